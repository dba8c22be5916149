"""Feeds damaged and hostile models to the engine: each must end in a result or a typed refusal.

    python benchmarks/fuzz.py --inputs 100000 --seed 1
    python benchmarks/fuzz.py --seed 1 --replay 4711 --save damaged.onnx

Input number N of seed S is always the same: a model (an operator's row of the test suite, an
example, a small model of `../shared/zoo`), changed byte by byte or field by field. All go through
`inspect`, one of eight through `prune` too. They run in a worker process of limited memory, so
that a crash of native code or a hang is seen, counted and attributed. The exit code is 1 where
anything but results and refusals was found.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import functools
import json
import lzma
import os
import pathlib
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

ROOT = pathlib.Path(__file__).resolve().parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
LIMIT_SECONDS = 20.0  # a single input may take
LIMIT_MEMORY = 3 << 30  # bytes of address space beyond what the imports take
START_SECONDS = 120.0
LARGEST_BASE = 200_000  # bytes of a model that is worth damaging
PRUNE_EVERY = 8

Random = random.Random


# -- what is damaged ---------------------------------------------------------------------------


@functools.cache
def bases() -> tuple[tuple[str, bytes], ...]:
    """Models to start from, by name."""
    models = (*_rows(), *_sequences(), *_spelt_out())
    found = {f"row {name}": content for name, content in models}
    for path in sorted((ROOT / "examples" / "digits").glob("*.onnx")):
        found[path.name] = path.read_bytes()
    for path in sorted(ZOO.glob("*.onnx.xz")):
        content = lzma.decompress(path.read_bytes())
        if len(content) <= LARGEST_BASE:
            found[path.name] = content
    return tuple(found.items())


def _rows() -> Iterator[tuple[str, bytes]]:
    """The smallest model around every operator that has a rule."""
    sys.path.insert(0, str(ROOT / "tests" / "graphops"))
    from nets import Net
    from rows import ROWS

    for row in ROWS:
        net = Net(row.opset)
        if row.domain:
            net.domains[row.domain] = 1
        net.output(row.build(net))
        yield row.id, net.bytes()


def _sequences() -> Iterator[tuple[str, bytes]]:
    """Models with sequences of tensors, which are taken out before any rule sees them."""
    from test_normalise import SEQUENCES, net_of

    for build, opset in SEQUENCES:
        yield f"{build.__name__}, opset {opset}", net_of(build, opset).SerializeToString()


def _spelt_out() -> Iterator[tuple[str, bytes]]:
    """Models with operators that are spelt out before any rule sees them."""
    from test_laws import quantised_as_it_runs
    from test_spelling import FORMS, net_of

    yield "products of integers", quantised_as_it_runs().SerializeToString()
    for name, (operator, build) in FORMS.items():
        yield f"{operator}, {name}", net_of(build).SerializeToString()


def make(seed: int, number: int) -> tuple[str, bytes]:
    """Input `number` of a seed, and what it was made of."""
    draw = Random(f"{seed}:{number}")
    name, content = draw.choice(bases())
    if draw.random() < 0.4:
        done, damaged = _damage_bytes(draw, content)
    else:
        done, damaged = _damage_fields(draw, content)
    return f"{name}: {', '.join(done)}", damaged


# -- byte by byte ------------------------------------------------------------------------------

_VARINTS = (b"\x00", b"\x7f", b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x07", b"\x80" * 12)


def _place(draw: Random, content: bytearray) -> int:
    """Mostly near a string: among names and attributes, not inside weights."""
    for _ in range(20):
        at = draw.randrange(len(content))
        around = content[max(0, at - 8) : at + 8]
        if sum(chr(byte).isalnum() and byte < 128 for byte in around) >= 4:
            return at
    return draw.randrange(len(content))


def _damage_bytes(draw: Random, original: bytes) -> tuple[list[str], bytes]:
    content, done = bytearray(original), []
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        if not content:
            break
        at, kind = _place(draw, content), draw.choice(("flip", "set", "cut", "splice", "varint"))
        kind = "truncate" if draw.random() < 0.04 else kind
        done.append(kind)
        if kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "set":
            content[at] = draw.randrange(256)
        elif kind == "cut":
            del content[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == "splice":
            start, length = draw.randrange(len(content)), draw.choice((1, 4, 32, 256))
            content[at:at] = content[start : start + length]
        elif kind == "varint":
            content[at : at + draw.randrange(3)] = draw.choice(_VARINTS)
        else:
            del content[at:]
    return done, bytes(content)


# -- field by field ----------------------------------------------------------------------------

_SIZES = (0, 1, 2, 3, 5, 7, 64, 1000, 65537, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -1, -2)
_SIZES += (-(2**31), -(2**63))
_TYPES = (*range(-1, 30), 1000, 2**31 - 1)
_Change = Callable[[Random, ModelProto], None]
_CHANGES: list[_Change] = []


def _change(function: _Change) -> _Change:
    _CHANGES.append(function)
    return function


def _damage_fields(draw: Random, original: bytes) -> tuple[list[str], bytes]:
    model, done = onnx.load_from_string(original), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = draw.choice(_CHANGES)
        with contextlib.suppress(
            IndexError, ValueError, DecodeError
        ):  # nothing of the kind in this model
            change(draw, model)
            done.append(change.__name__.strip("_"))
    return done, model.SerializeToString()


def _node(draw: Random, model: ModelProto) -> NodeProto:
    return draw.choice(model.graph.node)


def _tensor(draw: Random, model: ModelProto) -> TensorProto:
    found = list(model.graph.initializer)
    found += [a.t for n in model.graph.node for a in n.attribute if a.HasField("t")]
    return draw.choice(found)


def _attribute(draw: Random, model: ModelProto) -> AttributeProto:
    return draw.choice([a for node in model.graph.node for a in node.attribute])


def _names(model: ModelProto) -> list[str]:
    graph = model.graph
    found = [name for node in graph.node for name in (*node.input, *node.output)]
    return [*found, *(t.name for t in graph.initializer), *(v.name for v in graph.input), ""]


@_change
def _dangling_input(draw: Random, model: ModelProto) -> None:
    node = _node(draw, model)
    node.input[draw.randrange(len(node.input))] = draw.choice(("nowhere", "", "\x00"))


@_change
def _other_input(draw: Random, model: ModelProto) -> None:
    """Crossed wires; cycles among them."""
    node = _node(draw, model)
    node.input[draw.randrange(len(node.input))] = draw.choice(_names(model))


@_change
def _other_output(draw: Random, model: ModelProto) -> None:
    node = _node(draw, model)
    node.output[draw.randrange(len(node.output))] = draw.choice(_names(model))


@_change
def _arity(draw: Random, model: ModelProto) -> None:
    node = _node(draw, model)
    field = draw.choice((node.input, node.output))
    if draw.random() < 0.5:
        del field[draw.randrange(len(field)) :]
    else:
        field.extend(draw.choice(_names(model)) for _ in range(draw.choice((1, 3, 50))))


@_change
def _other_operator(draw: Random, model: ModelProto) -> None:
    names = sorted({schema.name for schema in onnx.defs.get_all_schemas()})
    _node(draw, model).op_type = draw.choice((*names, "", "Conv", "Reshape", "NoSuchOperator"))


@_change
def _other_domain(draw: Random, model: ModelProto) -> None:
    domains = ("com.microsoft", "ai.onnx", "ai.onnx.ml", "no.such.domain", "\x00")
    _node(draw, model).domain = draw.choice(domains)


@_change
def _drop_node(draw: Random, model: ModelProto) -> None:
    del model.graph.node[draw.randrange(len(model.graph.node))]


@_change
def _repeat_node(draw: Random, model: ModelProto) -> None:
    model.graph.node.append(_node(draw, model))


@_change
def _shuffle_nodes(draw: Random, model: ModelProto) -> None:
    nodes = list(model.graph.node)
    draw.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


@_change
def _integer_attribute(draw: Random, model: ModelProto) -> None:
    attribute = _attribute(draw, model)
    if attribute.ints:
        attribute.ints[draw.randrange(len(attribute.ints))] = draw.choice(_SIZES)
    else:
        attribute.i = draw.choice(_SIZES)


@_change
def _common_attribute(draw: Random, model: ModelProto) -> None:
    """Axes out of range, groups that do not divide, on nodes that may know no such attribute."""
    names = ("axis", "group", "num_heads", "kv_num_heads", "q_num_heads", "num_groups", "to")
    names += ("hidden_size", "blocksize", "batch_dims", "keepdims", "num_outputs", "allowzero")
    node, name = _node(draw, model), draw.choice(names)
    for index in reversed(range(len(node.attribute))):
        if node.attribute[index].name == name:
            del node.attribute[index]
    node.attribute.append(helper.make_attribute(name, draw.choice(_SIZES)))


@_change
def _list_attribute(draw: Random, model: ModelProto) -> None:
    names = ("axes", "perm", "pads", "strides", "dilations", "kernel_shape", "split")
    values = [draw.choice(_SIZES) for _ in range(draw.choice((0, 1, 2, 4, 9)))]
    attribute = AttributeProto(name=draw.choice(names), type=AttributeProto.INTS, ints=values)
    _node(draw, model).attribute.append(attribute)


@_change
def _attribute_type(draw: Random, model: ModelProto) -> None:
    _attribute(draw, model).type = draw.choice(range(15))


@_change
def _attribute_kind(draw: Random, model: ModelProto) -> None:
    """A well-made attribute of another kind."""
    attribute = _attribute(draw, model)
    values = (1, 0.5, "text", b"\xff\xfe", [1, 2], [0.5], ["a"], TensorProto(), GraphProto())
    made = helper.make_attribute(attribute.name, draw.choice(values))
    attribute.CopyFrom(made)


@_change
def _drop_attribute(draw: Random, model: ModelProto) -> None:
    node = draw.choice([node for node in model.graph.node if node.attribute])
    del node.attribute[draw.randrange(len(node.attribute))]


@_change
def _rename_attribute(draw: Random, model: ModelProto) -> None:
    _attribute(draw, model).name = draw.choice(("", "axis", "value", "body", "perm"))


@_change
def _huge_attribute(draw: Random, model: ModelProto) -> None:
    attribute = _attribute(draw, model)
    attribute.ints.extend([draw.choice(_SIZES)] * 10_000)
    attribute.s = b"x" * 100_000


@_change
def _dimension(draw: Random, model: ModelProto) -> None:
    tensor = _tensor(draw, model)
    if tensor.dims and draw.random() < 0.7:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(_SIZES)
    else:
        tensor.dims.append(draw.choice(_SIZES))


@_change
def _drop_dimension(draw: Random, model: ModelProto) -> None:
    tensor = _tensor(draw, model)
    del tensor.dims[draw.randrange(len(tensor.dims))]


@_change
def _element_type(draw: Random, model: ModelProto) -> None:
    _tensor(draw, model).data_type = draw.choice(_TYPES)


@_change
def _raw_length(draw: Random, model: ModelProto) -> None:
    tensor = _tensor(draw, model)
    raw = tensor.raw_data
    tensor.raw_data = draw.choice((b"", raw[:-1], raw[: len(raw) // 2], raw + b"x", raw * 2))


@_change
def _integer_values(draw: Random, model: ModelProto) -> None:
    """Shapes, axes and indices that fit nothing."""
    found = [t for t in model.graph.initializer if t.data_type == TensorProto.INT64]
    tensor = draw.choice(found)
    count = max(len(tensor.raw_data) // 8, 1)
    values = [draw.choice(_SIZES) % 2**64 for _ in range(count)]
    tensor.raw_data = b"".join(value.to_bytes(8, "little") for value in values)


@_change
def _typed_data(draw: Random, model: ModelProto) -> None:
    tensor = _tensor(draw, model)
    tensor.ClearField("raw_data")
    tensor.int32_data.extend(draw.choice((0, -1, 70000)) for _ in range(draw.randrange(5)))


@_change
def _external_reference(draw: Random, model: ModelProto) -> None:
    tensor = _tensor(draw, model)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../etc/passwd"), ("offset", "-1"), ("length", "x")):
        if draw.random() < 0.7:
            tensor.external_data.add(key=key, value=value)


@_change
def _zero_size(draw: Random, model: ModelProto) -> None:
    tensor = draw.choice([t for t in model.graph.initializer if t.dims])
    tensor.dims[draw.randrange(len(tensor.dims))] = 0
    tensor.raw_data = b""


@_change
def _input_shape(draw: Random, model: ModelProto) -> None:
    value = draw.choice((*model.graph.input, *model.graph.output))
    shape = value.type.tensor_type.shape
    if not shape.dim or draw.random() < 0.2:
        value.type.tensor_type.ClearField("shape")
        return
    dim = draw.choice(shape.dim)
    if draw.random() < 0.3:
        dim.dim_param = draw.choice(("N", "", "batch", "\x00"))
    else:
        dim.dim_value = draw.choice(_SIZES)


@_change
def _input_type(draw: Random, model: ModelProto) -> None:
    value = draw.choice((*model.graph.input, *model.graph.output))
    if draw.random() < 0.8:
        value.type.tensor_type.elem_type = draw.choice(_TYPES)
    elif draw.random() < 0.5:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    else:
        value.ClearField("type")


@_change
def _value_info(draw: Random, model: ModelProto) -> None:
    """A recorded shape that is not true."""
    shape = [draw.choice(_SIZES) for _ in range(draw.randrange(6))]
    kind = draw.choice((1, 7, 9))
    info = helper.make_tensor_value_info(draw.choice(_names(model)), kind, shape)
    model.graph.value_info.append(info)


@_change
def _repeat_name(draw: Random, model: ModelProto) -> None:
    graph = model.graph
    field = draw.choice((graph.initializer, graph.input, graph.output))
    field.append(draw.choice(field))


@_change
def _rename_value(draw: Random, model: ModelProto) -> None:
    graph = model.graph
    field = draw.choice((graph.initializer, graph.input, graph.output))
    draw.choice(field).name = draw.choice(_names(model))


@_change
def _drop_value(draw: Random, model: ModelProto) -> None:
    field = draw.choice((model.graph.initializer, model.graph.input, model.graph.output))
    del field[draw.randrange(len(field))]


@_change
def _versions(draw: Random, model: ModelProto) -> None:
    if draw.random() < 0.3:
        model.ir_version = draw.choice(_SIZES)
    if draw.random() < 0.1:
        del model.opset_import[:]
    else:
        draw.choice(model.opset_import).version = draw.choice((*range(-1, 30), *_SIZES))


@_change
def _second_domain(draw: Random, model: ModelProto) -> None:
    domain = draw.choice(("", "ai.onnx", "com.microsoft", "no.such.domain"))
    model.opset_import.append(helper.make_opsetid(domain, draw.choice((0, 1, 13, 2**40))))


@_change
def _nest(draw: Random, model: ModelProto) -> None:
    """Subgraphs in subgraphs; protobuf itself stops at about 100 messages."""
    graph = GraphProto(name="inner")
    graph.CopyFrom(model.graph)
    del graph.initializer[:]
    del graph.input[:]
    for _ in range(draw.choice((1, 2, 10, 24, 40))):
        kind, name = draw.choice((("If", "then_branch"), ("Loop", "body"), ("Scan", "body")))
        node = NodeProto(op_type=kind, input=[draw.choice(_names(model))], output=["nested"])
        node.attribute.append(AttributeProto(name=name, type=AttributeProto.GRAPH, g=graph))
        graph = GraphProto(name="outer", node=[node])
    model.graph.node.extend(graph.node)


@_change
def _body(draw: Random, model: ModelProto) -> None:
    """Damage inside a subgraph."""
    graphs = [a.g for n in model.graph.node for a in n.attribute if a.HasField("g")]
    inside = ModelProto(graph=draw.choice(graphs), opset_import=model.opset_import)
    change = draw.choice(_CHANGES)
    with contextlib.suppress(IndexError, ValueError, DecodeError):
        change(draw, inside)
    draw.choice(graphs).CopyFrom(inside.graph)


@_change
def _many_nodes(draw: Random, model: ModelProto) -> None:
    source = draw.choice(_names(model))
    kind = draw.choice(("Relu", "Identity", "Neg", "Shape", "Cast"))
    for index in range(draw.choice((50, 2000))):
        model.graph.node.add(op_type=kind, input=[source], output=[f"many_{index}"])
        source = f"many_{index}" if draw.random() < 0.95 else source


@_change
def _function(draw: Random, model: ModelProto) -> None:
    """A local function; half of them call themselves."""
    made = model.functions.add(name="F", domain="local", input=["a"], output=["b"])
    made.opset_import.add(domain="", version=17)
    inner = ("F", "local") if draw.random() < 0.5 else ("Relu", "")
    made.node.add(op_type=inner[0], domain=inner[1], input=["a"], output=["b"])
    model.opset_import.add(domain="local", version=1)
    node = _node(draw, model)
    node.op_type, node.domain = "F", "local"


@_change
def _sparse(draw: Random, model: ModelProto) -> None:
    made = model.graph.sparse_initializer.add()
    made.dims.extend(draw.choice(_SIZES) for _ in range(draw.randrange(4)))
    made.values.CopyFrom(_tensor(draw, model))
    made.indices.CopyFrom(_tensor(draw, model))


@_change
def _wild_reshape(draw: Random, model: ModelProto) -> None:
    """Any tensor, to a shape that may be impossible."""
    node = _node(draw, model)
    shape = [draw.choice((*_SIZES, 0, -1, 4, 6)) for _ in range(draw.randrange(6))]
    name = f"wild_{len(model.graph.node)}"
    model.graph.initializer.append(helper.make_tensor(name, 7, [len(shape)], shape))
    kind = draw.choice(("Reshape", "Expand", "Tile", "ConstantOfShape", "Pad", "Slice", "Range"))
    source = [name] if kind == "ConstantOfShape" else [node.input[0], name, name, name]
    count = 2 if kind in ("Reshape", "Expand", "Tile", "Pad") else 4
    made = NodeProto(op_type=kind, input=source[:count], output=[f"{name}_out"])
    at = next(i for i, other in enumerate(model.graph.node) if other is node or other == node)
    model.graph.node.insert(at, made)
    model.graph.node[at + 1].input[0] = made.output[0]


# -- the worker --------------------------------------------------------------------------------


def examine(content: bytes, prune: bool) -> str:
    """ "ok", or the code of the refusal.

    Raises:
        Exception: what must not happen.
    """
    import secateur
    from secateur import graphops
    from secateur.graphops.model import runtime

    runtime.RUN_SECONDS = LIMIT_SECONDS / 4  # a loop that counts to 2**62 is given up sooner here
    try:
        graphops.inspect(content, external_data=False)
        if prune:
            graphops.prune(content, external_data=False, measure_latency=False)
    except secateur.Refused as refused:
        str(refused)
        refused.refusal.model_dump_json()
        return str(refused.refusal.code)
    return "ok"


def _limit_memory() -> None:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT_MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _place_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/secateur/" in frame.filename] or frames
    inner = f" ({pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno})"
    where = f"{ours[-1].filename.partition('/secateur/')[2]}:{ours[-1].lineno}"
    return where + ("" if frames[-1] is ours[-1] else inner)


def work(seed: int, start: int, stop: int) -> None:
    """Examines inputs start … stop-1; one line of JSON each on stdout."""
    import secateur.graphops  # noqa: F401  before memory is limited

    bases()
    _limit_memory()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # native code prints where it likes
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for number in range(start, stop):
        faulthandler.dump_traceback_later(LIMIT_SECONDS - 2, exit=False)
        _, content = make(seed, number)
        began = time.perf_counter()
        try:
            outcome = {"outcome": examine(content, number % PRUNE_EVERY == 0)}
        except Exception as error:
            text = str(error).partition("\n")[0][:160]
            outcome = {"unexpected": f"{type(error).__name__} at {_place_of(error)}", "text": text}
        faulthandler.cancel_dump_traceback_later()
        took = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        line = json.dumps({"number": number, "took": took, "peak": peak, **outcome})
        print(line, file=answers, flush=True)


# -- the parent --------------------------------------------------------------------------------


class Tally:
    """What came of a run."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failures: dict[str, list[int]] = {}
        self.texts: dict[str, str] = {}
        self.slowest: list[tuple[float, int]] = []
        self.peak = 0

    @property
    def total(self) -> int:
        """Inputs that ended, in whichever way."""
        return sum(self.outcomes.values()) + sum(map(len, self.failures.values()))

    def add(self, line: dict[str, object]) -> None:
        """Counts one line of a worker."""
        number = int(str(line["number"]))
        if "outcome" in line:
            self.outcomes[str(line["outcome"])] += 1
        else:
            self.fail(str(line["unexpected"]), number, str(line["text"]))
        self.slowest = sorted([*self.slowest, (float(str(line["took"])), number)])[-5:]
        self.peak = max(self.peak, int(str(line["peak"])))

    def fail(self, what: str, number: int, text: str = "") -> None:
        """Counts an input that ended in anything else."""
        self.failures.setdefault(what, []).append(number)
        self.texts.setdefault(what, text)


