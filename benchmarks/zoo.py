"""Every model of a folder at channels=0.5: verified or refused, and is the law kept?

    python benchmarks/zoo.py                    # ../shared/zoo, if it is there
    python benchmarks/zoo.py FOLDER             # any folder of .onnx files
    python benchmarks/zoo.py --only tv_ --onnxsim
    python benchmarks/zoo.py --onnxsim --workers 2
    python benchmarks/zoo.py --calibrated

One row per model: outcome, law difference (largest difference from the original with the removed
positions zeroed at their consumers, relative), parameters and MACs removed, what Torch-Pruning
removes of the same architecture (recorded in the zoo) and, with `--onnxsim`, what onnxsim's
pruning removes of the same file in the same run; coupling and total time without verification.
With `--calibrated` made-up inputs are the calibration data and the model is repaired, which runs
what else there is to run; of the law nothing is known then, since repair writes other weights.
Below the table, for each model on which a rival removes more: how many groups are at the target,
and what the engine itself says keeps the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.util
import io
import itertools
import logging
import multiprocessing
import pathlib
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime

import secateur
from secateur.graphops.calibration.data import Feeds, sample_axes
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.planning.cost import count_params
from secateur.graphops.verify.examples import example_feeds
from secateur.graphops.verify.law import check_law
from secateur.recipe import Recipe

SHARED_ZOO = pathlib.Path(__file__).resolve().parents[2] / "shared" / "zoo"
RECIPE = Recipe(target={"channels": 0.5}, repair=False)
CALIBRATED = Recipe(target={"channels": 0.5})
SAMPLES = 16  # of made-up inputs, for calibration data
# Law difference up to which the law counts as kept. A number of another rounding can fall on the
# next step of a quantised output: a few of 127 steps. Where that made more of it, rounding was left
# out, and what is left is as exact as floats are.
KEPT = {"float32": 1e-3, "float16": 2e-2, "quantised": 5e-2}


@dataclass(frozen=True)
class Row:
    """What came of one model."""

    name: str
    outcome: str
    law: float | None = None
    exceptions: int = 0
    removed: float = 0.0
    macs_removed: float = 0.0
    torch_pruning: float | None = None
    onnxsim: float | None = None
    coupling: float = 0.0
    total: float = 0.0
    why: str = ""

    @property
    def rival(self) -> float:
        """The most that a rival removes."""
        return max(self.torch_pruning or 0.0, self.onnxsim or 0.0)

    def text(self) -> str:
        """The row as the table shows it."""
        law = "-" if self.law is None else f"{self.law:.0e}"
        rivals = [
            "-" if value is None else f"{value:.3f}" for value in (self.torch_pruning, self.onnxsim)
        ]
        return (
            f"{self.name:45s} {law:>6s} {self.exceptions:4d} {self.removed:6.3f} "
            f"{self.macs_removed:6.3f} {rivals[0]:>6s} {rivals[1]:>6s} "
            f"{self.coupling:6.2f} {self.total:6.2f}  {self.outcome}"
        )


@dataclass(frozen=True)
class Job:
    """One model to run: by path, or by name where the folder has a loader of its own."""

    name: str
    architecture: str
    folder: pathlib.Path
    path: pathlib.Path | None

    def load(self) -> onnx.ModelProto:
        """The model."""
        if self.path is not None:
            return onnx.load(self.path)
        model: onnx.ModelProto = zoo_loader(self.folder).load(self.name)
        return model


@functools.cache
def zoo_loader(folder: pathlib.Path) -> Any:
    """The zoo's own module."""
    spec = importlib.util.spec_from_file_location("zoo", folder / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    return zoo


def jobs(folder: pathlib.Path, only: list[str]) -> list[Job]:
    """Every model of a folder, or of the zoo's loader in it."""
    found = []
    if (folder / "zoo.py").exists():
        zoo = zoo_loader(folder)
        found = [Job(name, zoo.entry(name)["arch"], folder, None) for name in zoo.names()]
    found += [Job(p.stem, p.stem, folder, p) for p in sorted(folder.glob("**/*.onnx"))]
    return [job for job in found if not only or job.name.startswith(tuple(only))]


def torch_pruning(folder: pathlib.Path) -> dict[str, float]:
    """architecture → largest share of parameters that Torch-Pruning removed."""
    path, best = folder / "tp_baseline.csv", {}
    if path.exists():
        with path.open() as file:
            for row in csv.DictReader(file):
                if row["status"] == "ok":
                    removed = 1 - float(row["params_ratio"])
                    best[row["name"]] = max(best.get(row["name"], 0.0), removed)
    return best


def onnxsim_removes(model: onnx.ModelProto, params: int) -> float | None:
    """Share of parameters that onnxsim's two pruning passes remove; None where they fail."""
    from onnxsim import pruning

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            pruned = pruning.apply_structured_pruning(model, 0.5)
            pruned = pruned[0] if isinstance(pruned, tuple) else pruned
            pruned = pruning.apply_attention_head_pruning(pruned, 0.5)
            pruned = pruned[0] if isinstance(pruned, tuple) else pruned
        onnxruntime.InferenceSession(pruned.SerializeToString())
        return 1 - count_params(open_model(pruned).model) / params
    except Exception:
        return None


def kind(model: onnx.ModelProto) -> str:
    """In what the model computes."""
    if any("Quantize" in node.op_type or "QLinear" in node.op_type for node in model.graph.node):
        return "quantised"
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    return "float16" if half else "float32"


def _quiet() -> None:
    logging.disable(logging.WARNING)
    onnxruntime.set_default_logger_severity(4)


def made_up(model: onnx.ModelProto) -> Feeds:
    """Calibration data for want of any."""
    opened = open_model(model)  # large weights lie in a file as long as it is there
    graph, shapes = opened.model.graph, infer_shapes(opened.model)
    draws = [example_feeds(graph, shapes, seed=seed, batch=1) for seed in range(SAMPLES)]
    axes = {name: at for name, at in sample_axes(graph).items() if draws[0][name].shape[at] == 1}
    return {
        name: np.concatenate([draw[name] for draw in draws], axes[name]) if name in axes else array
        for name, array in draws[0].items()
    }


def run(job: Job, recorded: float | None, with_onnxsim: bool, calibrated: bool) -> Row:
    """Prunes one model and checks the law; a failure is a row too."""
    try:
        return _run(job.name, job.load(), recorded, with_onnxsim, calibrated)
    except Exception as error:  # the table goes on; the row says what failed
        return Row(job.name, f"FAILED {type(error).__name__}: {str(error)[:120]}")


def _run(
    name: str,
    model: onnx.ModelProto,
    recorded: float | None,
    with_onnxsim: bool,
    calibrated: bool,
) -> Row:
    recipe, data = (CALIBRATED, made_up(model)) if calibrated else (RECIPE, None)
    start = time.perf_counter()
    try:
        result = secateur.prune(model, recipe, calibration=data, measure_latency=False)
    except secateur.Refused as refused:
        return Row(name, f"{refused.refusal.code}: {refused.refusal.message[:120]}")
    seconds = result.report.seconds
    total = time.perf_counter() - start - seconds["VERIFY"] - seconds["LOAD"]
    before, after = result.report.before, result.report.after
    law = None if calibrated else check_law(model, result)
    kept = law is None or law.difference < KEPT[kind(model) if law.rounded else "float32"]
    return Row(
        name=name,
        outcome="verified" if kept else "verified, law not kept",
        law=law and law.difference,
        exceptions=len(law.exceptions) if law else 0,
        removed=1 - after.params / before.params,
        macs_removed=1 - after.macs / before.macs if before.macs else 0.0,
        torch_pruning=recorded,
        onnxsim=onnxsim_removes(model, before.params) if with_onnxsim else None,
        coupling=seconds["COUPLING"],
        total=total,
        why=_why(result.report),
    )


def _why(report: secateur.Report) -> str:
    """What kept the rest: groups at the target, and the reasons that keep most positions."""
    above = [group for group in report.groups if group.kept > 0.5 * group.units + 1]
    frozen = [
        f"{f.channels} positions {f.code} at {f.node or 'the face'}" for f in report.frozen[:3]
    ]
    groups = f"{len(report.groups) - len(above)} of {len(report.groups)} groups at one half"
    return "; ".join([groups, *frozen])


def _run_one(asked: tuple[Job, float | None, bool, bool]) -> Row:
    return run(*asked)


def rows_of(
    todo: list[Job],
    baseline: dict[str, float],
    with_onnxsim: bool,
    calibrated: bool,
    workers: int,
) -> Iterator[Row]:
    """Rows as they are done. Each worker takes a few models, then a fresh one takes its place:
    what a large model leaves in memory goes with it."""
    asked = [(job, baseline.get(job.architecture), with_onnxsim, calibrated) for job in todo]
    if workers < 2:
        _quiet()
        yield from itertools.starmap(run, asked)
        return
    # Python 3.11's ProcessPoolExecutor hangs where it is to replace workers.
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers, initializer=_quiet, maxtasksperchild=16) as pool:
        yield from pool.imap_unordered(_run_one, asked)


