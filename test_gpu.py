"""The way over a GPU, without one: tensors that say they are elsewhere, and whose numbers lie on the CPU.

As on a GPU it is an error where a tensor of one side meets one of the other. And what a CPU waits for is noted, as far
as it is known here: copies that are not asynchronous out of pinned memory, values that Python asks for, sizes that
follow from values. A training step must not wait.
"""

import contextlib
import dataclasses
import traceback
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import config as cfg
import eval_alignment
import evaluate_accuracy
import extract
import infer
import memory
import model as m
import test_core as t
import train

ELSEWHERE = torch.device("meta")  # the one device beside the CPU that every PyTorch has
OURS = {str(t.ROOT / f"{name}.py") for name in t.MODULES}
WAITS = """nonzero _local_scalar_dense masked_select equal _unique2 unique_dim unique_consecutive bincount
           repeat_interleave""".split()


class Elsewhere(torch.Tensor):
    """A tensor whose device is ELSEWHERE and whose numbers are those of `here`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    waits: list[str] = []

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), dtype=here.dtype,
                                                   storage_offset=here.storage_offset(), device=ELSEWHERE)

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run_here(function, args, kwargs or {})

    def __getitem__(self, key):
        return super().__getitem__(as_tensors(key))

    def __setitem__(self, key, value):
        return super().__setitem__(as_tensors(key), value)

    def tolist(self):
        note("tolist")
        return self.here.tolist()

    def numpy(self):
        raise TypeError("a GPU's tensor has no numpy")


class Gpu(TorchDispatchMode):
    """Also tensors that are made where none has been."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run_here(function, args, kwargs or {})


def as_tensors(key):
    """An index whose lists are tensors of the CPU, as PyTorch takes them."""
    keys = key if isinstance(key, tuple) else (key,)
    return tuple(torch.as_tensor(k, dtype=torch.long) if isinstance(k, list) else k for k in keys)


def note(what):
    for frame, line in traceback.walk_stack(None):
        if frame.f_code.co_filename in OURS:
            what += f": {frame.f_code.co_name}, line {line}"
            break
    Elsewhere.waits.append(what)


def mapped(function, x):
    """Of each value in nested lists and tuples. As PyTorch's tree_map, which takes half of these tests' time."""
    return type(x)([mapped(function, y) for y in x]) if isinstance(x, (list, tuple)) else function(x)


def is_there(name, tensors, args, kwargs):
    """Whether the result of an operation lies elsewhere; notes where the CPU waits, refuses what a GPU would."""
    there, to = [x for x in tensors if isinstance(x, Elsewhere)], kwargs.get("device")
    if name in ("_to_copy", "copy_"):
        source = args[1] if name == "copy_" else args[0]
        result = isinstance(args[0], Elsewhere) if name == "copy_" or to is None else torch.device(to) == ELSEWHERE
        is_async = result and (source.dim() == 0 or (kwargs.get("non_blocking") and hasattr(source, "pinned")))
        if result != isinstance(source, Elsewhere) and not is_async:
            note("copy")
        return result
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # the indices may lie on the CPU
        result = isinstance(args[0], Elsewhere)
        assert result or not there, f"{name}: a tensor of the CPU is indexed by one of the GPU"
        if result and any(x.dtype == torch.bool or not isinstance(x, Elsewhere) for x in args[1] if x is not None):
            note(name)
        return result
    bad = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()] if there else []
    assert not bad, f"{name}: a tensor {tuple(bad[0].shape)} of the CPU meets the GPU's"
    if there and name in WAITS:
        note(name)
    return bool(there) if to is None else torch.device(to) == ELSEWHERE


def run_here(function, args, kwargs):
    """An operation on the CPU; of a result that lies elsewhere, what stands for it there."""
    tensors, changed = [], {}  # what may be changed in place

    def here(x):
        if isinstance(x, torch.Tensor):
            tensors.append(x)
        if isinstance(x, Elsewhere):
            changed[id(x.here)] = x
            return x.here
        return x

    def back(x):
        return x if not isinstance(x, torch.Tensor) else changed[id(x)] if id(x) in changed else (
            Elsewhere(x) if result_there else x)

    args_here, kwargs_here = mapped(here, args), {key: mapped(here, x) for key, x in kwargs.items()}
    result_there = is_there(function._schema.name.removeprefix("aten::"), tensors, args, kwargs)
    if kwargs.get("device") is not None:
        kwargs_here["device"] = torch.device("cpu")
    return mapped(back, function(*args_here, **kwargs_here))


def pinned(x):
    x = x.clone()
    x.pinned = True
    return x


