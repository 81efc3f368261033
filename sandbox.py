"""A Python program in bubblewrap: no network, no host files, and limits on all that it can use up.

    from sandbox import run_program
    run_program("print(6 * 7)")  # Verdict(is_valid=True, reason="ok", detail="", stdout="42\\n")

Linux alone, `apt install bubblewrap`. The program sees the system's folders and the interpreter's, read-only, and a
scratch folder in memory; nobody's rights, an empty environment, its own processes. verify.py runs generated code here.
"""
import contextlib
import functools
import math
import os
import platform
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROCESSES = 8  # of one program, its init and its threads among them; each may take memory_mb
DISK_MB = 32  # of its scratch folder, of its shared memory, and of one file
MAX_OUTPUT = 1 << 20  # bytes, stdout and stderr together


@dataclass(frozen=True)
class Verdict:
    """What the gate says. `reason` is a stable snake_case word ("ok" when valid), `detail` the message for people."""
    is_valid: bool
    reason: str
    detail: str = ""
    stdout: str = ""  # of a program


# What holds memory that RLIMIT_AS does not count, or opens more of the kernel than a program under test needs:
# shmget msgget memfd_create memfd_secret io_uring_setup add_key request_key keyctl ptrace perf_event_open bpf
# userfaultfd unshare. On other machines there is no such filter. Source: linux/audit.h, the tables of system calls.
FORBIDDEN = {"x86_64": (0xC000003E, [29, 68, 319, 447, 425, 248, 249, 250, 101, 298, 321, 323, 272]),
             "aarch64": (0xC00000B7, [194, 186, 279, 447, 425, 217, 218, 219, 117, 241, 280, 282, 97])}


def _seccomp():
    """The filter as classic BPF: another architecture's calls kill, the forbidden ones give EPERM, the rest pass."""
    if platform.machine() not in FORBIDDEN:
        return b""
    arch, calls = FORBIDDEN[platform.machine()]
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0),  # load arch, load number
            (0x35, 0, 1, 0x40000000), (0x06, 0, 0, 0x80000000)]  # the x32 calls
    for call in calls:
        code += [(0x15, 0, 1, call), (0x06, 0, 0, 0x00050001)]
    return b"".join(struct.pack("=HBBI", *line) for line in [*code, (0x06, 0, 0, 0x7FFF0000)])


@functools.cache
def _no_more_users():
    """bwrap's option against user namespaces of the program's own; versions before 0.8 lack it."""
    text = subprocess.run(["bwrap", "--help"], capture_output=True, text=True).stdout
    return ["--disable-userns"] if "--disable-userns" in text else []


