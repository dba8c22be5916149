"""What a worker that a model has taken over can do: next to nothing."""

from __future__ import annotations

import json
import mmap
import os
import pathlib
import platform
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Server

import secateur
from secateur.service import jail
from secateur.service.errors import CallError
from secateur.service.guard import memory_of
from secateur.service.pool import MAX_REPORT, _environment, _seal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="walls are Linux's")

PACKAGE = pathlib.Path(secateur.__file__).parents[1]

# Each as an expression; `secret` is a file of the server's, `blob` a read-only hard link to one
ATTACKS = {
    "network": "socket.create_connection(('127.0.0.1', port))",
    "a datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "a Unix socket": "socket.socket(socket.AF_UNIX)",
    "io_uring": "call(425, 8, bytes(120))",
    "another architecture's numbers": "call(0x40000000 + 41, 2, 1, 0)",
    "reading a secret": "open(secret).read()",
    "looking around": "os.listdir(pathlib.Path(secret).parent)",
    "the root folder": "os.listdir('/')",
    "settings of other programs": "os.listdir('/etc')",
    "what lies beside the package": "os.listdir(pathlib.Path(jail.__file__).parents[2])",
    "the server's environment": "open(f'/proc/{parent}/environ').read()",
    "the server's memory": "open(f'/proc/{parent}/mem', 'rb')",
    "writing elsewhere": "open('/tmp/secateur-escaped', 'w')",
    "changing a blob": "open(blob, 'r+b')",
    "making a blob writable": "os.chmod(blob, 0o600)",
    "a symbolic link out": "os.symlink(secret, 'result.onnx')",
    "a hard link": "os.link(blob, 'again')",
    "a pipe that holds up its reader": "os.mkfifo('report.json')",
    "a child": "os.fork()",
    "a program": "subprocess.run(['true'])",
    "becoming a program": "os.execv('/bin/true', ['true'])",
    "a child by clone": "call(56 if x86 else 220, 17, 0, 0, 0, 0)",
    "killing the server": "os.kill(parent, 0)",
    "killing the server by a pipe": "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, parent)",
    "outliving the server": "call(157 if x86 else 167, 1, 0, 0, 0, 0)",
    "tracing the server": "call(101 if x86 else 117, 16, parent, 0, 0)",
    "limiting the server": "resource.prlimit(parent, resource.RLIMIT_NOFILE)",
    "leaving its group": "os.setsid()",
    "a new namespace": "call(272 if x86 else 97, 0x10000000)",
    "more descriptors": "resource.setrlimit(resource.RLIMIT_NOFILE, (9999, 9999))",
    "priority": "os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "memory that no limit counts": "os.memfd_create('x')",
    "shared memory": "open('/dev/shm/x', 'w')",
}

ATTACKER = """
import ctypes, fcntl, json, os, pathlib, platform, resource, socket, subprocess, sys, threading
from secateur.service import jail
home, secret, port, *patch = sys.argv[1:]
port, parent, blob, x86 = int(port), os.getppid(), "blob", platform.machine() == "x86_64"
if patch:
    platform.machine = lambda: "abacus"
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, as a worker does
gaps = jail.enter(pathlib.Path(home))
death = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(death), 0, 0, 0)  # PR_GET_PDEATHSIG
def call(*arguments):
    ctypes.set_errno(0)
    result = ctypes.CDLL(None, use_errno=True).syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
def outcome(attack):
    try:
        return f"got {eval(attack)!r}"
    except (OSError, ValueError) as error:
        return type(error).__name__
attacks = json.load(sys.stdin)
said = {name: outcome(attack) for name, attack in attacks.items()}
pathlib.Path("mine").write_text("x")
thread = threading.Thread(target=lambda: said.update(thread=outcome("open(secret)")))
thread.start(); thread.join()
print(json.dumps({"gaps": gaps, "said": said, "read": pathlib.Path(blob).read_text(),
    "death": death.value}))
"""


