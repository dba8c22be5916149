"""The command line in this process: what it prints, writes and refuses. No server here."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer.testing

import secateur
import secateur.graphops
from secateur import _html, _show
from secateur.cli import app
from secateur.errors import Code, refuse
from secateur.report import Cost, Frozen, Group, Inspection

DIGITS = pathlib.Path(__file__).parents[2] / "examples" / "digits"
CNN = DIGITS / "digits_cnn.onnx"
CALIBRATION = DIGITS / "calibration.npz"

Run = Callable[..., Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "100")

    def invoke(*arguments: object) -> Any:
        return typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def out(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "slim.onnx"


def names(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture(scope="session")
def result() -> secateur.Result:
    """What every prune to half of the MACs must give."""
    recipe = secateur.Recipe(target={"macs": 0.5})
    return secateur.prune(CNN, recipe, measure_latency=False)


# ---- prune -------------------------------------------------------------------------------------


def test_prune_writes_the_same_bytes_as_the_call(
    run: Run, out: pathlib.Path, result: secateur.Result
) -> None:
    done = run("prune", CNN, "-o", out, "--target", "macs=0.5")
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == result.model
    for text in ("MACs", "params", "size", "drift of logits", f"wrote {out}"):
        assert text in done.stdout
    stages = [line.split()[1] for line in done.stderr.splitlines()]
    assert stages[0] == "load" and "verify" in stages
    assert len(set(stages)) == len(stages)  # a line per stage


def test_prune_prints_one_json_document(
    run: Run, out: pathlib.Path, result: secateur.Result
) -> None:
    done = run("prune", CNN, "-o", out, "--target", "macs=0.5", "--json")
    document = json.loads(done.stdout)
    assert document["output"] == str(out)
    report = secateur.Report.model_validate(document["report"])
    assert report.groups == result.report.groups


def test_flags_reach_the_recipe(run: Run, out: pathlib.Path, tmp_path: pathlib.Path) -> None:
    recipe, plan = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    recipe.write_text("target: {macs: 0.9}\ncriterion: l1\nseed: 3\n")
    flags = ["--target", "channels=0.6", "--target", "params=0.8", "--scope", "global"]
    flags += [
        "--granularity",
        "channel,head_dim,weight",
        "--grouped",
        "whole",
        "--ignore",
        "*.bias",
        "--ignore",
        "logits",
    ]
    flags += ["--round-to", "4", "--seed", "7", "--no-repair", "--quantize", "int8-dynamic"]
    tokens = tmp_path / "tokens.json"
    tokens.write_text("[5, 0,\n 12]")
    flags += ["--sparsity", "2:4", "--weight-criterion", "wanda", "--vocabulary", str(tokens)]
    done = run("prune", CNN, "-o", out, "--recipe", recipe, "--save-plan", plan, *flags[:4])
    assert done.exit_code == 0, done.output
    wanted = secateur.Recipe(target={"channels": 0.6, "params": 0.8}, criterion="l1", seed=3)
    assert secateur.Plan.load(plan).recipe == wanted
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secateur.graphops, "prune", lambda *a, **k: seen.append(a) or _refuse())
        run("prune", CNN, "-o", out, "--recipe", recipe, *flags)
    assert seen[0][1] == secateur.Recipe(
        target={"channels": 0.6, "params": 0.8},
        criterion="l1",
        granularity=("channel", "head_dim", "weight"),
        sparsity="2:4",
        weight_criterion="wanda",
        vocabulary=(5, 0, 12),
        quantize="int8_dynamic",
        grouped="whole",
        scope="global",
        ignore=("*.bias", "logits"),
        round_to=4,
        repair=False,
        seed=7,
    )


def _refuse(code: Code = Code.INVALID_MODEL) -> Any:
    raise refuse(code, "no", nodes=tuple(f"n{i}" for i in range(20)), expected="1", found="2")


def test_a_saved_plan_replays_to_the_same_bytes(
    run: Run, out: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    plan, again = tmp_path / "plan.json", tmp_path / "again.onnx"
    assert run("prune", CNN, "-o", out, "--save-plan", plan).exit_code == 0
    assert run("prune", CNN, "-o", again, "--plan", plan).exit_code == 0
    assert again.read_bytes() == out.read_bytes()


def test_reports_are_written(run: Run, out: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for name in ("report.json", "report.html"):
        done = run("prune", CNN, "-o", out, "--report", tmp_path / name)
        assert done.exit_code == 0, done.output
    written = secateur.Report.model_validate_json((tmp_path / "report.json").read_bytes())
    assert written.after.macs < written.before.macs
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "slim.onnx" in page and "logits" in page
    assert not re.search(r"https?:|<script|<link|src=", page)  # opens anywhere, offline


def test_report_page_escapes_names(result: secateur.Result) -> None:
    evil = "<script>alert(1)</script>"
    group = result.report.groups[0].model_copy(update={"tensors": (evil,)})
    report = result.report.model_copy(update={"groups": (group,), "warnings": (evil,)})
    assert "<script" not in _html.page(report, evil)


# ---- wrong usage: 2 ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", CNN],
        ["prune", CNN, "-o", "{folder}"],
        ["prune", CNN, "-o", "{folder}/missing/slim.onnx"],
        ["prune", "{folder}/copy.onnx", "-o", "{folder}/copy.onnx"],
        ["prune", "{folder}/copy.onnx", "-o", "{folder}/x", "--save-plan", "{folder}/copy.onnx"],
        ["prune", CNN, "-o", "{folder}/x", "--report", "{folder}/report.txt"],
        ["prune", CNN, "-o", "{folder}/x", "--target", "macs"],
        ["prune", CNN, "-o", "{folder}/x", "--target", "macs=0.5", "--target", "macs=0.4"],
        ["prune", CNN, "-o", "{folder}/x", "--plan", "p.json", "--seed", "1"],
        ["prune", CNN, "-o", "{folder}/x", "--round-to", "many"],
        ["prune", CNN, "-o", "{folder}/x", "--vocabulary", "{folder}/copy.onnx"],
        ["inspect"],
        ["nonsense"],
        ["serve", "--listen", "0.0.0.0:0"],
        ["serve", "--workers", "0"],
        ["serve", "--log-level", "loud"],
    ],
)
def test_wrong_usage(run: Run, tmp_path: pathlib.Path, arguments: list[Any]) -> None:
    (tmp_path / "copy.onnx").write_bytes(CNN.read_bytes())
    done = run(*(str(argument).format(folder=tmp_path) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert names(tmp_path) == ["copy.onnx"]
    assert (tmp_path / "copy.onnx").read_bytes() == CNN.read_bytes()


# ---- refused: 3, failed verification: 4, server: 5 ---------------------------------------------


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [(c, 3) for c in Code if c != "VERIFICATION_FAILED"] + [(Code.VERIFICATION_FAILED, 4)],
)
def test_exit_code_of_each_refusal(
    run: Run,
    out: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    code: Code,
    exit_code: int,
) -> None:
    monkeypatch.setattr(secateur.graphops, "prune", lambda *a, **k: _refuse(code))
    done = run("prune", CNN, "-o", out)
    assert (done.exit_code, done.stdout) == (exit_code, "")
    for text in (code, "expected: 1", "found: 2", "at n0", "and 12 more"):
        assert text in done.stderr
    done = run("prune", CNN, "-o", out, "--json")
    assert done.exit_code == exit_code
    assert json.loads(done.stdout)["error"]["code"] == code
    assert names(out.parent) == []


def test_unreachable_server(run: Run, out: pathlib.Path) -> None:
    for arguments in (["prune", CNN, "-o", out], ["inspect", CNN], ["profile", CNN]):
        done = run(*arguments, "--server", "127.0.0.1:1")
        assert (done.exit_code, done.stdout) == (5, "")
        assert "UNAVAILABLE" in done.stderr
    done = run("inspect", CNN, "--server", "127.0.0.1:1", "--json")
    assert json.loads(done.stdout)["error"]["code"] == "ServerError"


def test_failed_write_leaves_nothing(
    run: Run, out: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = run("prune", CNN, "-o", out)
    assert done.exit_code == 2
    assert "No space left" in done.output
    assert names(out.parent) == []


# ---- interrupted: 130 --------------------------------------------------------------------------


def test_interrupt_leaves_nothing(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "model.onnx")  # the engine waits for bytes that never come
    # whoever runs the tests may ignore the signal, and children inherit that
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from secateur.cli import main; main()"
    )
    with (
        subprocess.Popen(
            [sys.executable, "-c", code, "prune", "model.onnx", "-o", "slim.onnx"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(pathlib.Path(secateur.__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        (tmp_path / "model.onnx").open("wb"),
    ):  # opens when the engine does
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted" in stderr and "Traceback" not in stderr
    assert names(tmp_path) == ["model.onnx"]


# ---- inspect, profile --------------------------------------------------------------------------


def test_inspect_shows_groups_and_reasons(run: Run) -> None:
    done = run("inspect", CNN)
    assert done.exit_code == 0
    assert "channel" in done.stdout and "GRAPH_OUTPUT" in done.stdout
    found = secateur.Inspection.model_validate_json(run("inspect", CNN, "--json").stdout)
    assert found == secateur.inspect(CNN)


def test_inspect_measures_sensitivity(run: Run) -> None:
    flags = ["--sensitivity", "--calibration", CALIBRATION]
    done = run("inspect", CNN, *flags)
    assert done.exit_code == 0, done.output
    assert "█" in done.stdout or "▇" in done.stdout
    found = secateur.Inspection.model_validate_json(run("inspect", CNN, *flags, "--json").stdout)
    assert found == secateur.inspect(CNN, calibration=CALIBRATION)
    assert {one.group for one in found.sensitivity} == {group.id for group in found.groups}
    assert run("inspect", CNN, "--sensitivity").exit_code == 2
    assert run("inspect", CNN, *flags[1:]).exit_code == 2


def test_a_repaired_result_is_reported(run: Run, out: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "report.html"
    done = run(
        "prune", CNN, "-o", out, "--target", "macs=0.4", "--calibration", CALIBRATION,
        "--report", page, "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = secateur.Report.model_validate(json.loads(done.stdout)["report"])
    assert report.verification.held_back
    assert report.repair
    text = page.read_text()
    assert "<h2>Sensitivity</h2>" in text and "<polyline" in text
    assert all(step.node in text for step in report.repair)


def test_what_was_done_without_data_is_shown(
    run: Run, out: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    page = tmp_path / "report.html"
    done = run("prune", CNN, "-o", out, "--report", page)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("no calibration data")]
    assert "means of what they no longer read" in line
    assert line in page.read_text() and "Means moved into its bias" in page.read_text()
    exact = run("prune", CNN, "-o", out, "--no-repair")
    assert exact.exit_code == 0 and "no calibration data" not in exact.stdout


def test_accuracy_is_shown(run: Run, out: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = tmp_path / "report.html"
    done = run("prune", CNN, "-o", out, "--labels", DIGITS / "heldout.npz", "--report", page)
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("accuracy of logits")]
    assert line.endswith("by 450 labels") and "top-5" in line
    assert line in page.read_text()


def test_inspect_stays_readable_for_a_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    groups = tuple(
        Group(
            id=f"g{i}",
            kind="head" if i % 3 else "channel",
            units=i % 90 + 1,
            kept=1,
            channels_per_unit=64,
            tensors=(f"model.layers.{i}.[attention].weight[0]",),
            frozen="reaches an output" if i % 5 == 0 else "",
        )
        for i in range(900)
    )
    frozen = tuple(
        Frozen(code=f"CODE_{i % 20}", node=f"n{i}", op_type="a::B-1", detail="d", channels=i)
        for i in range(500)
    )
    cost = Cost(macs=4_100_000_000, params=25_500_000, bytes=100 << 20)
    _show.inspection(Inspection(groups=groups, frozen=frozen, cost=cost))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 60
    assert "4.1 G MACs, 25.5 M params, 100 MiB; 900 groups" in printed
    assert "[attention]" in printed  # not taken for markup
    assert "see --json" in printed


def test_profile_of_one_and_of_two(run: Run, out: pathlib.Path, result: secateur.Result) -> None:
    result.save(out)
    assert "latency p50" in run("profile", CNN).stdout
    done = run("profile", out, "--against", CNN)
    assert done.exit_code == 0
    assert "slim.onnx takes" in done.stdout and "drift of logits" in done.stdout
    found = secateur.Profile.model_validate_json(run("profile", out, "--json").stdout)
    assert found.model.macs == result.report.after.macs


# ---- the program -------------------------------------------------------------------------------


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout == f"secateur {secateur.__version__}\n"
    done = run("prune", "--help")
    for flag in ("--target", "--calibration", "--no-repair", "--save-plan", "--server"):
        assert flag in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)


def test_module_runs_as_the_program(tmp_path: pathlib.Path) -> None:
    root = pathlib.Path(secateur.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "inspect", str(tmp_path / "missing.onnx"), "--json"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["code"] == "INVALID_MODEL"
    assert done.stderr == ""
