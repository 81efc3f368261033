"""The gate's tests: programs in the sandbox and attacks on it, HumanEval, LaTeX and multiple choice.

    pytest -q test_gate.py
"""

import contextlib
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import sandbox
import verify
from test_core import ROOT, refused, result_of, shared_data, write_jsonl

boxed = pytest.mark.skipif(sandbox.sandbox_problem() != "", reason=sandbox.sandbox_problem())

# "### name: the reasons it may end with:", then the program. It prints LEAK where it gets what it wants. It starts with
# CANARY, HOME, PREFIX (a file, the home and the interpreter of the host), PORT (where the host listens), PID (the
# tests' process), CLONE (the system call's number), and reads(paths), which tries to.
ATTACKS = r"""
### password_file: ok:
reads("/etc/passwd", "/etc/shadow", "/etc/hosts", "/etc/hostname", "/etc/ssl", "/etc/resolv.conf")
### home_folder: ok:
reads(HOME + "/.bashrc", HOME + "/.profile", HOME + "/.ssh", HOME + "/.cache", HOME + "/.bash_history")
### reads_a_host_file: ok: reads(CANARY, os.path.dirname(CANARY), "/root/../" + CANARY)
### searches_the_disk: ok timeout:
for folder, _, files in os.walk("/"):
    if "canary.txt" in files: print("LEAK", folder)
### environment: ok:
if "SECRET_TOKEN" in os.environ: print("LEAK")
reads("/proc/self/environ", f"/proc/{PID}/environ", f"/proc/{os.getppid()}/environ")
### writes_outside: ok:
for path in ("/", "/usr", "/usr/lib", "/tmp", "/dev", "/etc", "/var", "/home", PREFIX, HOME):
    for attempt in (lambda: open(path + "/mark", "w"), lambda: os.mkdir(path + "/mark"), lambda: os.chmod(path, 0o777)):
        try: attempt(); print("LEAK", path)
        except OSError: pass
### overwrites_a_host_file: exit_code: open(CANARY, "w").write("gone")
### overwrites_the_interpreter: exit_code: open(sys.executable, "ab").write(b"x")
### overwrites_itself: exit_code: open(__file__, "w").write("x")
### deletes_everything: ok timeout:
import shutil
for path in (os.path.dirname(CANARY), HOME, PREFIX, *(f"/{name}" for name in os.listdir("/"))):
    shutil.rmtree(path, ignore_errors=True)
### rm_rf: ok timeout:
import subprocess
subprocess.run(["rm", "-rf", "--no-preserve-root", "/"], capture_output=True)
### network_tcp: exit_code: import socket; socket.create_connection(("1.1.1.1", 53), 1); print("LEAK")
### network_of_the_host: exit_code: import socket; socket.create_connection(("127.0.0.1", PORT), 1); print("LEAK")
### network_names: exit_code:
import urllib.request; urllib.request.urlopen("http://example.com", timeout=1); print("LEAK")
### abstract_socket: exit_code:
import socket; socket.socket(socket.AF_UNIX).connect(f"\0nano-jepa-{PORT}"); print("LEAK")
### fork_bomb: exit_code timeout: while True: os.fork()
### fork_bomb_in_a_shell: ok exit_code timeout output_limit: os.system("f() { f | f & }; f")
### how_many_processes: ok:
n = 0
try:
    while n < 50:
        if os.fork() == 0: time.sleep(9); os._exit(0)
        n += 1
except OSError: pass
print("LEAK" if n > 8 else "", n, flush=True)
os._exit(0)
### thread_bomb: exit_code timeout:
import threading
for _ in range(50): threading.Thread(target=time.sleep, args=(9,)).start()
print("LEAK")
### memory_bomb: memory: x = bytearray(1 << 30)
### memory_bomb_by_and_by: memory:
x = []
while True: x.append(bytearray(1 << 20))
### memory_outside_the_limit: ok:
if libc.shmget(0, 1 << 28, 0o1600) >= 0 or libc.memfd_create(b"x", 0) >= 0: print("LEAK")
### disk_bomb: ok:
for folder in ("/box", "/dev/shm"):
    n = 0
    try:
        for n in range(50): open(f"{folder}/{n}", "wb").write(bytes(8 << 20))
    except OSError: pass
    if n > 8: print("LEAK", folder, n)
### disk_through_its_output: ok:
import ctypes
if libc.fallocate(1, 1, ctypes.c_long(0), ctypes.c_long(1 << 30)) == 0: print("LEAK")
### odd_flags_on_its_output: ok:
import fcntl
print("x", flush=True)
fcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT)
### endless_loop: timeout: while True: pass
### deaf_sleep: timeout:
import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
time.sleep(99)
### closes_its_output: timeout: os.close(1); os.close(2); time.sleep(99)
### endless_output: output_limit: while True: print("x" * 9999)
### endless_errors: output_limit: while True: os.write(2, b"x" * 9999)
### reads_stdin: exit_code: input()
### kills_its_parent: ok exit_code:
for pid in (os.getppid(), PID, 1, -1):
    try: os.kill(pid, 9)
    except OSError: pass
### daemon: ok:
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: os.execvp("sleep", ["sleep", f"99.{PORT}"])
    os._exit(0)
time.sleep(0.2)
### symlink: exit_code:
os.symlink(CANARY, "link"); os.symlink("/", "root")
reads("link", "root" + CANARY)
open("root" + CANARY, "w").write("gone")
### ctypes_crash: exit_code: ctypes.string_at(0)
### ctypes_system: ok: libc.system(b"cat /etc/passwd && echo LEAK")
### becomes_root: ok:
calls = (libc.mount(b"none", b"/box", b"tmpfs", 0, 0), libc.umount2(b"/usr", 2), libc.chroot(b"/box"), libc.setuid(0),
         libc.unshare(0x10000000), libc.ptrace(16, 1, 0, 0), libc.mount(None, b"/usr", None, 32 | 4096, 0))
if 0 in calls: print("LEAK", calls)
### new_user_namespace: ok: if libc.syscall(CLONE, 0x10000011, 0, 0, 0, 0) >= 0: print("LEAK")
### process_table: ok:
reads("/proc", "/proc/1/cmdline", "/sys")
if os.getpid() > 20: print("LEAK", os.getpid())
### deep_recursion: exit_code memory timeout:
sys.setrecursionlimit(10**9)
def f(): return [f()]
f()
### deep_nesting: exit_code: eval("(" * 10**5 + ")" * 10**5)
### raises_its_limits: ok:
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
    try: resource.setrlimit(kind, (resource.RLIM_INFINITY,) * 2); print("LEAK", kind)
    except (OSError, ValueError): pass
### devices: ok:
if set(os.listdir("/dev")) & {"sda", "vda", "nvme0", "mem", "kmsg", "kvm"}: print("LEAK")
try: os.mknod("disk", 0o60666, os.makedev(254, 0)); print("LEAK")
except OSError: pass
### open_descriptors: ok:
for fd in range(3, 64):
    try: os.fstat(fd); print("LEAK", fd)
    except OSError: pass
"""
PRELUDE = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
def reads(*paths):
    for path in paths:
        try: found = os.listdir(path) if os.path.isdir(path) else open(path).read()
        except OSError: continue
        if found: print("LEAK", path, str(found)[:99])
