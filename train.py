"""Trains every model of this repository: one loop, straight down.

    python train.py                                         # quickstart: synthetic problems, any machine, minutes
    python train.py nanojepa                                # 45 M parameters on GSM8K, one GPU
    python train.py nanojepa-small --data_dir DATA/gsm8k    # about 3 M on a CPU, from a local folder
    python train.py rjepa-small --data_dir DATA/gsm8k       # R-JEPA over SmolLM2's hidden states, on a CPU
    python train.py tjepa-small --data_dir DATA/gsm8k       # T-JEPA: a text encoder; then tjepa-speak, tjepa-distill
    torchrun --standalone --nproc_per_node 2 train.py quickstart
    python train.py nanojepa --help                         # every field

The same command on an unfinished run folder continues it, to the same weights. A run folder holds
model.safetensors, config.json, state.pt (what resuming needs), log.jsonl and its plots.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist
from tqdm import tqdm

import config as cfg
import runs
from jobs import JOBS, n_rows
from model import compile_model, configure_optimizers, estimate_mfu
from parallel import STATE_FOLDERS, copy_tensors, full, gathered, load_state, save_state, sync_gradients, wrap

load_run = runs.load_run  # (model, config) of any run folder


def learning_rate(step: int, n_steps: int, config) -> float:
    """Linear warm-up, then a cosine to lr * min_lr_ratio at the last step."""
    warmup = max(1, round(config.warmup_ratio * n_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - 1 - warmup)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(preset: str, config) -> dict:
    """One run from start (or checkpoint) to end -> the figures that `main` prints."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high")
    beside = {"rjepa-guide": "guide", "rjepa-speak": "speak"}.get(preset)  # where infer.py looks for them
    out = Path(config.out_dir or (f"{Path(config.init_from)}-{beside}" if beside else f"out/{preset}"))
    config.out_dir, device = str(out), runs.pick_device(config.device)
    runs.refuse_foreign(out, config.overwrite)
    for name in ("init_from", "teacher"):
        if (other := getattr(config, name, "")) and Path(other).resolve() == out.resolve():
            raise SystemExit(f"--{name} {other} would be lost: give another --out_dir")
    with runs.processes(device) as (rank, world), runs.lock(out, "--out_dir"):
        try:
            return run(preset, config, out, device, rank, world)
        finally:
            gc.unfreeze()


