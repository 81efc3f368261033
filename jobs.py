"""What train.py's one loop needs to know of each kind of model: a job brings the data, the batches, the evaluation.

A job has `train` and, held out, `val` (examples), `batches` (with `per_epoch` and `unit`, what they hold), `ahead`
(whether a batch may be made while the one before it is trained on: those that a frozen model makes are too large),
`identity` (what a resumed run must share), and the methods of `Job`.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import torch

import benchmarks
import config as cfg
import data
import extract
import latents
import runs
from llm import llm_of
from model import alignment, effective_rank, latent_figures, pad_rows, real_tokens


def n_rows(batch: dict) -> int:
    """How many rows hold the n_tokens of a batch."""
    return batch.get("n_rows") or len(batch["idx"] if "idx" in batch else batch["h"])


def parts(items: list, size: int) -> list[list]:
    """Items in parts of about `size`, none of a single item: a control pairs each with another of its part."""
    n = max(1, min(-(-len(items) // size), len(items) // 2))
    return [items[i * len(items) // n : (i + 1) * len(items) // n] for i in range(n)]


def pick_tokenizer(config, out: Path, texts: list[str], init_from: str = "") -> data.Tokenizer:
    """GPT-2's, the run folder's own, that of the run it starts from, or a BPE trained on the texts."""
    if config.tokenizer == "gpt2":
        return data.gpt2_tokenizer()
    if (out / "state.pt").is_file() and not config.overwrite:  # without a state it may be of other settings
        return data.load_bpe(out / "tokenizer.tiktoken")
    return runs.load_tokenizer(init_from, config) if init_from else data.train_bpe(texts, config.vocab_size)


def at_least_two(val: list, where: str) -> list:
    """val itself. Raises ValueError if it is shorter: a control pairs each of its items with another."""
    if len(val) < 2:
        raise ValueError(f"{where}: {len(val)} to validate on, two are needed (where no split is given every "
                         f"{data.VAL_EVERY}th is kept)")
    return val


def train_and_val(config) -> tuple[list[dict], list[dict]]:
    """The problems that a config names. Raises ValueError where too few are left to validate on."""
    train, val = (data.run_problems(config, split) for split in ("train", "val"))
    return train, at_least_two(val, f"problems of {config.dataset}")


def chains_to_train_on(config, rows: list[dict], manifest: dict, folder, world) -> tuple[list[dict], list[dict]]:
    """(train, val) of latents.training_chains, as many as a config names.

    world: the config of the R-JEPA. If its held_out names a folder, val comes from there, and all chains of `folder`
    are trained on. Raises ValueError as train_and_val does, and where a problem is in both.
    """
    train, val = latents.training_chains(rows, manifest, folder)
    if not train and not val:
        left = " that --where leaves" * bool(world.where)
        raise ValueError(f"{folder}: of {len(rows)} chains{left} the gate accepts none (verify.py --chains says why)")
    if world.held_out:
        held_out, manifest = latents.load_latents(world.held_out)
        latents.check_same_llm(world, manifest, f"--held_out {world.held_out}")
        train, val = train + val, latents.training_chains(held_out, manifest, world.held_out)[1]
    train = latents.first_problems(train, config.limit)
    val = at_least_two(latents.first_problems(val, config.val_problems),
                       f"verified chains of {world.held_out or folder}")
    if world.held_out:
        for name in (lambda r: r["problem_id"], lambda r: data.plain_question(r["question"])):
            if seen := {name(r) for r in train} & {name(r) for r in val}:
                raise ValueError(f"{folder} holds a problem of --held_out {world.held_out}: {min(seen)[:80]}")
    return train, val


class Job:
    """What the jobs share; each brings its `figures` of the held-out examples."""

    ahead, tokenizer = True, None

    def batch(self, index: int, device) -> dict:
        return self.batches(index, device)

    def fit(self, model):
        """Takes from the data what the model needs before the first step: nothing."""

    def write(self, out: Path):
        if self.tokenizer:
            runs.write_atomic(out / "tokenizer.tiktoken", self.tokenizer.save)

    @torch.no_grad()
    def evaluate(self, model, device, autocast) -> dict:
        """What `figures` says of the model in eval mode, not compiled: that would take longer than it could save."""
        with model.evaluating(), torch.compiler.set_stance("force_eager"):
            return self.figures(model, device, autocast)


class TextJob(Job):
    """To train NanoJEPA on problems."""

    def __init__(self, config, out: Path):
        self.config, asked_vocab_size = config, config.vocab_size
        train, val = train_and_val(config)
        texts = [t for p in train for t in (p["question"], data.answer_text(p, "solution"))]
        tokenizer = pick_tokenizer(config, out, texts, config.init_from)
        config.vocab_size, self.tokenizer = tokenizer.vocab_size, tokenizer
        self.train, self.val = (data.encode_problems(p, tokenizer, config) for p in (train, val))
        self.batches = data.Batches(self.train, config)
        rows = ([e["question"], e["answer"], e["target"]] for e in self.train)
        self.identity = {"vocab_size": asked_vocab_size, "training problems": runs.digest_of_list(rows),
                         "tokenizer": runs.tokenizer_digest(tokenizer), "pooling": config.pooling}

    def batch(self, index: int, device) -> dict:
        return data.collate(self.batches(index), self.config, device)

    def figures(self, model, device, autocast) -> dict:
        """Held-out lm_loss, jepa_loss and the collapse diagnostics of model.alignment; draws no random number."""
        config, total, n = self.config, 0.0, 0
        by_length = sorted(self.val, key=lambda e: len(e["question"]) + len(e["answer"]))
        for start in range(0, len(by_length), config.batch_size):
            batch = data.collate(by_length[start : start + config.batch_size], config, device)
            tokens = len(batch["targets"]) + len(batch.get("answer_targets", ()))
            with autocast():
                total += float(model(batch)["lm_loss"]) * tokens
            n += tokens
        with autocast():
            model.fit_standardize([e["target"] for e in self.train[:1024]])
            pred, target = model.encode([e["question"] for e in self.val], [e["target"] for e in self.val])
        figures = alignment(pred, target)
        return {"lm_loss": total / n, "jepa_loss": 1 - figures["cos_matched"],
                "predict_mean_loss": 1 - figures["predict_mean_cos"], **figures}


class LatentJob(Job):
    """To train RJEPA: verified chains' latents, extracted first where they are missing.

    Sets the config's llm, layer, pooling, prompt, dim and dataset to what the latents say.
    """

    def __init__(self, config, out: Path):
        self.config, named, folder = config, bool(config.latents), Path(config.latents or default_latents(config))
        if not (folder / "manifest.json").is_file() and not named:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise ValueError(f"{folder} holds no finished latents: run extract.py, then torchrun with --latents")
            extract_latents(config, folder)
        rows, manifest = latents.load_latents(folder, config.where)
        config.latents = str(folder)
        for name in latents.SAME_LLM:
            if named and name != "dim" and getattr(config, name) != manifest[name]:
                runs.say(f"{folder} decides: --{name} {manifest[name]!r:.80}, not {getattr(config, name)!r:.80}")
            setattr(config, name, manifest[name])
        config.llm_weights = manifest.get("weights", "")
        if (dataset := manifest["dataset"]) in {*benchmarks.WITH_NUMBERS, "synthetic"} - {config.dataset}:
            known = dataset in get_args(cfg.RunConfig.__annotations__["dataset"])
            config.dataset = dataset if known else config.dataset
            runs.say(f"{folder} is of --dataset {dataset}" + ("" if known else ": say so when the run is evaluated"))
        self.train, self.val = chains_to_train_on(config, rows, manifest, folder, config)
        if config.gap_share:
            extract.leave_out_a_step(config, self.train, config.seed, config.device)
        latents.join(self.val)  # copies them; once the training chains are in a table, too, the shards are freed
        self.batches = latents.Batches(self.train, config)
        parts = [[r["id"], r["steps"], r.get("wrong_step")] for r in self.train]
        self.identity = {"latents": runs.digest(json.dumps([parts, manifest], sort_keys=True))}

    def fit(self, model):
        """The latents' mean and std, from the training chains."""
        model.fit_standardize(torch.cat([r["h"] for r in self.train]))

    def figures(self, model, device, autocast) -> dict:
        """Losses and latent_figures of held-out chains under fixed masks; stores the energies' quantiles."""
        clean = dataclasses.replace(self.config, shuffle_steps=False)
        z_pred, z_target, z_copy, sums = [], [], [], {}
        energies = [[], [], []]  # the rows of model.quantiles
        for start in range(0, len(self.val), self.config.batch_size):
            part = self.val[start : start + self.config.batch_size]
            batch = latents.collate(part, clean, np.random.default_rng([0, start]), device)
            with autocast():
                losses = model(batch)
                is_real, is_visible, is_target = (batch[k].to(device) for k in ("is_real", "is_visible", "is_target"))
                z = model.targets(batch["h"], is_real)
                z_pred.append(model.predict(batch["h"], is_visible, is_target).cpu())
            z_target.append(z[is_target].cpu())
            z_copy.append(z[:, :-1][is_target[:, 1:]].cpu())  # the step before, or the question
            for k, v in losses.items():
                sums[k] = sums.get(k, 0.0) + float(v) * len(part) / len(self.val)
            for mode, values in zip(model.ENERGIES, energies, strict=False):
                e = model.energy(batch["h"], is_real, mode)
                values.append(e[~e.isnan()].cpu())
            later = e[:, 2:].nan_to_num(-1.0)  # next-step energies after the first step
            highest = later.amax(1) if later.shape[1] else later.new_zeros(0)
            energies[2].append(highest[highest >= 0].cpu())
        for row, values in zip(model.quantiles, energies, strict=True):
            if len(found := torch.cat(values)):
                row.copy_(torch.quantile(found, torch.linspace(0, 1, len(row))))
        return {**sums, **latent_figures(torch.cat(z_pred), torch.cat(z_target), torch.cat(z_copy))}


