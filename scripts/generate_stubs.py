"""Generates secateur/v1 from the protos: `python scripts/generate_stubs.py [FOLDER]`.

FOLDER stands for the repository's root and is where `secateur/v1` is written; a test generates
into a temporary one and compares. Needs grpcio-tools, of the version that pyproject.toml pins:
generated code states the lowest runtime it works with.
"""

from __future__ import annotations

import importlib.resources
import pathlib
import sys
import tempfile

from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVICE = "secateur/v1/pruning.proto"  # the one file of ours with a service in it
BYTESTREAM = "google/bytestream/bytestream"


def generate(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes `folder`/secateur/v1 and returns the files written."""
    stubs = folder / "secateur" / "v1"
    stubs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch)
        ours = sorted((ROOT / "protos").rglob("*.proto"))
        names = [str(path.relative_to(ROOT / "protos")) for path in ours] + [f"{BYTESTREAM}.proto"]
        _protoc(out, ("python", "pyi"), names)
        _protoc(out, ("grpc_python",), [SERVICE, f"{BYTESTREAM}.proto"])
        _adopt_bytestream(out)
        made = sorted((out / "secateur" / "v1").iterdir())
        written = [stubs / path.name for path in made]
        for source, target in zip(made, written, strict=True):
            target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return written


def _protoc(out: pathlib.Path, kinds: tuple[str, ...], names: list[str]) -> None:
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    paths = [f"-I{ROOT / 'protos'}", f"-I{ROOT / 'third_party'}", f"-I{well_known}"]
    outs = [f"--{kind}_out={out}" for kind in kinds]
    if protoc.main(["protoc", *paths, *outs, *names]) != 0:
        raise SystemExit(f"protoc failed on {', '.join(names)}")


def _adopt_bytestream(out: pathlib.Path) -> None:
    """Moves the ByteStream stubs under secateur/v1: a wheel of ours must not add to `google`.

    Only Python module names change; messages and service keep their names on the wire.
    """
    for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
        text = (out / f"{BYTESTREAM}{suffix}").read_text(encoding="utf-8")
        text = text.replace("from google.bytestream import", "from secateur.v1 import")
        text = text.replace("'google.bytestream.bytestream_pb2'", "'secateur.v1.bytestream_pb2'")
        target = out / "secateur" / "v1" / f"bytestream{suffix}"
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    generate(pathlib.Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
