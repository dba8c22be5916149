"""Prunes two real models through a real server and shows what came of it.

    make demo

Starts `secateur serve` as a process of its own, sends it the digit classifiers of
`examples/digits` through the gRPC client, and measures the accuracy of what comes back on images
that no training has seen. The slim models and their reports are left in `build/demo`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from digits.evaluate import accuracy
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import secateur
from secateur.report import Cost, Report

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits"
OUT = ROOT / "build" / "demo"
START_SECONDS = 60
STOP_SECONDS = 15
CALL_SECONDS = 300
ADDRESS = re.compile(r"\b127\.0\.0\.1:([1-9]\d*)\b")


@dataclass(frozen=True)
class Case:
    """One model and what is asked for it."""

    title: str
    model: pathlib.Path
    recipe: secateur.Recipe


CASES = (
    Case(
        "convolutional network",
        DIGITS / "digits_cnn.onnx",
        secateur.Recipe(target={"macs": 0.5}, criterion="l2"),
    ),
    Case(
        "transformer",
        DIGITS / "digits_transformer.onnx",
        # naming one tensor of the residual stream keeps the whole stream at its width
        secateur.Recipe(target={"macs": 0.7}, criterion="l2", ignore=("position",)),
    ),
)


class DemoError(Exception):
    """The demonstration cannot go on; the text says why."""


@contextlib.contextmanager
def server(log: pathlib.Path) -> Iterator[str]:
    """A running server as a process of its own; yields its address, and stops it at the end."""
    command = [sys.executable, "-m", "secateur", "serve", "--listen", "127.0.0.1:0"]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches this program alone, which then stops it
        )
        address = _Address()
        reader = threading.Thread(target=_follow, args=(process.stdout, file, address))
        reader.start()
        try:
            yield address.wait(log)
        finally:
            _stop(process)
            reader.join()


class _Address:
    """Where the server listens, once it has said so."""

    def __init__(self) -> None:
        self._known = threading.Event()
        self._text = ""

    def set(self, text: str) -> None:
        """States the address; empty: the server has ended. The first statement counts."""
        if not self._known.is_set():
            self._text = text
            self._known.set()

    def wait(self, log: pathlib.Path) -> str:
        """The address. Raises DemoError when none comes."""
        if not self._known.wait(START_SECONDS):
            raise DemoError(f"the server said no address within {START_SECONDS} s; see {log}")
        if not self._text:
            last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
            raise DemoError(f"the server did not start: {''.join(last) or 'no output'} (see {log})")
        return self._text


def _follow(lines: TextIO, log: TextIO, address: _Address) -> None:
    """Copies the server's output to the log until it ends, and looks for the address in it."""
    for line in lines:
        log.write(line)
        log.flush()
        if found := ADDRESS.search(line):
            address.set(found[0])
    address.set("")


def _stop(process: subprocess.Popen[str]) -> None:
    """Asks the server to end; one that does not is killed with its workers."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own session, so its own process group
        process.wait()


def prune(client: secateur.Client, case: Case, console: Console) -> secateur.Result:
    """Prunes one model, with a progress bar."""
    columns = (
        TextColumn("  {task.description:<36.36}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("sending the model", total=1.0)

        def show(step: secateur.Progress) -> None:
            text = step.message or step.stage.lower()
            bar.update(task, completed=step.fraction, description=text)

        result = client.prune(case.model, case.recipe, progress=show, timeout=CALL_SECONDS)
        bar.update(task, completed=1.0, description="done")
    return result


def empty_table() -> Table:
    """The table of results, with no rows yet."""
    table = Table(title="Before and after", title_justify="left", title_style="bold")
    table.add_column("")
    for heading in ("accuracy", "MACs", "params", "bytes", "latency"):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def add_rows(table: Table, title: str, before: float, after: float, report: Report) -> None:
    """Adds one model: before, after, and the ratio of the two."""

    def row(name: str, share: float, cost: Cost) -> None:
        latency = f"{cost.latency.p50_ms:.3f} ms" if cost.latency else "–"
        figures = (f"{figure:,}" for figure in (cost.macs, cost.params, cost.bytes))
        table.add_row(name, f"{share:.1%}", *figures, latency)

    def ratio(new: float, old: float) -> str:
        return f"× {new / old:.2f}"

    old, new = report.before, report.after
    table.add_row(title, style="bold cyan")
    row("before", before, old)
    row("after", after, new)
    table.add_row(
        "after ÷ before",
        ratio(after, before),
        ratio(new.macs, old.macs),
        ratio(new.params, old.params),
        ratio(new.bytes, old.bytes),
        ratio(new.latency.p50_ms, old.latency.p50_ms) if new.latency and old.latency else "–",
        style="bold",
        end_section=True,
    )


def demonstrate(console: Console) -> None:
    """Runs the whole demonstration."""
    OUT.mkdir(parents=True, exist_ok=True)
    table = empty_table()
    warnings: list[str] = []
    console.print("[bold]Starting a Secateur server …[/bold]")
    with server(OUT / "server.log") as address, secateur.Client(address) as client:
        console.print(f"It listens on {address}. Two trained models go to it over gRPC.\n")
        for case in CASES:
            kept = " and ".join(
                f"{part:.0%} of its {key}" for key, part in case.recipe.target.items()
            )
            console.print(f"[bold]{case.model.name}[/bold], a {case.title}: keep {kept}")
            result = prune(client, case, console)
            slim = OUT / f"{case.model.stem}_slim.onnx"
            result.save(slim)
            text = result.report.model_dump_json(indent=2) + "\n"
            slim.with_suffix(".report.json").write_text(text, encoding="utf-8")
            add_rows(table, case.title, accuracy(case.model), accuracy(slim), result.report)
            warnings += (f"{case.model.name}: {warning}" for warning in result.report.warnings)
    console.print()
    console.print(table)
    for warning in warnings:
        console.print(f"[yellow]Note[/yellow] {escape(warning)}")
    console.print(
        "Accuracy: 450 images that training has not seen. Latency: median, in ONNX Runtime on this "
        "machine; models this small spend most of it on overhead. Nothing was retrained or "
        "refitted after the cut; the models were trained to have channels to spare, and others "
        "lose more."
    )
    console.print(f"The slim models and their reports are in {OUT.relative_to(ROOT)}/.")


def main() -> int:
    """Runs the demonstration and returns an exit code, with one sentence where it failed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))  # unwinds, so that the server is stopped
    console = Console()
    try:
        demonstrate(console)
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted; the server is stopped.[/yellow]")
        return 130
    except secateur.ServerError as error:
        log = (OUT / "server.log").relative_to(ROOT)
        console.print(f"[red]The demo failed:[/red] {escape(str(error))} (see {log})")
        return error.exit_code
    except secateur.SecateurError as error:
        console.print(f"[red]The demo failed:[/red] {escape(str(error))}")
        return error.exit_code
    except (DemoError, OSError) as error:
        console.print(f"[red]The demo failed:[/red] {escape(str(error))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
