"""What is seen of a server from outside: metrics, traces, health while it stops, its log."""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from conftest import Server, frozen, wait_for
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.parser import text_string_to_metric_families

import secateur
from secateur import Recipe, _trace
from secateur.service import telemetry

HALF = Recipe(target={"macs": 0.5})
DEPLOY = pathlib.Path(__file__).parents[2] / "deploy"
STAGES = ("WAIT", "LOAD", "COUPLING", "CRITERIA", "PLANNING", "SURGERY", "VERIFY")


def said(server: Server, pattern: str) -> str:
    """What a line of the log says."""
    found = re.search(pattern, server.log.read_text())
    assert found is not None
    return found[1]


# ---- metrics -----------------------------------------------------------------------------------


def scrape(server: Server) -> Callable[..., float]:
    """Values of the metrics now, by name and labels; 0 for what is not there."""
    url = said(server, r"(http://\S+/metrics)")
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]

    def value(name: str, **labels: str) -> float:
        return sum(
            sample.value
            for sample in samples
            if sample.name == f"secateur_{name}" and labels.items() <= sample.labels.items()
        )

    return value


def test_metrics_count_what_happens(
    own_server: Callable[..., Server], cnn: pathlib.Path, wide: pathlib.Path
) -> None:
    server = own_server("--metrics-listen", "127.0.0.1:0")
    prune = "/secateur.v1.Pruning/Prune"
    with secateur.Client(server.address, timeout=60) as client:
        assert scrape(server)("jobs_running") == 0
        client.prune(cnn, HALF)
        client.prune(cnn, HALF)
        result = client.prune(wide, Recipe(target={"channels": 0.6}))
        with pytest.raises(secateur.Refused):
            client.prune(b"nonsense")
        worker = server.idle_worker()

        def fail() -> None:
            with pytest.raises(secateur.ServerError):
                client.inspect(cnn)

        with frozen(worker):
            thread = threading.Thread(target=fail)
            thread.start()
            wait_for(server.has_job)
            assert scrape(server)("jobs_running") == 1
            assert scrape(server)("calls_running") == 1
            os.kill(worker, signal.SIGKILL)
            thread.join()
    wait_for(lambda: scrape(server)("calls_running") == 0)  # a call is counted after its answer
    value = scrape(server)
    assert value("calls_total", method=prune, code="OK") == 3
    assert value("calls_total", method=prune, code="INVALID_ARGUMENT") == 1
    assert value("call_seconds_count", method=prune) == 4
    assert value("jobs_running") == value("jobs_waiting") == 0
    assert value("refusals_total", reason="INVALID_MODEL") == 1
    assert value("refusals_total", reason="WORKER_DIED") == 1
    assert value("worker_deaths_total", reason="WORKER_DIED") == 1
    assert value("worker_starts_total") >= 2
    assert value("cache_lookups_total", result="hit") == 1
    assert value("cache_lookups_total", result="miss") == 3
    assert value("blob_bytes_total", direction="received") == wide.stat().st_size
    assert value("blob_bytes_total", direction="sent") == len(result.model)
    assert value("stored_bytes") >= wide.stat().st_size
    for end, count in (("done", 2), ("refused", 1)):
        assert value("job_seconds_count", call="prune", end=end) == count
    assert value("job_seconds_count", call="inspect", end="failed") == 1
    for stage in STAGES:
        assert value("stage_seconds_count", stage=stage) >= 2, stage
    inside = value("stage_seconds_sum")
    assert inside <= value("job_seconds_sum") < inside + 1.0
    assert value("build_info", version=secateur.__version__) == 1


def test_the_dashboard_shows_each_metric_and_no_other() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    shown = set(re.findall(r"\b(?:secateur|process)_\w+", " ".join(expressions)))
    known, families = set(), {}
    for family in telemetry.REGISTRY.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count"]}.get(
            family.type, [""]
        )
        for suffix in suffixes:
            known.add(family.name + suffix)
            families[family.name + suffix] = family.name
    assert shown <= known
    ours = {family for family in families.values() if family.startswith("secateur_")}
    assert {families[name] for name in shown if name.startswith("secateur_")} == ours
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