def _bwrap(program_fd, filter_fd):
    """The command that starts another one with namespaces (network, processes, IPC, users) and a file tree of its own.

    The tree: system folders and the interpreter read-only, /box (the scratch folder) and /dev/shm in memory; no /proc,
    no /tmp, no home, of /etc what the linker reads. Root's processes escape RLIMIT_NPROC whatever their namespace, so
    root starts it as nobody, from a first bwrap that opens the interpreter's folder to nobody (it may lie in /root).
    """
    tree = ["--ro-bind", "/usr", "/usr"]
    for folder in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if os.path.islink(folder):
            tree += ["--symlink", os.readlink(folder), folder]
        elif os.path.isdir(folder):
            tree += ["--ro-bind", folder, folder]
    tree += ["--dir", "/etc"]  # a folder that bwrap makes by itself is closed to nobody
    for file in ("/etc/ld.so.cache", "/etc/alternatives"):
        tree += ["--ro-bind-try", file, file]
    for folder in sorted({Path(sys.base_prefix), Path(sys.prefix), Path(sys.executable).resolve().parents[1]}):
        if folder not in (Path("/"), Path.home()) and not folder.is_relative_to("/usr"):
            for parent in reversed(folder.parents[:-1]):
                tree += ["--dir", str(parent)]
            tree += ["--ro-bind", str(folder), str(folder)]
    size = ["--size", str(DISK_MB << 20)]
    box = ["bwrap", "--unshare-all", "--unshare-user", *_no_more_users(), "--uid", "65534", "--gid", "65534",
           "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--seccomp", str(filter_fd), "--clearenv", *tree,
           "--dev", "/dev", *size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev", *size, "--tmpfs", "/box",
           "--ro-bind-data", str(program_fd), "/box/main.py", "--remount-ro", "/", "--chdir", "/box"]
    for name, value in (("PATH", "/usr/bin:/bin"), ("HOME", "/box"), ("TMPDIR", "/box"), ("LANG", "C.UTF-8"),
                        ("OMP_NUM_THREADS", "1"), ("OPENBLAS_NUM_THREADS", "1")):
        box += ["--setenv", name, value]
    nobody = ["bwrap", "--unshare-pid", "--die-with-parent", *tree, "--dev", "/dev", "--proc", "/proc", "--cap-add",
              "ALL", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    return nobody + box if os.geteuid() == 0 else box


def _collect(process, deadline):
    """(stdout, stderr, None | "timeout" | "output_limit"). Ends with the process, whoever still holds its pipes."""
    output = {process.stdout: b"", process.stderr: b""}
    with selectors.DefaultSelector() as selector:
        for pipe in output:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            has_ended = process.poll() is not None  # asked before the pipes: what it wrote is in them
            ready = selector.select(0 if has_ended else min(0.05, max(0, deadline - time.monotonic())))
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                output[key.fileobj] += data
                if not data:
                    selector.unregister(key.fileobj)
            if sum(map(len, output.values())) > MAX_OUTPUT:
                return *output.values(), "output_limit"
            if time.monotonic() > deadline:
                return *output.values(), "timeout"
            if has_ended and not ready:
                break
    try:
        process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return *output.values(), "timeout"
    return *output.values(), None


def _run(source, timeout_s, memory_mb, is_boxed):
    limits = {"as": memory_mb << 20, "cpu": math.ceil(timeout_s) + 1, "fsize": DISK_MB << 20, "core": 0, "nofile": 64}
    with (tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as program,
          tempfile.TemporaryFile() as seccomp):
        for file, content in ((program, source.encode("utf-8", "backslashreplace")), (seccomp, _seccomp())):
            file.write(content)
            file.seek(0)
        fds = program.fileno(), seccomp.fileno()
        if is_boxed:  # the limit on processes counts those of this namespace; without one, all that the user runs
            command, main = [*_bwrap(*fds), "prlimit", f"--nproc={PROCESSES}"], "/box/main.py"
        else:
            command, main = ["prlimit"] if shutil.which("prlimit") else [], f"/dev/fd/{fds[0]}"
        if command:
            command += [f"--{name}={value}" for name, value in limits.items()]
        process = subprocess.Popen(
            [*command, sys.executable, "-I", main], cwd=folder, env={"PATH": os.environ.get("PATH", os.defpath)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds,
            start_new_session=True)
        with process:
            try:
                stdout, stderr, reason = _collect(process, time.monotonic() + timeout_s)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
                    os.killpg(process.pid, signal.SIGKILL)
    stdout, stderr = (text.decode("utf-8", "replace") for text in (stdout, stderr))
    detail = stderr.strip()[-500:] or f"exit code {process.returncode}"
    if reason:
        detail = {"timeout": f"after {timeout_s} s", "output_limit": f"more than {MAX_OUTPUT} bytes"}[reason]
    elif process.returncode:
        reason = "memory" if "MemoryError" in detail.rpartition("\n")[2].partition(":")[0] else "exit_code"
    return Verdict(reason is None, reason or "ok", detail if reason else "", stdout)


@functools.cache
def sandbox_problem():
    """Why programs cannot run in bubblewrap here, with the remedy; "" where they can. Tried once per process."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is missing: apt install bubblewrap (Linux only)"
    verdict = _run("print('in the box')", 30, 512, is_boxed=True)
    if verdict.stdout == "in the box\n":
        return ""
    return ("bubblewrap cannot start (it needs user namespaces, which the kernel, or the container's seccomp or "
            f"AppArmor profile, may forbid): {verdict.detail}")


def run_program(source, timeout_s=10, memory_mb=512, allow_unsafe=False):
    """Run a Python program in the sandbox; Verdict with its stdout, valid where it exits with 0.

    Reasons: "ok", "exit_code" (detail: the end of stderr), "memory" (it died of MemoryError), "timeout" (wall clock),
    "output_limit". memory_mb is the address space of one process: all together may take PROCESSES times as much, plus
    2 * DISK_MB. Where bubblewrap cannot run: ValueError with the reason, or, with allow_unsafe, the program runs as
    you, with the limits but with your files and network.
    """
    problem = sandbox_problem()
    if problem and not allow_unsafe:
        raise ValueError(f"{problem}\nOr pass --allow_unsafe_code: generated code then runs with your rights.")
    return _run(source, timeout_s, memory_mb, is_boxed=not problem)
