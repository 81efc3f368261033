"""R-JEPA at work: how coherent is each step of a chain (score), which of K candidates is best (RERANK), where should
the next step go (NUDGE), which step is missing (PLAN)? And T-JEPA: which texts are alike (think), what is the answer
(speak)?

    python infer.py score out/rjepa-small --question "Tom has 3 apples and buys 4. How many?" --steps "3+4 = 7" "#### 7"
    python infer.py score out/rjepa-small --chains FILE      # one JSON object a line for each chain, then a summary
    python infer.py rerank out/rjepa-small --fit FILE        # alpha and beta from labelled candidates; then
    python infer.py rerank out/rjepa-small --question "..." --k 8
    python infer.py nudge out/rjepa-small --question "..." --alpha 0.5         # after train.py rjepa-guide
    python infer.py plan out/rjepa-small --question "..." --steps "..." "..."  # after train.py rjepa-speak
    python infer.py think out/tjepa-small --text "..."                         # nearest among its training texts
    python infer.py speak out/tjepa-speak --question "..."

A step's energy is the L1 error of its latent when it is hidden and predicted from all other steps (leave-one-out) or
from those before it alone (next-step). Its coherence is the share of verified steps with a higher energy. Two caveats:
the target is encoded from the whole chain, and the LLM's states of later steps have read the hidden one.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

import config as cfg
import data
import extract
import latents
import verify
from config import check, not_negative, plain_errors, positive, shares
from llm import LLM, HuggingFaceLLM, generate, llm_of
from memory import Memory
from runs import encoder_block_size, load_config, load_encoder, load_run, load_tokenizer, weights_digest, write_jsonl

# ----------------------------------------------------------------------------- functions to import


def load_world_model(run: str, device: str = "auto"):
    """(model, config) of an R-JEPA run. Raises ValueError for a run of another kind."""
    return load_run(run, device, cfg.RJEPAConfig, "not of R-JEPA (train.py rjepa-small)")


def load_chains(run: str, config, folder, limit: int = 0, logprobs: bool = False, held_out: bool = False) -> list[dict]:
    """Rows of latents.load_latents for a run and its config: the chains of the first `limit` problems (0: of all).

    From the folder that the run was trained on come only the chains that its `where` let in. held_out: of a folder of
    several splits those to train on are left out. Raises ValueError where they are of another LLM, layer or pooling, or
    where logprobs are asked for and there are none.
    """
    is_own = bool(config.latents) and Path(folder).resolve() == Path(config.latents).resolve()
    rows, manifest = latents.load_latents(folder, config.where * is_own)
    latents.check_same_llm(config, manifest, f"{run} and {folder}")
    if logprobs and any(r["logprobs"] is None for r in rows):
        raise ValueError(f"{folder} holds no logprobs: extract with --logprobs")
    if held_out and len({r["split"] for r in rows}) > 1:
        rows = [r for r in rows if r["split"] != "train"]
        print(f"{folder}: {len(rows):,} chains of other splits than train")
    return latents.first_problems(rows, limit)


@torch.no_grad()
def energies(model, chains: list[torch.Tensor], batch_size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Latents [1 + S, D] of chains -> for each {"leave_one_out": [S], "next_step": [S]}, fp32 on the CPU.

    Chains of like length share a batch; a chain's energies do not depend on its company, but for the last bits.
    """
    out, order = [{} for _ in chains], sorted(range(len(chains)), key=lambda i: len(chains[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        h, is_real = latents.pad_latents([chains[i] for i in part], model.h_mean.device)
        for mode in model.ENERGIES:
            for i, row in zip(part, model.energy(h, is_real, mode).cpu(), strict=True):
                out[i][mode] = row[1 : len(chains[i])]
    return out


def suspect(steps: list[str], found: dict[str, torch.Tensor]) -> tuple[int, str]:
    """(number from 1 of the step that is likely to be the first wrong one, why), from the gate and from `energies`.

    "equation": the first step that states a false equation. Where there is none, "energies": the step whose next-step
    energy is furthest above its leave-one-out energy, for the steps before do not lead to it and those after go along
    with it. Nothing comes after the last step, so energies name it only where no other step has such a difference.
    """
    for number, step in enumerate(steps, 1):
        if not verify.check_step(step).is_valid:
            return number, "equation"
    return int((found["next_step"] - found["leave_one_out"]).argmax()) + 1, "energies"


def check_llm(model, llm: LLM):
    """Raises ValueError for a model that is no R-JEPA, or an LLM whose states are not those that it reads."""
    if not isinstance(model.config, cfg.RJEPAConfig):
        raise ValueError(f"an R-JEPA is needed, not a {type(model).__name__}")
    what = f"{llm.name}, as it was loaded (llm.llm_of(config) loads it for a run),"
    latents.check_same_llm(model.config, llm.origin() | {"llm": model.config.llm}, what)


def score(model, llm: LLM, question: str, steps: list[str]) -> dict:
    """Energies and coherence of a chain and of its steps.

    -> {"energy", "energy_max", "energy_last", "next_step_energy", "coherence", "suspect" and "suspect_by" (see
    `suspect`), "steps": [{"text", "energy", "next_step_energy", "coherence"}]}
    """
    check_llm(model, llm)
    if isinstance(steps, str) or not steps or not all(unit.strip() for unit in (question, *steps)):
        raise ValueError("score needs a question and a list of at least one step, none of them empty")
    e = energies(model, [llm.step_latents(question, steps)])[0]
    loo, ahead = e["leave_one_out"], e["next_step"]
    coherence = model.coherence(loo.to(model.quantiles.device)).cpu()
    number, by = suspect(steps, e)
    rows = [{"text": t, "energy": float(a), "next_step_energy": float(b), "coherence": float(c)}
            for t, a, b, c in zip(steps, loo, ahead, coherence, strict=True)]
    return {"energy": float(loo.mean()), "energy_max": float(loo.max()), "energy_last": float(loo[-1]),
            "next_step_energy": float(ahead.mean()), "coherence": float(coherence.mean()),
            "suspect": number, "suspect_by": by, "steps": rows}


# ----------------------------------------------------------------------------- RERANK


def by_question(rows: list[dict], seed) -> tuple[list[dict], np.ndarray, list[np.ndarray]]:
    """Labelled candidates -> (the same in random order, question number of each [n], row numbers of each question).

    In random order because a tie goes to the first of a question's candidates: their order in the file must not decide.
    seed: a number, or a generator to draw from.
    """
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    ids = {name: i for i, name in enumerate(dict.fromkeys(r["problem_id"] for r in rows))}
    question = np.array([ids[r["problem_id"]] for r in rows])
    return rows, question, [np.flatnonzero(question == q) for q in range(len(ids))]


def centred(x: np.ndarray, question: np.ndarray) -> np.ndarray:
    """x [n, F] less its mean over the candidates of the same question; question [n] says whose each row is."""
    out = x.astype(float)
    for q in np.unique(question):
        out[question == q] -= out[question == q].mean(0)
    return out


def regression(x: np.ndarray, right: np.ndarray, C: float, least: float) -> tuple[np.ndarray, float]:
    """(weights [F], none below `least`; intercept) of a logistic regression of right [n] on centred x [n, F]."""
    from sklearn.linear_model import LogisticRegression

    scale = x.std(0) + 1e-12
    fitted = LogisticRegression(C=C, max_iter=500).fit(x / scale, right)
    return (fitted.coef_[0] / scale).clip(least), fitted.intercept_[0]


def cross_validated(x: np.ndarray, right: np.ndarray, question: np.ndarray, seed, C: float, least: float = -np.inf):
    """Scores [n] of a `regression` on x [n, F], centred within questions [n]; each fitted on other questions alone, in
    five folds."""
    names, question = np.unique(question, return_inverse=True)
    x, scores, folds = centred(x, question), np.zeros(len(x)), min(5, len(names))
    if folds < 2:
        raise ValueError("candidates of at least two questions are needed")
    fold_of = np.random.default_rng(seed).permutation(len(names)) % folds
    for fold in range(folds):
        held_out = fold_of[question] == fold
        if right[~held_out].all() or not right[~held_out].any():
            continue  # one label alone: nothing to fit, all scores stay equal
        weights, intercept = regression(x[~held_out], right[~held_out], C, least)
        scores[held_out] = x[held_out] @ weights + intercept
    return scores


def mean_logprob(row: dict) -> float:
    """Mean logprob of a chain's step tokens, not the question's. NaN where the latents have none, -inf for no steps."""
    if row["logprobs"] is None:
        return float("nan")
    if not row["steps"]:
        return float("-inf")
    return float(np.average(row["logprobs"][1:], weights=row["n_tokens"][1:]))


def chain_energy(found: dict[str, torch.Tensor]) -> float | None:
    """Mean leave-one-out energy of a chain, as `energies` gives it; None without steps."""
    return float(found["leave_one_out"].mean()) if len(found["leave_one_out"]) else None


def fit_weights(model, rows: list[dict], seed: int = 1) -> dict:
    """alpha and beta of RERANK from labelled candidates (rows of `load_chains` with logprobs).

    By `regression` on logprob and -energy; a weight below 0 becomes 0, since it would rank by what misleads. ->
    {"alpha", "beta", "n" (questions), and the accuracy of picking: "accuracy" (by such weights, cross-validated),
    "random", "logprob" and "energy" (by one of the two alone)}.
    """
    rng = np.random.default_rng(seed)
    rows, question, members = by_question([r for r in rows if r["steps"]], rng)
    right, logprob = np.array([r["is_valid"] for r in rows]), np.array([mean_logprob(r) for r in rows])
    if right.all() or not right.any():
        raise ValueError("right and wrong candidates are needed, these are all of one kind")
    x = np.stack((logprob, [-chain_energy(e) for e in energies(model, [r["h"] for r in rows])]), 1)

    def accuracy(score):
        return float(np.mean([right[m[score[m].argmax()]] for m in members]))

    accuracies = {"accuracy": accuracy(cross_validated(x, right, question, rng, C=1.0, least=0.0)),
                  "random": float(np.mean([right[m].mean() for m in members])), "logprob": accuracy(logprob),
                  "energy": accuracy(x[:, 1])}
    (alpha, beta), _ = regression(centred(x, question), right, C=1.0, least=0.0)
    return {"alpha": float(alpha), "beta": float(beta), "n": len(members), **accuracies}


def rerank(model, chains: list[dict], alpha: float, beta: float, gate: bool = False) -> list[dict]:
    """Chains of llm.generate ({"steps", "logprob", "h"}) -> the same, best first, each with its number, energy, score,
    answer and arithmetic.

    score = alpha * mean logprob + beta * (-energy). `arithmetic` is the gate's verdict on the steps' equations, without
    knowing the answer: "" where they all hold, else why not. gate: chains that it finds fault with, and those without
    an answer, come after all others.
    """
    ranked = []
    for i, (chain, found) in enumerate(zip(chains, energies(model, [c["h"] for c in chains]), strict=True), 1):
        energy = chain_energy(found)
        verdict = verify.check_steps(chain["steps"])
        answer = verify.extract_answer(chain["steps"][-1]) if chain["steps"] else None
        ranked.append({"candidate": i, "steps": chain["steps"], "answer": answer, "logprob": chain["logprob"],
                       "energy": energy,
                       "score": None if energy is None else alpha * chain["logprob"] - beta * energy,
                       "arithmetic": "" if verdict.is_valid else verdict.reason})
    return sorted(ranked, reverse=True, key=lambda c: (
        c["score"] is not None, not (gate and (c["arithmetic"] or c["answer"] is None)), c["score"] or 0.0))


def fitted_weights(run: str) -> dict | None:
    """What `infer.py rerank RUN --fit` found (alpha, beta, ...), or None if the run has other weights by now."""
    path = Path(run) / "rerank.json"
    rows = verify.read_jsonl(path) if path.is_file() else []
    return next((row for row in rows if row.get("world") == weights_digest(run)), None)


# ----------------------------------------------------------------------------- NUDGE


def load_beside(run: str, folder: str = "", kind: str = "speak", device: str = "auto"):
    """The Guidance (`guide`) or Speaker (`speak`) of an R-JEPA run: (model, config, folder).

    Raises ValueError, naming the command that makes it, where it is missing or was made for other weights.
    """
    load_config(run)  # raises where the R-JEPA itself is missing
    folder = folder or f"{Path(run)}-{kind}"
    command = f"python train.py rjepa-{kind} --init_from {run}"
    if not (Path(folder) / "model.safetensors").is_file():
        raise ValueError(f"{folder} holds no finished run: {command}")
    asked = {"guide": cfg.GuideConfig, "speak": cfg.SpeakConfig}[kind]
    model, config = load_run(folder, device, asked, f"no {kind}: {command}")
    if config.world != weights_digest(run):
        raise ValueError(f"{folder} was trained for another R-JEPA than {run} holds now: {command}")
    return model, config, folder


MAX_ALPHA = 100


class Nudge:
    """NUDGE for llm.generate: the predicted next step, renewed whenever one has ended, pulls at what is written.

    With a Guidance `guide`: alpha times its shift is added to the LLM's last state, before the words are read off it.
    Without: h + alpha * (z - h) at the LLM's layer, z the prediction in the LLM's space (`hidden`). alpha = 0 changes
    nothing at all. shuffled: every row gets the next row's prediction.
    """

    def __init__(self, model, llm: LLM, alpha: float, guide=None, shuffled: bool = False):
        if not 0 <= alpha <= MAX_ALPHA:
            raise ValueError(f"alpha {alpha}: must lie in [0, {MAX_ALPHA}]")
        if alpha > 0 and guide is None and llm.layer == llm.n_layer:
            raise ValueError("nudging the hidden state needs a layer below the last: there is nothing above it")
        self.model, self.llm, self.alpha, self.guide, self.shuffled = model, llm, alpha, guide, shuffled

    def predict(self, chains: list[torch.Tensor]) -> torch.Tensor:
        return self.model.predict_next(*latents.pad_latents(chains, self.model.h_mean.device))

    def begin(self, writing: list):
        self.source = dict(zip(writing, writing[1:] + writing[:1] if self.shuffled else writing, strict=True))
        self.z = dict(zip(writing, self.predict([row.question_latent[None] for row in writing]), strict=True))

    def step_ended(self, row):
        self.z[row] = self.predict([row.chain()["h"]])[0]

    def now(self, active) -> torch.Tensor:
        return torch.stack([self.z[self.source[row]] for row in active])

    def move(self, final, h, active):
        """Last states [B, D] that the next words are read off, moved; None: they stay."""
        if self.guide is None or self.alpha == 0:
            return None
        return final + self.alpha * self.guide.shift(self.now(active), h).to(final.dtype)

    def blend(self, active):
        if self.guide is not None or self.alpha == 0:
            return None
        target = self.model.to_llm(self.now(active))
        return self.alpha, target[:, -self.llm.dim :]  # of mean and last, the last: one token's state


def nudge(model, llm: LLM, question: str, alpha: float, guide=None, temperature: float = 0.0, top_p: float = 0.95,
          seed: int = 1, max_new_tokens: int = 256) -> dict:
    """The LLM's own chain beside the nudged one -> {"question", "alpha", "nudge", "own", "nudged"}.

    Each of the last two is {"steps", "logprob" (under the LLM alone; of `hidden` under the LLM as it is moved),
    "energy"}, without steps the latter two None.
    """
    check_llm(model, llm)
    result = {"question": question, "alpha": alpha, "nudge": "hidden" if guide is None else "bias"}
    pulls = {"own": Nudge(model, llm, 0.0, guide), "nudged": Nudge(model, llm, alpha, guide)}
    for name, pull in pulls.items():
        chain = generate(llm, [question], 1, temperature, top_p, seed, max_new_tokens, nudge=pull)[0][0]
        energy = chain_energy(energies(model, [chain["h"]])[0])
        result[name] = {"steps": chain["steps"], "logprob": chain["logprob"], "energy": energy}
    return result


# ----------------------------------------------------------------------------- PLAN


def find_gap(model, ahead: torch.Tensor, quantile: float = 0.9) -> tuple[int | None, float]:
    """(step before which something seems to be missing or None, threshold) from a chain's next-step energies [S].

    Of the steps after the first it is the one with the highest next-step energy, if that is above the `quantile` of
    the highest energies of verified chains.
    """
    threshold = float(model.quantiles[2, round(quantile * (model.quantiles.shape[1] - 1))])
    if len(ahead) < 2:
        return None, threshold
    worst = int(ahead[1:].argmax()) + 1
    return (worst + 1 if float(ahead[worst]) > threshold else None), threshold


def load_memory(config, folder: str) -> tuple[torch.Tensor, list[str]]:
    """(latents [N, D], texts) of the verified training steps in a folder of latents, or of memory.py's file."""
    if Path(folder).is_file():
        h, steps = Memory(folder, vars(config)).vectors()
        if not steps:
            raise ValueError(f"--memory {folder} holds no verified chain")
        return h, [step["text"] for step in steps]
    if not Path(folder).exists():
        raise FileNotFoundError(f"--memory {folder}: neither a folder of latents nor a file of memory.py")
    rows, manifest = latents.load_latents(folder)
    latents.check_same_llm(config, manifest, f"--memory {folder}")
    rows = [r for r in rows if r["is_valid"] and r["split"] == "train"]
    if not rows:
        raise ValueError(f"--memory {folder} holds no verified chain of a training split")
    return torch.cat([r["h"][1:] for r in rows]), [s for r in rows for s in r["steps"]]


@torch.no_grad()
def nearest_steps(model, memory: tuple[torch.Tensor, list[str]], z_pred: torch.Tensor, k: int = 3) -> list[dict]:
    """The k steps of a `load_memory` whose latents are nearest (cosine, standardised) to a prediction [C]."""
    h, texts = memory
    guess = model.w_out(z_pred.to(model.h_mean.dtype))[None]
    cos = torch.cosine_similarity(model.standardize(h.to(guess.device)), guess, dim=1)
    found = {}
    for i in cos.argsort(descending=True).tolist():
        found.setdefault(texts[i], float(cos[i]))
        if len(found) == k:
            break
    return [{"text": text, "cos": value} for text, value in found.items()]


def next_lines(llm: LLM, chains: list[tuple[str, list[str]]], max_new_tokens: int, hints: list[str] = (),
               temperature: float = 0.0, seed: int = 1) -> list[str]:
    """What the LLM writes, greedily at temperature 0, as the step after each chain (question, steps).

    hints, steps of other solutions, stand before the question where the LLM takes a prompt.
    """
    prompt, found = llm.prompt, []
    try:
        if hints and isinstance(llm, HuggingFaceLLM):
            before, _, after = (prompt or "{question}\n").partition("{question}")
            llm.set_prompt(before + "Steps of similar solutions:\n" + "\n".join(hints) + "\n\n{question}" + after)
        for start in range(0, len(chains), 64):
            questions, started = zip(*chains[start : start + 64], strict=True)
            found += generate(llm, questions, 1, temperature, 1.0, seed, max_new_tokens, started=started, one_step=True)
    finally:
        if llm.prompt != prompt:
            llm.set_prompt(prompt)
    return [chain["steps"][0] if chain["steps"] else "" for (chain,) in found]


TRIES = 8  # texts that a Speaker may try for a step, unless told otherwise


def until_it_holds(write, n: int, tries: int = TRIES) -> list[str]:
    """A step for each of n chains, from write(rows, temperature, seed), which writes them for the chains `rows`.

    The first text is greedy; where the gate, which does not know the answer, finds fault with it, up to tries - 1 more
    are sampled. -> the first one without fault or, where there is none, the greedy one.
    """
    wrong, texts = list(range(n)), [""] * n
    for seed in range(max(1, tries)):
        if not wrong:
            break
        rows, wrong = wrong, []
        for i, text in zip(rows, write(rows, 0.7 if seed else 0.0, seed), strict=True):
            text = " ".join(text.split())
            holds = text != "" and verify.check_step(text).is_valid
            if holds or seed == 0:
                texts[i] = text
            if not holds:
                wrong.append(i)
    return texts


def say(speaker, tokenizer, context, allowed, offsets=None, reads=None, max_new_tokens: int = 64,
        tries: int = 1) -> list[str]:
    """The step that a Speaker says from each latent context and from the tokens that it `reads`; see `until_it_holds`.

    context [n, 1 + S, C], allowed bool and offsets int [n, 1 + S]: as model.RJEPA.around makes them.
    """
    reads = reads or [[]] * len(context)

    def write(rows, temperature, seed):
        part = (None if x is None else x[rows] for x in (context, allowed, offsets))
        found = speaker.generate(*part, max_new_tokens, temperature, seed, [reads[i] for i in rows])
        return map(tokenizer.decode, found)

    return until_it_holds(write, len(context), tries)


def plan(model, llm: LLM, question: str, steps: list[str], decode: str = "speaker", speaker=None, tokenizer=None,
         memory=None, at: int = 0, slots: int = 1, quantile: float = 0.9, max_new_tokens: int = 64,
         tries: int = TRIES) -> dict:
    """Finds where steps are missing, fills up to `slots` of them, says whether the chain now holds together better.

    at: the 1-based step before which to insert; 0: where `find_gap` says. decode: `speaker` (from the predicted latent)
    or `llm` (prompted with question, steps so far and the nearest verified steps of `memory`, a `load_memory`). tries:
    of the Speaker, see `until_it_holds`.
    -> {"steps", "filled": [{"step", "text", "nearest", "valid", "reason"}] (empty where no gap is seen, or nothing
    comes to be said), "gap", "threshold", "next_step_energies", "energy_before", "energy_after", "decode"}.
    """
    check_llm(model, llm)
    if decode not in ("speaker", "llm") or not 0 <= at <= len(steps) + 1 or slots < 1 or not 0 <= quantile <= 1:
        raise ValueError(f"decode {decode!r} (speaker, llm), at {at} (0 to {len(steps) + 1}), slots {slots} (1 and "
                         f"more), quantile {quantile} (0 to 1): one of them cannot be")
    if decode == "speaker" and (speaker is None or tokenizer is None):
        raise ValueError("plan: decode='speaker' needs speaker and tokenizer (load_beside, runs.load_tokenizer)")
    steps, filled, before, gap = list(steps), [], None, None
    for _ in range(slots):
        h = llm.step_latents(question, steps)
        e = energies(model, [h])[0]
        found, threshold = find_gap(model, e["next_step"], quantile)
        if not filled:
            before, gap, first = chain_energy(e), found, e["next_step"].tolist()
        position = at + len(filled) if at else found
        if position is None:
            break
        slot = torch.tensor([position], device=model.h_mean.device)
        context, allowed, offsets = model.around(*latents.with_slots([h], [position], slot.device), slot)
        nearest = nearest_steps(model, memory, context[0, 0]) if memory else []
        if decode == "speaker":
            read = data.read_around(speaker.config, tokenizer, question, steps[: position - 1], steps[position - 1 :])
            text = say(speaker, tokenizer, context, allowed, offsets, [read], max_new_tokens, tries)[0]
        else:
            hints = [n["text"] for n in nearest]
            text = " ".join(next_lines(llm, [(question, steps[: position - 1])], max_new_tokens, hints)[0].split())
        if not text:
            break
        verdict = verify.check_step(text)
        steps.insert(position - 1, text)
        filled.append({"step": position, "text": text, "nearest": nearest, "valid": verdict.is_valid,
                       "reason": verdict.reason})
    after = chain_energy(energies(model, [llm.step_latents(question, steps)])[0])
    return {"steps": steps, "filled": filled, "gap": gap, "threshold": threshold, "next_step_energies": first,
            "energy_before": before, "energy_after": after, "decode": decode}


# ----------------------------------------------------------------------------- T-JEPA


def think(encoder, tokenizer, block_size: int, texts: list[str]) -> torch.Tensor:
    """Thought vectors [len(texts), C] fp32; a text longer than a block is the mean over its parts' tokens.

    Raises ValueError for an empty text.
    """
    coded = [tokenizer.encode(text.strip()) for text in texts]
    if [] in coded:
        raise ValueError(f"text {coded.index([])} is empty")
    parts = [[ids[at : at + block_size] for at in range(0, len(ids), block_size)] for ids in coded]
    found = encoder.thoughts([row for part in parts for row in part]).cpu().split([len(part) for part in parts])
    return torch.stack([torch.tensor([len(row) / len(ids) for row in part]) @ z
                        for ids, part, z in zip(coded, parts, found, strict=True)])


def nearest_texts(thought: torch.Tensor, stored: torch.Tensor, texts: list[str], k: int = 5) -> list[dict]:
    """The k stored texts whose thoughts [N, C] are nearest to a thought [C], by cosine.

    From 16 stored texts on, all are taken less their mean, the direction that all share. The mean of fewer would be
    what these few say.
    """
    mean = stored.mean(0) if len(stored) >= 16 else torch.zeros_like(thought)
    cos = torch.cosine_similarity((thought - mean)[None], stored - mean, dim=1)
    return [{"text": texts[i], "cos": float(cos[i])} for i in cos.argsort(descending=True)[:k].tolist()]


# ----------------------------------------------------------------------------- command line


@dataclass
class Command:
    """What all commands have in common."""

    run: Annotated[str, tyro.conf.Positional]  # a run folder: of R-JEPA; of T-JEPA for think and speak
    device: str = "auto"


@dataclass
class Asked(Command):
    """A command that answers one question, and may keep what came of it."""

    question: str = ""
    log: str = ""  # memory.py's file: appends question and steps without personal data, and the gate's verdict
    truth: str = ""  # --log: the right answer, if it is known; memory.py export needs it


def check_question(args: Asked):
    check(args, "question", bool(args.question.strip()), "is empty: give the text of the problem")


@dataclass
class OfWorld(Asked):
    """A command of an R-JEPA, which reads the states of its LLM."""

    llm: str = ""  # where the run's LLM lies, if not under the name it was trained with

    def load(self):
        """(model, config, LLM)"""
        model, config = load_world_model(self.run, self.device)
        return model, config, llm_of(config, self.llm, self.device)


@dataclass
class Score(OfWorld):
    """Energies and coherence of one chain, or of every chain in a file."""

    steps: tuple[str, ...] = ()  # one text a step
    chains: str = ""  # a jsonl file of chains instead
    limit: int = 0  # the first N chains of the file; 0: all

    def __post_init__(self):
        not_negative(self, "limit")

    def result(self) -> dict:
        if bool(self.chains) == bool(self.question):
            raise ValueError("give --question and --steps, or --chains FILE")
        model, _, llm = self.load()
        if not self.chains:
            return score(model, llm, self.question, list(self.steps))
        found = []
        for chain in latents.chains_of_file(self.chains, "chains", self.limit):
            try:
                found.append(score(model, llm, chain["question"], chain["steps"]))
            except ValueError as error:
                raise ValueError(f"{self.chains}, {chain['id']}: {error}") from None
            print(json.dumps({"id": chain["id"], **found[-1]}))
        if not found:
            raise ValueError(f"{self.chains}: no chain")
        return {"n": len(found), **{k: sum(f[k] for f in found) / len(found) for k in ("energy", "coherence")}}


@dataclass
class Writing(OfWorld):
    """What commands that let the run's LLM write have in common."""

    temperature: float = 0.8  # 0: greedy
    top_p: float = 0.95
    max_new_tokens: int = 256
    seed: int = 1

    def __post_init__(self):
        not_negative(self, "temperature")
        check(self, "top_p", 0 < self.top_p <= 1, "must lie in (0, 1]")
        positive(self, "max_new_tokens")

    def load(self):
        """(model, config, LLM). Raises ValueError for an empty question before anything is loaded."""
        check_question(self)
        return super().load()


@dataclass
class Rerank(Writing):
    """K candidates for a question, ranked; or, with --fit, the weights of the ranking from labelled candidates."""

    k: int = 4  # candidates
    alpha: float | None = None  # weight of the mean logprob; empty: as fitted
    beta: float | None = None  # weight of the energy; empty: as fitted
    gate: bool = False  # candidates with an equation that does not hold, or without an answer, come after all others
    fit: str = ""  # a jsonl file of labelled candidates, or a folder of their latents: fits alpha and beta for the run
    limit: int = 0  # --fit: the first N questions; 0: all

    def __post_init__(self):
        super().__post_init__()
        positive(self, "k")
        not_negative(self, "limit")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            check(self, name, value is None or 0 <= value < float("inf"), "must be 0 or more, and finite")
        check(self, "fit", not (self.fit and self.question), "does not go with --question: first one, then the other")

    def result(self) -> dict:
        load_config(self.run)  # is it a run at all? before anything says that its weights are missing
        if self.fit:
            model, config = load_world_model(self.run, self.device)
            folder = Path(self.fit)
            if not folder.is_dir():
                folder = extract.latents_of_file(config, "candidates", self.fit, self.device, self.limit, self.llm)
            rows = load_chains(self.run, config, folder, self.limit, logprobs=True)
            fitted = {"world": weights_digest(self.run), **fit_weights(model, rows, self.seed)}
            if fitted["n"] < 50:
                print(f"{fitted['n']} questions are few: the weights may be far off")
            if fitted["alpha"] == fitted["beta"] == 0:
                print("neither logprob nor energy is higher where candidates are right: weights of 0 rank nothing")
            write_jsonl(path := Path(self.run) / "rerank.json", [fitted])
            return {"fitted": str(path), **fitted}
        weights = {"alpha": self.alpha, "beta": self.beta}
        if None in weights.values():
            if not (fitted := fitted_weights(self.run)):
                raise ValueError(f"{self.run} has no weights of RERANK, or those of an earlier state: infer.py rerank "
                                 f"{self.run} --fit FILE makes them, or give --alpha and --beta")
            weights = {k: fitted[k] if v is None else v for k, v in weights.items()}
        model, _, llm = self.load()
        chains = generate(llm, [self.question], self.k, self.temperature, self.top_p, self.seed, self.max_new_tokens)[0]
        weights["gate"] = self.gate
        return {"question": self.question, **weights, "candidates": rerank(model, chains, **weights)}


@dataclass
class Nudged(Writing):
    """One chain written with the predicted next step pulling at it, beside the LLM's own."""

    alpha: float = 0.5  # strength; 0: the LLM's own tokens
    nudge: Literal["bias", "hidden"] = "bias"  # a guidance head's bias on the logits, or a pull on the hidden state
    guide: str = ""  # the head's run folder; empty: RUN-guide
    temperature: float = 0.0  # 0: greedy

    def __post_init__(self):
        super().__post_init__()
        check(self, "alpha", 0 <= self.alpha <= MAX_ALPHA, f"must lie in [0, {MAX_ALPHA}]")

    def result(self) -> dict:
        guide = load_beside(self.run, self.guide, "guide", self.device)[0] if self.nudge == "bias" else None
        model, _, llm = self.load()
        return nudge(model, llm, self.question, self.alpha, guide, self.temperature, self.top_p, self.seed,
                     self.max_new_tokens)


@dataclass
class Plan(OfWorld):
    """Finds and fills a gap in a chain."""

    steps: tuple[str, ...] = ()  # one text a step
    at: int = 0  # the 1-based step before which something is missing; 0: find it, from step 2 on
    slots: int = 1  # steps to insert, at most
    decode: Literal["speaker", "llm"] = "speaker"  # who puts the predicted step into words
    speaker: str = ""  # the Speaker's run folder; empty: RUN-speak
    memory: str = ""  # where near verified steps come from: a folder of latents, memory.py's file; empty: the run's own
    quantile: float = 0.9  # a gap is a next-step energy above this quantile of verified steps' energies
    max_new_tokens: int = 64
    tries: int = TRIES  # texts that the Speaker may try, while a step's arithmetic does not hold

    def __post_init__(self):
        check(self, "slots", 1 <= self.slots <= 16, "must lie in [1, 16]")
        check(self, "at", 0 <= self.at <= len(self.steps) + 1, f"must lie in [0, {len(self.steps) + 1}]")
        shares(self, "quantile")
        positive(self, "max_new_tokens tries")

    def result(self) -> dict:
        if not self.question.strip() or not self.steps or not all(s.strip() for s in self.steps):
            raise ValueError("plan needs --question and --steps, none of them empty")
        model, config = load_world_model(self.run, self.device)
        speaker, tokenizer = None, None
        if self.decode == "speaker":
            speaker, speak_config, folder = load_beside(self.run, self.speaker, "speak", self.device)
            tokenizer = load_tokenizer(folder, speak_config)
        folder = self.memory or (config.latents if (Path(config.latents) / "manifest.json").is_file() else "")
        memory = load_memory(config, folder) if folder else None
        llm = llm_of(config, self.llm, self.device)  # after what may be missing: it takes the longest to load
        found = plan(model, llm, self.question, list(self.steps), self.decode, speaker, tokenizer, memory, self.at,
                     self.slots, self.quantile, self.max_new_tokens, self.tries)
        if not self.at and found["gap"] is None:
            print("no gap seen: --at N inserts before step N (before the first no gap is looked for)")
        for step in found["filled"]:
            if not step["valid"]:
                print(f"step {step['step']}, which was inserted, does not hold: {step['reason']}")
        return {"question": self.question} | found


@dataclass
class Think(Command):
    """The thought vector of a text, and the texts that are nearest to it."""

    text: str = ""
    stored: str = ""  # a file with a text a line to search; empty: the run's own training texts, its questions alone
    k: int = 5  # how many

    def __post_init__(self):
        positive(self, "k")
        check(self, "text", bool(self.text.strip()), "is empty: give a text")

    def result(self) -> dict:
        encoder, config, tokenizer = load_encoder(self.run, self.device)
        source = self.stored or f"the training texts of {self.run}"
        try:
            if self.stored:
                texts = [line.strip() for line in Path(self.stored).read_text("utf-8").splitlines() if line.strip()]
            elif getattr(config, "text", ""):
                texts = data.load_texts(config, "train")
            else:
                texts = [p["question"] for p in data.run_problems(config, "train")]
        except (OSError, UnicodeDecodeError) as error:
            why = str(error).splitlines()[0]
            raise OSError(f"{source} cannot be read ({why}): name other texts to compare with by --stored FILE, one a "
                          "line, in UTF-8") from None
        print(f"{len(texts):,} texts to compare with", flush=True)
        if not texts:
            raise ValueError(f"{source}: no text there")
        thoughts = think(encoder, tokenizer, encoder_block_size(config), [self.text, *texts])
        return {"text": self.text, "nearest": nearest_texts(thoughts[0], thoughts[1:], texts, self.k),
                "thought": [round(x, 5) for x in thoughts[0].tolist()]}


@dataclass
class Speak(Asked):
    """What a Speaker answers to a question; the run is one of train.py tjepa-speak."""

    temperature: float = 0.0  # 0: greedy
    seed: int = 1
    max_new_tokens: int = 256

    def __post_init__(self):
        check_question(self)
        not_negative(self, "temperature")
        positive(self, "max_new_tokens")

    def result(self) -> dict:
        model, config = load_run(self.run, self.device, cfg.AnswerConfig,
                                 "which has no Speaker: python train.py tjepa-speak --init_from RUN")
        tokenizer = load_tokenizer(self.run, config)
        ids = model.generate([tokenizer.encode(self.question)], self.max_new_tokens, self.temperature, self.seed)[0]
        text = tokenizer.decode(ids)
        return {"question": self.question, "response": text, "answer": verify.extract_answer(text)}


def check_log(args: Asked):
    """Raises ValueError for a --log or --truth that cannot be kept, before there is work to lose."""
    if args.truth and (not args.log or verify.answer_value(args.truth) is None):
        raise ValueError(f"--truth {args.truth}: needs a number, and --log FILE to be kept in")
    if args.log and (not args.question.strip() or getattr(args, "fit", "")):
        raise ValueError("--log is for the answer to one --question")
    if args.log and Path(args.log).exists():
        with Memory(args.log).open(write=True):  # is it one, and free?
            pass


def log_answer(args: Asked, result: dict) -> str:
    """Appends what came of a command to the feedback log -> its id, for `memory.py rate`."""
    command, steps_of = {
        Score: ("score", lambda: args.steps), Rerank: ("rerank", lambda: result["candidates"][0]["steps"]),
        Nudged: ("nudge", lambda: result["nudged"]["steps"]), Plan: ("plan", lambda: result["steps"]),
        Speak: ("speak", lambda: data.split_steps(result["response"]))}[type(args)]
    return Memory(args.log).log(command, args.question, list(steps_of()), args.truth or None, extra={"run": args.run})


COMMANDS = {"score": Score, "rerank": Rerank, "nudge": Nudged, "plan": Plan, "think": Think, "speak": Speak}


@plain_errors()
def main(argv=None):
    args = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=argv, prog="infer.py", description=__doc__)
    if may_log := isinstance(args, Asked):
        check_log(args)
    result, not_logged = args.result(), None
    if may_log and args.log:
        try:
            result["interaction"] = log_answer(args, result)
        except (ValueError, OSError) as error:  # the result is printed all the same
            not_logged = error
    if isinstance(args, Score) and not args.chains:
        for i, s in enumerate(result["steps"], 1):
            mark = f" <- suspect, by its {result['suspect_by']}" if i == result["suspect"] else ""
            print(f"{i:3}  energy {s['energy']:.3f}  next {s['next_step_energy']:.3f}  coherence {s['coherence']:.2f}  "
                  f"{s['text'][:80]}{mark}")
    for c in result.get("candidates", []):
        head = "nothing written" if not c["steps"] else (
            f"score {c['score']:.3f}  logprob {c['logprob']:.3f}  energy {c['energy']:.3f}  "
            + (f"wrong: {c['arithmetic']}" if c["arithmetic"] else "no wrong equation")
            + ("" if c["answer"] else ", no answer"))
        print("\n    ".join([head, *c["steps"]]))
    print(json.dumps(result, allow_nan=False))
    if not_logged:
        raise not_logged


if __name__ == "__main__":
    sys.exit(main())