def run(preset: str, config, out: Path, device: str, rank: int, world: int) -> dict:
    """What `train` does once it holds the folder's lock, as one of `world` processes."""
    dtype = runs.pick_dtype(config.dtype, device)
    in_dtype = functools.partial(runs.autocast, device, dtype)

    # data, model, optimizer
    if runs.add_up(runs.is_restart()):
        config.overwrite = False  # what this very job has written it goes on with
    runs.inherit(config)
    state = runs.open_run(out, config)
    job = JOBS[type(config)](config, out)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)  # a new field alone is no change
                if f.name not in runs.FREE_ON_RESUME and getattr(config, f.name) != f.default}
    micro_steps = config.grad_accum * world
    fields = ("id", "question", "steps", "wrong_step", "answer", "target", "tokens")
    held_out = ([example.get(name) for name in fields] for example in job.val)
    identity = {"settings": runs.digest(json.dumps(settings)), "grad_accum x processes": micro_steps,
                "validation": runs.digest_of_list(held_out), **job.identity}
    if state:
        theirs = state["identity"]
        there = theirs.get("grad_accum x processes", micro_steps)  # a state of an older version is refused below
        if there != micro_steps and there % world == 0:
            raise SystemExit(f"{out} was begun with grad_accum x processes = {there}, here it is {micro_steps}: "
                             f"--grad_accum {there // world} goes on with it")
        runs.refuse_changes(out, {k: (theirs.get(k), v) for k, v in identity.items() if theirs.get(k) != v})
    n_steps = config.max_steps or max(1, round(config.epochs * job.batches.per_epoch / micro_steps))
    torch.manual_seed(config.seed)
    model = runs.build_model(config)
    job.fit(model)
    if config.init_from and type(config) in cfg.NETWORK:
        runs.start_from(model, config)
    old_val = None  # figures of the run that this one must not be worse than
    if getattr(config, "held_out", ""):
        model.to(device)
        old_weights = {k: v.clone() for k, v in model.state_dict().items()}
        old_val = job.evaluate(model, device, in_dtype)
        model.load_state_dict(old_weights)  # evaluation stores quantiles
    use_compile = runs.pick_compile(config.compile, device)
    if use_compile:
        compile_model(model, by_block=world > 1)
    if config.shard and world == 1:
        runs.say("--shard is for several processes (torchrun): this one keeps everything")
    run_model = wrap(model, world, config.shard, device)
    optimizer = configure_optimizers(model, config)
    first = 0
    if state:
        load_state(out, model, optimizer, state)
        first, n_steps = state["step"], state["n_steps"]
        del state
        runs.say(f"continuing {out} at step {first} of {n_steps}")
    runs.say(f"{preset}: {model.n_params():,} parameters on {device} in {str(dtype)[6:]}, "
             f"{len(job.train):,} {job.batches.unit}, {n_steps} steps of {config.batch_size * micro_steps} -> {out}")

    if use_compile:
        with in_dtype():  # always on the first batch: kernels must not depend on the step at which a run is resumed
            run_model(job.batch(0, device))["loss"].backward()
        optimizer.zero_grad(set_to_none=True)

    if world > 1:
        dist.barrier()  # every process has looked at the folder before the first one writes
    if rank == 0:  # all is ready: only now does anything in the folder change
        if config.overwrite:
            ours = [out / name for name in (*runs.RUN_FILES, "energies.png")]
            for path in [*ours, *out.glob("generations-*.jsonl")]:
                path.unlink(missing_ok=True)
            for folder in out.glob(STATE_FOLDERS):
                shutil.rmtree(folder)
        job.write(out)
        runs.write_text(out / "config.json", cfg.to_json(config, preset) + "\n")
        keep_log_until(out / "log.jsonl", first)

    def log(row):
        if rank == 0:
            runs.append_line(out / "log.jsonl", row)

    def save(step):
        """state.pt last: a finished state means that everything else is there."""
        if step == n_steps:
            weights = model.state_dict() if rank == 0 or config.shard else {}
            weights = {name: full(value).cpu().contiguous() for name, value in weights.items()}
            if rank == 0:
                runs.write_weights(out / "model.safetensors", weights)
                runs.save_plots(out)
        save_state(out, model, optimizer, {"step": step, "n_steps": n_steps, "identity": identity})

    # loop
    gc.collect()
    gc.freeze()  # so that what lives until the end is not looked through again and again
    progress = tqdm(total=n_steps, initial=first, unit="step", disable=rank > 0 or not sys.stderr.isatty())
    model.train()
    figures, val, verdict = {}, {}, {}
    started, busy, tokens, filled, slots = time.monotonic(), 0.0, 0, 0, 0
    window, window_tokens, upcoming, saved, health = time.monotonic(), 0, None, first, None
    for step in range(first, n_steps):
        t0 = time.monotonic()
        lr = learning_rate(step, n_steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = {}
        for micro in range(config.grad_accum):
            index = (step * config.grad_accum + micro) * world + rank
            batch = upcoming or job.batch(index, device)
            tokens, window_tokens = tokens + batch["n_tokens"], window_tokens + batch["n_tokens"]
            filled, slots = filled + batch["n_filled"], slots + batch["n_slots"]
            torch.manual_seed(config.seed * 1_000_003 * 1009 + index)  # dropout follows from the batch, whoever has it
            with sync_gradients(run_model, last=micro == config.grad_accum - 1):
                with in_dtype():
                    losses = run_model(MappingProxyType(batch))  # FSDP2 would take the masks of a dict to the GPU, too
                (losses["loss"] / config.grad_accum).backward()
            for k, v in losses.items():
                sums[k] = sums.get(k, 0.0) + v.detach() / config.grad_accum
            upcoming = None
            if job.ahead and index + world < n_steps * micro_steps:  # made while a GPU is still busy
                upcoming = job.batch(index + world, device)
        grad_norm = full(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip))
        now = torch.stack((torch.full_like(grad_norm, step), sums["loss"], grad_norm))
        health = now if health is None else torch.where(health.isfinite().all(), now, health)  # the first bad step's
        done = step + 1
        is_last = done == n_steps
        logs, evaluates, saves = (
            is_last or done % n == 0 for n in (config.log_every, config.eval_every, config.save_every))
        if logs or evaluates or saves:  # not at every step: a GPU would stand still while the CPU waits for it
            bad, loss, norm = health.tolist()
            is_bad = not math.isfinite(loss + norm)
            if runs.add_up(is_bad):  # in any process: none must save what came after
                at = f"at step {int(bad)}" if is_bad else "here, not finite in another process"
                raise SystemExit(
                    f"loss {loss}, gradient norm {norm} {at}: stopped. Last good checkpoint: {out / 'state.pt'} "
                    f"({f'step {saved}' if saved else 'none yet'}). It would come to the same: start again, with a "
                    "lower --lr and --overwrite")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_target(config.ema_start + (config.ema_end - config.ema_start) * step / max(1, n_steps - 1))
        busy += time.monotonic() - t0

        if logs:
            values = torch.stack([v.float() for v in sums.values()])
            if world > 1:
                dist.all_reduce(values)
            figures = dict(zip(sums, (values / world).tolist(), strict=True))
            rate = window_tokens * world / max(1e-9, time.monotonic() - window)
            row = {"step": done, "split": "train", **figures, "lr": lr, "grad_norm": float(grad_norm),
                   "tokens_per_s": round(rate), "real_share": round(filled / slots, 4)}
            name = torch.cuda.get_device_name() if device.startswith("cuda") else device
            mfu = estimate_mfu(rate / world * model.flops_per_token(batch["n_tokens"] / n_rows(batch)), name)
            log(row | ({"mfu": mfu} if mfu else {}))
            progress.set_postfix({k: f"{v:.3f}" for k, v in figures.items() if k != "loss"})
            progress.update(done - progress.n)
            window, window_tokens = time.monotonic(), 0
        if evaluates:
            if rank == 0 or config.shard:  # a sharded model is there where all are
                with gathered(run_model):
                    val = job.evaluate(model, device, in_dtype)
                log({"step": done, "split": "val", **val})
                runs.say(f"step {done}/{n_steps}: train {short(figures)} | val {short(val)}")
                if old_val and is_last:
                    before, after = relative_l1(old_val), relative_l1(val)
                    verdict = {"accepted": after <= before, "before": before, "after": after}
                    runs.say(f"error on {config.held_out}, in units of predict-the-mean's: {before:.4f} of "
                             f"{config.init_from}, {after:.4f} now: "
                             + ("accepted" if verdict["accepted"] else "rejected, the old weights stay"))
                    if not verdict["accepted"]:
                        copy_tensors(model.state_dict(), old_weights)
                        val = old_val
            window, window_tokens = time.monotonic(), 0
        if saves:
            save(done)
            saved = done
    progress.close()
    return {"preset": preset, "out_dir": str(out), "steps": n_steps, "params": model.n_params(), "device": device,
            "train": figures, "val": val, "tokens_per_s": round(tokens * world / max(busy, 1e-9)),
            "real_share": round(filled / max(1, slots), 4), "seconds": round(time.monotonic() - started, 1), **verdict}


def relative_l1(val: dict) -> float:
    """R-JEPA's error in units of the best constant's: other weights have targets of another size."""
    return val["l1"] / val["l1_predict_mean"]


def short(figures: dict) -> str:
    """The figures that a line on the screen has room for."""
    names = """lm_loss lm_loss_shuffled lm_loss_predicted mse mse_predict_mean mse_copy mse_document_mean cos ce ce_llm
               ce_shuffled jepa_loss l1 l1_predict_mean l1_copy infonce own margin cos_matched cos_mismatched
               retrieval_top1 effective_rank""".split()
    return " ".join(f"{k} {figures[k]:.3f}" for k in names if k in figures)


def keep_log_until(path: Path, step: int):
    """Drops log lines after `step` (and a half-written last one), so that a resumed run logs each step once."""
    if path.is_file():
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        runs.write_text(path, "".join(line + "\n" for line in kept))


@cfg.plain_errors()
def main():
    preset, config = cfg.parse_cli(sys.argv[1:])
    result = train(preset, config)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result, allow_nan=False))
    runs.leave()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the last checkpoint, before the first (--save_every) anew")
