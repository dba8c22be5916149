"""The command line.

Standard output holds the answer (with `--json`, one JSON document, also for errors); progress and
error texts go to standard error. Exit codes:

    0 done   2 wrong usage   3 refused   4 the result failed verification (nothing written)
    5 server unreachable or failing   130 interrupted
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

import secateur
from secateur import _malloc, _show
from secateur._flags import NONE, Connection, connecting
from secateur.errors import Cancelled, SecateurError, ServerError
from secateur.plan import Plan
from secateur.recipe import Recipe
from secateur.result import write_atomically
from secateur.service.command import serve, token

if TYPE_CHECKING:
    from secateur.result import Result

_P = ParamSpec("_P")
_T = TypeVar("_T")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Removes what a trained ONNX model does not need, and proves that the rest runs.",
)


def main() -> None:
    """The program `secateur`."""
    _malloc.keep_freed()
    app(prog_name="secateur")


# ---- what the commands share -------------------------------------------------------------------

Model = Annotated[pathlib.Path, typer.Argument(metavar="MODEL", help="The ONNX model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Calibration = Annotated[
    pathlib.Path | None,
    typer.Option(metavar="PATH", help="An .npz, or a folder of them; no labels needed."),
]
Labels = Annotated[
    pathlib.Path | None,
    typer.Option(
        metavar="PATH",
        help="Class numbers of the calibration samples, or with samples of their own: an .npz, or "
        "a folder of them. Original and result are scored by them; nothing else reads them.",
    ),
]
RecipeFile = Annotated[
    pathlib.Path | None,
    typer.Option(metavar="FILE.yaml", help="Read the recipe here; flags override its fields."),
]
Out = Annotated[
    pathlib.Path | None,
    typer.Option("-o", "--out", metavar="OUT", help="Where the pruned model goes."),
]
SavePlan = Annotated[
    pathlib.Path | None, typer.Option(metavar="FILE.json", help="Save what was decided.")
]
ReportFile = Annotated[
    pathlib.Path | None, typer.Option(metavar="FILE.json|.html", help="Save the evidence.")
]
Granularity = Annotated[
    str | None,
    typer.Option(
        metavar="KIND,…",
        help="What may go: channel, head or head_dim, expert, layer, rank, weight.",
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Nodes or weights whose channels must all stay."),
]


def _reported(command: Callable[_P, _T]) -> Callable[_P, _T]:
    """Shows what the package raises on purpose, and ends with its exit code."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        as_json = bool(kwargs.get("as_json"))
        try:
            return command(*args, **kwargs)
        except SecateurError as error:
            _show.error(error, as_json)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _show.error(Cancelled("interrupted"), as_json)
            raise typer.Exit(Cancelled.exit_code) from None

    return run


@contextlib.contextmanager
def _engine(connection: Connection) -> Iterator[Any]:
    """Who does the work, with the calls prune, inspect and profile: a server or this process."""
    if connection.server is None:
        import secateur.graphops as engine

        yield engine
    else:
        with connection.client() as client:
            yield client


def _recipe(file: pathlib.Path | None, flags: dict[str, Any]) -> Recipe | None:
    """The recipe of a file and the flags that were given; None when there is neither."""
    given = {name: value for name, value in flags.items() if value is not None}
    if file is None and not given:
        return None
    base = Recipe.load(file).model_dump(exclude_unset=True) if file is not None else {}
    return Recipe.parse({**base, **given})


def _targets(texts: list[str] | None) -> dict[str, str] | None:
    if not texts:
        return None
    targets: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or key in targets:
            problem = "given twice" if key in targets else "not KEY=VALUE"
            raise typer.BadParameter(f"{text!r} is {problem}", param_hint="--target")
        targets[key] = value
    return targets


def _ids(file: pathlib.Path | None) -> list[int] | None:
    """Numbers in a file; they may stand in a JSON list."""
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8")
        return [int(word) for word in text.translate(str.maketrans("[],", "   ")).split()]
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--vocabulary") from None


def _kinds(text: str | None) -> list[str] | None:
    return None if text is None else [kind.strip() for kind in text.split(",") if kind.strip()]


# ---- commands ----------------------------------------------------------------------------------


