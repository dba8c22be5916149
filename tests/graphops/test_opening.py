"""Opening: every form of a model gives the same result, and what is none is refused by name."""

from __future__ import annotations

import ast
import hashlib
import pathlib
import tempfile
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from laws import prune
from nets import Net
from onnx import TensorProto, helper

import secateur
from secateur.errors import Code, Refusal, Refused
from secateur.graphops.model.opening import open_model
from secateur.graphops.model.runtime import open_session
from secateur.graphops.verify.law import check_law
from secateur.result import WeightsFile


def model() -> onnx.ModelProto:
    net = Net()
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8, 3))
    net.output(net.conv(net.op("Relu", net.conv(x, 8, 6)), 6, 3), shape=["N", 3, 6, 6])
    return net.model()


def refusal(source: Any, code: Code = Code.INVALID_MODEL, **options: Any) -> Refusal:
    with pytest.raises(Refused) as caught:
        open_model(source, **options)
    assert caught.value.refusal.code is code
    assert caught.value.refusal.message
    return caught.value.refusal


# -- sources -----------------------------------------------------------------------------------


def test_path_bytes_proto_and_ir_model_give_the_same_result(tmp_path: pathlib.Path) -> None:
    proto = model()
    serialised = proto.SerializeToString(deterministic=True)
    path = tmp_path / "model.onnx"
    path.write_bytes(serialised)
    sources = [path, str(path), serialised, bytearray(serialised), proto]
    results = [prune(source) for source in sources]
    assert len({result.model for result in results}) == 1
    assert {result.plan.source for result in results} == {hashlib.sha256(serialised).hexdigest()}
    from_ir = prune(ir.from_proto(proto))
    assert from_ir.plan.kept == results[0].plan.kept
    assert from_ir.model == results[0].model


def test_the_standard_operators_have_two_names() -> None:
    spelt = model()
    spelt.opset_import[0].domain = "ai.onnx"
    for node in spelt.graph.node:
        node.domain = "ai.onnx"
    assert prune(spelt).plan.kept == prune(model()).plan.kept
    assert "" in open_model(spelt).model.opset_imports


def test_a_known_digest_is_taken() -> None:
    assert secateur.prune(model(), sha256="ab" * 32).plan.source == "ab" * 32


def large(*, constants: bool = False) -> bytes:
    """A model of 37 MB: large enough to have its weights put aside; in Constant nodes if asked."""
    net = Net()
    x = net.op("Relu", net.op("MatMul", net.input("x", ["N", 16]), net.floats(16, 3000)))
    y = net.op("Relu", net.op("MatMul", x, net.floats(3000, 3000)))
    net.output(net.op("MatMul", y, net.floats(3000, 4)), shape=["N", 4])
    if constants:
        weights, net.initializers = net.initializers, []
        net.nodes[:0] = [helper.make_node("Constant", [], [w.name], value=w) for w in weights]
    return net.bytes()