@pytest.fixture
def gpu(monkeypatch):
    """A context in which `meta` is a GPU."""
    autocast, is_enabled, tensor, generator, adamw = (
        torch.autocast, torch.is_autocast_enabled, torch.tensor, torch.Generator, torch.optim.AdamW)

    def put(name, value, place=torch):
        monkeypatch.setattr(place, name, value)

    put("autocast", lambda device, *a, **k: autocast("cpu" if device == "meta" else device, *a, **k))
    put("is_autocast_enabled", lambda device: device != "meta" and is_enabled(device))
    put("tensor", lambda x, *a, device=None, **k: tensor(x, *a, **k).to(device or "cpu"))
    put("Generator", lambda device="cpu": generator())
    put("synchronize", lambda device: None, torch.accelerator)
    put("AdamW", lambda groups, **k: adamw(groups, **k | {"fused": False, "foreach": False}), torch.optim)
    put("ROW", m.ROW | {"meta": m.ROW["cpu"]}, m)
    put("PINNED", {"meta"}, m)
    put("pin_memory", pinned, torch.Tensor)
    Elsewhere.waits.clear()
    return Gpu


@pytest.mark.parametrize("moved", [False, True])
def test_a_training_step_gives_the_same_on_a_gpu_and_does_not_wait_for_it(gpu, moved):
    """moved: all of the batch, masks too; then it may wait."""
    options, each = dict(dropout=0.1, margin=1.0), []
    with gpu():
        for (model, batch), (other, other_batch) in zip(
                t.models_and_batches("cpu", **options), t.models_and_batches(ELSEWHERE, **options), strict=True):
            assert not Elsewhere.waits, "a batch is made without waiting, too"
            if moved:
                other_batch = {k: v.to(ELSEWHERE) if isinstance(v, torch.Tensor) else v for k, v in other_batch.items()}
            other.load_state_dict(model.state_dict())
            other.to(ELSEWHERE)
            Elsewhere.waits.clear()
            losses = []
            for net, given in ((model, batch), (other, other_batch)):
                torch.manual_seed(0)
                losses.append(net.train()(MappingProxyType(given))["loss"])
                losses[-1].backward()
                net.update_target(0.9)
            each.append((type(model).__name__, list(Elsewhere.waits)))
            torch.testing.assert_close(losses[1].detach().cpu(), losses[0].detach())
            for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
                for value, there in ((ours, theirs), (ours.grad, theirs.grad)):
                    if value is not None:
                        torch.testing.assert_close(there.detach().cpu(), value.detach(), msg=name)
            Elsewhere.waits.clear()
    assert moved or not any(waits for _, waits in each), each


def test_a_wait_and_a_meeting_of_both_sides_are_noticed(gpu):
    with gpu():
        there, here = torch.arange(4.0, device=ELSEWHERE), torch.arange(4.0)
        for what in (lambda: there[there > 1], lambda: float(there.sum()), there.cpu, there.tolist, there.nonzero,
                     lambda: here.to(ELSEWHERE), lambda: here.to(ELSEWHERE, non_blocking=True), there[:1].cpu,
                     lambda: there[torch.tensor([1])], lambda: torch.tensor([1.0], device=ELSEWHERE)):
            Elsewhere.waits.clear()
            what()
            assert Elsewhere.waits
        Elsewhere.waits.clear()
        assert (there + 1)[there.long()].device == m.to_device(here, ELSEWHERE).device == ELSEWHERE
        assert not Elsewhere.waits
        for what in (lambda: there + here, lambda: here[there.long()], lambda: torch.cat((there, here))):
            with pytest.raises(AssertionError, match="of the CPU"):
                what()


