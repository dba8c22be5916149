"""What an operator may set: one definition for the YAML file, the flags and the code."""

from __future__ import annotations

import enum
import os
import pathlib
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from secateur._address import is_loopback


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LogFormat(enum.StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class ServerConfig(BaseModel):
    """Settings of one server. Each is a key of the YAML file and a flag of `secateur serve`.

    Units are in the names: `_s` seconds, `_bytes` bytes. The flag of a field is its name with
    hyphens, without `_s`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    listen: str = Field(
        "127.0.0.1:50051", description="HOST:PORT; port 0 takes any free one; or unix:PATH."
    )
    workers: int = Field(
        default_factory=_cores, ge=1, description="Jobs that run at once; default: the cores."
    )
    folder: pathlib.Path | None = Field(
        None, description="Where blobs and jobs lie; default: a temporary one."
    )
    insecure_public: bool = Field(
        False,
        description="Allow an address that other machines reach without TLS and clients: for "
        "containers, whose own network is the wall.",
    )
    tls_certificate: pathlib.Path | None = Field(
        None, description="PEM file: this server's certificate and what leads to its CA."
    )
    tls_key: pathlib.Path | None = Field(None, description="PEM file: the certificate's key.")
    tls_client_ca: pathlib.Path | None = Field(
        None, description="PEM file: CAs; only clients with a certificate of theirs may connect."
    )
    clients: pathlib.Path | None = Field(
        None,
        description="YAML file: who may call, by token or by certificate; each sees only what "
        "is its own. See docs/operating.md.",
    )
    health_listen: str | None = Field(
        None,
        description="HOST:PORT that answers health checks and nothing else, without TLS: for "
        "probes that know neither.",
    )
    metrics_listen: str | None = Field(
        None, description="HOST:PORT that answers GET /metrics, for Prometheus."
    )
    lame_duck_s: float = Field(
        0.0,
        ge=0,
        description="Time at a stop during which health says NOT_SERVING and calls are still "
        "taken: for balancers, which learn of it late.",
    )
    grace_s: float = Field(10.0, ge=0, description="Time that running calls get at a stop.")
    max_queued: int = Field(
        100, ge=0, description="Jobs that may wait for a worker; more are told when to come again."
    )
    max_jobs_per_client: int = Field(
        50, ge=1, description="Jobs that one client may have, running and waiting."
    )
    max_calls: int = Field(
        1000, ge=1, description="Calls of any kind at once, those that only wait included."
    )
    job_s: float = Field(
        3600.0, gt=0, description="Time that a job may take; then its worker is killed."
    )
    job_memory_bytes: int = Field(
        8 << 30, ge=1, description="Memory that a job may take; then its worker is killed."
    )
    job_disk_bytes: int = Field(
        16 << 30, ge=1, description="Disk that a job may fill; then its worker is killed."
    )
    max_model_bytes: int = Field(
        4 << 30, ge=1, description="Largest model taken, with its external data."
    )
    max_nodes: int = Field(
        1_000_000, ge=1, description="Most nodes of a model, its functions inlined."
    )
    max_calibration_bytes: int = Field(
        1 << 30,
        ge=1,
        description="Of all calibration files of a request; of labels as well.",
    )
    max_decompressed_bytes: int = Field(
        4 << 30,
        ge=1,
        description="Of the arrays in those files.",
    )
    max_blob_bytes: int = Field(4 << 30, ge=1, description="Largest blob taken.")
    max_stored_bytes: int = Field(
        64 << 30,
        ge=1,
        description="Of all blobs and uploads together; above it, the longest unused go.",
    )
    blob_ttl_s: float = Field(
        3600.0,
        gt=0,
        description="Age at which a blob is removed that nobody used and no operation needs.",
    )
    operation_ttl_s: float = Field(
        7 * 86400.0, gt=0, description="Time for which an operation that ended can be asked for."
    )
    max_attempts: int = Field(
        3,
        ge=1,
        description="Times that an operation may run: again when a server or a worker died over "
        "it, which may be its own doing.",
    )
    cache: bool = Field(
        True, description="Answer a prune that was done before with its result from then."
    )
    object_store: str | None = Field(
        None,
        description="URL of an object store where blobs lie too: s3://BUCKET/PREFIX, gs://…, "
        "az://… or file:///FOLDER.",
    )
    share_operations: bool = Field(
        False,
        description="Keep operations in the object store, with all servers that are told so: any "
        "of them answers for any operation, and goes on with those of one that died.",
    )
    lease_s: float = Field(
        15.0,
        ge=1,
        description="Time without a sign of life of a server after which others run what it ran, "
        "where operations are shared.",
    )
    jobs_per_worker: int = Field(
        1000,
        ge=1,
        description="Jobs after which a worker process is replaced. 1 isolates jobs from one "
        "another, for a second of imports each.",
    )
    require_jail: bool = Field(
        False,
        description="Do not start where this system cannot shut workers in fully; else warn.",
    )
    log_level: str = Field("info", description="debug, info, warning or error.")
    log_format: LogFormat = Field(LogFormat.TEXT, description="text or json, a line per event.")

    @classmethod
    def load(cls, file: pathlib.Path | None, flags: dict[str, Any]) -> ServerConfig:
        """The settings of a YAML file, each of which a flag overrides; then checked.

        Raises:
            ValueError: a setting is unknown, makes no sense or is not safe; with a sentence that
                says which and what to do.
        """
        try:
            config = cls.model_validate({**(_read(file) if file else {}), **flags})
        except pydantic.ValidationError as error:
            raise ValueError("; ".join(_sentence(item) for item in error.errors())) from None
        config.check()
        return config

    def check(self) -> None:
        """Refuses settings that do not go together.

        Raises:
            ValueError: with a sentence that says which and what to do.
        """
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ValueError(f"log_level must be debug, info, warning or error: {self.log_level!r}")
        self._check_tls()
        if self.share_operations and not self.object_store:
            raise ValueError("share_operations needs object_store, which is where they are shared")
        for name in ("health_listen", "metrics_listen"):
            if (address := getattr(self, name)) is not None:
                _host(address, name)
        if self.insecure_public or self.listen.startswith("unix:"):
            return
        if is_loopback(_host(self.listen, "listen")) or (self.tls_certificate and self.clients):
            return
        raise ValueError(
            f"{self.listen} can be reached from other machines: listen on 127.0.0.1, or give "
            "--tls-certificate, --tls-key and --clients, or say --insecure-public if the network "
            "around it is closed"
        )

    def _check_tls(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        if self.tls_client_ca and not (self.tls_certificate and self.clients):
            raise ValueError("tls_client_ca needs tls_certificate, tls_key and clients beside it")
        for name in ("tls_certificate", "tls_key", "tls_client_ca", "clients"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{name}: {path} is not a file")


def _host(address: str, setting: str) -> str:
    """The host of `HOST:PORT`. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{setting} must be HOST:PORT, not {address!r}")
    return host


def _read(file: pathlib.Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold `key: value` lines, not a {type(fields).__name__}")
    return fields


def _sentence(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    return f"{name}: {error['msg']}, not {error['input']!r}"
