"""Many processes, and what goes wrong in long jobs: kills, full disks, read-only folders, damage, a clock set back.

    pytest -q test_faults.py
    SOAK=100 pytest -q test_faults.py -k soak        # as many rounds of start, SIGKILL at a random moment, resume
"""

import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import config as cfg
import data
import extract
import latents
import runs
import train
import verify
from test_core import ROOT, driver, fork, forked, refused, result_of, weights, write_jsonl
from test_gate import boxed

SOAK = int(os.environ.get("SOAK", 3))
QUICKSTART = """quickstart --n_synthetic 120 --max_problem_steps 2 --n_layer 2 --n_head 2 --n_embd 32 --batch_size 8
    --val_problems 8 --vocab_size 300 --dropout 0.1 --target_encoder ema --answer_context latent --max_steps 12
    --log_every 1 --eval_every 6 --save_every 2 --dtype fp32 --device cpu --threads 1""".split()
STUDENT = ["--llm", "pretrained/student", "--dataset", "synthetic", "--max_problem_steps", "3", "--device", "cpu"]
EXTRACT = [*STUDENT, "--limit", "12", "--shard_size", "2", "--threads", "1"]


def script(*argv, n=1, code=0):
    """What a script of this folder says in n processes; `code`: how it must end."""
    ends, out, err = fork(*argv, n=n)
    assert any(ends) == (code != 0), err[-3000:]
    return out if code == 0 else err


def torchrun(*argv):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*start, *map(str, argv)], cwd=ROOT, check=True, timeout=300)


def train_here(folder, *more):
    """The same training in this process -> its figures."""
    return train.train(*cfg.parse_cli([*QUICKSTART, *more, "--out_dir", str(folder)]))


def stopping(folder) -> Path:
    """train.py that ends after the state of step 6."""
    return driver(folder, "train", "train.save_state", after='if args[3]["step"] == 6: sys.exit("stopped")')


def same_curves(a, b, tolerance=1e-5):
    for one, two in zip(*(verify.read_jsonl(folder / "log.jsonl") for folder in (a, b)), strict=True):
        for key in set(one) - {"split", "tokens_per_s", "real_share", "retrieval_top1", "retrieval_ci95"}:
            assert one[key] == pytest.approx(two[key], rel=tolerance, abs=tolerance), (one["step"], key)