class WorldJob(Job):
    """What GuideJob and SpeakJob share: the frozen R-JEPA that init_from names, and the verified chains it saw."""

    ahead = False

    def __init__(self, config, out: Path):
        self.config = config
        self.world, self.world_config = runs.load_run(config.init_from, config.device, cfg.RJEPAConfig,
                                                      "not of R-JEPA (train.py rjepa-small)")
        self.world.requires_grad_(False)
        rows, manifest = latents.load_latents(self.world_config.latents, self.world_config.where)
        latents.check_same_llm(self.world_config, manifest, f"{config.init_from} and {self.world_config.latents}")
        self.train, self.val = chains_to_train_on(config, rows, manifest, self.world_config.latents, self.world_config)
        self.batches = latents.Batches(self.train, config)
        parts = [[r["id"], r["steps"]] for r in self.train]
        config.world = runs.weights_digest(config.init_from)
        self.identity = {"chains": runs.digest(json.dumps([parts, manifest], sort_keys=True)),
                         "world model": config.world}

    def batch(self, index: int, device) -> dict:
        return self.collate(*self.batches.chains(index), device)


def of_other_problems(chains: list[dict], by: int) -> list[int]:
    """For every chain the next one (by = 1) or the one before (-1) of another problem, round the end; else any."""
    n, ids = len(chains), [c["problem_id"] for c in chains]
    return [next((j for d in range(1, n) if ids[j := (i + by * d) % n] != ids[i]), (i + by) % n) for i in range(n)]


