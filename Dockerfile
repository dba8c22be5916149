# Secateur as a server, or with other arguments any other of its commands.
#
#   docker build -t secateur .
#   docker run --rm --read-only --tmpfs /tmp -p 127.0.0.1:50051:50051 secateur

FROM python:3.11-slim AS build
WORKDIR /build
# no pip inside: the environment goes into the image whole
RUN python3 -m venv --without-pip /opt/secateur
# dependencies in a layer of their own, so that a change of code does not fetch them again
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
      extras = [p["optional-dependencies"][name] for name in ("otel", "store")]; \
      print(*p["dependencies"], *sum(extras, []), sep="\n")' \
      > requirements.txt \
 && pip --python /opt/secateur/bin/python install --no-cache-dir --requirement requirements.txt
COPY README.md LICENSE ./
COPY secateur secateur
RUN pip wheel --no-cache-dir --no-deps --wheel-dir dist . \
 && pip --python /opt/secateur/bin/python install --no-cache-dir --no-deps dist/secateur-*.whl
# other packages' tests, 80 MB; NumPy's stay: numpy.testing imports from them, and SciPy that
RUN cd /opt/secateur/lib/python3.11/site-packages \
 && rm -rf onnx/backend/test \
 && find scipy sympy -type d -name tests -prune -exec rm -rf {} +

FROM python:3.11-slim
ARG VERSION=dev
LABEL org.opencontainers.image.title="secateur" \
      org.opencontainers.image.description="Structured pruning of trained ONNX models, by gRPC and by command line" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# The group is root's, and may write: clusters that choose a user of their own keep group 0.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /var/lib/secateur \
      --shell /usr/sbin/nologin secateur \
 && install -d -o 10001 -g 0 -m 0770 /var/lib/secateur
COPY --from=build /opt/secateur /opt/secateur
# ONNX Runtime reports its use, model names included, to its maker unless told not to
ENV PATH=/opt/secateur/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# numeric, so that Kubernetes can see that it is not root
USER 10001:0
WORKDIR /var/lib/secateur
# Blobs and jobs. A volume, so that it can be written though the root file system cannot.
VOLUME /var/lib/secateur
EXPOSE 50051
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import sys, secateur; sys.exit(not secateur.Client('127.0.0.1:50051').health(timeout=4))"]
ENTRYPOINT ["secateur"]
# A container's own network is the wall around it: publish the port on loopback or on a closed network.
CMD ["serve", "--listen", "0.0.0.0:50051", "--insecure-public", "--folder", "/var/lib/secateur"]
