"""The walls around a worker process, which works on models that strangers made.

A model may be made to take over the process that opens it. `enter` shuts the process in before it
imports anything that reads models, so that whoever takes it over gains one job's own folder:

    network      an empty network namespace, and no system call that opens a socket
    files        Landlock: the job's folder, and Python's own libraries to read
    processes    no new ones, and no signals to others; threads only
    privileges   none, and none to be had: no capabilities, `no_new_privs`
    kernel       no system calls that only administration needs, and none newer than this file
    resources    no core dumps, limited descriptors

Each wall needs nothing but the Linux kernel and works for root and for anybody else. Where one
cannot be raised, `enter` says so and raises the others: containers often forbid namespaces, other
systems have none of this. Namespaces and Landlock hold for the calling thread and those that it
starts later, so `enter` comes first in a process.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import platform
import resource
import struct
import sys
import threading
from collections.abc import Iterator

import secateur

_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x40000000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CAPABILITY_VERSION_3 = 0x20080522

_MAX_DESCRIPTORS = 1024
_MAX_THREADS = 1024


def enter(home: pathlib.Path) -> list[str]:
    """Shuts this process in, for good.

    Args:
        home: the one folder whose files it may change.

    Returns:
        The walls that could not be raised, each as a phrase with the reason; empty when all stand.
    """
    _limit_resources()
    if sys.platform != "linux":
        return [f"all but resource limits: {sys.platform} has no jail that this program knows"]
    assert threading.active_count() == 1, "threads that are there already would stay outside"
    gaps = []
    for name, raise_wall in (
        ("network namespace", _leave_network),
        ("privileges", _drop_privileges),
        ("files (Landlock)", lambda: _confine_files(home)),
        ("system calls (seccomp)", _filter_calls),
    ):
        try:
            raise_wall()
        except OSError as error:
            gaps.append(f"{name}: {error.strerror}")
    if len(gaps) == 1 and gaps[0].startswith("network namespace"):
        return []  # without sockets there is no network either
    return gaps


def _limit_resources() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold the model
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# ---- namespaces and privileges -----------------------------------------------------------------


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> int:
    """The result of a call of the C library. Raises OSError when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _leave_network() -> None:
    """Moves into a network namespace without interfaces, and out of reach of shared memory."""
    wanted = _CLONE_NEWNET | _CLONE_NEWIPC
    try:
        _check(_libc().unshare(wanted))
    except PermissionError:  # not root: whoever has a user namespace of his own may
        _check(_libc().unshare(wanted | _CLONE_NEWUSER))
        # counted in that namespace, so this process' own; root has no such limit
        resource.setrlimit(resource.RLIMIT_NPROC, (_MAX_THREADS, _MAX_THREADS))


def _drop_privileges() -> None:
    """Gives up every capability, also root's, and any way to new ones."""
    _check(_libc().prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc().capset(header, bytes(24)))  # effective, permitted, inheritable; twice 32 bits


# ---- files: https://docs.kernel.org/userspace-api/landlock.html --------------------------------

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1

_READ_FILE, _READ_DIR, _WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_IN_A_FILE = (1 << 0) | _WRITE_FILE | _READ_FILE | (1 << 14) | (1 << 15)  # a rule for a file takes
# Rights of each version: execute, write, read, list, remove, make …; refer; truncate; ioctl
_FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
# no one's: execute; make devices, sockets, FIFOs and symbolic links
_NEVER = 1 << 0 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12
_NETWORK_RIGHTS = {4: 0b11}  # bind and connect, TCP
_SCOPES = {6: 0b11}  # abstract Unix sockets, signals


def _confine_files(home: pathlib.Path) -> None:
    """Leaves `home` to read and write, and what Python needs to read."""
    syscall = _libc().syscall
    version = _check(syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_CREATE_RULESET_VERSION))
    files, network, scopes = (
        max((rights for since, rights in table.items() if since <= version), default=0)
        for table in (_FILE_RIGHTS, _NETWORK_RIGHTS, _SCOPES)
    )
    attributes = struct.pack("=QQQ", files, network, scopes)
    size = 24 if scopes else 16 if network else 8  # older kernels refuse what they do not know
    ruleset = _check(syscall(_LANDLOCK_CREATE_RULESET, attributes, size, 0))
    try:
        _allow(ruleset, home, files & ~_NEVER)
        _allow(ruleset, pathlib.Path(os.devnull), _READ_FILE | _WRITE_FILE)
        for path in _libraries():
            _allow(ruleset, path, _READ_FILE | _READ_DIR)
        _check(syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: pathlib.Path, rights: int) -> None:
    """Adds a rule for all that lies under `path`, if there is such a thing."""
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        rule = struct.pack("=Qi", rights if path.is_dir() else rights & _IN_A_FILE, descriptor)
        _check(_libc().syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0))
    finally:
        os.close(descriptor)