class GuideJob(WorldJob):
    """To train NUDGE's Guidance: the LLM reads verified chains, R-JEPA predicts every next step."""

    def __init__(self, config, out: Path):
        super().__init__(config, out)
        self.llm = llm_of(self.world_config, device=config.device)
        config.z_dim, config.h_dim = self.world_config.n_embd, self.llm.dim
        self.llm.model.requires_grad_(False)

    @torch.no_grad()
    def collate(self, chains: list[dict], rng, device) -> dict:
        """A batch of Guidance.forward over all tokens of the steps, with the line end (or end of text) after each.

        And, as the control, z_other: the prediction for the step of the same number (or the last) of another problem.
        """
        coded = [self.llm.encode(c["question"], c["steps"]) for c in chains]
        seen, final = self.llm.states(pad_rows([ids for ids, _ in coded], 0, self.llm.device), {self.llm.layer}, True)
        h, is_real = latents.pad_latents([c["h"] for c in chains], device)
        chain, step, z_pred, _ = self.world.hidden_steps(h, is_real, "next_step")
        at = {pair: i for i, pair in enumerate(zip(chain.tolist(), step.tolist(), strict=True))}
        rows, columns, tokens, mine, others, beside = [], [], [], [], [], of_other_problems(chains, 1)
        for i, (ids, spans) in enumerate(coded):
            j, ids = beside[i], [*ids, self.llm.end_id]
            for s, (begin, end) in enumerate(spans[1:], 1):
                end = spans[s + 1][0] if s + 1 < len(spans) else len(ids)
                n = end - begin
                rows += [i] * n
                columns += range(begin - 1, end - 1)
                tokens += ids[begin:end]
                mine += [at[i, s]] * n
                others += [at[j, min(s, len(coded[j][1]) - 1)]] * n
        return {"h": seen[self.llm.layer][rows, columns].float().to(device), "z_pred": z_pred[mine],
                "z_other": z_pred[others], "targets": torch.tensor(tokens, device=device),
                "final": final[rows, columns], "words": self.llm.logits,
                "n_tokens": len(tokens), "n_filled": len(tokens), "n_slots": len(tokens)}

    def figures(self, model, device, autocast) -> dict:
        """Held-out cross-entropy a token: of the LLM, guided, and guided by predictions for other chains."""
        sums, n = {"ce_llm": 0.0, "ce": 0.0, "ce_shuffled": 0.0, "bias": 0.0}, 0
        for part in parts(self.val, self.config.batch_size):
            batch = self.collate(part, None, device)
            with autocast():
                losses = model(batch)
                losses["ce_shuffled"] = model(batch | {"z_pred": batch["z_other"]})["ce"]
            for k in sums:
                sums[k] += float(losses[k]) * batch["n_tokens"]
            n += batch["n_tokens"]
        return {k: v / n for k, v in sums.items()}


