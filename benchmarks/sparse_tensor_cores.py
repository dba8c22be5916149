"""Are 2:4 weights what sparse tensor cores multiply? Asked of the library that drives them.

    python benchmarks/sparse_tensor_cores.py write FILE     # anywhere: prunes, writes an .npz
    python benchmarks/sparse_tensor_cores.py run FILE       # PyTorch and a GPU that has them

`write` prunes MiniLM of `../shared/bench` with sparsity=2:4 by both criteria, and the first block
of the ViT-B/16 of `../shared/zoo` by magnitude, and keeps the matrices of their products in
float16. `run` has PyTorch compress each to half of its numbers (cuSPARSELt) and prints, for 8192
rows of drawn input, how far the compressed product is from the dense one (relative error: what the
format cannot hold would be lost), and how long a product takes: dense, compressed as
`torch.nn.functional.linear` runs it, and by the kernel that cuSPARSELt's search finds best.
"""

from __future__ import annotations

import argparse
import importlib
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

ROWS = 8192
RUNS = 50
REPLAYS = 9


def write(path: pathlib.Path) -> None:
    """Prunes, and keeps the matrices, (out, in) as products over their rows read them."""
    import onnx
    from tasks import TASKS
    from zoo import SHARED_ZOO, zoo_loader

    import secateur

    minilm = next(task for task in TASKS if task.name == "minilm")
    vit = zoo_loader(SHARED_ZOO).load("tv_vit_b_16")
    asked: list[tuple[str, Any, str, dict[str, Any]]] = [
        ("minilm", minilm.model(), "magnitude", {}),
        ("minilm", minilm.model(), "second_order", {"calibration": minilm.calibration()}),
        ("vit_b_16", vit, "magnitude", {}),
    ]
    matrices: dict[str, np.ndarray] = {}
    for name, model, criterion, given in asked:
        recipe = secateur.Recipe(granularity=["weight"], sparsity="2:4", weight_criterion=criterion)
        result = secateur.prune(model, recipe, measure_latency=False, **given)
        pruned = onnx.load_from_string(result.model)
        tensors = {tensor.name: tensor for tensor in pruned.graph.initializer}
        for node in pruned.graph.node:
            tensor = tensors.get(node.input[1]) if len(node.input) > 1 else None
            if node.op_type not in ("MatMul", "Gemm") or tensor is None:
                continue
            array = onnx.numpy_helper.to_array(tensor)
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            array = array if transposed else array.T
            if array.ndim == 2 and min(array.shape) >= 64:
                place = len([key for key in matrices if key.startswith(f"{name} {criterion}")])
                if name == "minilm" or place < 4:
                    matrices[f"{name} {criterion} {place}"] = array.astype(np.float16)
    np.savez_compressed(path, **matrices)
    print(f"{len(matrices)} matrices, {path.stat().st_size / 2**20:.1f} MiB")


def run(path: pathlib.Path) -> None:
    """Compresses, multiplies and compares all; times one of each shape."""
    torch = importlib.import_module("torch")
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(
        f"{'model':10s} {'criterion':13s} {'out':>5s} {'in':>5s} {'n':>3s} {'error':>8s} ", end=""
    )
    print(f"{'dense us':>8s} {'linear us':>9s} {'best us':>8s} {'dense / best':>12s}")
    alike: dict[tuple[str, str, int, int], list[Any]] = {}
    for key, array in np.load(path).items():
        name, criterion, _ = key.split(" ")
        weight = torch.from_numpy(array).cuda().contiguous()
        alike.setdefault((name, criterion, *weight.shape), []).append(weight)
    for (name, criterion, wide, deep), weights in alike.items():
        rows = torch.randn(ROWS, deep, dtype=torch.float16, device="cuda")
        error = max(_error(torch, rows, weight) for weight in weights)
        dense, linear, best = _times(torch, rows, weights[0])
        print(
            f"{name:10s} {criterion:13s} {wide:5d} {deep:5d} {len(weights):3d} {error:8.1e} "
            f"{dense:8.1f} {linear:9.1f} {best:8.1f} {dense / best:12.2f}",
            flush=True,
        )


def _error(torch: Any, rows: Any, weight: Any) -> float:
    """‖compressed − dense‖ / ‖dense‖ of the products."""
    linear = torch.nn.functional.linear
    dense = linear(rows, weight).float()
    sparse = linear(rows, torch.sparse.to_sparse_semi_structured(weight)).float()
    return float((sparse - dense).norm() / dense.norm())


def _times(torch: Any, rows: Any, weight: Any) -> tuple[float, float, float]:
    """Microseconds of a product: dense, compressed, and by the kernel that a search finds best."""
    linear = torch.nn.functional.linear
    compressed = torch.sparse.to_sparse_semi_structured(weight)
    best = torch._cslt_sparse_mm_search(compressed.packed, rows.t())
    return (
        _microseconds(torch, lambda: linear(rows, weight)),
        _microseconds(torch, lambda: linear(rows, compressed)),
        _microseconds(
            torch, lambda: torch._cslt_sparse_mm(compressed.packed, rows.t(), alg_id=best)
        ),
    )


def _microseconds(torch: Any, product: Callable[[], object]) -> float:
    """On the GPU's own clock: a graph of many is replayed, so that no host is waited for."""
    product()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(RUNS):
            product()
    taken = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(1000 * start.elapsed_time(end) / RUNS)
    return statistics.median(taken)


def main() -> None:
    """Writes the matrices, or runs them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("write", "run"))
    parser.add_argument("file", type=pathlib.Path)
    arguments = parser.parse_args()
    {"write": write, "run": run}[arguments.step](arguments.file)


if __name__ == "__main__":
    main()
