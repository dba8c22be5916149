"""Every granularity on real models: score, drift, MACs, size, latency and time.

    python benchmarks/granularity.py [MODEL …] [--rows WORD] [--into FILE]

Uses `../shared/bench`: recipes run with the calibration samples of `tasks.py`, and are scored on
data that calibration has not seen. Rows of every model: channels, heads, layers, ranks and all of
them at MACs 0.7 and 0.5; 2:4 and half of the weights by magnitude and by second order. Of some:
int8 after MACs 0.5, channels=0.75 with streams in another basis and without, and as few layers as
blocks fewer have (30 and 24 of MiniLM's 36 for one and two, 50, 44 and 38 of ResNet-56's 56 for
three, six and nine residual blocks), with repair and without. Drift and latency ratio are of the
report: original and result in turns.

Every row is a cell, run in a process of its own and added to FILE (JSON lines) when it is done; a
second run takes from there what it finds. Take the file away to measure anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import onnxruntime
from cells import add, entries, in_process
from tasks import ROOT, TASKS, Task

import secateur

KINDS = {
    "channels": ["channel"],
    "heads": ["head"],
    "layers": ["layer"],
    "ranks": ["rank"],
    "combined": ["layer", "channel", "head", "rank"],
}
PATTERNS = ("2:4", "0.5")
QUANTISED = ("resnet56", "efficientnet_lite0", "minilm")
ROTATED = ("efficientnet_lite0",)  # with streams between linear bottlenecks
LAYERS = {"minilm": (30, 24, 36), "resnet56": (50, 44, 38, 56)}  # kept, and of how many


@dataclass(frozen=True)
class Cell:
    """What became of one model.

    Attributes:
        score: None where it failed.
        drift: relative error of the first output on samples that were held back.
        macs, size, latency: shares of the original's.
        seconds: to prune, by the clock, latency and verification included.
        gone: regions left out and products split.
        failure: why there is no score.
    """

    score: float | None = None
    drift: float = 0.0
    macs: float = 1.0
    size: float = 1.0
    latency: float = 1.0
    seconds: float = 0.0
    gone: tuple[int, int] = (0, 0)
    failure: str = ""


def recipes(task: Task) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and fields of every row of a model."""
    for target in (0.7, 0.5):
        for kind, granularity in KINDS.items():
            fields = {"granularity": granularity, "target": {"macs": target}}
            yield f"{kind} macs={target}", fields
    for rotate in (False, True) if task.name in ROTATED else ():
        name = f"channels=0.75{'' if rotate else ', not rotated'}"
        yield name, {"target": {"channels": 0.75}, "rotate": rotate}
    for pattern in PATTERNS:
        for criterion in ("magnitude", "second_order"):
            fields = {"granularity": ["weight"], "sparsity": pattern}
            yield f"{pattern} {criterion}", {**fields, "weight_criterion": criterion}
    if task.name in QUANTISED:
        for how in (None, "int8"):
            yield f"default macs=0.5 {how or 'float'}", {"target": {"macs": 0.5}, "quantize": how}
    *counts, whole = LAYERS.get(task.name, (1,))
    for count in counts:
        for repair in (False, True):
            fields = {"granularity": ["layer"], "target": {"layers": count / whole}}
            name = f"{count} of {whole} layers{', repair' if repair else ''}"
            yield name, {**fields, "repair": repair}


def run_cell(task: Task, fields: dict[str, Any] | None) -> Cell:
    """Prunes and scores, in this process; None: the original."""
    if fields is None:
        return Cell(score=task.measure(task.model()))
    start = time.perf_counter()
    recipe = secateur.Recipe.parse(fields)
    result = secateur.prune(task.model(), recipe, calibration=task.calibration())
    seconds = time.perf_counter() - start
    before, after = result.report.before, result.report.after
    assert before.latency is not None
    assert after.latency is not None
    return Cell(
        score=task.measure(result.model),
        drift=result.report.verification.drift[0].relative_error,
        macs=after.macs / before.macs,
        size=after.bytes / before.bytes,
        latency=after.latency.p50_ms / before.latency.p50_ms,
        seconds=seconds,
        gone=(len(result.plan.removed), len(result.plan.factored)),
    )


def show(model: str, row: str, cell: Cell) -> None:
    """One line."""
    score = "-" if cell.score is None else f"{cell.score:.4f}"
    print(
        f"{model:18s} {row:26s} {score:>7s} {cell.drift:6.3f} {cell.macs:5.3f} {cell.size:5.3f} "
        f"{cell.latency:7.2f} {cell.seconds:6.0f} {cell.gone[0]:3d} {cell.gone[1]:3d} "
        f"{cell.failure[:120]}",
        flush=True,
    )


def main() -> None:
    """Prints all rows of the models that were named, of all without names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names; all without")
    parser.add_argument("--rows", default="", help="only rows with this in their name")
    parser.add_argument("--into", type=pathlib.Path, default=ROOT / "build" / "granularity.jsonl")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one cell at most")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(4)
    by_name = {task.name: task for task in TASKS}
    if arguments.cell:
        name, fields = arguments.cell
        print(json.dumps(asdict(run_cell(by_name[name], json.loads(fields)))))
        return
    if unknown := set(arguments.models) - set(by_name):
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(by_name)}")
    found = {(one["model"], one["row"]): Cell(**one["cell"]) for one in entries(arguments.into)}
    heads = f"{'model':18s} {'row':26s} {'score':>7s} {'drift':>6s} {'MACs':>5s} {'size':>5s}"
    print(f"{heads} {'latency':>7s} {'s':>6s} out split")
    for task in [by_name[name] for name in arguments.models] or TASKS:
        rows: list[tuple[str, dict[str, Any] | None]] = [("original", None), *recipes(task)]
        for row, fields in rows:
            if arguments.rows not in row and fields is not None:
                continue
            if (task.name, row) not in found:
                cell = found[task.name, row] = in_process(
                    Cell, __file__, (task.name, json.dumps(fields)), arguments.timeout
                )
                add(arguments.into, {"model": task.name, "row": row, "cell": asdict(cell)})
            show(task.name, row, found[task.name, row])


if __name__ == "__main__":
    main()