@app.command()
@_reported
@connecting
def prune(
    model: Model,
    out: Out = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What is kept, as a fraction of the original: channels, params, macs, layers, "
            "latency, size or memory (also in bytes: 4MiB).",
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How units are ranked; see docs/guide.md."),
    ] = None,
    reduction: Annotated[
        str | None,
        typer.Option(
            metavar="sum|mean|max|first", help="Of what the tensors of one unit say of it."
        ),
    ] = None,
    normaliser: Annotated[
        str | None,
        typer.Option(
            metavar="none|mean|max|isomorphic",
            help="What makes scores of groups comparable (with --scope global).",
        ),
    ] = None,
    calibration: Calibration = None,
    labels: Labels = None,
    repair: Annotated[
        bool | None,
        typer.Option(
            "--repair/--no-repair", help="Have what is left take over the work of what went."
        ),
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate",
            help="Turn streams of channels into the basis in which fewest are needed.",
        ),
    ] = None,
    granularity: Granularity = None,
    grouped: Annotated[
        str | None,
        typer.Option(metavar="auto|whole|balanced", help="What layers with groups lose."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(metavar="local|global|measured", help="How much each group gives up."),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|N:M|ROWSxCOLS",
            help="Single weights that become zero, with --granularity weight: 0.7, 2:4, 0.7@4x1.",
        ),
    ] = None,
    weight_criterion: Annotated[
        str | None,
        typer.Option(metavar="magnitude|wanda|second_order", help="How single weights are ranked."),
    ] = None,
    sparse_initializers: Annotated[
        bool | None,
        typer.Option(
            "--sparse-initializers", help="Store sparse weights as such where that is smaller."
        ),
    ] = None,
    vocabulary: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="FILE", help="Ids of the tokens that are kept, by white space."),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(metavar="int8|int8-dynamic|fp16", help="Quantise what is left."),
    ] = None,
    ignore: Ignore = None,
    round_to: Annotated[
        int | None, typer.Option(metavar="N", help="Keep multiples of N channels.")
    ] = None,
    recipe: RecipeFile = None,
    plan: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE.json", help="Replay a saved plan.")
    ] = None,
    save_plan: SavePlan = None,
    report: ReportFile = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of everything random.")
    ] = None,
    connection: Connection = NONE,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach", help="Start an operation on the server, print its name and leave."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL into OUT, which appears complete or not at all."""
    flags = {
        "target": _targets(target),
        "criterion": criterion,
        "reduction": reduction,
        "normaliser": normaliser,
        "granularity": _kinds(granularity),
        "grouped": grouped,
        "scope": scope,
        "ignore": ignore or None,
        "round_to": round_to,
        "repair": repair,
        "rotate": rotate,
        "sparsity": sparsity,
        "weight_criterion": weight_criterion,
        "sparse_initializers": sparse_initializers,
        "vocabulary": _ids(vocabulary),
        "quantize": quantize,
        "seed": seed,
    }
    if plan is not None and (recipe is not None or any(v is not None for v in flags.values())):
        raise typer.BadParameter("a plan holds its own recipe: no other can be given with it")
    wanted = _recipe(recipe, flags)
    replayed = Plan.load(plan) if plan is not None else None
    if detach:
        if connection.server is None or out or save_plan or report:
            text = "needs --server, and `operations wait` says where its result goes"
            raise typer.BadParameter(text, param_hint="--detach")
        with connection.client() as client:
            started = client.start_prune(model, wanted, calibration, replayed, labels=labels)
        typer.echo(json.dumps(_show.plain(started)) if as_json else started.name)
        return
    if out is None:
        raise typer.BadParameter("say where the pruned model goes", param_hint="-o")
    _check_outputs(model, out, save_plan, report)
    with _engine(connection) as engine, _show.progress() as progress:
        result = engine.prune(
            model,
            wanted,
            calibration=calibration,
            labels=labels,
            plan=replayed,
            progress=progress,
        )
    _save(result, out, save_plan, report)
    _show.result(result, out, as_json)


@app.command()
@_reported
@connecting
def inspect(
    model: Model,
    granularity: Granularity = None,
    ignore: Ignore = None,
    recipe: RecipeFile = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Measure what a cut of each group does to the outputs (with --calibration).",
        ),
    ] = False,
    calibration: Calibration = None,
    connection: Connection = NONE,
    as_json: Json = False,
) -> None:
    """Tell what can go in MODEL, what must stay and why."""
    wanted = _recipe(recipe, {"granularity": _kinds(granularity), "ignore": ignore or None})
    if sensitivity != (calibration is not None):
        raise typer.BadParameter("--sensitivity and --calibration go together")
    with _engine(connection) as engine:
        found = engine.inspect(model, wanted, calibration=calibration)
    if as_json:
        typer.echo(json.dumps(_show.plain(found)))
    else:
        _show.inspection(found)


