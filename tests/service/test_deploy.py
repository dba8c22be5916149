"""The files in deploy/: what they say to the server is what it understands, and they confine it."""

from __future__ import annotations

import configparser
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer.testing
import yaml

from secateur._flags import Connection
from secateur.cli import app
from secateur.service.auth import load_clients
from secateur.service.config import ServerConfig

DEPLOY = pathlib.Path(__file__).parents[2] / "deploy"
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PORTS = {"grpc": 50051, "health": 50052, "metrics": 9464}


def settings(arguments: list[str], files: dict[str, str]) -> ServerConfig:
    """What `secateur serve` makes of arguments; `files` are those that --config may name."""
    command, *flags = arguments
    assert command == "serve"
    config = [flag for flag in flags if flag.startswith("--config=")]
    if config:
        assert flags == config
        return ServerConfig.model_validate(yaml.safe_load(files[config[0].partition("=")[2]]))
    done = typer.testing.CliRunner().invoke(app, ["serve", *flags, "--check-config"])
    assert done.exit_code == 0, done.output
    return ServerConfig.model_validate_json(done.stdout)


GIB = 1 << 30


def fits(config: ServerConfig, memory: str) -> bool:
    """Whether jobs at their limits, and a server beside them, take no more than `memory`."""
    assert memory.lower().rstrip("i").endswith("g")
    return config.workers * config.job_memory_bytes + GIB <= int(memory.rstrip("GgIi")) * GIB


def port(address: str | None) -> int:
    assert address is not None
    return int(address.rpartition(":")[2])


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """(file, pod, files that its config maps hold) of each workload."""
    for path in KUBERNETES:
        documents = list(yaml.safe_load_all(path.read_text()))
        files = {
            f"/etc/secateur/{name}": content
            for document in documents
            if document["kind"] == "ConfigMap"
            for name, content in document["data"].items()
        }
        for document in documents:
            if document["kind"] in ("Deployment", "StatefulSet"):
                spec = document["spec"]
                assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
                pod = spec["template"]["spec"]
                claims = [claim["metadata"] for claim in spec.get("volumeClaimTemplates", ())]
                pod["volumes"] += claims
                yield path.name, pod, files


PODS = list(pods())


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def test_each_kind_of_pod_is_here() -> None:
    assert [name for name, _, _ in PODS] == ["service.yaml", "sidecar.yaml"]