def contents(folder) -> dict:
    """What a finished run or extraction leaves, without the record of how long it took."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".parquet", ".json")}


# ----------------------------------------------------------------------------- many processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process on the global batch of two."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_here(folder, "--grad_accum", "2")
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same run by two processes, of which none may shut Python down: gloo's threads can abort it there."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    torchrun(driver(folder.parent, "train", "train.main", "import atexit; atexit.register(os.abort)"), *QUICKSTART,
             "--out_dir", folder)
    return folder


@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_give_the_curves_of_one(tmp_path, alone, pair, shard):
    if shard:
        script("train.py", *QUICKSTART, "--shard", "--out_dir", tmp_path, n=2)
    folder = tmp_path if shard else pair
    same_curves(folder, alone)
    assert len(list(folder.glob("state-00000012/*.safetensors"))) == 2 * shard
    net, _ = runs.load_run(folder)
    for name, value in runs.load_run(alone)[0].state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [
    "rjepa-small --llm pretrained/student --n_synthetic 48 --batch_size 8 --n_embd 32 --predictor_n_embd 16",
    "rjepa-small --batch_size 8 --n_embd 32 --predictor_n_embd 16 --gap_share 0.5",
    "tjepa-small --n_synthetic 80 --batch_size 2 --n_layer 1 --n_embd 32 --head --document_share 0.5"])
def test_two_processes_train_the_other_models(tmp_path, fields, monkeypatch):
    monkeypatch.chdir(ROOT)
    common = [*fields.split(), *"""--dataset synthetic --max_problem_steps 3 --max_steps 3 --log_every 1 --dtype fp32
        --device cpu --threads 1""".split()]
    if fields.startswith("rjepa"):
        problems = data.load_problems("synthetic", "train", "", 90, 1, 3)
        gold = latents.gold_chains(problems, "train", False, 1)
        wrong = gold[0] | {"id": "wrong", "steps": [*gold[0]["steps"][:-1], "#### 0"], "is_valid": False}
        chains = [c | {"split": None} for c in (*gold, wrong)]
        write_jsonl(tmp_path / "chains.jsonl", chains)  # one process has a wrong chain, the other does not
        extract.main([*STUDENT[:2], "--chains", str(tmp_path / "chains.jsonl"), "--device", "cpu", "--out",
                      str(tmp_path / "latents")])
        common += ["--latents", str(tmp_path / "latents")]
    train.train(*cfg.parse_cli([*common, "--grad_accum", "2", "--out_dir", str(tmp_path / "one")]))
    script("train.py", *common, "--shard", "--out_dir", tmp_path / "two", n=2)
    same_curves(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("first, then", [("1", "2 --shard"), ("2", "2 --shard")])
def test_a_state_is_read_by_any_number_of_processes(tmp_path, alone, first, then):
    for how, name, code in ((first, stopping(tmp_path), 1), (then, "train.py", 0)):
        n, *shard = how.split()
        accumulate = ["--grad_accum", "2"] if n == "1" else []
        said = script(name, *QUICKSTART, *shard, *accumulate, "--out_dir", tmp_path / "run", n=int(n), code=code)
        assert code == 0 or "stopped" in said
    same_curves(tmp_path / "run", alone)
    refused(SystemExit, "is finished", train_here, tmp_path / "run")


def test_a_kill_between_the_parts_and_what_names_them(tmp_path, alone):
    between = 'if (args[0].parent / "state-00000006").exists(): die()'
    script(driver(tmp_path, "train", "parallel.write_atomic", between), *QUICKSTART, "--shard", "--out_dir",
           tmp_path / "run", n=2, code=1)
    assert {p.name for p in (tmp_path / "run").glob("state-*")} == {"state-00000004", "state-00000006"}
    script("train.py", *QUICKSTART, "--shard", "--out_dir", tmp_path / "run", n=2)
    same_curves(tmp_path / "run", alone)
    assert [p.name for p in (tmp_path / "run").glob("state-*")] == ["state-00000012"]


def test_another_global_batch_is_refused_and_a_damaged_part_is_named(tmp_path, alone):
    folder = tmp_path / "run"
    script(stopping(tmp_path), *QUICKSTART, "--shard", "--out_dir", folder, n=2, code=1)
    refused(SystemExit, "here it is 1: --grad_accum 2 goes on", train_here, folder)
    part, other = sorted((folder / "state-00000006").iterdir())
    whole = part.read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), other.read_bytes()):
        part.write_bytes(damaged)
        refused(ValueError, f"{part.name} is missing or damaged", train_here, folder, "--grad_accum", "2")
    part.write_bytes(whole)
    assert train_here(folder, "--grad_accum", "2")["steps"] == 12 and not list(folder.glob("state-*"))
    same_curves(folder, alone)


def test_a_worker_that_dies_is_started_again(tmp_path, pair):
    """By the same command, or by torchrun --max-restarts, whatever it was told to overwrite: to the same bits."""
    when = 'os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and len(calls) == 6'
    dying = driver(tmp_path, "train", "train.torch.nn.utils.clip_grad_norm_", f"if {when}: die()")
    command = [dying, *QUICKSTART, "--out_dir"]
    assert fork(*command, tmp_path / "again", n=2)[0] == [-signal.SIGTERM, -signal.SIGKILL]
    script("train.py", *QUICKSTART, "--out_dir", tmp_path / "again", n=2)
    torchrun("--max-restarts", "1", *command, tmp_path / "restarted", "--overwrite")
    for name in ("again", "restarted"):
        assert weights(tmp_path / name) == weights(pair)
        same_curves(tmp_path / name, pair, tolerance=0)


def test_a_bad_loss_of_one_process_stops_all_before_more_is_saved(tmp_path):
    """Its gradient is finite: no other process would notice."""
    bad = 'if os.environ["RANK"] == "1" and len(calls) == 11: result = result + float("inf")'  # two calls a step
    broken = driver(tmp_path, "train", 'sys.modules["model"].NanoJEPA.token_loss', after=bad)
    said = script(broken, *QUICKSTART, "--log_every", "12", "--eval_every", "12", "--save_every", "4", "--out_dir",
                  tmp_path / "run", n=2, code=1)
    assert re.search(r"loss (inf, .* at step 5|.* here, not finite in another process): stopped.*\(step 4\)", said)
    assert torch.load(tmp_path / "run/state.pt")["step"] == 4


# ----------------------------------------------------------------------------- two at once, no room, no rights


def test_a_second_process_in_a_folder_is_refused(tmp_path):
    """Until the first one is done, or killed."""
    for command in (["train.py", *QUICKSTART, "--out_dir"], ["extract.py", *EXTRACT, "--out"]):
        with runs.lock(tmp_path, "--out"):
            [end], _, said = fork(*command, tmp_path)
            assert end == 1 and "another process is writing" in said
            assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    holding = "with t.runs.lock(t.Path(sys.argv[1]), '--out'): os.kill(os.getpid(), signal.SIGKILL)"
    assert fork("-c", tmp_path, code=holding)[0] == [-signal.SIGKILL]
    train_here(tmp_path, "--max_steps", "1")


ROOM = {  # a disk's bytes, and how many of them something else has at first
    "train": (4_000_000, 3_300_000), "shards": (4_000_000, 3_300_000), "extract": (400_000, 330_000),
    "memory": (4_000_000, 3_990_000)}


@pytest.fixture(scope="module")
def box(tmp_path_factory):
    """(a folder, the start of a command that finds in it these small disks and `read_only`, where it may not write)."""
    folder, command = tmp_path_factory.mktemp("box"), ["bwrap", "--dev-bind", "/", "/"]
    for name in (*ROOM, "read_only"):
        (folder / name).mkdir()
        command += ["--size", ROOM[name][0], "--tmpfs"] if name in ROOM else ["--ro-bind", folder / name]
        command.append(folder / name)
    return folder, command


@boxed
@pytest.mark.parametrize("kind", ROOM)
def test_a_full_disk_is_an_error_and_then_the_command_goes_on(tmp_path, box, kind):
    disk, whole = box[0] / kind, tmp_path / "whole"
    target = disk / ("m.duckdb" if kind == "memory" else "run")
    command = {
        "train": ["train.py", *QUICKSTART, "--out_dir", target],
        "shards": ["train.py", *QUICKSTART, "--shard", "--out_dir", target],
        "extract": ["extract.py", *EXTRACT, "--layer", "1", "2", "3", "4", "--out", target],
        "memory": ["infer.py", "score", "pretrained/rjepa-student", "--question", "Ann has 3 pens and buys 4. How many "
                   "pens has she?", "--steps", "She has 3 + 4 = 7.", "#### 7", "--truth", "7", "--log", target],
    }[kind]
    inside, n = functools.partial(fork, box=box[1]), 1 + (kind == "shards")
    inside(code=f"open('{disk}/filler', 'wb').write(bytes({ROOM[kind][1]}))")
    ends, _, said = inside(*command, n=n)
    assert any(ends) and "Traceback" not in said, said
    assert ("could not be written (" if kind != "memory" else "No space left") in said, said
    left = inside(code=f"print(*t.Path('{disk}').rglob('*')); os.remove('{disk}/filler')")[1]
    assert ".tmp" not in said.rpartition("error")[2] + left, said + left
    ends, _, said = inside(*command, n=n)
    assert not any(ends), said
    inside(code=f"import shutil; shutil.{'copy' if kind == 'memory' else 'copytree'}('{target}', '{whole}')")
    assert whole.exists()
    if kind == "train":
        train_here(tmp_path / "calm")
        assert weights(whole) == weights(tmp_path / "calm")


@boxed
def test_a_read_only_folder_is_named(box):
    folder = box[0] / "read_only"
    for command in (["train.py", *QUICKSTART, "--out_dir"], ["extract.py", *EXTRACT, "--out"]):
        _, _, said = fork(*command, folder / "run", box=box[1])
        assert f"{folder}/run cannot be written to (Read-only file system)" in said and "Traceback" not in said
    assert not list(folder.iterdir())


def test_the_clock_may_be_set_back(tmp_path, alone, monkeypatch):
    now = [2e9]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(time, "time", lambda: now.append(now[-1] - 3600) or now[-1])
    result = train_here(tmp_path / "back", "--grad_accum", "2")
    assert weights(tmp_path / "back") == weights(alone) and 0 <= result["seconds"] < 300
    assert 0 < result_of(extract.main, *EXTRACT, "--out", tmp_path / "latents")["tokens_per_s"] < 1e7
    assert not [p.name for p in ROOT.glob("*.py") if "time.time()" in p.read_text() and not p.name.startswith("test_")]


# ----------------------------------------------------------------------------- a soak

LIVES = """
import random
t.runs.save_plots = t.save_plots  # a kill may come while they are drawn
def main():
    try: MAIN()
    except SystemExit as end:
        if "is finished" not in str(end): raise