def run(seed: int, first: int, count: int, seconds: float | None = None) -> Tally:
    """Examines `count` inputs in one worker after another, in at most `seconds`."""
    tally, number, stop = Tally(), first, first + count
    ends = None if seconds is None else time.monotonic() + seconds
    while number < stop and (ends is None or time.monotonic() < ends):
        number = _one_worker(tally, seed, number, min(stop, number + 5000), ends)
    return tally


def _one_worker(tally: Tally, seed: int, start: int, stop: int, ends: float | None) -> int:
    """Runs a worker until it is done, dies, hangs or time is up; the next number to examine."""
    command = [sys.executable, __file__, "--seed", str(seed), "--worker", str(start), str(stop)]
    number, patience = start, START_SECONDS
    with (
        tempfile.TemporaryFile() as trace,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=trace, bufsize=0) as worker,
    ):
        assert worker.stdout is not None
        buffer = b""
        while number < stop and (ends is None or time.monotonic() < ends):
            readable, _, _ = select.select([worker.stdout], [], [], patience)
            chunk = worker.stdout.read(1 << 16) if readable else b""
            if not chunk:
                worker.kill()
                code = worker.wait()
                if patience == START_SECONDS:
                    trace.seek(0)
                    raise RuntimeError(f"the worker did not start: {trace.read().decode()[-2000:]}")
                what = f"crash, code {code}" if readable else "hang"
                trace.seek(0)
                tally.fail(*_attributed(what, number, trace.read().decode(errors="replace")))
                return number + 1
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in map(json.loads, lines):
                patience = LIMIT_SECONDS
                if "number" in line:
                    tally.add(line)
                    number = line["number"] + 1
        worker.kill()
    return number


