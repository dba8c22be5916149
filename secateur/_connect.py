"""How a client reaches a server: credentials of the connection and of each call."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass

import grpc

from secateur._address import is_loopback

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Tls:
    """A connection by TLS.

    Attributes:
        ca: PEM file of the CAs that may have signed the server's certificate; None: those that
            gRPC comes with.
        certificate: PEM file of the client's own certificate, for servers that ask for one.
        key: PEM file of its key.
    """

    ca: str | pathlib.Path | None = None
    certificate: str | pathlib.Path | None = None
    key: str | pathlib.Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel. Raises OSError where a file cannot be read, ValueError for half a pair."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a client's certificate and its key belong together")
        ca, key, certificate = (
            None if path is None else pathlib.Path(path).read_bytes()
            for path in (self.ca, self.key, self.certificate)
        )
        return grpc.ssl_channel_credentials(ca, key, certificate)


def headers(target: str, tls: Tls | None, token: str | None) -> Metadata:
    """Metadata of each call.

    Raises:
        ValueError: the token would travel readable.
    """
    if token is None:
        return ()
    local = target.startswith("unix:") or is_loopback(target.rpartition(":")[0])
    if tls is None and not local:
        raise ValueError(f"a token for {target} would travel readable: use TLS")
    return (("authorization", f"Bearer {token}"),)