@pytest.mark.parametrize(("name", "pod", "files"), PODS, ids=[name for name, _, _ in PODS])
class TestKubernetes:
    def test_pods_are_confined(self, name: str, pod: dict[str, Any], files: Any) -> None:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            allowed = {**pod["securityContext"], **container["securityContext"]}
            assert allowed["runAsUser"] == 10001  # as in the Dockerfile
            assert allowed["allowPrivilegeEscalation"] is False
            assert allowed["readOnlyRootFilesystem"] is True
            assert allowed["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            volumes = {volume["name"] for volume in pod["volumes"]}
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes

    def test_the_server_understands_its_settings(
        self, name: str, pod: dict[str, Any], files: dict[str, str]
    ) -> None:
        (server,) = (c for c in containers(pod) if c["name"] == "secateur")
        config = settings(server["args"], files)
        mounts = {mount["mountPath"] for mount in server["volumeMounts"]}
        assert str(config.folder) in mounts
        for path in (config.tls_certificate, config.tls_key, config.clients):
            assert path is None or str(path.parent) in mounts
        ports = {item["name"]: item["containerPort"] for item in server["ports"]}
        assert ports["health"] == port(config.health_listen)
        assert ports["metrics"] == port(config.metrics_listen)
        assert ports.get("grpc", 50051) == port(config.listen)
        assert config.lame_duck_s + config.grace_s < pod["terminationGracePeriodSeconds"]
        assert fits(config, server["resources"]["limits"]["memory"])
        public = config.listen.startswith("0.0.0.0")
        assert public == bool(config.tls_certificate and config.clients)

    def test_probes_ask_what_is_there(
        self, name: str, pod: dict[str, Any], files: dict[str, str]
    ) -> None:
        (server,) = (c for c in containers(pod) if c["name"] == "secateur")
        config = settings(server["args"], files)
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = server[kind]["grpc"]
            assert probe["port"] == port(config.health_listen)
            assert probe.get("service", "") in ("", "secateur.v1.Pruning")

    def test_variables_are_flags(self, name: str, pod: dict[str, Any], files: Any) -> None:
        known = {f"SECATEUR_{field.upper()}" for field in Connection.__dataclass_fields__}
        for container in containers(pod):
            assert {item["name"] for item in container.get("env", ())} <= known


def test_the_service_leads_to_the_pod() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "service.yaml").read_text()))
    (service,) = (document for document in documents if document["kind"] == "Service")
    (policy,) = (document for document in documents if document["kind"] == "NetworkPolicy")
    (workload,) = (document for document in documents if document["kind"] == "StatefulSet")
    template = workload["spec"]["template"]
    assert service["spec"]["selector"] == template["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == template["metadata"]["labels"]
    named = {
        item["name"]: item["containerPort"] for item in template["spec"]["containers"][0]["ports"]
    }
    assert named == PORTS
    for item in service["spec"]["ports"]:
        assert item["port"] == named[item["targetPort"]]
    assert {item["port"] for item in policy["spec"]["ingress"][0]["ports"]} == set(named.values())


def test_compose() -> None:
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["secateur"]
    config = settings(service["command"], {})
    assert config.insecure_public
    for published in service["ports"]:
        host, outside, inside = published.split(":")
        assert host == "127.0.0.1"
        assert outside == inside
    inside_ports = {int(published.rpartition(":")[2]) for published in service["ports"]}
    assert inside_ports == {port(config.listen), port(config.metrics_listen)}
    assert service["volumes"] == [f"data:{config.folder}"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert {"cpus", "mem_limit", "pids_limit"} <= service.keys()
    assert fits(config, service["mem_limit"])
    assert config.grace_s < float(service["stop_grace_period"].removesuffix("s"))


def test_systemd() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "secateur.service")
    service = unit["Service"]
    program, *arguments = shlex.split(service["ExecStart"])
    assert program == "/opt/secateur/bin/secateur"
    assert shlex.split(service["ExecStartPre"]) == [program, *arguments, "--check-config"]
    assert arguments == ["serve", "--config", "/etc/secateur/server.yaml"]
    config = ServerConfig.model_validate(yaml.safe_load((DEPLOY / "server.yaml").read_text()))
    assert config.grace_s < float(service["TimeoutStopSec"])
    assert config.folder == pathlib.Path("/var/lib", service["StateDirectory"])
    assert fits(config, service["MemoryMax"])
    # without these, workers could not be shut in
    assert set(service["RestrictNamespaces"].split()) >= {"user", "net", "ipc"}


def test_the_guide_names_flags_that_there_are_with_their_defaults() -> None:
    text = (DEPLOY.parent / "docs" / "operating.md").read_text()
    shown = typer.testing.CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"})
    client = {"--server", "--tls-ca", "--token-file"}
    for flag in set(re.findall(r"(--[a-z][a-z-]+)", text)) - client:
        assert f"{flag} " in shown.stdout, flag
    rows = re.findall(r"^\|[^|]+\| `--([a-z-]+)` ([\d,]+) ?(\w*) \|", text, re.MULTILINE)
    assert len(rows) > 10
    unit = {"": 1, "s": 1, "h": 3600, "days": 86400, "GiB": GIB}
    for flag, number, scale in rows:
        name = flag.replace("-", "_")
        field = ServerConfig.model_fields.get(name) or ServerConfig.model_fields[f"{name}_s"]
        assert field.default == int(number.replace(",", "")) * unit[scale], flag


def test_the_example_of_clients_is_one() -> None:
    assert set(load_clients(DEPLOY / "clients.yaml").values()) == {"build-farm", "laptop"}
