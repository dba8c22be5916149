"""`secateur serve`: its flags are the fields of `ServerConfig`, with nothing to keep in step."""

from __future__ import annotations

import inspect
import json
import pathlib
from collections.abc import Callable
from typing import Annotated, Any

import typer

from secateur import _malloc
from secateur.service.config import ServerConfig


def serve(
    config: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE.yaml", help="Read settings here; flags override them."),
    ] = None,
    check_config: Annotated[
        bool,
        typer.Option("--check-config", help="Print the settings as JSON, or what is wrong; stop."),
    ] = False,
    **flags: Any,
) -> None:
    """Serve. Prints one line, `listening on ADDRESS`, once calls are taken."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        settings = ServerConfig.load(config, given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    import asyncio

    from secateur.service import logs
    from secateur.service.server import check
    from secateur.service.server import serve as run

    if check_config:
        check(settings)
        typer.echo(json.dumps(settings.model_dump(mode="json"), indent=2))
        return
    logs.set_up(settings.log_level, settings.log_format)
    _malloc.keep_freed(4 << 20, 32 << 20)  # chunks of transfers
    asyncio.run(run(settings, lambda address: typer.echo(f"listening on {address}")))


def token() -> None:
    """Make a token for a client of a server, and the hash of it that the clients file holds."""
    from secateur.service.auth import new_token

    made, hashed = new_token()
    typer.echo(f"token: {made}\nhash: {hashed}")


def _with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces `**flags` by one optional flag for each setting."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[field.annotation | None, _option(name, field)],  # type: ignore[operator]
        )
        for name, field in ServerConfig.model_fields.items()
    ]
    command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in (*own, *flags)}
    return command


def _option(name: str, field: Any) -> Any:
    flag = "--" + name.removesuffix("_s").replace("_", "-")
    if field.annotation is bool:
        return typer.Option(f"{flag}/--no-{flag[2:]}", help=field.description)
    metavar = "SECONDS" if name.endswith("_s") else None
    return typer.Option(flag, metavar=metavar, help=_help(field), show_default=False)


def _help(field: Any) -> str:
    plain = field.default is not None and field.default_factory is None
    return f"{field.description} Default: {field.default}." if plain else field.description


_with_flags(serve)