def _libraries() -> Iterator[pathlib.Path]:
    """What the interpreter, the engine and the C library read; nothing that could be a secret."""
    package = pathlib.Path(secateur.__file__).resolve().parent
    yield package
    for entry in {*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)} - {""}:
        path = pathlib.Path(entry)
        # a checkout's folder may hold anything besides the package
        if path.resolve() != package.parent or path.name.endswith("-packages"):
            yield path
    # not all of a prefix, where there may be settings, too
    for prefix in {"/", "/usr", "/usr/local", sys.prefix, sys.base_prefix}:
        for name in ("lib", "lib64"):
            yield pathlib.Path(prefix, name)
    for name in ("/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache", "/dev/urandom"):
        yield pathlib.Path(name)
    # ONNX Runtime asks for cores, caches and accelerators
    for name in ("/proc/self", "/proc/cpuinfo", "/proc/meminfo"):
        yield pathlib.Path(name)
    for name in ("/sys/bus/pci", "/sys/class/drm", "/sys/devices"):
        yield pathlib.Path(name)


# ---- system calls: https://docs.kernel.org/userspace-api/seccomp_filter.html -------------------

# Numbers on x86-64 and on 64-bit ARM, which has no fork, vfork, chmod, chown, lchown and so on.
_NO = None
_DENIED: dict[str, tuple[int, int | None]] = {
    # network, also through io_uring, whose requests no filter sees
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # processes: new ones, and reaching into others
    "fork": (57, _NO), "vfork": (58, _NO), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # leaving the group that is killed when a job ends
    "setsid": (112, 157), "setpgid": (109, 154),
    # making a read-only file writable: blobs lie in a job's folder as hard links
    "chmod": (90, _NO), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, _NO),
    "lchown": (94, _NO), "fchown": (93, 55), "fchownat": (260, 54), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # files that lead whoever reads a job's folder elsewhere, or hold him up
    "symlink": (88, _NO), "symlinkat": (266, 36), "link": (86, _NO), "linkat": (265, 37),
    "mknod": (133, _NO), "mknodat": (259, 33),
    # memory that no limit counts, memory and queues shared by number, keys
    "memfd_create": (319, 279),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # administration, and corners of the kernel that attacks come through
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "personality": (135, 92),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "swapon": (167, 224),
    "swapoff": (168, 225), "reboot": (169, 142), "acct": (163, 89), "syslog": (103, 116),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "fanotify_init": (300, 262),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "sethostname": (170, 161), "setdomainname": (171, 162),
    "vhangup": (153, 58), "ioperm": (173, _NO), "iopl": (172, _NO), "modify_ldt": (154, _NO),
    "uselib": (134, _NO),
}  # fmt: skip
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)
_PRCTL, _FCNTL = (157, 167), (72, 25)
_NEWEST = 451  # cachestat; later calls are refused as by an older kernel until this file knows them

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG = 1
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15

# of struct seccomp_data; both architectures are little-endian: an argument's low half comes first
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def _filter_calls() -> None:
    """Makes the kernel refuse the system calls that no job needs."""
    machine = platform.machine()
    if machine not in _AUDIT_ARCH:
        raise OSError(_ENOSYS, f"no table of system calls for {machine}")
    program = b"".join(_program(machine, os.getpid()))
    memory = ctypes.create_string_buffer(program)
    # struct sock_fprog: unsigned short length, padding, pointer
    description = struct.pack("@HP", len(program) // 8, ctypes.addressof(memory))
    _check(_libc().prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, description, 0, 0))


def _program(machine: str, pid: int) -> Iterator[bytes]:
    """Instructions of the filter, in classic BPF."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def refuse(number: int) -> bytes:
        return step(_RETURN, _ERRNO | number)

    column = list(_AUDIT_ARCH).index(machine)
    yield step(_LOAD, _ARCHITECTURE)
    yield step(_EQUAL, _AUDIT_ARCH[machine], if_true=1)
    yield step(_RETURN, _KILL_PROCESS)  # calls of another architecture have other numbers
    yield step(_LOAD, _NUMBER)
    yield step(_ABOVE, _NEWEST, if_false=1)
    yield refuse(_ENOSYS)
    # its flags lie in memory, where no filter sees them; the C library then takes clone
    yield step(_EQUAL, _CLONE3[column], if_false=1)
    yield refuse(_ENOSYS)
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            yield step(_EQUAL, numbers[column] or 0, if_false=1)
            yield refuse(_EPERM)
    # refused when an argument is …
    for numbers, argument, values in (
        (_PRCTL, 0, [_PR_SET_PDEATHSIG]),  # outliving the server
        (_FCNTL, 1, [_F_SETOWN, _F_SETSIG, _F_SETOWN_EX]),  # signals to others by way of a pipe
    ):
        yield step(_EQUAL, numbers[column], if_false=2 * len(values) + 2)
        yield step(_LOAD, _FIRST_ARGUMENT + 8 * argument)
        for value in values:
            yield step(_EQUAL, value, if_false=1)
            yield refuse(_EPERM)
        yield step(_RETURN, _ALLOW)
    # allowed when the first argument is …
    for numbers, compare, values in (
        (_CLONE, _ANY_BIT, [_CLONE_THREAD]),
        (_KILL, _EQUAL, [0, pid]),  # its own group, itself
        (_TGKILL, _EQUAL, [pid]),
        (_PRLIMIT, _EQUAL, [0, pid]),
    ):
        yield step(_EQUAL, numbers[column], if_false=2 * len(values) + 2)
        yield step(_LOAD, _FIRST_ARGUMENT)
        for value in values:
            yield step(compare, value, if_false=1)
            yield step(_RETURN, _ALLOW)
        yield refuse(_EPERM)
    yield step(_RETURN, _ALLOW)
