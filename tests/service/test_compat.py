"""Programs made for the protos in `released/` still work; at a release, those become its own."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import Server

import secateur
from secateur import Recipe, _wire
from secateur.v1 import pruning_pb2, report_pb2

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
RELEASED = HERE / "released"
HALF = Recipe(target={"macs": 0.5})


def buf(*arguments: object) -> subprocess.CompletedProcess[str]:
    beside = pathlib.Path(sys.executable).parent / "buf"
    program = str(beside) if beside.exists() else shutil.which("buf")
    if program is None:
        pytest.skip("buf is not installed (pip install buf-bin)")
    command = [program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def before(tmp_path: pathlib.Path) -> pathlib.Path:
    """The repository's protos as they were released."""
    for name in ("buf.yaml", "third_party"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    shutil.copytree(RELEASED, tmp_path / "protos")
    return tmp_path


def test_nothing_that_was_released_breaks(before: pathlib.Path) -> None:
    done = buf("breaking", "--against", before)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_breaks_is_seen(before: pathlib.Path) -> None:
    path = before / "protos" / "secateur" / "v1" / "pruning.proto"
    text = path.read_text(encoding="utf-8")
    path.write_text(
        text.replace("string request_id = 5;", "string request_id = 5;\n  int32 x = 6;")
    )
    done = buf("breaking", "--against", before)
    assert done.returncode != 0 and '"6"' in done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One in which `secateur` is nothing but the stubs of the released protos."""
    protoc = pytest.importorskip("grpc_tools.protoc")
    folder = tmp_path_factory.mktemp("stubs")
    import importlib.resources

    well_known = importlib.resources.files("grpc_tools") / "_proto"
    names = [str(path.relative_to(RELEASED)) for path in RELEASED.rglob("*.proto")]
    paths = [f"-I{RELEASED}", f"-I{ROOT / 'third_party'}", f"-I{well_known}"]
    outs = [f"--python_out={folder}", f"--grpc_python_out={folder}"]
    assert protoc.main(["protoc", *paths, *outs, *names]) == 0
    for package in (folder / "secateur", folder / "secateur" / "v1"):
        (package / "__init__.py").touch()
    for path in (ROOT / "secateur" / "v1").glob("bytestream*.py"):  # Google's own, unchanged
        shutil.copy(path, folder / "secateur" / "v1")
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_an_old_client_is_served(
    server: Server, cnn: pathlib.Path, environment: dict[str, str]
) -> None:
    program = [sys.executable, HERE / "old_programs.py", "client", server.address, cnn]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    expected = secateur.prune(cnn, HALF, measure_latency=False).model
    assert done.stdout == hashlib.sha256(expected).hexdigest()


def test_an_old_server_is_used(
    cnn: pathlib.Path, environment: dict[str, str], tmp_path: pathlib.Path
) -> None:
    local = secateur.prune(cnn, HALF, measure_latency=False)
    result = pruning_pb2.PruneResult(model={"inline": local.model})
    result.plan.inline = local.plan.to_json().encode()
    result.report.CopyFrom(_wire.to_wire(local.report, report_pb2.Report()))
    (tmp_path / "result").write_bytes(result.SerializeToString())
    program = [sys.executable, HERE / "old_programs.py", "server", tmp_path / "result"]
    with subprocess.Popen(
        program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as old:
        assert old.stdout is not None
        address = f"127.0.0.1:{old.stdout.readline().strip()}"
        with secateur.Client(address, timeout=20) as client:
            steps: list[secateur.Progress] = []
            assert client.prune(cnn, HALF, progress=steps.append) == local
            assert [step.fraction for step in steps] == [0.5]
            with pytest.raises(secateur.ServerError, match="UNIMPLEMENTED"):
                client.start_prune(cnn)
        old.communicate()