class SpeakJob(WorldJob):
    """To train a Speaker on an R-JEPA's latents: one hidden step of each chain, put into words.

    The LLM reads every chain of two or more steps once without that step.
    """

    def __init__(self, config, out: Path):
        super().__init__(config, out)
        self.train, self.val = ([c for c in part if len(c["steps"]) > 1] for part in (self.train, self.val))
        at_least_two(self.val, f"chains of two steps and more in {self.world_config.latents}")
        extract.leave_out_a_step(self.world_config, self.train + self.val, config.seed, config.device)
        self.batches = latents.Batches(self.train, config)
        texts = [c["question"] for c in self.train] if config.reads != "nothing" else []
        self.tokenizer = pick_tokenizer(config, out, texts + [s for c in self.train for s in c["steps"]])
        self.identity |= {"vocab_size": config.vocab_size, "tokenizer": runs.tokenizer_digest(self.tokenizer)}
        config.vocab_size, config.context_dim = self.tokenizer.vocab_size, self.world_config.n_embd

    def collate(self, chains: list[dict], rng, device, predicted: float | None = None) -> dict:
        """A batch of Speaker.forward; `predicted` is the share that speaks from predicted latents, else config's."""
        eos, config = self.config.vocab_size - 2, self.config
        steps = [c["hole"] for c in chains]
        at = torch.tensor(steps, device=device)
        gapped = latents.with_slots([c["gapped"] for c in chains], steps, device)
        context, allowed, offsets = self.world.around(*gapped, at)
        share = config.predicted_share if predicted is None else predicted
        from_true = torch.from_numpy(rng.random(len(chains)) >= share)
        if from_true.any():
            true, mine = latents.pad_latents([c["h"] for c in chains], device), from_true.to(device)
            context[mine, 0] = self.world.target_of(*true, at)[mine]
        if predicted is None and rng.random() < config.alone_share:
            allowed[:, 1:], reads = False, None
        else:
            reads = [data.read_around(config, self.tokenizer, c["question"], c["steps"][: s - 1], c["steps"][s:])
                     for c, s in zip(chains, steps, strict=True)]
        texts = [self.tokenizer.encode(c["steps"][s - 1])[: config.block_size - 1]
                 for c, s in zip(chains, steps, strict=True)]
        return {"context": context, "context_allowed": allowed, "offsets": offsets,
                **spoken(texts, eos, device, reads)}

    def figures(self, model, device, autocast) -> dict:
        """Held-out token loss from true latents, from predicted ones, and from that of another chain (a predicted one
        where it has learnt from these alone)."""
        sums, other = {"lm_loss": 0.0, "lm_loss_predicted": 0.0, "lm_loss_shuffled": 0.0}, self.config.predicted_share
        n = 0
        for i, part in enumerate(parts(self.val, self.config.batch_size)):
            for name, share in (("lm_loss", 0.0), ("lm_loss_predicted", 1.0), ("lm_loss_shuffled", float(other == 1))):
                batch = self.collate(part, np.random.default_rng([0, i]), device, share)
                if name == "lm_loss_shuffled":  # the latent alone, its surroundings stay
                    batch["context"][:, 0] = batch["context"][of_other_problems(part, -1), 0]
                with autocast():
                    sums[name] += float(model(batch)["lm_loss"]) * int(batch["is_text"].sum())
            n += int(batch["is_text"].sum())
        return {name: total / n for name, total in sums.items()}


