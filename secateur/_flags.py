"""Flags of the command line that say which server to use, for every command that can use one."""

from __future__ import annotations

import functools
import inspect
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from secateur.client import Client


def _option(variable: str, metavar: str | None, text: str) -> Any:
    return typer.Option(
        envvar=f"SECATEUR_{variable}", metavar=metavar, help=text, rich_help_panel="Server"
    )


@dataclass(frozen=True, slots=True)
class Connection:
    """What the flags of these names say."""

    server: Annotated[
        str | None,
        _option("SERVER", "HOST:PORT", "Let this server do the work, instead of this process."),
    ] = None
    tls: Annotated[bool | None, _option("TLS", None, "Connect by TLS.")] = None
    tls_ca: Annotated[
        pathlib.Path | None,
        _option("TLS_CA", "FILE", "Connect by TLS; CAs of the server's certificate."),
    ] = None
    tls_cert: Annotated[
        pathlib.Path | None,
        _option("TLS_CERT", "FILE", "Your certificate, where the server asks for one."),
    ] = None
    tls_key: Annotated[pathlib.Path | None, _option("TLS_KEY", "FILE", "Its key.")] = None
    token_file: Annotated[
        pathlib.Path | None,
        _option("TOKEN_FILE", "FILE", "Holds the token that says who you are."),
    ] = None

    def client(self) -> Client:
        """A client of the server. Raises typer.BadParameter."""
        from secateur import Client, Tls

        if self.server is None:
            raise typer.BadParameter("say which server", param_hint="--server")
        secure = self.tls or self.tls_ca or self.tls_cert or self.tls_key
        tls = Tls(self.tls_ca, self.tls_cert, self.tls_key) if secure else None
        try:
            token = self.token_file.read_text("ascii").strip() if self.token_file else None
            return Client(self.server, tls=tls, token=token)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(str(error)) from None


NONE = Connection()


def connecting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces a command's parameter `connection` by the flags that make one."""
    own = inspect.signature(command, eval_str=True).parameters
    flags = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in inspect.get_annotations(Connection, eval_str=True).items()
    ]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        connection = Connection(**{flag.name: given.pop(flag.name) for flag in flags})
        return command(connection=connection, **given)

    shown = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()]
    place = [p.name for p in shown].index("connection")
    shown[place : place + 1] = flags
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return run
