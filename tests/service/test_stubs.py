"""The committed stubs are what the protos give, and the protos keep the rules."""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def generator() -> Any:
    path = ROOT / "scripts" / "generate_stubs.py"
    spec = importlib.util.spec_from_file_location("generate_stubs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stubs_are_current(tmp_path: pathlib.Path) -> None:
    written = generator().generate(tmp_path)
    committed = {p.name for p in (ROOT / "secateur" / "v1").glob("*_pb2*.py*")}
    assert {path.name for path in written} == committed
    for path in written:
        text = (ROOT / "secateur" / "v1" / path.name).read_text(encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, "run scripts/generate_stubs.py"


def test_protos_pass_lint() -> None:
    beside = pathlib.Path(sys.executable).parent / "buf"
    buf = str(beside) if beside.exists() else shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed (pip install buf-bin)")
    done = subprocess.run([buf, "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_bytestream_keeps_its_published_name() -> None:
    from secateur.v1 import bytestream_pb2

    service = bytestream_pb2.DESCRIPTOR.services_by_name["ByteStream"]
    assert service.full_name == "google.bytestream.ByteStream"
    assert bytestream_pb2.DESCRIPTOR.name == "google/bytestream/bytestream.proto"