def spoken(texts: list[list[int]], eos: int, device, reads: list[list[int]] | None = None) -> dict:
    """idx, targets, is_text and counts of a batch of Speaker.forward: texts (token ids), each after what is read."""
    heads = [[*r, eos] if r else [] for r in reads or [[]] * len(texts)]
    rows = [[*r, *t] for r, t in zip(heads, texts, strict=True)]
    idx, n = pad_rows([[eos, *row] for row in rows], eos, device), sum(len(row) + 1 for row in rows)
    is_text = pad_rows([[0] * len(r) + [1] * (len(t) + 1) for r, t in zip(heads, texts, strict=True)], 0)
    return {"idx": idx, "targets": pad_rows([[*row, eos] for row in rows], -100), "is_text": is_text.bool(),
            "n_tokens": n, "n_filled": n, "n_slots": idx.numel()}  # fmt: skip


class DocumentJob(Job):
    """To train TJEPA: packed documents with masked spans."""

    def __init__(self, config, out: Path, tokenizer=None):
        self.config, asked_vocab_size = config, config.vocab_size
        texts = {split: data.load_texts(config, split) for split in ("train", "val")}
        self.tokenizer = tokenizer or pick_tokenizer(config, out, texts["train"], config.init_from)
        config.vocab_size = self.tokenizer.vocab_size
        documents, n_short = {}, 0
        for split, part in texts.items():
            coded = [data.encode_document(t, self.tokenizer, config.block_size) for t in part]
            documents[split], n_short = [d for ds in coded for d in ds], n_short + sum(not ds for ds in coded)
            if not documents[split]:
                raise ValueError(f"{config.text or config.dataset}: no document of two sentences and more among "
                                 f"{len(texts[split])} to {'train' if split == 'train' else 'validate'} on (a "
                                 "twentieth is held out): more text is needed")
        if n_short:
            runs.say(f"{n_short} texts of one sentence left out: there is nothing to predict it from")
        self.batches, self.val = data.Documents(documents["train"], config, tokenizer is None), documents["val"]
        self.train = self.batches.examples
        self.identity = {"vocab_size": asked_vocab_size, "tokenizer": runs.tokenizer_digest(self.tokenizer),
                         "documents": runs.digest_of_list(d["tokens"] for d in documents["train"])}

    def figures(self, model, device, autocast) -> dict:
        with autocast():
            return span_figures(model, self.val, device)