# ---- traces ------------------------------------------------------------------------------------


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Spans that servers started from now on send, as OpenTelemetry's protocol has them."""
    spans: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{listener.server_address[1]}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield spans
    listener.shutdown()
    listener.server_close()
    thread.join()


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """This program's own, as whoever uses the client may have one."""
    provider = TracerProvider()
    monkeypatch.setattr(_trace, "_tracer", lambda: provider.get_tracer("secateur"))
    yield provider.get_tracer("program")
    provider.shutdown()


def test_a_trace_leads_from_the_client_to_the_stages(
    own_server: Callable[..., Server], collector: list[Any], tracer: Any, cnn: pathlib.Path
) -> None:
    server = own_server()
    with (
        tracer.start_as_current_span("program") as program,
        secateur.Client(server.address, timeout=60) as client,
    ):
        client.prune(cnn, HALF)
        client.wait_operation(client.start_prune(cnn, Recipe(target={"macs": 0.7})))
        with pytest.raises(secateur.Refused):
            client.inspect(b"nonsense")
    assert server.stop() == 0

    of_program = f"{program.get_span_context().trace_id:032x}"
    spans = [span for span in collector if span.trace_id.hex() == of_program]
    names = {span.span_id: span.name for span in spans}

    def under(parent: str) -> set[str]:
        return {span.name for span in spans if names.get(span.parent_span_id) == parent}

    assert under("secateur.v1.Pruning/Prune") == {"job prune"}
    assert under("secateur.v1.Pruning/StartPrune") == {"operation"}
    assert under("operation") == {"job prune"}
    assert under("job prune") >= {f"stage {stage}" for stage in STAGES}
    (refused,) = (span for span in spans if span.name == "secateur.v1.Pruning/Inspect")
    assert refused.status.code == trace.StatusCode.ERROR.value
    assert refused.status.message == "INVALID_ARGUMENT"
    operation = next(span for span in spans if span.name == "operation")
    assert "secateur.operation" in {attribute.key for attribute in operation.attributes}
    for span in spans:
        assert span.start_time_unix_nano <= span.end_time_unix_nano


def test_all_works_without_opentelemetry(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, cnn: pathlib.Path
) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    package = pathlib.Path(secateur.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{package}")
    running = Server(tmp_path)
    try:
        code = "import sys, secateur; secateur.Client(sys.argv[1]).inspect(sys.argv[2])"
        subprocess.run([sys.executable, "-c", code, running.address, cnn], check=True, timeout=60)
        assert "for want of the extra secateur[otel]" in running.log.read_text()
    finally:
        running.close()


# ---- health and log ----------------------------------------------------------------------------


def test_health_says_not_serving_before_calls_end(
    own_server: Callable[..., Server], cnn: pathlib.Path
) -> None:
    server = own_server("--health-listen", "127.0.0.1:0")
    worker = server.idle_worker()
    ask = health_pb2.HealthCheckRequest(service="google.longrunning.Operations")
    with (
        grpc.insecure_channel(said(server, r"health checks on (\S+)")) as channel,
        secateur.Client(server.address, timeout=60) as client,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(ask)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(client.inspect(cnn)))
        with frozen(worker):
            thread.start()
            wait_for(server.has_job)
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert stub.Check(ask).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not found
        thread.join()
        assert found
    assert server.process.wait(timeout=20) == 0


def test_a_lame_duck_takes_calls_until_a_second_signal(
    own_server: Callable[..., Server], cnn: pathlib.Path
) -> None:
    server = own_server("--lame-duck", "60")
    with secateur.Client(server.address, timeout=30) as client:
        client.inspect(cnn)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not client.health())
        assert client.inspect(cnn).groups
    assert server.stop() == 0


def test_each_line_of_the_log_is_json_and_says_what_it_belongs_to(
    own_server: Callable[..., Server], cnn: pathlib.Path
) -> None:
    server = own_server("--log-format", "json")
    with secateur.Client(server.address, timeout=60) as client:
        operation = client.wait_operation(client.start_prune(cnn, HALF))
        with pytest.raises(secateur.Refused):
            client.prune(b"nonsense")
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    calls = [line for line in lines if line["message"] == "call ended"]
    assert {"StartPrune", "Prune"} <= {line["method"].rpartition("/")[2] for line in calls}
    assert all(re.fullmatch("[0-9a-f]{32}", line["request"]) for line in calls)
    name = operation.name.rpartition("/")[2]
    assert {line["message"] for line in lines if line.get("operation") == name} >= {
        "operation started",
        "operation ended",
    }