@app.command()
@_reported
@connecting
def profile(
    model: Model,
    against: Annotated[
        pathlib.Path | None,
        typer.Option(metavar="MODEL", help="Measure this one alternately, and compare outputs."),
    ] = None,
    connection: Connection = NONE,
    as_json: Json = False,
) -> None:
    """Measure MODEL: MACs, params, bytes, latency, memory, drift."""
    with _engine(connection) as engine:
        found = engine.profile(model, against=against)
    if as_json:
        typer.echo(json.dumps(_show.plain(found)))
    else:
        _show.profile(found, model, against)


app.command()(_reported(serve))
app.command()(token)


# ---- operations --------------------------------------------------------------------------------

operations = typer.Typer(
    no_args_is_help=True, help="Prunes that a server does on its own; see prune --detach."
)
app.add_typer(operations, name="operations")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The operation: operations/…")]


@operations.command("list")
@_reported
@connecting
def list_operations(
    connection: Connection,
    filter: Annotated[  # noqa: A002
        str, typer.Option(metavar="FILTER", help="state=…, or done=true|false.")
    ] = "",
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many at most; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List operations, newest first."""
    with connection.client() as client:
        found = client.list_operations(filter, limit)
    if as_json:
        typer.echo(json.dumps([_show.plain(operation) for operation in found]))
    else:
        _show.operations(found)


@operations.command("get")
@_reported
@connecting
def get_operation(name: Name, connection: Connection, as_json: Json = False) -> None:
    """Tell how NAME stands."""
    with connection.client() as client:
        _show.operation(client.get_operation(name), as_json)


@operations.command("cancel")
@_reported
@connecting
def cancel_operation(name: Name, connection: Connection, as_json: Json = False) -> None:
    """End NAME and its work; nothing happens to one that has ended."""
    with connection.client() as client:
        client.cancel_operation(name)
        _show.operation(client.get_operation(name), as_json)


@operations.command("delete")
@_reported
@connecting
def delete_operation(name: Name, connection: Connection, as_json: Json = False) -> None:
    """Have the server forget NAME, which must have ended."""
    with connection.client() as client:
        client.delete_operation(name)
    if as_json:
        typer.echo(json.dumps({"deleted": name}))


@operations.command("wait")
@_reported
@connecting
def wait_operation(
    name: Name,
    connection: Connection,
    out: Out = None,
    save_plan: SavePlan = None,
    report: ReportFile = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Give up after; default: never.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Wait until NAME has ended, and write its result; exit as the prune would have."""
    if out is None and (save_plan is not None or report is not None):
        raise typer.BadParameter("say where the pruned model goes", param_hint="-o")
    if out is not None:
        _check_outputs(None, out, save_plan, report)
    with connection.client() as client:
        with _show.progress() as progress:
            found = client.wait_operation(name, progress, timeout)
        if not found.done:
            raise ServerError(f"{name} is {found.state} after {timeout:g} s")
        if found.failure is not None:
            raise found.failure
        if out is None:
            _show.operation(found, as_json)
            return
        result = client.operation_result(name)
    _save(result, out, save_plan, report)
    _show.result(result, out, as_json)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


# ---- files -------------------------------------------------------------------------------------


def _check_outputs(
    model: pathlib.Path | None,
    out: pathlib.Path,
    save_plan: pathlib.Path | None,
    report: pathlib.Path | None,
) -> None:
    """Refuses places that cannot be written to before the work is done, not after."""
    for option, path in (("-o", out), ("--save-plan", save_plan), ("--report", report)):
        if path is None:
            continue
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"{path} is no place for a file", param_hint=option)
        if model and path.exists() and model.exists() and path.samefile(model):
            raise typer.BadParameter("the original is never overwritten", param_hint=option)
    if report is not None and report.suffix not in (".json", ".html"):
        raise typer.BadParameter(f"{report} is neither .json nor .html", param_hint="--report")


def _save(
    result: Result,
    out: pathlib.Path,
    save_plan: pathlib.Path | None,
    report: pathlib.Path | None,
) -> None:
    """Writes what was asked for, the model last: where it is, all is."""
    try:
        if save_plan is not None:
            write_atomically(save_plan, result.plan.to_json().encode())
        if report is not None:
            if report.suffix == ".html":
                from secateur import _html

                text = _html.page(result.report, out.name)
            else:
                text = json.dumps(_show.plain(result.report), indent=2) + "\n"
            write_atomically(report, text.encode())
        result.save(out)
    except OSError as error:
        raise typer.BadParameter(f"cannot write: {error}") from None
