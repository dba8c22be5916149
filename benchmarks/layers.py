"""Whole layers left out of real models: score, MACs, latency, and which regions went.

    python benchmarks/layers.py [MODEL …]

Uses `../shared/bench`. `layers` is the share of matrix products with weights that stays: 30 and 24
of MiniLM's 36 are as many fewer as one and two blocks have, 38 of ResNet-56's 56 as nine residual
blocks have. Which go, and whether as blocks or as halves, is what is measured.
Each is run with and without repair.
"""

from __future__ import annotations

import sys
import time

from tasks import TASKS

import secateur

KEPT = {"minilm": (30 / 36, 24 / 36), "resnet56": (50 / 56, 44 / 56, 38 / 56)}


def main() -> None:
    """Prints one row per model, share and repair."""
    print(f"{'model':10s} {'layers':>6s} repair {'score':>7s}  MACs latency seconds  left out")
    for task in TASKS:
        if task.name not in KEPT or task.name not in (sys.argv[1:] or KEPT):
            continue
        calibration = task.calibration()
        print(f"{task.name:10s} {1:6.3f}        {task.measure(task.model()):7.4f}", flush=True)
        for share in KEPT[task.name]:
            for repair in (False, True):
                recipe = secateur.Recipe(
                    target={"layers": share}, granularity=("layer",), repair=repair
                )
                start = time.perf_counter()
                result = secateur.prune(task.model(), recipe, calibration=calibration)
                seconds = time.perf_counter() - start
                before, after = result.report.before, result.report.after
                assert before.latency is not None
                assert after.latency is not None
                regions = ", ".join(one.exit for one in result.plan.removed)
                ratio = after.latency.p50_ms / before.latency.p50_ms
                print(
                    f"{task.name:10s} {share:6.3f} {'yes' if repair else 'no':6s} "
                    f"{task.measure(result.model):7.4f} {after.macs / before.macs:5.3f} "
                    f"{ratio:7.2f} {seconds:7.1f}  {regions}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