@pytest.mark.parametrize("constants", [False, True])
def test_weights_put_aside_change_nothing(
    constants: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = large(constants=constants)
    opened = open_model(source)
    assert opened.aside is not None
    tensors = {name: value.const_value for name, value in opened.model.graph.initializers.items()}
    tensors |= {
        node.outputs[0].name: node.attributes["value"].as_tensor()
        for node in opened.model.graph
        if node.op_type == "Constant"
    }
    for wanted in onnx.load_from_string(large()).graph.initializer:
        found = tensors[wanted.name]
        assert isinstance(found, ir.ExternalTensor) == (len(wanted.raw_data) >= 1 << 16)
        np.testing.assert_array_equal(found.numpy(), onnx.numpy_helper.to_array(wanted))
    del opened, tensors, found
    result = prune(source)
    assert check_law(source, result).difference < 1e-4
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("secateur.graphops.model.opening.LARGE", len(source))
    assert open_model(source).aside is None
    assert prune(source).model == result.model


@pytest.mark.parametrize("constants", [False, True])
def test_weights_put_aside_run_on_calibration_data(
    constants: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a model are run from bytes, and weights stand in initializers or in nodes."""
    source = large(constants=constants)
    data = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}
    options = {"target": {"macs": 0.5}, "criterion": "wanda", "repair": False}
    result = prune(source, calibration=data, **options)
    monkeypatch.setattr("secateur.graphops.model.opening.LARGE", len(source))
    assert prune(source, calibration=data, **options).model == result.model


def test_weights_of_a_branch_in_a_file_run_on_calibration_data(tmp_path: pathlib.Path) -> None:
    def branch(place: int) -> onnx.GraphProto:
        inner = Net(seed=place)
        inner._count = 100 * place  # names of its own
        inner.output(inner.dense("hidden", 24, 24), shape=["N", 24])
        return inner.model().graph

    net = Net()
    net.nodes.append(
        helper.make_node("Relu", [net.dense(net.input("x", ["N", 16]), 16, 24)], ["hidden"])
    )
    chosen = net.op("Greater", net.op("ReduceMax", "hidden", keepdims=0), net.const(np.float32(0)))
    y = net.op("If", chosen, then_branch=branch(1), else_branch=branch(2))
    net.output(net.dense(net.op("Relu", y), 24, 4))
    path = tmp_path / "model.onnx"
    onnx.save(net.model(), path, save_as_external_data=True, size_threshold=16)
    data = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}
    options = {"target": {"channels": 0.5}, "criterion": "wanda"}
    result = prune(path, calibration=data, **options)
    assert result.model == prune(net.bytes(), calibration=data, **options).model


def test_a_large_model_opens_where_there_is_no_room_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = WeightsFile(pathlib.Path("/nonexistent/folder/weights"))
    monkeypatch.setattr(WeightsFile, "new", lambda: nowhere)
    opened = open_model(large())
    assert opened.aside is None
    assert all(value.const_value.numpy().size for value in opened.model.graph.initializers.values())


def test_a_graphsurgeon_graph_is_a_source() -> None:
    proto = model()
    graph = gs.import_onnx(proto)
    result, wanted = prune(graph), prune(proto)
    assert result.plan.kept == wanted.plan.kept
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    outputs = [open_session(found.model).run(None, feeds)[0] for found in (result, wanted)]
    assert np.array_equal(*outputs)


def test_a_result_opens_edits_and_exports_through_graphsurgeon() -> None:
    graph = gs.import_onnx(onnx.load_from_string(prune(model()).model))
    relu = next(node for node in graph.nodes if node.op == "Relu")
    relu.op = "Sigmoid"
    graph.cleanup().toposort()
    edited = gs.export_onnx(graph).SerializeToString()
    feeds = {"x": np.ones((1, 3, 6, 6), np.float32)}
    (output,) = open_session(edited).run(None, feeds)
    assert output.shape == (1, 3, 6, 6)


@pytest.mark.parametrize("form", ["path", "proto", "ir", "gs", "bytes"])
def test_the_original_is_untouched(form: str, tmp_path: pathlib.Path) -> None:
    proto = model()
    before = proto.SerializeToString(deterministic=True)
    if form == "path":
        source: Any = tmp_path / "model.onnx"
        source.write_bytes(before)
        after = source.read_bytes
    elif form == "ir":
        source = ir.from_proto(proto)
        state = ir.to_proto(source).SerializeToString(deterministic=True)
        before, after = state, lambda: ir.to_proto(source).SerializeToString(deterministic=True)
    elif form == "gs":
        source = gs.import_onnx(proto)
        state = gs.export_onnx(source).SerializeToString(deterministic=True)
        before, after = state, lambda: gs.export_onnx(source).SerializeToString(deterministic=True)
    elif form == "bytes":
        source = bytearray(before)
        after = lambda: bytes(source)  # noqa: E731
    else:
        source, after = proto, lambda: proto.SerializeToString(deterministic=True)
    prune(source)
    assert after() == before


@pytest.mark.parametrize("source", [None, 3, ["model.onnx"], {"graph": 1}, object()])
def test_what_is_no_source_at_all_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError, match="a model is"):
        open_model(source)


# -- not a model -------------------------------------------------------------------------------


def test_a_file_that_is_not_there(tmp_path: pathlib.Path) -> None:
    assert "none.onnx" in refusal(tmp_path / "none.onnx").message
    assert str(tmp_path) in refusal(tmp_path).message


def test_empty(tmp_path: pathlib.Path) -> None:
    assert "empty" in refusal(b"").message
    path = tmp_path / "empty.onnx"
    path.touch()
    assert "empty" in refusal(path).message


def test_cut_short_anywhere() -> None:
    """Every prefix is refused, or is a whole model by chance of the format: never a crash."""
    serialised = model().SerializeToString()
    refused = 0
    for end in range(0, len(serialised), 7):
        try:
            open_model(serialised[:end])
        except Refused as error:
            refused += 1
            assert error.refusal.code in (Code.INVALID_MODEL, Code.UNSUPPORTED_VERSION)
    assert refused > 0.95 * len(range(0, len(serialised), 7))


def test_random_bytes() -> None:
    draw = np.random.default_rng(0)
    for size in (1, 10, 100, 1000, 10000):
        for _ in range(20):
            refusal(draw.bytes(size))


def test_damaged_bytes_never_crash() -> None:
    serialised = bytearray(model().SerializeToString())
    draw = np.random.default_rng(1)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(serialised)
        for _ in range(3):
            damaged[draw.integers(len(damaged))] = draw.integers(256)
        try:
            secateur.inspect(bytes(damaged))
            outcomes.add("opened")
        except Refused as error:
            outcomes.add(error.refusal.code.value)
    assert Code.INVALID_MODEL.value in outcomes
    assert "opened" in outcomes  # damage inside a weight


def test_nested_too_deep() -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "inner", [], [])
    serialised = graph.SerializeToString()
    for _ in range(120):
        # a graph with one node, with one attribute that holds the last graph: tags by hand, since
        # protobuf itself refuses to build it
        attribute = _field(1, b"body") + _field(6, serialised) + b"\xa0\x01\x05"
        node = _field(4, b"Loop") + _field(5, attribute)
        serialised = _field(1, node) + _field(2, b"g")
    proto = b"\x08\x08" + _field(7, serialised)
    assert "deep" in refusal(proto).message


def _field(number: int, content: bytes) -> bytes:
    """One length-delimited protobuf field."""
    length, size = len(content), b""
    while True:
        size += bytes([length & 127 | (128 if length > 127 else 0)])
        length >>= 7
        if not length:
            return bytes([number << 3 | 2]) + size + content


def test_no_graph() -> None:
    proto = onnx.ModelProto(ir_version=8)
    proto.opset_import.add(version=17)
    assert "0 nodes" in refusal(proto).found


def test_no_operator_set() -> None:
    proto = model()
    del proto.opset_import[:]
    assert "operator set" in refusal(proto).message


def test_a_node_that_reads_what_nothing_defines() -> None:
    proto = model()
    proto.graph.node[1].input[0] = "nobody"
    found = refusal(proto)
    assert "nobody" in found.message
    assert found.nodes == (proto.graph.node[1].name,)


def test_an_output_that_nothing_produces() -> None:
    proto = model()
    proto.graph.output[0].name = "nobody"
    assert "nobody" in refusal(proto).message


def test_a_value_that_is_defined_twice() -> None:
    proto = model()
    proto.graph.node[2].output[0] = proto.graph.node[0].output[0]
    refusal(proto)


def test_a_cycle() -> None:
    proto = model()
    proto.graph.node[0].input[0] = proto.graph.node[2].output[0]
    refusal(proto)


def test_nodes_out_of_order_are_put_in_order() -> None:
    proto = model()
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    opened = open_model(proto).model
    assert [node.op_type for node in opened.graph] == ["Conv", "Relu", "Conv", "Relu", "Conv"]


def test_a_sparse_initializer_with_indices_outside() -> None:
    proto = model()
    values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [99])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2, 2]))
    assert "sparse" in refusal(proto).message


def test_a_model_that_does_not_run_is_said_so_by_prune() -> None:
    proto = model()
    proto.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(Refused) as caught:
        prune(proto)
    assert caught.value.refusal.code is Code.MODEL_DOES_NOT_RUN
    assert "NoSuchOperator" in caught.value.refusal.message


def test_what_does_not_run_is_told_before_what_cannot_be_cut() -> None:
    proto = model()
    for unknown in proto.graph.node:
        unknown.op_type = "NoSuchOperator"
    with pytest.raises(Refused) as caught:
        prune(proto)
    assert caught.value.refusal.code is Code.MODEL_DOES_NOT_RUN


# -- versions ----------------------------------------------------------------------------------


def test_a_newer_ir_version() -> None:
    proto = model()
    proto.ir_version = onnx.IR_VERSION + 1
    found = refusal(proto, Code.UNSUPPORTED_VERSION)
    assert str(onnx.IR_VERSION) in found.expected
    assert found.found == str(onnx.IR_VERSION + 1)


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_a_newer_opset(domain: str) -> None:
    newest = onnx.defs.onnx_opset_version()
    proto = model()
    proto.opset_import[0].domain = domain
    proto.opset_import[0].version = newest + 1
    found = refusal(proto, Code.UNSUPPORTED_VERSION)
    assert str(newest) in found.expected
    assert found.found == str(newest + 1)


def test_other_domains_have_versions_of_their_own() -> None:
    proto = model()
    proto.opset_import.append(helper.make_opsetid("example", 1000))
    assert open_model(proto).model.opset_imports["example"] == 1000


# -- external data -----------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: pathlib.Path) -> tuple[pathlib.Path, onnx.ModelProto]:
    """A model whose weights lie in `weights.bin` beside it, and its proto to be changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(model(), path, save_as_external_data=True, location="weights.bin", size_threshold=16)
    return path, onnx.load(path, load_external_data=False)


def rewritten(path: pathlib.Path, proto: onnx.ModelProto, **entries: str) -> str:
    """Changes the first external reference and writes the model; gives the tensor's name."""
    tensor = next(t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    stated = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in stated.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return tensor.name


Outside = tuple[pathlib.Path, onnx.ModelProto]


def test_weights_beside_the_model_are_read(outside: Outside) -> None:
    path, proto = outside
    assert any(t.data_location == TensorProto.EXTERNAL for t in proto.graph.initializer)
    result, wanted = prune(path), prune(model())
    locations = {t.data_location for t in onnx.load_from_string(result.model).graph.initializer}
    assert locations == {TensorProto.DEFAULT}
    assert check_law(path, result).difference < 1e-5
    assert result.plan.kept == wanted.plan.kept
    feeds = {"x": np.ones((1, 3, 6, 6), np.float32)}
    outputs = [open_session(found.model).run(None, feeds)[0] for found in (result, wanted)]
    assert np.array_equal(*outputs)
    assert open_model(path).size > path.stat().st_size


def test_activations_of_a_model_with_weights_beside_it(outside: Outside) -> None:
    path, _ = outside
    data = {"x": np.random.default_rng(0).standard_normal((4, 3, 6, 6)).astype(np.float32)}
    found = prune(path, criterion="activation", calibration=data)
    assert found.plan.kept == prune(model(), criterion="activation", calibration=data).plan.kept


@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "deep/../../secret.bin", "ABSOLUTE", "", "link.bin", "to/secret.bin"],
)
def test_a_file_outside_the_folder_is_unsafe(outside: Outside, location: str) -> None:
    path, proto = outside
    secret = path.parent.parent / "secret.bin"
    secret.write_bytes((path.parent / "weights.bin").read_bytes())
    (path.parent / "deep").mkdir()
    (path.parent / "link.bin").symlink_to(secret)
    (path.parent / "to").symlink_to(path.parent.parent)
    location = str(secret) if location == "ABSOLUTE" else location
    name = rewritten(path, proto, location=location)
    found = refusal(path, Code.UNSAFE_EXTERNAL_DATA)
    assert found.nodes == (name,)
    assert found.found == location


def test_a_file_with_two_names_is_unsafe(outside: Outside) -> None:
    """It may be anybody's, and onnx_ir does not open it."""
    path, _ = outside
    (path.parent / "other.bin").hardlink_to(path.parent / "weights.bin")
    assert refusal(path, Code.UNSAFE_EXTERNAL_DATA).found == "weights.bin"


def test_a_link_inside_the_folder_is_unsafe_too(outside: Outside) -> None:
    path, proto = outside
    (path.parent / "inside.bin").symlink_to(path.parent / "weights.bin")
    rewritten(path, proto, location="inside.bin")
    refusal(path, Code.UNSAFE_EXTERNAL_DATA)


def test_external_data_of_a_model_that_is_no_file_is_unsafe(outside: Outside) -> None:
    path, proto = outside
    refusal(proto, Code.UNSAFE_EXTERNAL_DATA)
    refusal(path.read_bytes(), Code.UNSAFE_EXTERNAL_DATA)
    refusal(path, Code.UNSAFE_EXTERNAL_DATA, external_data=False)


def test_external_data_in_a_subgraph_and_in_an_attribute_is_looked_at(outside: Outside) -> None:
    path, proto = outside
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    inner = helper.make_graph([helper.make_node("Identity", ["hidden"], ["z"])], "inner", [], [])
    inner.initializer.append(tensor)
    node = helper.make_node("If", ["x"], ["unused"])
    node.attribute.append(helper.make_attribute("then_branch", inner))
    proto.graph.node.append(node)
    path.write_bytes(proto.SerializeToString())
    assert refusal(path, Code.UNSAFE_EXTERNAL_DATA).nodes == ("hidden",)


def test_a_missing_file(outside: Outside) -> None:
    path, proto = outside
    name = rewritten(path, proto, location="gone.bin")
    found = refusal(path, Code.MISSING_EXTERNAL_DATA)
    assert found.nodes == (name,)
    assert "gone.bin" in found.message
    assert found.found == "no such file"


def test_a_short_file(outside: Outside) -> None:
    path, _ = outside
    weights = path.parent / "weights.bin"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size - 8])
    found = refusal(path, Code.MISSING_EXTERNAL_DATA)
    assert "weights.bin" in found.message
    assert "offset" in found.expected
    assert str(size - 8) in found.found


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        ({"offset": "1000000"}, Code.MISSING_EXTERNAL_DATA),
        ({"length": "1000000"}, Code.MISSING_EXTERNAL_DATA),
        ({"offset": "-8"}, Code.MISSING_EXTERNAL_DATA),
        ({"offset": "first"}, Code.INVALID_MODEL),
        ({"length": ""}, Code.INVALID_MODEL),
    ],
)
def test_numbers_that_do_not_fit_the_file(
    outside: Outside, entries: dict[str, str], code: Code
) -> None:
    path, proto = outside
    rewritten(path, proto, **entries)
    refusal(path, code)


def test_a_length_that_is_not_the_tensors(outside: Outside) -> None:
    path, proto = outside
    rewritten(path, proto, length="4")
    with pytest.raises(Refused) as caught:
        prune(path)
    codes = (Code.MISSING_EXTERNAL_DATA, Code.INVALID_MODEL, Code.MODEL_DOES_NOT_RUN)
    assert caught.value.refusal.code in codes


def test_refusals_of_models_and_plans_say_what_to_do() -> None:
    silent = []
    for path in pathlib.Path(secateur.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) != "refuse":
                continue
            code = ast.unparse(call.args[0])
            named = {keyword.arg for keyword in call.keywords}
            if code in ("Code.INVALID_MODEL", "Code.INVALID_PLAN") and "hint" not in named:
                silent.append(f"{path}:{call.lineno}")
    assert not silent
