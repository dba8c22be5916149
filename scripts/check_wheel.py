"""Builds the wheel, installs it alone in a fresh environment, and prunes a model with it there.

    make wheel-test

What the tests cannot see, because they run in the checkout with the developers' tools around them:
a file that the wheel lacks, a dependency that pyproject.toml does not name, a module of ours where
other people's modules lie.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "digits" / "digits_cnn.onnx"


def main() -> None:
    """Runs the check. Raises where something is missing; the exit code says so."""
    with tempfile.TemporaryDirectory(prefix="secateur-wheel-") as name:
        folder = pathlib.Path(name)
        wheel = build(folder / "dist")
        tops = {pathlib.PurePosixPath(path).parts[0] for path in zipfile.ZipFile(wheel).namelist()}
        ours = {top for top in tops if not top.endswith(".dist-info")}
        if ours != {"secateur"}:
            raise SystemExit(f"the wheel installs {sorted(ours)}, and should install secateur only")
        programs = install(wheel, folder / "venv")
        secateur = str(programs / "secateur")
        say(run([secateur, "--version"], folder).strip())
        run([secateur, "--help"], folder)
        slim = folder / "slim.onnx"
        start = time.monotonic()
        command = [secateur, "prune", str(MODEL), "-o", str(slim), "--target", "macs=0.5"]
        answer = json.loads(run([*command, "--no-repair", "--json"], folder))
        seconds = time.monotonic() - start
        say(f"pruned {MODEL.name} in {seconds:.1f} s, imports included:")
        say(f"  {MODEL.stat().st_size:,} → {slim.stat().st_size:,} bytes, {answer['sha256']}")
        if not slim.stat().st_size < MODEL.stat().st_size:
            raise SystemExit("the pruned model is not smaller")
    say("the wheel works by itself")


def build(folder: pathlib.Path) -> pathlib.Path:
    """The wheel, built without what the checkout's environment holds."""
    say("building the wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    run([*pip, "--wheel-dir", str(folder), str(ROOT)], ROOT)
    (wheel,) = folder.glob("secateur-*.whl")
    return wheel


def install(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Installs the wheel with what it declares, and returns the folder of programs."""
    say(f"installing {wheel.name} in a fresh environment, with its declared dependencies only")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], ROOT)
    programs = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(programs / "python")]
    run([*pip, "install", "--quiet", str(wheel)], ROOT)
    run([*pip, "check"], ROOT)
    return programs


def run(command: list[str], folder: pathlib.Path) -> str:
    """Runs a program, none of our checkout in its module path. Ends this one where it fails."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        print(done.stdout, end="")
        raise SystemExit(f"exit code {done.returncode}: {' '.join(command)}")
    return done.stdout


def say(text: str) -> None:
    """Prints at once: what runs below prints too."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