@pytest.fixture(scope="module")
def attack(
    tmp_path_factory: pytest.TempPathFactory, server: Server
) -> Callable[..., dict[str, Any]]:
    def attack(attacks: dict[str, str], *patch: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("jail")
        home, secret, blob = folder / "home", folder / "tokens", folder / "blob"
        home.mkdir()
        secret.write_text("secret")
        blob.write_text("blob")
        blob.chmod(0o444)
        os.link(blob, home / "blob")
        port = server.address.rpartition(":")[2]
        done = subprocess.run(
            [sys.executable, "-P", "-c", ATTACKER, home, secret, port, *patch],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(PACKAGE)},
            input=json.dumps(attacks),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert blob.read_text() == "blob"
        assert (home / "mine").read_text() == "x"
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return attack


@pytest.fixture(scope="module")
def attacked(attack: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    found = attack(ATTACKS)
    if found["gaps"]:
        pytest.skip(f"this machine has no full jail: {found['gaps']}")
    return found


@pytest.mark.parametrize("name", [*ATTACKS, "thread"])
def test_an_attack_fails(attacked: dict[str, Any], name: str) -> None:
    assert attacked["said"][name] in ("PermissionError", "ValueError", "OSError")


def test_its_own_files_are_its_own(attacked: dict[str, Any]) -> None:
    assert attacked["read"] == "blob"


def test_it_still_ends_with_its_parent(attacked: dict[str, Any]) -> None:
    assert attacked["death"] == signal.SIGKILL


def test_a_missing_wall_is_named_and_the_others_stand(
    attack: Callable[..., dict[str, Any]], attacked: dict[str, Any]
) -> None:
    by_other_walls = ("network", "reading a secret", "writing elsewhere", "changing a blob")
    found = attack({name: ATTACKS[name] for name in by_other_walls}, "without seccomp")
    (gap,) = found["gaps"]
    assert gap.startswith("system calls")
    assert "abacus" in gap
    for name in by_other_walls:
        assert found["said"][name] in ("PermissionError", "OSError"), name


# ---- as the server has it ----------------------------------------------------------------------


def status_of(pid: int) -> dict[str, str]:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_workers_of_a_server_are_shut_in(
    own_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, attacked: dict[str, Any]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    server = own_server("--require-jail")
    worker = server.idle_worker()
    status = status_of(worker)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    for task in pathlib.Path(f"/proc/{worker}/task").iterdir():
        assert "Seccomp:\t2" in (task / "status").read_text()
    environment = pathlib.Path(f"/proc/{worker}/environ").read_text()
    assert "hush" not in environment
    descriptors = [str(entry.readlink()) for entry in pathlib.Path(f"/proc/{worker}/fd").iterdir()]
    kinds = {text.split(":")[0] for text in descriptors}
    assert kinds == {"pipe", "/dev/null"}
    assert pathlib.Path(f"/proc/{worker}/cwd").readlink().parent == server.folder / "workers"
    assert "not fully shut in" not in server.log.read_text()


@pytest.mark.parametrize("flags", [(), ("--require-jail",)])
def test_a_server_says_when_workers_are_not_shut_in(
    own_server: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    flags: tuple[str, ...],
) -> None:
    patch = "import platform; platform.machine = lambda: 'abacus'"
    (tmp_path / "sitecustomize.py").write_text(patch)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PACKAGE}")
    if not flags:
        assert "not fully shut in, for want of: system calls" in own_server().log.read_text()
        return
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "serve", "--listen", "127.0.0.1:0", *flags],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 5
    assert "not fully shut in" in done.stderr


def test_memory_that_may_be_shared_counts() -> None:
    before, size = memory_of(os.getpid()), 64 << 20
    with mmap.mmap(-1, size) as shared:
        for offset in range(0, size, mmap.PAGESIZE):
            shared[offset] = 1
        assert memory_of(os.getpid()) - before > size // 2


def test_memory_is_measured_though_workers_start_no_process(
    client: secateur.Client, wide: pathlib.Path
) -> None:
    here = secateur.profile(wide).model.peak_memory_bytes
    there = client.profile(wide).model.peak_memory_bytes
    assert here
    assert there
    assert 0.5 < there / here < 2
    report = client.prune(wide, secateur.Recipe(target={"memory": 0.9})).report
    assert report.before.peak_memory_bytes
    assert report.after.peak_memory_bytes
    assert report.after.peak_memory_bytes < report.before.peak_memory_bytes


def test_a_worker_gets_little_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    for name in ("HOME", "SECATEUR_TOKEN", "SSH_AUTH_SOCK", "MY_PATH", "LANG", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", "relative")
    found = _environment(tmp_path)
    assert not {"SECATEUR_TOKEN", "SSH_AUTH_SOCK", "MY_PATH"} & found.keys()
    assert (found["LANG"], found["OMP_NUM_THREADS"]) == ("1", "1")
    assert found["HOME"] == found["TMPDIR"] == str(tmp_path)
    assert found["PYTHONPATH"].split(os.pathsep) == [
        str(pathlib.Path.cwd() / "relative"),
        str(PACKAGE),
    ]


def test_what_a_worker_leaves_is_looked_at(tmp_path: pathlib.Path) -> None:
    (tmp_path / "result.onnx").write_bytes(b"x")
    (tmp_path / "calibration").mkdir()
    _seal(tmp_path)
    traps: list[Callable[[pathlib.Path], Any]] = [
        lambda path: path.symlink_to("/etc/passwd"),
        lambda path: os.mkfifo(path),
        lambda path: (path.touch(), os.truncate(path, MAX_REPORT + 1)),
    ]
    for trap in traps:
        trap(tmp_path / "report.json")
        with pytest.raises(CallError, match=r"report\.json"):
            _seal(tmp_path)
        (tmp_path / "report.json").unlink()
    with (
        (tmp_path / "result.onnx").open("rb"),
        (tmp_path / "report.json").open("wb"),
        pytest.raises(CallError, match=r"report\.json"),
    ):
        _seal(tmp_path)
    _seal(tmp_path)


def test_libraries_of_custom_operators_are_never_loaded() -> None:
    for path in (PACKAGE / "secateur").rglob("*.py"):
        assert "register_custom_ops" not in path.read_text(encoding="utf-8"), path


# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "header"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        (1, "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_system_calls_have_the_kernels_numbers(column: int, header: str) -> None:
    path = pathlib.Path(header)
    if not path.exists():
        pytest.skip("the kernel's headers are not here")
    pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
    known = {name: int(number) for name, number in re.findall(pattern, path.read_text())}
    special = {
        "clone": jail._CLONE, "clone3": jail._CLONE3, "kill": jail._KILL,
        "tgkill": jail._TGKILL, "prlimit64": jail._PRLIMIT, "prctl": jail._PRCTL,
        "fcntl": jail._FCNTL,
    }  # fmt: skip
    for name, numbers in {**jail._DENIED, **special}.items():
        assert known.get(name) == numbers[column], name
    assert known["cachestat" if "cachestat" in known else "memfd_secret"] <= jail._NEWEST


def test_this_machine_is_in_the_table() -> None:
    assert platform.machine() in jail._AUDIT_ARCH
    assert stat.S_ISREG(pathlib.Path(jail.__file__).stat().st_mode)