def main() -> None:
    """Prints the table and its last line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=SHARED_ZOO)
    parser.add_argument("--only", action="append", default=[], help="name prefix; may be repeated")
    parser.add_argument("--onnxsim", action="store_true", help="run onnxsim's pruning beside it")
    parser.add_argument("--calibrated", action="store_true", help="with made-up data, and repair")
    parser.add_argument(
        "--workers", type=int, default=1, help="models at a time; times are truest with one"
    )
    arguments = parser.parse_args()
    if not arguments.folder.exists():
        sys.exit(f"{arguments.folder} does not exist: name a folder of .onnx files")
    todo, baseline = jobs(arguments.folder, arguments.only), torch_pruning(arguments.folder)
    print(
        f"{'model':45s} {'law':>6s} {'exc':>4s} {'params':>6s} {'MACs':>6s} {'TP':>6s} "
        f"{'osim':>6s} {'coup s':>6s} {'all s':>6s}  outcome"
    )
    rows = []
    found = rows_of(todo, baseline, arguments.onnxsim, arguments.calibrated, arguments.workers)
    for row in found:
        rows.append(row)
        print(row.text(), flush=True)
    verified = [row for row in rows if row.outcome.startswith("verified")]
    failed = [row for row in rows if row.outcome.startswith("FAILED")]
    if not verified:
        sys.exit("no model was verified")
    less = [row for row in verified if row.removed + 0.005 < row.rival]
    print()
    for row in less:
        print(f"{row.name}: {row.removed:.3f} against {row.rival:.3f}; {row.why}")
    print(
        f"\n{len(rows)} models: {len(verified)} verified, "
        f"{sum('law not kept' in row.outcome for row in rows)} of them without the law, "
        f"{len(rows) - len(verified) - len(failed)} refused, {len(failed)} failed; "
        f"median params removed {statistics.median(row.removed for row in verified):.3f}; "
        f"median coupling {statistics.median(row.coupling for row in verified):.3f} s, "
        f"worst {max(row.coupling for row in verified):.2f} s; worst total "
        f"{max(row.total for row in verified):.2f} s; a rival removes more on {len(less)}: "
        + ", ".join(row.name for row in less)
    )


if __name__ == "__main__":
    main()