@torch.no_grad()
def span_figures(model, documents: list[dict], device) -> dict:
    """model.latent_figures of a TJEPA on documents under fixed masks, in the space that it is trained in.

    copy: predicts the target of the nearest visible token. document_mean: predicts, times the best factor for all, the
    mean of what the target encoder makes of a document's visible tokens, seeing these alone. mse_gain: by how much the
    model's error is lower than document_mean's, with a 95 % interval (bootstrap of documents). target_std and
    target_raw_effective_rank are taken before standardising, which would hide a collapse; encoder_effective_rank before
    the head.
    """
    found = {name: [] for name in ("pred", "target", "copy", "document_mean", "encoder", "document")}
    for batch in data.packed(documents, model.config, device):
        is_target, segment, where = batch["is_target"], batch["segment"], (batch["positions"], batch["segment"])
        encoded, visible = model.encode(batch["idx"], segment >= 0, *where), (segment >= 0) & ~is_target
        z, z_visible = model.project(encoded), model.project(model.encode(batch["idx"], visible, *where))
        belongs = ((segment[:, :, None] == segment[:, None, :]) & visible[:, None, :]).float()  # (B, T, T)
        own = belongs @ torch.where(visible[..., None], z_visible, 0.0) / belongs.sum(-1, keepdim=True).clamp_min(1)
        nearest = z[is_target.nonzero()[:, 0], nearest_visible(is_target, segment)]
        row = torch.arange(len(segment), device=segment.device)[:, None] * segment.shape[1]
        for name, part in (("pred", model.predict(**batch)), ("target", z[is_target]), ("copy", nearest),
                           ("document_mean", own[is_target]), ("encoder", encoded[is_target].float()),
                           ("document", (row + segment)[is_target] + 10**6 * len(found["document"]))):
            found[name].append(part.cpu())
    z = {name: torch.cat(parts) for name, parts in found.items()}
    raw = {"target_std": float(z["target"].std(0).mean()), "target_raw_effective_rank": effective_rank(z["target"]),
           "encoder_effective_rank": effective_rank(z["encoder"])}
    if model.config.standardize_target:  # as in training, by these very tokens
        mean, std = z["target"].mean(0), z["target"].std(0, correction=0).clamp_min(1e-3)
        z |= {name: (z[name] - mean) / std for name in ("target", "copy", "document_mean")}
    m = z["document_mean"]
    z["document_mean"] = m * (z["target"] * m).sum() / m.square().sum().clamp_min(1e-9)  # few tokens: it must shrink
    errors = [(z[name] - z["target"]).square().mean(1).double() for name in ("document_mean", "pred")]
    document, n = z["document"].unique(return_inverse=True, return_counts=True)[1:]
    gain, n = torch.zeros(len(n)).double().index_add(0, document, errors[0] - errors[1]).numpy(), n.numpy()
    draws = np.random.default_rng(0).integers(0, len(n), (1000, len(n)))
    raw |= {"mse_document_mean": float(errors[0].mean()), "mse_gain": float(gain.sum() / n.sum()),
            "mse_gain_ci95": np.quantile(gain[draws].sum(1) / n[draws].sum(1), [0.025, 0.975]).tolist()}
    return latent_figures(z["pred"], z["target"], z["copy"], error="mse") | raw