def _attributed(what: str, number: int, trace: str) -> tuple[str, int, str]:
    """A crash or hang with the innermost frames that faulthandler wrote."""
    frames = [line.strip() for line in trace.splitlines() if line.startswith("  File")]
    ours = next((frame for frame in frames if "/secateur/" in frame), "")
    return f"{what} {ours.rpartition('/secateur/')[2]}", number, trace[-400:]


def show(tally: Tally, seed: int, seconds: float) -> None:
    """Prints counts, and the numbers of what failed."""
    print(f"seed {seed}: {tally.total} inputs in {seconds:.0f} s, peak memory {tally.peak} MiB")
    for outcome, count in tally.outcomes.most_common():
        print(f"  {count:8d}  {outcome}")
    print("slowest: " + ", ".join(f"{took:.2f} s (#{n})" for took, n in reversed(tally.slowest)))
    for what, numbers in sorted(tally.failures.items(), key=lambda item: -len(item[1])):
        print(f"FAILED {len(numbers)} × {what}: {tally.texts[what]}\n    {numbers[:8]}")
    print("clean" if not tally.failures else f"{len(tally.failures)} kinds of failure")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--replay", type=int, help="examine one input in this process")
    parser.add_argument("--save", type=pathlib.Path, help="where to write the replayed input")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    faulthandler.enable()
    if options.worker:
        work(options.seed, *options.worker)
        return 0
    if options.replay is not None:
        described, content = make(options.seed, options.replay)
        print(f"{described}; {len(content)} bytes, crc {zlib.crc32(content):08x}")
        if options.save:
            options.save.write_bytes(content)
        print(examine(content, prune=options.replay % PRUNE_EVERY == 0))
        return 0
    began = time.monotonic()
    tally = run(options.seed, options.first, options.inputs, options.seconds)
    show(tally, options.seed, time.monotonic() - began)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
