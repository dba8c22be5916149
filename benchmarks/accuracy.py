"""Accuracy without training: trained models pruned with unlabelled data, then scored.

    python benchmarks/accuracy.py [--only MODEL] [--criteria a,b] [--rivals] [--int8] [--cells FILE]

Models, data and scores are those of `tasks.py`, in `../shared/bench`; labels only score. Rows are
models at MACs 0.7 and 0.5; columns the original, our default, l2 alone (no data, no repair), each
criterion that sees data with all else at its default, and other tools. Every cell runs in a
process of its own: seconds are of pruning and verification, by the clock and of processor time,
which tells more on a busy machine; memory is the peak of that process until then, its data
included. A line is printed when a cell is done, and the table at the end, or when interrupted.

What the goals are about comes first: original, default and l2 alone of every model, then other
tools, then the criteria, model by model, the two ImageNet models last. `--criteria ''` stops
before those. `--int8` adds the original in 8 bits and what the default makes of that: in QDQ, with
scales found at run time, and in operators on integers.
`--cells FILE` keeps every cell that is done, and takes up where a run stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import onnxruntime
import rivals
from cells import add, entries, in_process
from onnxruntime import quantization
from tasks import TASKS, Feeds, Task

import secateur

TARGETS = (0.7, 0.5)
ALONE = "l2 alone"
INT8 = ("int8", "dynamic", "operators")  # before a column: of the model in 8 bits
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
SLOW = ("mobilenet_v1_075", "efficientnet_lite0")  # minutes a cell: their criteria come last

Key = tuple[str, str, float]  # model, column, target


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
    form, _, plain = column.rpartition(" ")
    if form in INT8:
        model, column = in_8_bits(model, calibration, form), plain
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


def in_8_bits(model: bytes, calibration: Any, form: str) -> bytes:
    """A model quantised, and not pruned."""
    if form == "operators":
        if not isinstance(calibration, dict):
            raise ValueError("folders: ONNX Runtime's quantiser takes batches of arrays")
        return in_operators_on_integers(model, calibration)
    how = {"int8": "int8", "dynamic": "int8-dynamic"}[form]
    whole = secateur.Recipe.parse({"target": {"channels": 1.0}, "quantize": how})
    return secateur.prune(model, whole, calibration=calibration, measure_latency=False).model


def in_operators_on_integers(model: bytes, calibration: Feeds) -> bytes:
    """Quantised by ONNX Runtime: QLinearConv and its like."""
    count = min(map(len, calibration.values()))
    batches = iter(
        [
            {name: array[start : start + 32] for name, array in calibration.items()}
            for start in range(0, count, 32)
        ]
    )

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> Feeds | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder:
        source, result = (pathlib.Path(folder) / name for name in ("source.onnx", "result.onnx"))
        source.write_bytes(model)
        quantization.quantize_static(
            source,
            result,
            Reader(),
            quant_format=quantization.QuantFormat.QOperator,
            per_channel=True,
            reduce_range=True,
        )
        return result.read_bytes()


def in_order(
    tasks: list[Task], criteria: list[str], with_rivals: bool, with_int8: bool
) -> list[Key]:
    """What is run, the most important first."""
    first = [("original", TARGETS[0])]
    first += [(column, target) for column in ("default", ALONE) for target in TARGETS]
    if with_int8:
        for form in INT8:
            first += [(f"{form} original", TARGETS[0]), *((f"{form} default", t) for t in TARGETS)]
    order = [(task.name, *cell) for cell in first for task in tasks]
    for rival in (ONNXSIM, TORCH_PRUNING) if with_rivals else ():
        some = [task for task in tasks if rival == ONNXSIM or task.name in RESNETS]
        order += [(task.name, rival, target) for task in some for target in TARGETS]
    for task in sorted(tasks, key=lambda task: task.name in SLOW):
        order += [(task.name, column, target) for column in criteria for target in TARGETS]
    return order


def kept(path: pathlib.Path | None) -> dict[Key, Cell]:
    """The cells that an earlier run has written."""
    rows = [] if path is None else entries(path)
    return {(row["model"], row["column"], row["target"]): Cell(**row["cell"]) for row in rows}


def keep(path: pathlib.Path, key: Key, cell: Cell) -> None:
    """Adds a cell to those of earlier runs."""
    row = dict(zip(("model", "column", "target"), key, strict=True))
    add(path, {**row, "cell": asdict(cell)})


def show(key: Key, cell: Cell) -> None:
    """One line."""
    score = "-" if cell.score is None else f"{cell.score:.3f}"
    print(
        f"{key[0]:18s} {key[1]:15s} {key[2]:5.2f} {score:>6s} {cell.macs:5.3f} "
        f"{cell.seconds:5.0f} {cell.processor:5.0f} {cell.mebibytes:5d} {cell.failure[:150]}",
        flush=True,
    )


def main() -> None:
    """Prints lines and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="a model; may be repeated")
    parser.add_argument("--criteria", default=",".join(SEE_DATA), help="those to show, by commas")
    parser.add_argument("--rivals", action="store_true", help="run other tools beside it")
    parser.add_argument("--int8", action="store_true", help="prune what is quantised, too")
    parser.add_argument("--cells", type=pathlib.Path, help="file of cells, to go on with later")
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
    order = in_order(tasks, criteria, arguments.rivals, arguments.int8)
    before = kept(arguments.cells)
    cells = {key: before[key] for key in order if key in before}
    print("model              column           MACs  score  kept     s   cpu   MiB")
    try:
        for key in order:
            if key not in cells:
                name, column, target = key
                cells[key] = in_process(
                    Cell, __file__, (name, column, str(target)), arguments.timeout
                )
                if arguments.cells is not None:
                    keep(arguments.cells, key, cells[key])
            show(key, cells[key])
    except KeyboardInterrupt:
        print("\ninterrupted: the cells that are done")
    table(tasks, list(dict.fromkeys(column for _, column, _ in order)), cells)


def table(tasks: list[Task], columns: list[str], cells: dict[Key, Cell]) -> None:
    """One row per model and target."""
    print("\n" + f"{'model':18s} {'score':8s} {'MACs':>4s} {'goal':>5s} {'orig.':>5s}", end="")
    shown = [column for column in columns if column != "original"]
    print("".join(f"  {column:>18s}" for column in shown))
    for task in tasks:
        for target, goal in zip(TARGETS, task.goals, strict=True):
            original = cells.get((task.name, "original", TARGETS[0]), Cell()).score
            row = [cells.get((task.name, column, target)) for column in shown]
            print(
                f"{task.name:18s} {task.unit:8s} {target:4.1f} {goal:5.3f} "
                + ("    -" if original is None else f"{original:5.3f}")
                + "".join(f"  {'' if cell is None else cell.text():>18s}" for cell in row)
            )


if __name__ == "__main__":
    main()