def tour(device):
    """(command, its figures) of what the scripts can do, on the device, in the present folder."""
    def trained(preset, **fields):
        config = dataclasses.replace(cfg.pick_preset(preset), **SMALL | fields, device=device)
        return f"train {preset}", train.train(preset, config)

    def asked(script, *argv):
        argv = *argv, "--device", device
        return f"{script.__name__} {' '.join(argv)}", t.result_of(script.main, *argv)

    shape, text = dict(n_layer=2, n_head=2, n_embd=16), dict(vocab_size=300, block_size=700)
    problems = dict(dataset="synthetic", n_synthetic=48, max_problem_steps=3, tokenizer="bpe", **shape, **text)
    made = "--dataset synthetic --max_problem_steps 3 --limit 40 --llm llm --layer 1 --pooling both".split()
    question, few = ("--question", "Ann has 2 pens and buys 3."), ("--max_new_tokens", "8")
    steps = ("--steps", "2+3 = 5", "#### 5")
    t.write_jsonl(Path("errors.jsonl"), [{"id": str(i), "question": "Ann has 2 pens.", "steps": ["2+2=4", "2+3=5"],
                                          "is_correct": False, "first_error_step": 2} for i in range(3)])
    yield trained("quickstart", **problems, batch_size=8, out_dir="llm")
    yield trained("quickstart", **problems, batch_size=8, out_dir="ema", target_encoder="ema", answer_context="latent")
    yield asked(extract, *made, "--counterfactual", "--logprobs", "--out", "latents")
    yield asked(extract, *made, "--generate", "2", "--split", "test", *few, "--out", "written")
    world = shape | dict(predictor_n_embd=8, latents="latents")
    yield trained("rjepa-small", **world, batch_size=8, out_dir="world")
    yield trained("rjepa-small", **world, batch_size=8, init_from="world", held_out="latents", out_dir="next",
                  where="split = 'train'", mask="random")
    yield trained("rjepa-calibrate", **world, batch_size=8, init_from="world", out_dir="calibrated")
    yield trained("rjepa-guide", init_from="world", batch_size=4)
    yield trained("rjepa-speak", init_from="world", batch_size=4, **shape, vocab_size=300,
                  block_size=16)
    yield trained("tjepa-document", **problems, predictor_n_embd=8, batch_size=2, out_dir="thinker")
    yield trained("tjepa-distill", **problems, teacher="thinker", batch_size=2, out_dir="student")
    yield trained("tjepa-speak", **problems, init_from="thinker", batch_size=8, out_dir="speaker")
    for run in ("llm", "thinker", "speaker"):
        yield asked(eval_alignment, run, "--limit", "12")
    yield asked(eval_alignment, "student", "--limit", "12", "--teacher", "thinker")
    yield asked(eval_alignment, "world", "--latents", "latents")
    yield asked(eval_alignment, "world", "--step_errors", "errors.jsonl")
    yield asked(eval_alignment, "world", "--plan", "--dataset", "synthetic", "--limit", "30", "--decode_limit", "2",
                "--logprob_limit", "1")
    yield asked(evaluate_accuracy, "llm", "--limit", "6", "--k", "2", *few)
    yield asked(evaluate_accuracy, "world", "--latents", "written")
    for way in ("bias", "hidden"):
        yield asked(evaluate_accuracy, "world", "--method", "nudge", "--nudge", way, "--limit", "3", *few,
                    "--alphas", "1")
    yield asked(infer, "score", "world", *question, *steps)
    yield asked(infer, "rerank", "world", *question, "--k", "2", "--alpha", "1", "--beta", "1", *few)
    for who in ("speaker", "llm"):
        yield asked(infer, "plan", "world", *question, *steps, "--at", "1", "--decode", who, *few)
    yield asked(infer, "think", "thinker", "--text", "Ann has 2 pens.")
    yield asked(infer, "speak", "speaker", *question, *few)
    memory.main(["remember", "--latents", "latents", "--memory", "memory.duckdb"])
    yield asked(memory, "recall", *question, "--memory", "memory.duckdb")


SMALL = dict(max_steps=3, log_every=1, eval_every=3, save_every=2, val_problems=8, threads=1, dtype="fp32")


@pytest.mark.parametrize("preset", ["quickstart", "rjepa-small", "tjepa-document"])
def test_training_waits_for_a_gpu_where_it_logs_evaluates_or_saves_alone(preset, gpu, tmp_path, monkeypatch):
    """Not so rjepa-guide and rjepa-speak, for whose batches a frozen network is asked."""
    monkeypatch.chdir(tmp_path)
    t.latents_folder(tmp_path / "latents")
    fields = dict(n_layer=2, n_head=2, n_embd=16, batch_size=8, val_problems=8, threads=1, dtype="fp32", device="meta")
    fields |= dict(predictor_n_embd=8, batch_size=4) if preset != "quickstart" else {}
    fields |= dict(latents="latents") if preset == "rjepa-small" else dict(
        dataset="synthetic", n_synthetic=48, max_problem_steps=3, tokenizer="bpe", vocab_size=300)
    waits = {}
    with gpu():
        for steps, every in ((3, 50), (6, 50), (6, 3)):
            Elsewhere.waits.clear()
            train.train(preset, dataclasses.replace(
                cfg.pick_preset(preset), **fields, max_steps=steps, log_every=every, eval_every=50, save_every=50,
                out_dir=f"{steps}-{every}"))
            waits[steps, every] = len(Elsewhere.waits)
    assert 0 < waits[3, 50] == waits[6, 50] < waits[6, 3], waits


def figures(found, path=""):
    """The numbers of a nested result, each with its path; not those of a time."""
    if isinstance(found, (dict, list)):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from figures(value, f"{path}/{key}")
    elif isinstance(found, (int, float)) and not path.endswith(("seconds", "tokens_per_s")):
        yield path, found


def test_every_command_gives_the_same_on_a_gpu(gpu, tmp_path, monkeypatch):
    results = []
    monkeypatch.setattr(infer, "TRIES", 2)
    for device, there in (("cpu", contextlib.nullcontext), ("meta", gpu)):
        (tmp_path / device).mkdir()
        monkeypatch.chdir(tmp_path / device)
        with there():
            results.append(list(tour(device)))
    for (name, here), (_, there) in zip(*results, strict=True):
        assert dict(figures(there)) == pytest.approx(dict(figures(here)), rel=1e-3, abs=1e-3), name
