"""Builds the image and runs it with the very lines that README.md shows, then prunes through it.

    make container-test

The lines are taken from README.md and run as they are, apart from the program's name where there is
podman instead of Docker, and the port where 50051 is taken. Checked:

- the server becomes healthy, by gRPC from outside and by the image's own health check;
- a prune through it gives the bytes that the same prune gives in this process;
- it does not run as root, has no privileges, and its root file system is read-only;
- its workers are shut in further than the container is;
- it ends by itself when it is told to stop, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import secateur

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "digits" / "digits_cnn.onnx"
RECIPE = secateur.Recipe(target={"macs": 0.5}, repair=False)
PORT = 50051  # in README.md's line
START_SECONDS = 60
STOP_SECONDS = 30

# Runs inside: what the first process and a worker are, and what can be written where.
INSIDE = """
import json, os, pathlib, tempfile
def status_of(pid):
    return dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
status = status_of(1)
workers = [path.parent.name for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")
           if b"secateur.service.worker" in path.read_bytes()]
worker = status_of(workers[0])
def writable(folder):
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
print(json.dumps({
    "users": status["Uid"].split(),
    "capabilities": status["CapEff"].strip(),
    "worker_filters": int(worker["Seccomp_filters"]) - int(status["Seccomp_filters"]),
    "worker_may_gain_privileges": worker["NoNewPrivs"].strip() != "1",
    "root_is_read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
    "writable": [path for path in ("/", "/opt/secateur", "/tmp", "/var/lib/secateur")
                 if writable(path)],
}))
"""


class CheckError(Exception):
    """The container is not what it must be; the text says how."""


@dataclass(frozen=True)
class Engine:
    """A container engine: Docker, or podman where there is none.

    Attributes:
        program: with the options that come before a subcommand.
        build: options of `build` that README.md's line does not have.
        run: options of `run` that README.md's line does not have.
    """

    program: tuple[str, ...]
    build: tuple[str, ...] = ()
    run: tuple[str, ...] = ()

    def __call__(self, *arguments: str) -> str:
        """Output of a command. Raises CheckError with what it says when it fails."""
        command = [*self.program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CheckError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout}")
        return done.stdout.strip()


DOCKER = Engine(("docker",))
# runc, because crun refuses some kernels; small limits, because podman may set its own no higher
# than its own parent allows; --format, because the OCI image format has no HEALTHCHECK
PODMAN = Engine(
    ("podman", "--runtime", "runc"),
    build=("--isolation", "chroot", "--format", "docker"),
    run=("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
)


def main() -> int:
    """Runs the check and returns an exit code."""
    parser = argparse.ArgumentParser(description="Build, run and use the container image.")
    parser.add_argument("--engine", choices=("docker", "podman"), help="default: what is there")
    engines = {"docker": DOCKER, "podman": PODMAN}
    name = parser.parse_args().engine
    try:
        names = [name] if name else [name for name in engines if works(name)]
        if not names:
            raise CheckError("neither Docker nor podman works here; see deploy/README.md")
        check(engines[names[0]])
    except (CheckError, secateur.SecateurError) as error:
        print(f"container: FAILED: {error}", file=sys.stderr)
        return 1
    return 0


def check(engine: Engine) -> None:
    """Builds, runs, asks, stops."""
    build_line, run_line = readme_lines()
    if engine is PODMAN:
        subprocess.run([ROOT / "deploy" / "base_image.sh"], check=True)
    image = shlex.split(build_line)[shlex.split(build_line).index("-t") + 1]
    start = time.monotonic()
    build(engine, build_line)
    described = json.loads(engine("image", "inspect", image))[0]
    say(f"built in {since(start)}: {image}, {described['Size'] / 1e6:.0f} MB with its base")

    port = free_port()
    run_line = run_line.replace(f"127.0.0.1:{PORT}:", f"127.0.0.1:{port}:")
    with (
        running(engine, run_line) as (container, started),
        secateur.Client(f"127.0.0.1:{port}") as client,
    ):
        wait_until_healthy(client)
        say(f"healthy by gRPC {since(started)} after the start")
        probe = described_health_check(described)
        start = time.monotonic()
        engine("exec", container, *probe)
        say(f"healthy by its own check `{shlex.join(probe)}` in {since(start)}")
        check_confinement(json.loads(engine("exec", container, "python3", "-c", INSIDE)))

        start = time.monotonic()
        there = client.prune(MODEL, RECIPE, timeout=120)
        say(f"pruned {MODEL.name} through it in {since(start)}: {facts(there.model)}")
        here = secateur.prune(MODEL, RECIPE)
        if here.model != there.model:
            raise CheckError(f"in this process the same prune gives {facts(here.model)}")
        say("the same prune in this process gives the same bytes")

        for line in engine("logs", container).splitlines():
            if "not fully shut in" in line:
                say(line)
        start = time.monotonic()
        engine("stop", "-t", str(STOP_SECONDS), container)
        say(f"stopped in {since(start)}")
    say("passed")


def works(program: str) -> bool:
    """Whether an engine is here and, as Docker's program alone is not enough, can be reached."""
    if shutil.which(program) is None:
        return False
    return subprocess.run([program, "info"], capture_output=True, check=False).returncode == 0