def live(name, seconds=None):
    sys.argv = [a.replace("OUT", OUT + "/" + name) for a in ARGV]
    return life(seconds, main)
for name in ("warm", "calm"):
    began = time.monotonic()
    assert live(name) == 0
length, dice, killed = time.monotonic() - began, random.Random(SEED), 0
for i in range(ROUNDS):
    for _ in range(dice.randrange(1, 5)):  # lives, each cut at any moment
        killed += live(str(i), max(1e-3, dice.random() * length)) == signal.SIGKILL
    assert live(str(i)) == 0, (i, SEED)
assert killed or ROUNDS < 10  # some lives are over before
print([killed, round(length, 2)])
"""


def test_whoever_reads_no_further_ends_a_script_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "verify.py", "--expression", "1 = 1"], cwd=ROOT, stdout=writing,
                          stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 1 and done.stderr == b""


@pytest.mark.parametrize("kind", ["train", "extract"])
def test_soak(tmp_path, kind):
    """SIGKILL at random moments, again and again: every folder ends in the bits of the undisturbed one."""
    argv = [f"{kind}.py", *(QUICKSTART if kind == "train" else EXTRACT), "--out" + "_dir" * (kind == "train"), "OUT"]
    seed = random.randrange(2**32)
    given = f"MAIN, ARGV, OUT, ROUNDS, SEED = {kind}.main, {argv}, {str(tmp_path)!r}, {SOAK}, {seed}"
    kills, seconds = forked(given + LIVES, timeout=60 * (2 + SOAK))
    calm, ends = contents(tmp_path / "calm"), [contents(tmp_path / str(i)) for i in range(SOAK)]
    for end in [calm, *ends]:
        end.pop("config.json", None)  # names the folder
    assert calm and sum(end == calm for end in ends) == SOAK, f"seed {seed}"
    for i in range(SOAK) if kind == "train" else ():
        same_curves(tmp_path / str(i), tmp_path / "calm", tolerance=0)
    print(f"{kind}: {SOAK} of {SOAK} rounds, {kills} kills, {seconds} s undisturbed")