"""
ATTACKS = {name: (reasons.split(), program) for name, reasons, program
           in re.findall(r"### (\w+): ([a-z_ ]+):\s((?:(?!###).*\n)+)", ATTACKS)}


def is_running(command):
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended in between
            if command in path.read_bytes():
                return True
    return False


@boxed
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_do_no_harm(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    canary = tmp_path / "canary.txt"
    canary.write_text("a secret of the host")
    reasons, program = ATTACKS[name]
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        port = server.getsockname()[1]
        abstract.bind(f"\0nano-jepa-{port}")
        abstract.listen()
        known = {"CANARY": str(canary), "HOME": str(Path.home()), "PREFIX": sys.prefix, "PORT": port,
                 "PID": os.getpid(), "CLONE": 56 if os.uname().machine == "x86_64" else 220}
        given = "".join(f"{key} = {value!r}\n" for key, value in known.items())
        start, limit = time.monotonic(), 1 if "timeout" in reasons else 5
        verdict = verify.run_program(PRELUDE + given + program, timeout_s=limit, memory_mb=256)
    assert time.monotonic() - start < limit + 2
    assert verdict.reason in reasons and "LEAK" not in verdict.stdout, verdict
    assert canary.read_text() == "a secret of the host" and list(tmp_path.iterdir()) == [canary]
    assert Path(sys.executable).exists() and not (Path(sys.prefix) / "mark").exists()
    for _ in range(20):  # the kernel takes the namespace's processes down right after its first one
        if not is_running(b"/box/main.py\0") and not is_running(f"sleep\x0099.{port}\0".encode()):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("a process of the sandbox survives")


ADD = {"kind": "code", "prompt": "def add(a, b):\n", "entry_point": "add",
       "test": "def check(f):\n    print('x')\n    assert f(1, 2) == 3\n"}


@pytest.fixture
def asked_again():
    """Whether there is a sandbox is found out in this test, and again after it."""
    sandbox.sandbox_problem.cache_clear()
    yield
    sandbox.sandbox_problem.cache_clear()


@boxed
def test_a_program_runs_and_says_how_it_ended():
    verdict = verify.run_program("import numpy, sys, json\nprint(numpy.ones(3).sum(), 'ä')\nopen('x', 'w').write('x')")
    assert verdict == verify.Verdict(True, "ok", "", "3.0 ä\n")
    failed = verify.run_program("print('before')\nraise ValueError('why')")
    assert (failed.reason, failed.stdout) == ("exit_code", "before\n") and failed.detail.endswith("ValueError: why")
    assert verify.run_program("import sys; sys.exit(3)").detail == "exit code 3"
    assert verify.run_program("print('\\ud800'").reason == verify.run_program("\0").reason == "exit_code"
    start = time.monotonic()
    held = "import os, time\nif os.fork() == 0: time.sleep(9)\nprint('done', flush=True)\nos._exit(0)"
    assert verify.run_program(held).stdout == "done\n" and time.monotonic() - start < 3  # its child holds the pipe


def test_no_sandbox_is_a_refusal_and_unsafe_runs_under_limits(monkeypatch, tmp_path, asked_again):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "bwrap" else which(name))
    refused(ValueError, "apt install bubblewrap[^\0]*--allow_unsafe_code", verify.run_program, "print(1)")
    path = write_jsonl(tmp_path / "one.jsonl", [{**ADD, "canonical_solution": "    return a + b\n"}])
    refused(SystemExit, "apt install bubblewrap", verify.main, ["--humaneval", path])
    assert result_of(verify.main, "--humaneval", path, "--allow_unsafe_code")["passed"] == 1
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    for program, reason in [("import os; assert 'SECRET_TOKEN' not in os.environ and os.listdir() == []", "ok"),
                            ("while True: pass", "timeout"), ("while True: print('x' * 999)", "output_limit"),
                            ("bytearray(1 << 30)", "memory")]:
        assert verify.run_program(program, 1, 256, allow_unsafe=True).reason == reason, program


@boxed
def test_a_sandbox_that_cannot_start_says_so_in_its_own_words(monkeypatch, asked_again):
    monkeypatch.setattr(sandbox, "_bwrap", lambda *fds: ["bwrap", "--no-such-option"])
    assert "Unknown option --no-such-option" in sandbox.sandbox_problem()


@boxed
def test_humaneval_every_eighth_solution_passes_and_its_mutant_fails(tmp_path):
    rows = verify.read_jsonl(shared_data("humaneval/HumanEval.jsonl.gz"))
    assert len(rows) == 164
    path = write_jsonl(tmp_path / "part.jsonl", rows[::8])
    assert verify.check_humaneval(path)["passed"] == len(rows[::8]) == 21
    assert verify.check_humaneval(path, mutants=True)["passed"] == 0
    out = subprocess.run([sys.executable, "verify.py", "--humaneval", path, "--limit", "2", "--mutants"], cwd=ROOT,
                         capture_output=True, text=True, check=True).stdout
    result = json.loads(out.splitlines()[-1])
    assert result["n"] == 2 and result["passed"] == 0 and result["seconds"] > 0


@boxed
@pytest.mark.parametrize("body, reason", [
    ("    return a + b", "ok"), ("    c = a + b\n\n    return c\n", "ok"), ("    return a - b", "exit_code"),
    ("    return a + b\nimport sys\nsys.exit(0)", "tests_not_run"), ("    raise SystemExit", "tests_not_run"),
    ("    return a + b\nimport os\nos._exit(0)", "tests_not_run"), ("    return a +", "exit_code"),
    ("    return a + b\nprint('0' * 32, flush=True)\nquit = exit\nraise SystemExit(0)", "tests_not_run"),
    ("    return a + b\nimport atexit\natexit.register(print, 'bye')", "ok"),
    ("    return a + b\ndef check(f): pass", "ok"), ("    '''", "exit_code"), ("    while True: pass", "timeout"),
    ("    while True: print('x' * 9999)", "output_limit")])
def test_a_completion_passes_by_its_tests_alone(body, reason):
    verdict = verify.check_program(ADD, body, timeout_s=2)
    assert verdict.reason == reason and verdict.is_valid == (reason == "ok")
    assert reason != "ok" or verdict.stdout == "x\n" + "bye\n" * ("bye" in body)  # without the word that ends the tests


@boxed
def test_validate_runs_code():
    assert verify.validate(ADD, {"steps": ["    c = a + b", "    return c"]}).reason == "ok"
    assert verify.validate(ADD, {"steps": ["    return 4"]}).reason == "exit_code"
    assert verify.validate(ADD, {"steps": []}).reason == "no_steps"
    for problem, message in (({"kind": "code", "prompt": "x", "test": "y"}, "'entry_point'"),
                             ({"kind": "poem", "answer": "1"}, "number, math, choice, exact or code")):
        refused(ValueError, message, verify.validate, problem, {"steps": ["z"]})


@pytest.mark.parametrize("step, reason", [
    ("B", "ok"), ("(B)", "ok"), ("b)", "ok"), ("B. Rome", "ok"), ("rome", "ok"), ("So the answer is (B).", "ok"),
    ("2+2=5\n#### B", "ok"), ("A: B", "ok"), (r"\boxed{\text{(B)}}", "ok"), (r"The answer is $\boxed{B}$.", "ok"),
    ("The answer is: **Rome**.", "ok"),
    ("A", "wrong_answer"), ("The answer is Paris", "wrong_answer"), ("B. Paris", "no_answer"), ("F", "no_answer"),
    ("Rome or Paris", "no_answer"), ("...", "no_answer"), ("The answer is (C) because it is.", "wrong_answer"),
    ("Answer: B", "ok"), ("The answer is B because Rome lies there.", "ok"), ("The answer is B, Rome", "ok"),
    ("The answer is A, Paris", "wrong_answer")])
def test_choice(step, reason):
    problem = {"kind": "choice", "question": "?", "choices": ["Paris", "Rome", "Bonn"], "answer": "B"}
    for truth in ({"answer": "B"}, {"answer": "Rome"}, {"label": 1}):
        assert verify.validate({**problem, "answer": "", **truth}, {"steps": ["2+2=5", step]}).reason == reason


def test_choice_holds_both_answers_against_the_truth_and_names_bad_problems():
    problem = {"kind": "choice", "choices": ["4", "5"], "answer": "A"}
    assert verify.validate(problem, {"steps": ["#### A"], "answer": "4"}).reason == "ok"
    assert verify.validate(problem, {"steps": ["#### A"], "answer": "5"}).reason == "wrong_answer"
    assert verify.validate(problem, {"steps": ["no idea"], "answer": "(a)"}).reason == "ok"
    for bad in ({"answer": "C"}, {"label": 2}, {"choices": "45"}, {"answer": None}):
        refused(ValueError, "'answer'|'label'|'choices'", verify.validate, {**problem, **bad}, {"steps": ["A"]})


SAME = [(r"\dfrac{1}{2}", r"\frac{1}{2}"), ("1/2", "0.5"), (r"so it is \boxed{\frac{1}{2}}.", "0.5"), ("$5$", r"\$5"),
        (r"5\text{ cm}", "5"), (r"90^\circ", "90"), (r"50\%", "50"), ("[0,1)", r"\left[0, 1\right)"), ("1,2", "2,1"),
        ("(1,2)", r"\left(1, 2\right)"), (r"\{1,2\}", r"\left\{2,1\right\}"), (r"\text{Evelyn}", "Evelyn"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "\\begin{bmatrix}1 & 2\\\\\n3 & 4\\end{bmatrix}"), (r"\(5\)", "5"),
        (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2+2x+1", "(x+1)^2"), (r"10{,}000", "10000"), ("x=5", "5"), ("12_8", "12_{8}"),
        ("204", "204_5"), ("10_{10}", "10")]
OTHER = [("5", "6"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), (r"\frac{1}{3}", "0.3"), ("", "5"), ("no idea", "5"),
         ("1,2", "1,2,3"), ("Evelyn", "Bob"), (r"\boxed{5", "5"), ("12_8", "12"), ("12_{9}", "12_8"),
         (r"\begin{pmatrix}1&2\end{pmatrix}", "1,2,3")]
HOSTILE = ["9**9**9**9", "10^{10^{10}}", "((9!)!)!", "(" * 450 + "1" + ")" * 450, "1" * (1 << 20), "9" * 999, "\0",
           "\ud800", "__import__('os').system('touch MARK')", r"\text{__import__('os').system('touch MARK')}",
           r"\operatorname{exec}(open('MARK','w'))", r"\operatorname{zeros}(99999,99999)", r"\boxed{" * 9999]


def test_answers_are_found_where_models_put_them():
    exact = {"kind": "exact", "answer": "True"}
    assert verify.validate(exact, {"steps": [" True."]}).is_valid
    assert verify.validate(exact, {"steps": ["not True"]}).reason == "wrong_answer"
    math = {"kind": "math", "answer": "It is \\boxed{5}."}
    for steps in (["So \\boxed{5}.", "I hope it is correct."], ["\\boxed 5"], ["The answer is $5$."]):
        assert verify.validate(math, {"steps": steps}).is_valid, steps


def test_math_answers_compare_by_value():
    assert [pair for pair in SAME if not verify.check_math(*pair)] == []
    assert [pair for pair in OTHER if verify.check_math(*pair)] == []
    problem = {"kind": "math", "answer": r"\frac{1}{2}"}
    for step, reason in ((r"2 = 3, thus \boxed{0.5}", "ok"), ("1/2", "ok"), (r"\boxed{2}", "wrong_answer"),
                         (r"\boxed{}", "no_answer")):
        assert verify.validate(problem, {"steps": ["first", step]}).reason == reason
    assert verify.validate(problem, {"steps": [r"\boxed{0.5}"], "answer": "2"}).reason == "wrong_answer"


def test_a_worker_that_does_not_start_is_an_error_and_not_false(monkeypatch):
    monkeypatch.setattr(verify, "_math_process", None)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    refused(ValueError, "does not start", verify.check_math, "1", "2")


def test_hostile_latex_is_false_in_time_and_off_the_main_thread(monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "MATH_SECONDS", 1)
    for text in HOSTILE:
        start = time.monotonic()
        assert not verify.check_math(text.replace("MARK", str(tmp_path / "mark")), "5"), text[:50]
        assert time.monotonic() - start < verify.MATH_SECONDS + 8, text[:50]  # a fresh worker's imports among them
    assert not list(tmp_path.iterdir())
    with ThreadPoolExecutor(4) as pool:  # one worker answers all threads, each its own question
        assert list(pool.map(lambda i: verify.check_math(str(i), f"{i % 2}.0"), range(6))) == [True] * 2 + [False] * 4


def test_jsonl_may_be_gzipped(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}\n'))
    assert verify.read_jsonl(path, ["a"]) == [{"a": 1}, {"a": 2}]
    for damaged in (gzip.compress(b'{"a": 1}\n' * 99)[:-9], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises((ValueError, OSError)):
            verify.read_jsonl(path)
