"""Each refusal that can be provoked is the same in process, from a server and in the shell."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.helper
import pytest
import typer.testing
from conftest import DIGITS, Server, perceptron, serialised

import secateur
from secateur import Code, Plan, Recipe, Refusal
from secateur.cli import app


@dataclass(frozen=True)
class Case:
    """A request that is refused.

    Attributes:
        code: why.
        model: the model's bytes; None: the digits network.
        recipe: fields of the recipe.
        calibration, labels: arrays, or the bytes of an `.npz`.
        plan: a plan.
    """

    code: Code
    model: Callable[[], bytes] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | bytes | None = None
    labels: dict[str, Any] | bytes | None = None
    plan: Callable[[], Plan] | None = None


def node(kind: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, ["x"], ["y"], **attributes)


def with_external_data() -> bytes:
    model = onnx.load_from_string(perceptron(8, 16, 4))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secrets.bin")
    return bytes(model.SerializeToString())


def with_unknown_operator() -> bytes:
    model = onnx.load_from_string(perceptron(8, 16, 4))
    model.graph.node[-1].output[0] = "z"
    unknown = onnx.helper.make_node("Nope", ["z"], ["y"], "nope", domain="org.example")
    model.graph.node.append(unknown)
    model.opset_import.add(domain="org.example", version=1)
    return bytes(model.SerializeToString())


def other_plan() -> Plan:
    return Plan(source="0" * 64, recipe=Recipe(), kept=())


IMAGES = np.zeros((4, 1, 8, 8), np.float32)
CLASSES = np.arange(4)

CASES = {
    "empty": Case(Code.INVALID_MODEL, lambda: b""),
    "noise": Case(Code.INVALID_MODEL, lambda: bytes(range(256)) * 9),
    "cut short": Case(Code.INVALID_MODEL, lambda: perceptron(8, 16, 4)[:-100]),
    "newer opset": Case(
        Code.UNSUPPORTED_VERSION, lambda: perceptron(8, 16, 4, opsets=(("", 999),))
    ),
    "external data": Case(Code.UNSAFE_EXTERNAL_DATA, with_external_data),
    "unknown operator": Case(
        Code.MODEL_DOES_NOT_RUN,
        with_unknown_operator,
    ),
    "calibration of another input": Case(Code.INVALID_CALIBRATION, calibration={"other": IMAGES}),
    "calibration of another type": Case(
        Code.INVALID_CALIBRATION, calibration={"input": IMAGES.astype(np.float64)}
    ),
    "calibration of another shape": Case(
        Code.INVALID_CALIBRATION, calibration={"input": IMAGES[:, :, :7]}
    ),
    "calibration with NaN": Case(
        Code.INVALID_CALIBRATION, calibration={"input": np.full_like(IMAGES, np.nan)}
    ),
    "no calibration samples": Case(Code.INVALID_CALIBRATION, calibration={"input": IMAGES[:0]}),
    "calibration that is no file of arrays": Case(Code.INVALID_CALIBRATION, calibration=b"nope"),
    "labels that are no file of arrays": Case(Code.INVALID_LABELS, labels=b"nope"),
    "labels of no samples": Case(Code.INVALID_LABELS, labels={"label": np.zeros(4, np.int64)}),
    "labels for another output": Case(
        Code.INVALID_LABELS, labels={"input": IMAGES, "logits": CLASSES, "other": CLASSES}
    ),
    "labels beside samples of another shape": Case(
        Code.INVALID_LABELS, labels={"input": IMAGES[:, :, :7], "logits": CLASSES}
    ),
    "labels of another shape": Case(
        Code.INVALID_LABELS, labels={"input": IMAGES, "logits": CLASSES[:, None]}
    ),
    "labels of no class": Case(
        Code.INVALID_LABELS, labels={"input": IMAGES, "logits": CLASSES + 99}
    ),
    "activation without calibration": Case(
        Code.INVALID_CALIBRATION, recipe={"criterion": "activation"}
    ),
    "unknown target": Case(Code.INVALID_TARGET, recipe={"target": {"beauty": 0.5}}),
    "target above 1": Case(Code.INVALID_TARGET, recipe={"target": {"macs": 1.5}}),
    "target of 0": Case(Code.INVALID_TARGET, recipe={"target": {"macs": 0.0}}),
    "bad recipe": Case(Code.INVALID_RECIPE, recipe={"round_to": 0}),
    "repair": Case(Code.INVALID_CALIBRATION, lambda: perceptron(8, 16, 4), recipe={"repair": True}),
    "out of reach": Case(Code.UNREACHABLE_TARGET, recipe={"target": {"params": 0.0001}}),
    "glob without match": Case(Code.UNMATCHED_IGNORE, recipe={"ignore": ["no_such_*"]}),
    "plan of another model": Case(Code.INVALID_PLAN, plan=other_plan),
    "nothing to prune": Case(Code.NOTHING_TO_PRUNE, lambda: serialised([node("Relu")], 4, 4)),
}

# Nothing that can be sent provokes these; test_wire sends each through a status.
NOT_PROVOKED = {Code.VERIFICATION_FAILED, Code.LIMIT_EXCEEDED, Code.MISSING_EXTERNAL_DATA}


def test_all_codes_are_provoked() -> None:
    assert {case.code for case in CASES.values()} | NOT_PROVOKED == set(Code)


def files(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """The case's arguments as files, which every face takes."""
    model = DIGITS / "digits_cnn.onnx"
    if case.model is not None:
        model = folder / "model.onnx"
        model.write_bytes(case.model())
    given: dict[str, Any] = {"model": model}
    for name in ("calibration", "labels"):
        content = getattr(case, name)
        given[name] = None if content is None else folder / f"{name}.npz"
        if isinstance(content, bytes):
            given[name].write_bytes(content)
        elif content is not None:
            np.savez(given[name], **content)
    return given


