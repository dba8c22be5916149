"""Accuracy without training: trained models pruned with unlabelled data, then scored.

    python benchmarks/accuracy.py [--only MODEL] [--criteria a,b] [--rivals]

Models, data and scores are those of `tasks.py`, in `../shared/bench`; labels only score. Rows are
models at MACs 0.7 and 0.5; columns the original, our default, l2 alone (no data, no repair), each
criterion that sees data with all else at its default, and other tools. Every cell runs in a
process of its own: seconds are of pruning and verification, by the clock and of processor time,
which tells more on a busy machine; memory is the peak of that process until then, its data
included. A line is printed when a cell is done, and the table at the end.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import onnxruntime
import rivals
from tasks import TASKS, Task

import secateur

TARGETS = (0.7, 0.5)
ALONE = "l2 alone"
SEE_DATA = (
    "activation",
    "rms",
    "apoz",
    "variance",
    "wanda",
    "fluctuation",
    "taylor",
    "fisher",
    "reconstruction",
)
ONNXSIM, TORCH_PRUNING = "onnxsim", "Torch-Pruning"
RESNETS = ("resnet20", "resnet56")


@dataclass(frozen=True)
class Cell:
    """What became of one model.

    Attributes:
        score: None where it failed.
        macs: share kept.
        seconds: to prune, by the clock.
        processor: seconds of it, of all threads.
        mebibytes: peak memory of the process when it had pruned.
        failure: why there is no score.
    """

    score: float | None = None
    macs: float = 1.0
    seconds: float = 0.0
    processor: float = 0.0
    mebibytes: int = 0
    failure: str = ""

    def text(self) -> str:
        """As the table shows it."""
        if self.score is None:
            return self.failure.split(":")[0][:22] or "-"
        return f"{self.score:.3f} {self.seconds:4.0f}s {self.mebibytes:4d}M"


def run_cell(task: Task, column: str, target: float) -> Cell:
    """Prunes and scores, in this process."""
    model, calibration = task.model(), task.calibration()
    if column == "original":
        return Cell(score=task.measure(model))
    run, start, before = None, time.perf_counter(), time.process_time()
    if column == ONNXSIM:
        pruned, macs = rivals.onnxsim(model, calibration, target)
    elif column == TORCH_PRUNING:
        run, macs = rivals.torch_pruning(model, target)
    else:
        recipe: dict[str, Any] = {"target": {"macs": target}}
        if column == ALONE:
            recipe["repair"] = False
        elif column != "default":
            recipe["criterion"] = column
        result = secateur.prune(
            model,
            secateur.Recipe(**recipe),
            calibration=None if column == ALONE else calibration,
            measure_latency=False,
        )
        pruned, macs = result.model, result.report.after.macs / result.report.before.macs
    seconds, processor = time.perf_counter() - start, time.process_time() - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    score = task.score(run) if run is not None else task.measure(pruned)
    return Cell(score, macs, seconds, processor, peak)


def in_process(task: Task, column: str, target: float, timeout: float) -> Cell:
    """The cell, from a process of its own."""
    command = [sys.executable, __file__, "--cell", task.name, column, str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Cell(failure=f"above {timeout:.0f} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return Cell(failure=last.removeprefix("secateur.errors."))
    return Cell(**json.loads(done.stdout.splitlines()[-1]))


def columns_for(task: Task, criteria: list[str], with_rivals: bool) -> list[str]:
    """What is run of a task, the most important first."""
    found = ["original", "default", ALONE]
    if with_rivals:
        found += [ONNXSIM] + [TORCH_PRUNING] * (task.name in RESNETS)
    return found + criteria


def main() -> None:
    """Prints lines and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="a model; may be repeated")
    parser.add_argument("--criteria", default=",".join(SEE_DATA), help="those to show, by commas")
    parser.add_argument("--rivals", action="store_true", help="run other tools beside it")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one cell at most")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(4)
    by_name = {task.name: task for task in TASKS}
    if arguments.cell:
        name, column, target = arguments.cell
        print(json.dumps(asdict(run_cell(by_name[name], column, float(target)))))
        return
    tasks = [by_name[name] for name in arguments.only] or list(TASKS)
    criteria = [name for name in arguments.criteria.split(",") if name]
    columns = {t.name: columns_for(t, criteria, arguments.rivals) for t in tasks}
    cells: dict[tuple[str, str, float], Cell] = {}
    order = list(dict.fromkeys(column for some in columns.values() for column in some))
    print("model              column           MACs  score  kept     s   cpu   MiB")
    for column in order:
        for task in tasks:
            for target in TARGETS if column in columns[task.name] else ():
                if column == "original" and target != TARGETS[0]:
                    continue
                cell = in_process(task, column, target, arguments.timeout)
                cells[task.name, column, target] = cell
                score = "-" if cell.score is None else f"{cell.score:.3f}"
                print(
                    f"{task.name:18s} {column:15s} {target:5.2f} {score:>6s} {cell.macs:5.3f} "
                    f"{cell.seconds:5.0f} {cell.processor:5.0f} {cell.mebibytes:5d} "
                    f"{cell.failure[:150]}",
                    flush=True,
                )
    table(tasks, order, cells)


def table(tasks: list[Task], columns: list[str], cells: dict[tuple[str, str, float], Cell]) -> None:
    """One row per model and target."""
    print("\n" + f"{'model':18s} {'score':8s} {'MACs':>4s} {'goal':>5s} {'orig.':>5s}", end="")
    shown = [column for column in columns if column != "original"]
    print("".join(f"  {column:>18s}" for column in shown))
    for task in tasks:
        for target, goal in zip(TARGETS, task.goals, strict=True):
            original = cells[task.name, "original", TARGETS[0]].score
            row = [cells.get((task.name, column, target)) for column in shown]
            print(
                f"{task.name:18s} {task.unit:8s} {target:4.1f} {goal:5.3f} "
                + ("    -" if original is None else f"{original:5.3f}")
                + "".join(f"  {'' if cell is None else cell.text():>18s}" for cell in row)
            )


if __name__ == "__main__":
    main()