def nearest_visible(is_target, segment):
    """Position [N] of the visible token nearest to every target (is_target [B, T]) in its segment [B, T]; of two, the
    earlier one."""
    row, at = is_target.nonzero(as_tuple=True)
    there, T = torch.arange(is_target.shape[1], device=segment.device), is_target.shape[1]
    is_near = (segment[row] == segment[row, at, None]) & ~is_target[row]
    return (there - at[:, None]).abs().masked_fill(~is_near, T).argmin(1)


class DistillJob(DocumentJob):
    """To train DistilledEncoder: the documents, and what the teacher makes of them."""

    ahead = False

    def __init__(self, config, out: Path):
        self.teacher, theirs, tokenizer = runs.load_encoder(config.teacher, config.device)
        super().__init__(config, out, tokenizer)
        config.teacher_dim, config.world = self.teacher.transformer.n_embd, runs.weights_digest(config.teacher)
        if config.block_size > runs.encoder_block_size(theirs):
            raise ValueError(f"--block_size {config.block_size}: the teacher has seen rows of "
                             f"{runs.encoder_block_size(theirs)}")
        self.identity["teacher"] = config.world

    def batch(self, index: int, device) -> dict:
        return self.taught(self.batches(index, device))

    @torch.no_grad()
    def taught(self, batch: dict) -> dict:
        z = self.teacher(batch["idx"], batch["segment"] >= 0, batch["positions"], batch["segment"]).float()
        return batch | {"z_teacher": torch.nn.functional.layer_norm(z, z.shape[-1:])}

    def figures(self, model, device, autocast) -> dict:
        """Held-out mse and cos to the teacher's outputs, and the mse of the best constant."""
        sums, seen = {}, []
        for batch in map(self.taught, data.packed(self.val, self.config, device, masks=False)):
            with autocast():
                losses = model(batch)
            for k in ("mse", "cos"):
                sums[k] = sums.get(k, 0.0) + float(losses[k]) * batch["n_tokens"]
            seen.append(batch["z_teacher"][batch["segment"] >= 0].cpu())
        z, n = torch.cat(seen), sum(map(len, seen))
        return {k: v / n for k, v in sums.items()} | {"mse_predict_mean": float(z.var(0, correction=0).mean()), "n": n}


class AnswerJob(Job):
    """To train SpeakingTJEPA: questions, responses, and the encoder to start from."""

    def __init__(self, config, out: Path):
        self.config, asked_vocab_size, self.start = config, config.vocab_size, None
        if config.init_from != "random":
            self.start, _, self.tokenizer = runs.load_encoder(config.init_from, "cpu")
            config.world = runs.weights_digest(config.init_from)
        train, val = train_and_val(config)
        if self.start is None:
            self.tokenizer = pick_tokenizer(config, out, [data.document_text(p) for p in train])
        config.vocab_size, config.context_dim = self.tokenizer.vocab_size, config.encoder_n_embd
        self.train, self.val = (data.encode_problems(p, self.tokenizer, config) for p in (train, val))
        known = runs.encoder_block_size(config)
        if longer := sum(len(e["question"]) > known for e in self.train):
            runs.say(f"{longer} questions are longer than the {known} tokens a row that the encoder was trained on")
        self.batches = data.Batches(self.train, config)
        self.identity = {"vocab_size": asked_vocab_size, "tokenizer": runs.tokenizer_digest(self.tokenizer),
                         "encoder": config.world, "training problems": runs.digest_of_list(self.train)}

    def fit(self, model):
        """The encoder that init_from names."""
        if self.start is not None:
            model.text_encoder.load_state_dict(self.start.state_dict())

    def batch(self, index: int, device) -> dict:
        return collate_answers(self.batches(index), self.config.vocab_size - 2, device)

    def figures(self, model, device, autocast) -> dict:
        with autocast():
            losses = answer_losses(model, self.val, self.config, device)
        return {name: float(np.average(a[:, 0], weights=a[:, 1])) for name, a in losses.items()}