def refused(call: Callable[[], Any]) -> Refusal:
    with pytest.raises(secateur.Refused) as caught:
        call()
    return caught.value.refusal


def in_python(prune: Callable[..., Any], case: Case, folder: pathlib.Path) -> Refusal:
    given = files(case, folder)
    if case.code is Code.UNSAFE_EXTERNAL_DATA:  # a path may have data beside it, bytes may not
        given["model"] = given["model"].read_bytes()
    plan = case.plan() if case.plan else None

    def call() -> None:
        recipe = Recipe.parse(case.recipe) if case.recipe else None
        prune(given.pop("model"), recipe, plan=plan, **given)

    return refused(call)


def on_command_line(case: Case, folder: pathlib.Path, *more: str) -> tuple[int, Refusal]:
    given = files(case, folder)
    flags = ["prune", str(given["model"]), "-o", str(folder / "out.onnx"), "--json", *more]
    for name in ("calibration", "labels"):
        if given[name] is not None:
            flags += [f"--{name}", str(given[name])]
    for name, value in case.recipe.items():
        if name == "target":
            flags += [f"--target={key}={amount}" for key, amount in value.items()]
        elif name == "repair":
            flags.append("--repair")
        else:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{name.replace('_', '-')}={item}" for item in values]
    if case.plan is not None:
        (folder / "plan.json").write_text(case.plan().to_json())
        flags += ["--plan", str(folder / "plan.json")]
    done = typer.testing.CliRunner().invoke(app, flags)
    assert not (folder / "out.onnx").exists()
    return done.exit_code, Refusal.model_validate(json.loads(done.stdout)["error"])


def nameless(refusal: Refusal, folder: pathlib.Path) -> Refusal:
    """Without the folder, of which a server knows nothing."""
    text = refusal.model_dump_json().replace(f"{folder}/", "")
    return Refusal.model_validate_json(text)


@pytest.mark.parametrize("name", CASES)
def test_refusals_are_the_same_in_all_faces(
    server: Server, client: secateur.Client, tmp_path: pathlib.Path, name: str
) -> None:
    case = CASES[name]
    expected = nameless(in_python(secateur.prune, case, tmp_path), tmp_path)
    assert expected.code is case.code
    assert nameless(in_python(client.prune, case, tmp_path), tmp_path) == expected
    code, remote = on_command_line(case, tmp_path, "--server", server.address)
    assert (code, nameless(remote, tmp_path)) == (3, expected)
    code, local = on_command_line(case, tmp_path)
    assert (code, local.code) == (3, expected.code)
    if case.code is not Code.UNSAFE_EXTERNAL_DATA:  # refused in a path for another reason
        assert nameless(local, tmp_path) == expected


def test_missing_files_are_the_same_in_all_faces(
    server: Server, client: secateur.Client, tmp_path: pathlib.Path
) -> None:
    model, missing = DIGITS / "digits_cnn.onnx", tmp_path / "missing"
    empty = tmp_path / "empty"
    empty.mkdir()
    for call in (
        lambda who: who.inspect(missing),
        lambda who: who.prune(model, calibration=missing),
        lambda who: who.prune(model, calibration=empty),
        lambda who: who.prune(model, labels=missing),
        lambda who: who.prune(model, labels=empty),
        lambda who: who.profile(model, against=missing),
    ):
        expected = refused(lambda c=call: c(secateur))  # type: ignore[misc]
        assert refused(lambda c=call: c(client)) == expected  # type: ignore[misc]
