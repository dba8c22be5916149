"""Everything that README.md shows is run as it stands there."""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.startswith("secateur ") and not line.startswith("secateur serve")
]
SERVE = next(
    line for _, block in BLOCKS for line in block.splitlines() if line.startswith("secateur serve")
)
PROGRAMS = [block for language, block in BLOCKS if language == "python"]
LOCAL = [program for program in PROGRAMS if "Client(" not in program]
REMOTE = [program for program in PROGRAMS if "Client(" in program]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder that looks like a clone to the examples, and may be written to."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(arguments: list[str], folder: pathlib.Path) -> str:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_is_something_of_each_kind() -> None:
    assert len(COMMANDS) >= 3
    assert LOCAL
    assert REMOTE


def test_commands(folder: pathlib.Path) -> None:
    for command in COMMANDS:
        run([sys.executable, "-m", *shlex.split(command)], folder)
    assert (folder / "slim.onnx").stat().st_size > 0
    assert (folder / "report.html").stat().st_size > 0
    assert (folder / "plan.json").stat().st_size > 0


@pytest.mark.parametrize("program", LOCAL)
def test_python(program: str, folder: pathlib.Path) -> None:
    assert "of the MACs" in run([sys.executable, "-c", program], folder)
    assert (folder / "slim.onnx").exists()


@pytest.mark.parametrize("program", REMOTE)
def test_grpc(program: str, folder: pathlib.Path) -> None:
    """The server and client examples, on a free port instead of 50051."""
    serve = [sys.executable, "-m", *shlex.split(SERVE.replace(":50051", ":0"))]
    server = subprocess.Popen(serve, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = re.search(r"127\.0\.0\.1:\d+", server.stdout.readline())
        assert address is not None
        output = run([sys.executable, "-c", program.replace("127.0.0.1:50051", address[0])], folder)
        assert "VERIFY" in output
        assert (folder / "slim.onnx").exists()
    finally:
        server.terminate()
        server.wait(timeout=15)
        server.stdout.close()
