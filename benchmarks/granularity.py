"""Single weights and quantisation on real models: score, size, latency.

    python benchmarks/granularity.py [MODEL …]

Uses `../shared/bench`. A row is a recipe (`ROWS`); all are run with the calibration samples of
`tasks.py`, and scored on data that calibration has not seen. The latency ratio is of the report:
original and result in turns.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tasks import TASKS, Task

import secateur

ROWS: dict[str, dict[str, Any]] = {
    "2:4 magnitude": {
        "granularity": ["weight"],
        "sparsity": "2:4",
        "weight_criterion": "magnitude",
    },
    "2:4 second order": {"granularity": ["weight"], "sparsity": "2:4"},
    "50 % magnitude": {
        "granularity": ["weight"],
        "sparsity": "0.5",
        "weight_criterion": "magnitude",
    },
    "50 % second order": {"granularity": ["weight"], "sparsity": "0.5"},
    "macs=0.5": {"target": {"macs": 0.5}},
    "macs=0.5, int8": {"target": {"macs": 0.5}, "quantize": "int8"},
}


def row(task: Task, name: str, fields: dict[str, Any], calibration: Any) -> None:
    """Prunes by one recipe and prints what came of it."""
    start = time.perf_counter()
    try:
        recipe = secateur.Recipe.parse(fields)
        result = secateur.prune(task.model(), recipe, calibration=calibration)
    except secateur.Refused as refused:
        print(f"{task.name:20s} {name:20s} refused: {refused}", flush=True)
        return
    seconds = time.perf_counter() - start
    before, after = result.report.before, result.report.after
    assert before.latency is not None
    assert after.latency is not None
    print(
        f"{task.name:20s} {name:20s} {task.measure(result.model):8.4f} "
        f"{after.bytes / before.bytes:6.3f} "
        f"{after.latency.p50_ms / before.latency.p50_ms:8.2f} {seconds:6.1f}",
        flush=True,
    )


def main() -> None:
    """Prints all rows of the models that were named, of all without names."""
    logging.disable(logging.WARNING)
    print(f"{'model':20s} {'recipe':20s} {'score':>8s} {'size':>6s} {'latency':>8s} {'s':>6s}")
    for task in TASKS:
        if sys.argv[1:] and task.name not in sys.argv[1:]:
            continue
        print(f"{task.name:20s} {'original':20s} {task.measure(task.model()):8.4f} ({task.unit})")
        calibration = task.calibration()
        for name, fields in ROWS.items():
            row(task, name, fields, calibration)


if __name__ == "__main__":
    main()
