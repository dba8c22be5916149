"""The main job on real models: figures for size, exactness, time, memory and the wire.

    python benchmarks/main.py

Uses `../shared/bench` and `../shared/zoo` where they are, else the models of `examples/digits`.
Times are of this machine at this moment; ratios come from runs that take turns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import lzma
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import onnx

import secateur
from secateur.graphops.coupling.analyse import couple
from secateur.graphops.model.normalise import unshare
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.shapes import infer_shapes
from secateur.graphops.verify.law import check_law
from secateur.recipe import Recipe

ROOT = pathlib.Path(__file__).resolve().parents[1]
BENCH = ROOT.parent / "shared" / "bench"
ZOO = ROOT.parent / "shared" / "zoo"
RECIPE = Recipe(target={"macs": 0.5})
MODELS = {
    "resnet20": "cifar10/resnet20.onnx",
    "resnet56": "cifar10/resnet56.onnx",
    "efficientnet_lite0": "imagenet/efficientnet_lite0.onnx",
    "mobilenet_v1_075_192": "imagenet/mobilenet_v1_075_192.onnx",
    "lenet5": "mnist/lenet5.onnx",
    "kws_dscnn": "kws/kws_dscnn.onnx",
    "chargpt": "chargpt/chargpt.onnx",
    "all_minilm_l6_v2": "minilm/all_minilm_l6_v2.onnx.xz",
}


def models() -> dict[str, bytes]:
    """The models of the table, by name."""
    if not BENCH.exists():
        return {path.stem: path.read_bytes() for path in (ROOT / "examples/digits").glob("*.onnx")}
    found = {}
    for name, place in MODELS.items():
        content = (BENCH / place).read_bytes()
        found[name] = lzma.decompress(content) if place.endswith(".xz") else content
    return found


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A server as a process of its own; yields its address."""
    command = [sys.executable, "-m", "secateur", "serve", "--listen", "127.0.0.1:0", "--no-cache"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if address := re.search(r"127\.0\.0\.1:[1-9]\d*", line):
                yield address.group()
                break
    finally:
        process.terminate()
        process.wait(timeout=15)


def table(address: str) -> None:
    """Size, law, determinism and latency of each model at macs=0.5."""
    print(
        f"{'model':22s} {'MACs':>6s} {'params':>6s} {'law':>7s} {'batches':>8s} {'server':>7s} "
        f"{'again':>6s} {'before ms':>9s} {'after ms':>9s} {'ratio':>6s}  named exceptions"
    )
    with secateur.Client(address) as client:
        for name, model in models().items():
            result = secateur.prune(model, RECIPE)
            again = secateur.prune(model, RECIPE, measure_latency=False)
            remote = client.prune(model, RECIPE)
            law = check_law(model, result)
            before, after = result.report.before, result.report.after
            assert before.latency is not None
            assert after.latency is not None
            batches = "/".join(str(n) for n in result.report.verification.batch_sizes)
            print(
                f"{name:22s} {after.macs / before.macs:6.4f} {after.params / before.params:6.3f} "
                f"{law.difference:7.0e} {batches:>8s} "
                f"{'same' if remote.model == result.model else 'OTHER':>7s} "
                f"{'same' if again.model == result.model else 'OTHER':>6s} "
                f"{before.latency.p50_ms:9.3f} {after.latency.p50_ms:9.3f} "
                f"{after.latency.p50_ms / before.latency.p50_ms:6.2f}  "
                f"{', '.join(law.exceptions) or 'none'}",
                flush=True,
            )


def latency_targets() -> None:
    """What comes of asking for a latency: as measured at the end, MACs it took, seconds."""
    print("model                   asked  found  MACs  seconds")
    for name, model in models().items():
        for asked in (0.8, 0.6):
            start = time.perf_counter()
            try:
                report = secateur.prune(model, Recipe(target={"latency": asked})).report
            except secateur.Refused as refused:
                print(f"{name:22s} {asked:6.2f}  {refused.refusal.found}", flush=True)
                continue
            before, after = report.before, report.after
            assert before.latency is not None
            assert after.latency is not None
            print(
                f"{name:22s} {asked:6.2f} {after.latency.p50_ms / before.latency.p50_ms:6.2f} "
                f"{after.macs / before.macs:5.2f} {time.perf_counter() - start:8.1f}",
                flush=True,
            )


def resnet50() -> bytes | None:
    """A ResNet-50 of the zoo, about 100 MB."""
    if not ZOO.exists():
        return None
    spec = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    model: onnx.ModelProto = zoo.load("tv_resnet50")
    return model.SerializeToString()


def coupling_time(name: str, model: bytes, runs: int = 9) -> None:
    """Shapes, labels and components of an opened model: by the clock, and of the processor.

    What else the machine does shows in the first only.
    """
    clock, processor = [], []
    for _ in range(runs):
        opened = open_model(model)
        start, used = time.perf_counter(), time.process_time()
        unshare(opened.model)
        couple(opened.model, infer_shapes(opened.model))
        processor.append((time.process_time() - used) * 1e3)
        clock.append((time.perf_counter() - start) * 1e3)
    print(
        f"coupling {name}: median {statistics.median(clock):.1f} ms, best {min(clock):.1f} ms; "
        f"processor {statistics.median(processor):.1f} and {min(processor):.1f} ms"
    )


def whole_prune(model: bytes, runs: int = 3) -> None:
    """A prune without calibration in a fresh process, after imports: seconds and peak memory.

    As the process is, and with glibc told to keep what is freed, as the program tells it.
    """
    program = (
        "import re, sys, time, secateur; secateur.prune; import onnxruntime\n"
        f"secateur.prune({str(ROOT / 'examples/digits/digits_cnn.onnx')!r})\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before, start, used = peak(), time.perf_counter(), time.process_time()\n"
        "secateur.prune(sys.argv[1], secateur.Recipe(target={'macs': 0.5}))\n"
        "seconds, used = time.perf_counter() - start, time.process_time() - used\n"
        "print(seconds, used, (peak() - before) * 1024)\n"
    )
    keep = "from secateur import _malloc; _malloc.keep_freed(32 << 20, 256 << 20)\n"
    told = {"as it is": "", "freed memory kept": keep}
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(model)
        file.flush()
        for _, (how, first) in itertools.product(range(runs), told.items()):
            done = subprocess.run(
                [sys.executable, "-c", first + program, file.name],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
            )
            seconds, used, memory = (float(item) for item in done.stdout.split())
            print(
                f"whole prune, {len(model) / 1e6:.0f} MB, {how}: {seconds:.2f} s, processor "
                f"{used:.2f} s, memory grew by {memory / len(model):.2f} x the model"
            )


def overhead(address: str, model: bytes, runs: int = 7) -> None:
    """The same prune in process and over gRPC, in turns: of a model that the server has never
    seen, which travels there first, and of one that it has."""
    proto = onnx.ModelProto.FromString(model)
    times: dict[str, list[float]] = {"in process": [], "new to the server": [], "known to it": []}
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file, secateur.Client(address) as client:
        for turn in range(runs + 1):
            proto.doc_string = f"turn {turn}"
            pathlib.Path(file.name).write_bytes(proto.SerializeToString())
            for taken, prune in zip(
                times.values(), (secateur.prune, client.prune, client.prune), strict=True
            ):
                start = time.perf_counter()
                prune(file.name, RECIPE)
                taken.append(time.perf_counter() - start)
    print(f"gRPC against in process, {len(model) / 1e6:.0f} MB, {runs} turns:")
    base = times["in process"][1:]  # the first turn waits for imports
    for name, (_, *taken) in times.items():
        ratio = statistics.median(taken) / statistics.median(base)
        print(
            f"  {name:18s} median {statistics.median(taken):.2f} s, best {min(taken):.2f} s: "
            f"{100 * (ratio - 1):+.1f} %, {100 * (min(taken) / min(base) - 1):+.1f} %"
        )


def main() -> None:
    """Prints everything."""
    logging.disable(logging.WARNING)
    with server() as address:
        table(address)
        print()
        latency_targets()
        print()
        if BENCH.exists():
            efficientnet = (BENCH / MODELS["efficientnet_lite0"]).read_bytes()
            coupling_time("EfficientNet-Lite0", efficientnet)
        large = resnet50()
        if large is not None:
            coupling_time("ResNet-50", large)
            whole_prune(large)
            overhead(address, large)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak memory of this program: {peak} MiB")


if __name__ == "__main__":
    main()
