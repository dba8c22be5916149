"""Who calls: from bearer tokens and certificates to clients, each of whom sees only its own.

The clients file, YAML:

    clients:
      build-farm:
        tokens: ["sha256:5e88…"]              # of a token that `secateur token` made
      laptop:
        certificates: ["laptop.example.com"]  # a name in a certificate that the client CA signed

Tokens are long and random, so that a plain hash of one tells nothing. The file and the TLS files
are read again when they change; a new state that makes no sense is logged, and the old one stays.
"""

from __future__ import annotations

import contextvars
import hashlib
import logging
import pathlib
import secrets
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, TypeVar

import grpc
import grpc.aio
import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints

from secateur.service import logs
from secateur.service.calls import wrapped
from secateur.service.errors import CallError

log = logging.getLogger("secateur.service")

_T = TypeVar("_T")

_OPEN = "/grpc.health.v1.Health/"  # probes have no credentials
_CERTIFICATE_NAMES = ("x509_subject_alternative_name", "x509_common_name")

_client: contextvars.ContextVar[str] = contextvars.ContextVar("client", default="")


def caller() -> str:
    """The name of the client behind the running call; empty where nobody is asked."""
    return _client.get()


def new_token() -> tuple[str, str]:
    """A token, and what the clients file says of it."""
    token = f"sct_{secrets.token_urlsafe(32)}"
    return token, _hashed(token)


def _hashed(token: str) -> str:
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


# ---- files that may change ---------------------------------------------------------------------


class Reloaded(Generic[_T]):
    """What files say, read again when one of them has changed. Thread-safe.

    Args:
        paths: the files.
        load: their meaning; raises OSError or ValueError when there is none.

    Raises:
        OSError: now, as ValueError; later, they are logged and the last good state stays.
    """

    def __init__(self, paths: tuple[pathlib.Path, ...], load: Callable[[], _T]) -> None:
        self._paths = paths
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._state()
        self._value = load()

    @property
    def value(self) -> _T:
        """The last good state."""
        with self._lock:
            if (state := self._state()) != self._seen:
                self._seen = state
                names = ", ".join(map(str, self._paths))
                try:
                    self._value = self._load()
                    log.info("read again: %s", names)
                except (OSError, ValueError) as error:
                    log.error("what is in force stays, for %s cannot be used: %s", names, error)
            return self._value

    def _state(self) -> list[tuple[int, ...] | None]:
        state: list[tuple[int, ...] | None] = []
        for path in self._paths:
            try:
                found = path.stat()
                state.append((found.st_mtime_ns, found.st_size, found.st_ino))
            except OSError:
                state.append(None)
        return state


# ---- clients -----------------------------------------------------------------------------------

_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]
_Hash = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]


class _Client(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: tuple[_Hash, ...] = ()
    certificates: tuple[str, ...] = ()


class _Clients(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    clients: dict[_Name, _Client]


def load_clients(path: pathlib.Path) -> Mapping[str, str]:
    """Client by credential: the hash of a token, or `certificate:` and a name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a clients file, or two clients share a credential.
    """
    try:
        listed = _Clients.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, pydantic.ValidationError) as error:
        raise ValueError(f"{path} is no clients file: {error}") from None
    found: dict[str, str] = {}
    for name, client in listed.clients.items():
        for credential in (*client.tokens, *(f"certificate:{c}" for c in client.certificates)):
            if found.setdefault(credential, name) != name:
                text = f"{path}: {found[credential]} and {name} share {credential}"
                raise ValueError(text)
    return found


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls in whose client is known, and remembers who it is; see `caller`.

    Args:
        clients: by credential, see `load_clients`.
    """

    def __init__(self, clients: Reloaded[Mapping[str, str]]) -> None:
        self._clients = clients

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: Any
    ) -> Any:
        """Wraps the method's handler."""
        handler = await continuation(details)
        if handler is None or details.method.startswith(_OPEN):
            return handler
        return wrapped(handler, self._enter)

    def _enter(self, context: Any) -> None:
        client = self._client(context)
        _client.set(client)
        logs.add_ids(client=client)

    def _client(self, context: Any) -> str:
        """The client behind a call. Raises CallError UNAUTHENTICATED."""
        clients = self._clients.value
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                scheme, _, token = str(value).partition(" ")
                found = clients.get(_hashed(token.strip()))
                if scheme.lower() != "bearer" or found is None:
                    raise _refused("BAD_TOKEN", "the token is not one that this server knows")
                return found
        names = [
            name.decode(errors="replace")
            for kind in _CERTIFICATE_NAMES
            for name in context.auth_context().get(kind, ())
        ]
        for name in names:
            if f"certificate:{name}" in clients:
                return clients[f"certificate:{name}"]
        if names:
            text = f"the certificate of {', '.join(names)[:200]} belongs to no client"
            raise _refused("UNKNOWN_CERTIFICATE", text)
        raise _refused("NO_CREDENTIALS", "this server asks for a bearer token or a certificate")


def _refused(reason: str, text: str) -> CallError:
    return CallError(grpc.StatusCode.UNAUTHENTICATED, reason, text)


# ---- TLS ---------------------------------------------------------------------------------------


def load_tls(
    certificate: pathlib.Path, key: pathlib.Path, client_ca: pathlib.Path | None
) -> grpc.ServerCertificateConfiguration:
    """A server's certificate chain, its key, and the CAs whose clients may come.

    Raises:
        OSError: a file cannot be read. ValueError: they are no PEM, or do not belong together.
    """
    chain, secret = certificate.read_bytes(), key.read_bytes()
    trusted = client_ca.read_bytes() if client_ca else None
    try:  # gRPC would say nothing, and serve nobody
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        if client_ca:
            context.load_verify_locations(client_ca)
    except ssl.SSLError as error:
        text = f"{certificate}, {key} and {client_ca or 'no client CA'} are no TLS set: {error}"
        raise ValueError(text) from None
    return grpc.ssl_server_certificate_configuration([(secret, chain)], trusted)


def server_credentials(
    tls: Reloaded[grpc.ServerCertificateConfiguration], *, ask_clients: bool
) -> grpc.ServerCredentials:
    """Credentials of a port; each handshake uses the files as they are then."""
    last = tls.value

    def changed() -> Any:
        nonlocal last
        if (now := tls.value) is last:
            return None
        last = now
        return now

    return grpc.dynamic_ssl_server_credentials(last, changed, ask_clients)