def collate_answers(examples: list[dict], eos: int, device, questions: list[dict] = ()) -> dict:
    """A batch of SpeakingTJEPA.forward; the questions may be those of other examples."""
    rows = [e["question"] for e in questions or examples]
    return {"question": pad_rows(rows, 0, device), "context_allowed": real_tokens(rows),
            **spoken([e["answer"] for e in examples], eos, device)}


@torch.no_grad()
def answer_losses(model, examples: list[dict], config, device) -> dict[str, np.ndarray]:
    """Cross-entropy of each response, [n, 2] (mean a token, tokens): `lm_loss` given its question, `lm_loss_shuffled`
    given that of another example."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["answer"]))
    ordered, eos = [examples[i] for i in order], config.vocab_size - 2
    others = ordered[1:] + ordered[:1]
    out = {name: np.zeros((len(examples), 2)) for name in ("lm_loss", "lm_loss_shuffled")}
    for start in range(0, len(order), config.batch_size):
        here = slice(start, start + config.batch_size)
        for name, questions in (("lm_loss", ordered[here]), ("lm_loss_shuffled", others[here])):
            batch = collate_answers(ordered[here], eos, device, questions)
            context = model.encode(batch["question"], batch["context_allowed"])
            loss = model.speaker.losses(batch | {"context": context})  # (B, T)
            counts = (batch["targets"] >= 0).sum(1)
            out[name][order[here], 0] = loss.sum(1).cpu() / counts
            out[name][order[here], 1] = counts
    return out


JOBS = {cfg.NanoJEPAConfig: TextJob, cfg.RJEPAConfig: LatentJob, cfg.GuideConfig: GuideJob, cfg.SpeakConfig: SpeakJob,
        cfg.TJEPAConfig: DocumentJob, cfg.DistillConfig: DistillJob, cfg.AnswerConfig: AnswerJob}  # fmt: skip


def default_latents(config) -> Path:
    """Where the latents of a job lie unless --latents names a folder: the name follows from what is extracted."""
    if config.dataset == "synthetic":
        which = [config.n_synthetic, config.max_problem_steps, config.seed]
    else:
        folders = [Path(config.data_dir), Path(config.data_dir) / config.dataset] if config.data_dir else []
        files = [path for folder in folders for path in sorted(folder.glob("train*")) if path.is_file()]
        which = [config.limit, config.data_dir, config.seed, *map(runs.digest_file, files)]
    which = runs.digest(json.dumps(which))[:6]
    llm = runs.llm_label(config)
    return Path("out/latents") / f"{config.dataset}-{llm}-layer{config.layer}-{config.pooling}-{which}"


def extract_latents(config, folder: Path):
    """Runs extract.py for a job's training chains and counterfactuals; says so."""
    import subprocess

    command = [sys.executable, str(Path(__file__).with_name("extract.py")), "--llm", config.llm, "--dataset",
               config.dataset, "--layer", str(config.layer), "--pooling", config.pooling, "--counterfactual",
               "--out", str(folder), "--prompt", config.prompt, "--seed", str(config.seed),
               "--max_problem_steps", str(config.max_problem_steps),
               "--threads", str(config.threads), "--device", config.device]  # fmt: skip
    limit = config.n_synthetic if config.dataset == "synthetic" else config.limit
    command += ["--limit", str(limit), *(["--data_dir", config.data_dir] if config.data_dir else [])]
    runs.say(f"{folder} holds no finished latents: extracting them first\n  {' '.join(command)}")
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise ValueError(f"{folder}: extraction failed (see above); the same command continues it")