def readme_lines() -> tuple[str, str]:
    """The first `docker build` line and the first `docker run` line that README.md shows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for command in ("build", "run"):
        match = re.search(rf"^ *(docker {command} .*)$", text, re.MULTILINE)
        if match is None:
            raise CheckError(f"README.md shows no line that begins with `docker {command}`")
        found.append(match[1].strip())
    return found[0], found[1]


def command(engine: Engine, line: str, extra: tuple[str, ...]) -> list[str]:
    """README.md's line with the engine's name and the options that this machine needs."""
    _, subcommand, *arguments = shlex.split(line)
    return [*engine.program, subcommand, *extra, *arguments]


def build(engine: Engine, line: str) -> None:
    """Builds the image; what the build prints is shown only when it fails."""
    say(line)
    done = subprocess.run(
        command(engine, line, engine.build),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        print(done.stdout)
        raise CheckError("the image could not be built")


@contextlib.contextmanager
def running(engine: Engine, line: str) -> Iterator[tuple[str, float]]:
    """The id of a container started with a line, and when; removes it, and checks how it ended."""
    with tempfile.TemporaryDirectory(prefix="secateur-container-") as name:
        id_file, log = pathlib.Path(name) / "id", pathlib.Path(name) / "log"
        say(line)
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                command(engine, line, (*engine.run, "--cidfile", str(id_file))),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            try:
                container = wait_for_id(process, id_file)
                yield container, started
                code = process.wait(STOP_SECONDS)
            finally:
                if process.poll() is None:
                    if id_file.exists():
                        engine("rm", "--force", "--volumes", id_file.read_text())
                    process.kill()
                    process.wait()
            if code != 0:
                raise CheckError(f"the server ended with exit code {code} when told to stop")
            if container in engine("ps", "--all", "--quiet", "--no-trunc").split():
                raise CheckError("the container is still there after its end")
        except BaseException:
            print(log.read_text(), file=sys.stderr)
            raise


def wait_for_id(process: subprocess.Popen[bytes], id_file: pathlib.Path) -> str:
    """The container's id, once the engine has made it."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if id_file.exists() and (text := id_file.read_text().strip()):
            return text
        time.sleep(0.05)
    raise CheckError("the container did not start")


def wait_until_healthy(client: secateur.Client) -> None:
    """Asks the gRPC health service until it says yes."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            if client.health(timeout=1):
                return
        except secateur.SecateurError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def described_health_check(image: dict[str, Any]) -> list[str]:
    """The command of the image's HEALTHCHECK; Docker and podman keep it in different places."""
    found = image.get("Healthcheck") or image["Config"].get("Healthcheck")
    if not found or found["Test"][0] != "CMD":
        raise CheckError("the image has no HEALTHCHECK")
    return list(found["Test"][1:])


def check_confinement(found: dict[str, Any]) -> None:
    """Compares what the container's first process may do with what it needs."""
    say(
        f"its process: user {found['users'][0]}, capabilities {found['capabilities']}, "
        f"root read-only: {found['root_is_read_only']}, can write to {found['writable']}"
    )
    say(
        f"its worker: {found['worker_filters']} more system call filter, may gain privileges: "
        f"{found['worker_may_gain_privileges']}"
    )
    if found["worker_filters"] < 1 or found["worker_may_gain_privileges"]:
        raise CheckError("its worker is not shut in")
    if "0" in found["users"]:
        raise CheckError("it runs as root")
    if int(found["capabilities"], 16) != 0:
        raise CheckError("it has privileges")
    if not found["root_is_read_only"]:
        raise CheckError("its root file system can be written")
    if found["writable"] != ["/tmp", "/var/lib/secateur"]:
        raise CheckError("it must be able to write to /tmp and /var/lib/secateur, and only there")


def free_port() -> int:
    """README.md's port, or another one where that is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            probe.bind(("127.0.0.1", 0))
            say(f"port {PORT} is taken; using {probe.getsockname()[1]}")
        return int(probe.getsockname()[1])


def facts(model: bytes) -> str:
    """What shows whether two models are the same."""
    return f"{len(model):,} bytes, SHA-256 {hashlib.sha256(model).hexdigest()}"


def since(start: float) -> str:
    """Time since `start`, for people."""
    return f"{time.monotonic() - start:.1f} s"


def say(text: str) -> None:
    """Prints at once: programs that run below print too."""
    print(f"container: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
