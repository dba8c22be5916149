"""Settings: one definition behind the YAML file, the flags and the code."""

from __future__ import annotations

import json
import logging
import pathlib
from typing import Any

import pytest
import typer.testing
import yaml

from secateur.cli import app
from secateur.service import logs
from secateur.service.config import LogFormat, ServerConfig


def check(*flags: str) -> typer.testing.Result:  # type: ignore[name-defined]
    return typer.testing.CliRunner().invoke(app, ["serve", "--check-config", *flags])


def test_each_setting_has_a_flag() -> None:
    shown = typer.testing.CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"})
    for name, field in ServerConfig.model_fields.items():
        assert f"--{name.removesuffix('_s').replace('_', '-')} " in shown.stdout
        assert field.description


def test_flags_override_the_file(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(yaml.safe_dump({"workers": 3, "grace_s": 5, "insecure_public": True}))
    done = check("--config", str(file), "--workers", "4", "--no-insecure-public")
    assert done.exit_code == 0, done.output
    settings = json.loads(done.stdout)
    assert settings == {
        **ServerConfig(workers=4).model_dump(mode="json"),
        "grace_s": 5,
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("wrokers: 3", "wrokers"),
        ("workers: none", "workers"),
        ("workers: 0", "greater than or equal to 1"),
        ("- workers", "must hold"),
        ("{", "cannot be read"),
        ("log_level: loud", "log_level"),
        ("listen: 0.0.0.0:1", "insecure-public"),
        ("share_operations: true", "object_store"),
    ],
)
def test_a_file_that_says_nonsense_is_wrong_usage(
    tmp_path: pathlib.Path, content: str, said: str
) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(content)
    done = check("--config", str(file))
    assert done.exit_code == 2
    assert said in done.stderr.replace("\n", " ")
    with pytest.raises(ValueError, match=said):
        ServerConfig.load(file, {})


@pytest.fixture
def line(capsys: pytest.CaptureFixture[str]) -> Any:
    root = logging.getLogger()
    before = (root.level, root.handlers[:])

    def line(form: LogFormat) -> str:
        logs.set_up("info", form)
        logging.getLogger("x").debug("unseen")
        try:
            raise KeyError("k")
        except KeyError:
            logging.getLogger("x").exception("it\nbroke", extra=logs.fields(code="OK", seconds=0.5))
        return capsys.readouterr().err

    yield line
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_log_lines_carry_ids_and_fields(line: Any) -> None:
    logs.add_ids(request="r1")
    logs.add_ids(operation="o1")
    text = line(LogFormat.JSON)
    assert text.count("\n") == 1
    found = json.loads(text)
    assert "KeyError" in found.pop("exception")
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "error", "logger": "x", "message": "it\nbroke", "request": "r1",
        "operation": "o1", "code": "OK", "seconds": 0.5,
    }  # fmt: skip
    assert "request=r1 operation=o1 code=OK seconds=0.5" in line(LogFormat.TEXT)
