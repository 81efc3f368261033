"""Exact match on held-out problems, beside what chance, a constant and a wrong pairing would get.

    python evaluate_accuracy.py out/nanojepa-small --dataset gsm8k --data_dir DATA/gsm8k
    python evaluate_accuracy.py out/student-small --limit 1000 --k 8        # sample 8, compare ways of picking one
    python evaluate_accuracy.py out/rjepa-small --candidates FILE           # R-JEPA picks among labelled candidates
    python evaluate_accuracy.py out/rjepa-small --candidates FILE --also out/rjepa-seed2 out/rjepa-shuffled
    python evaluate_accuracy.py smollm2 --dataset arc_easy --limit 500      # any LLM on any data set of benchmarks.py
    python evaluate_accuracy.py smollm2 --dataset humaneval --k 10          # pass@1 and pass@10, in the sandbox

Every generation is kept, in RUN/generations-*.jsonl, an LLM's in out/generations. An answer counts where
verify.check_answer says so, that is by value (18 = 18.00 = $18); text without `#### n` counts by its last number and is
reported apart as `strict`. The other kinds of problems are judged as benchmarks.py says.
"""

import collections
import functools
import itertools
import json
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

import benchmarks
import data
import eval_alignment
import extract
import infer
import jobs
import latents
import runs
import sandbox
import verify
from config import AnswerConfig, NanoJEPAConfig, RJEPAConfig, TextConfig, check, not_negative, plain_errors, positive
from eval_alignment import paired_p, pairwise
from llm import HuggingFaceLLM, chat_text, complete, load_llm
from llm import generate as llm_generate
from model import wilson


@dataclass
class Args(eval_alignment.Problems):
    """Accuracy of a run, or of an LLM, on held-out problems."""

    run: Annotated[str, tyro.conf.Positional]  # a run folder of train.py, or an LLM as extract.py takes it
    dataset: Literal[("", "synthetic", *benchmarks.BENCHMARKS)] = ""  # empty: the run's own
    shots: int = 0  # solved examples before a question, where the data set has a split for them (MMLU: 5 is usual)
    chat: bool = False  # what the LLM writes, it writes as a chat's answer, by its tokenizer's template
    allow_unsafe_code: bool = False  # run generated programs without the sandbox, if there is none
    k: int = 1  # candidates a problem: 1 is greedy, more are sampled; of those given, the first k of a file, 1: all
    temperature: float = 0.8  # of the samples
    top_p: float = 0.95  # of an LLM's samples
    max_new_tokens: int = 0  # of an answer; 0: what the data set needs
    batch_size: int = 128  # candidates generated at a time
    candidates: str = ""  # R-JEPA: a jsonl file of labelled candidates to pick from
    also: tuple[str, ...] = ()  # R-JEPA: more runs over the same LLM, layer and pooling, shown under their own names
    # R-JEPA: nudge pulls at greedy answers, greedy leaves them alone; all others pick among K and are shown together
    method: Literal["all", "greedy", "nudge", "rerank", "majority"] = "all"
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0)  # strengths of the pull
    nudge: Literal["bias", "hidden"] = "bias"  # by the guidance head, or on the hidden state
    ensemble: bool = False  # R-JEPA: also the standardised energies of all these runs together

    def __post_init__(self):
        super().__post_init__()
        bench = benchmarks.BENCHMARKS.get(self.dataset)
        self.max_new_tokens = self.max_new_tokens or (bench.max_new_tokens if bench else 256)
        not_negative(self, "shots")
        check(self, "alphas", bool(self.alphas), "needs one value at least")
        names = [Path(other).name for other in self.also]
        check(self, "also", len(set(names)) == len(names), "needs folders of different names: figures go by these")
        check(self, "ensemble", bool(self.also) or not self.ensemble, "needs --also RUN: of one run there is none")
        positive(self, "k max_new_tokens batch_size temperature")
        check(self, "top_p", 0 < self.top_p <= 1, "must lie in (0, 1]")


def interval(right: np.ndarray, seed: int, draws: int = 2000) -> list[float]:
    """95 % interval of a mean over problems, right: float [n]. Wilson's for right and wrong, else a bootstrap."""
    if np.isin(right, (0.0, 1.0)).all():
        return list(wilson(float(right.mean()), len(right)))
    rng = np.random.default_rng(seed)
    means = right[rng.integers(0, len(right), (draws, len(right)))].mean(1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def generate(model, questions: list[list[int]], tokenizer, args) -> list[list[str]]:
    """K answer texts for every question; greedy for k = 1. Batches hold questions of like length."""
    questions = [q for q in questions for _ in range(args.k)]
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    texts = [""] * len(questions)
    for start in range(0, len(order), args.batch_size):
        part = order[start : start + args.batch_size]
        out = model.generate([questions[i] for i in part], args.max_new_tokens,
                             temperature=args.temperature if args.k > 1 else 0.0, seed=args.seed + start)
        for i, tokens in zip(part, out, strict=True):
            texts[i] = tokenizer.decode(tokens)
    return [texts[i : i + args.k] for i in range(0, len(texts), args.k)]


def majority(texts: list[str], weights=None) -> int:
    """Index of the text that a vote picks: the heaviest of those with the answer of the largest total weight.

    weights: one a text, 1 unless given. Answers count by value; a text without an answer does not vote.
    """
    values, weights = [verify.answer_value(t) for t in texts], np.ones(len(texts)) if weights is None else weights
    votes = {}
    for value, weight in zip(values, weights, strict=True):
        if value is not None:
            votes[value] = votes.get(value, 0.0) + weight
    if not votes:
        return 0
    winner = max(votes, key=votes.get)
    return max((i for i, value in enumerate(values) if value == winner), key=lambda i: weights[i])


def majority_expected(texts, right) -> float:
    """Accuracy of the plain vote if ties between answers are broken at random. texts, right (bool): a row a problem."""
    correct = []
    for row, r in zip(texts, right, strict=True):
        values = [verify.answer_value(t) for t in row]
        votes = collections.Counter(v for v in values if v is not None)
        winners = [w for w, n in votes.items() if n == max(votes.values())]
        correct.append(np.mean([r[[v == w for v in values]].mean() for w in winners] or [r.mean()]))
    return float(np.mean(correct))


def holds_together(steps: list[str]) -> bool:
    """Does the gate find no false equation in a chain, without knowing the answer? A chain needs steps for that."""
    return bool(steps) and verify.check_steps(steps).is_valid


def method_figures(correct, random: float, oracle: float, seed: int, recovered: bool = True, pairs=None) -> dict:
    """What is reported of one method. correct [n]: whether, or in which share of tries, each problem came out right."""
    correct = np.asarray(correct, dtype=float)
    gained = (correct.mean() - random) / (oracle - random) if recovered and oracle > random else None
    return {"accuracy": float(correct.mean()), "ci95": interval(correct, seed), "recovered": gained, "pairwise": pairs}


def evaluate_run(run: str, args) -> dict:
    """Generates, saves and scores -> {"n", "k", "random", "oracle", "methods": {NAME: figures}}."""
    model, config = runs.load_run(run, args.device)
    if not isinstance(config, (NanoJEPAConfig, AnswerConfig)):
        hint = f": python train.py tjepa-speak --init_from {run}" if isinstance(config, TextConfig) else ""
        raise ValueError(f"{run} is a run of preset '{model.preset}', which writes no answers{hint}")
    tokenizer = runs.load_tokenizer(run, config)
    problems = eval_alignment.held_out(args, config)
    texts = generate(model, [tokenizer.encode(p["question"]) for p in problems], tokenizer, args)
    truths = [data.answer_text(p, "final") for p in problems]
    right = np.array([[verify.check_answer(t, truth) for t in row] for row, truth in zip(texts, truths, strict=True)])
    name = (f"generations-{args.dataset or config.dataset}-{args.split}-n{len(problems)}-k{args.k}"
            f"-t{args.temperature}-m{args.max_new_tokens}-seed{args.seed}"
            f"-{runs.digest_of_list(p['question'] for p in problems)[:6]}.jsonl")
    runs.write_jsonl(Path(run) / name, [
        {"id": p["id"], "question": p["question"], "truth": truth,
         "candidates": [{"text": t, "is_correct": bool(r)} for t, r in zip(row, ok, strict=True)]}
        for p, truth, row, ok in zip(problems, truths, texts, right, strict=True)])
    print(f"generations: {Path(run) / name}")

    n, random, oracle = len(problems), float(right.mean()), float(right.any(1).mean())
    figures = functools.partial(method_figures, random=random, oracle=oracle, seed=args.seed)
    if args.k == 1:
        strict = [r and verify.extract_answer(t[0], "strict") is not None
                  for t, r in zip(texts, right[:, 0], strict=True)]
        methods = {"greedy": figures(right[:, 0], recovered=False), "greedy_strict": figures(strict, recovered=False)}
    else:
        lengths = -np.array([[len(t) for t in row] for row in texts], dtype=float)
        holds = np.array([[holds_together(data.split_steps(t)) for t in row] for row in texts])
        left = [np.flatnonzero(ok) if ok.any() else np.arange(args.k) for ok in holds]
        methods = {"random": figures(right.mean(1)),
                   "shortest": figures(right[np.arange(n), lengths.argmax(1)], pairs=pairwise(lengths, right)),
                   "gate": figures([r[i].mean() for r, i in zip(right, left, strict=True)],
                                   pairs=pairwise(holds, right))}
        for name, kept in (("majority", [np.arange(args.k)] * n), ("gate_majority", left)):
            voters = [[row[j] for j in i] for row, i in zip(texts, kept, strict=True)]
            labels = [r[i] for r, i in zip(right, kept, strict=True)]
            methods[name] = figures([r[majority(row)] for row, r in zip(voters, labels, strict=True)])
            methods[name]["expected"] = majority_expected(voters, labels)
        methods["oracle"] = figures(right.any(1))
    # controls: the best single answer to everything, in hindsight, and the model's own answers to other questions
    constant = statistics.mode(truths)
    methods["constant"] = figures([verify.check_answer(constant, t) for t in truths], recovered=False)
    if n > 1:
        others = [truths[(i + n // 2) % n] for i in range(n)]
        methods["shuffled"] = figures([np.mean([verify.check_answer(t, truth) for t in row])
                                       for row, truth in zip(texts, others, strict=True)], recovered=False)
    return {"n": n, "k": args.k, "random": random, "oracle": oracle, "methods": methods,
            "unparsed": float(np.mean([verify.answer_value(t) is None for row in texts for t in row]))}


# ----------------------------------------------------------------------------- labelled candidates


def balanced_pairwise(scores, right, sources) -> float | None:
    """`pairwise`, but so that no method gains by knowing which source is right more often.

    scores, right, sources: an array a question. For each ordered pair (source of the right one, source of the wrong
    one) the share in which the right one scores higher; averaged over both directions of a pair, then over the pairs
    of sources that have both.
    """
    wins = {}
    for s, r, names in zip(scores, right, sources, strict=True):
        for i in np.flatnonzero(r):
            for j in np.flatnonzero(~r):
                won = float(s[i] > s[j]) + 0.5 * float(s[i] == s[j])
                wins.setdefault((names[i], names[j]), []).append(won)
    both = [(np.mean(w) + np.mean(wins[b, a])) / 2 for (a, b), w in wins.items() if a <= b and (b, a) in wins]
    return float(np.mean(both)) if both else None


def contrast_scores(config, x: np.ndarray) -> np.ndarray | None:
    """Scores [n] of `chain_features` x [n, F] by a linear contrast of right chains and their counterfactuals.

    Fitted on the run's own training latents: the pairs of the energy margin without a world model, its control. None
    where those latents are not at hand.
    """
    from sklearn.linear_model import LogisticRegression

    if not (Path(config.latents) / "manifest.json").is_file():
        return None
    train, _ = latents.training_chains(*latents.load_latents(config.latents, config.where), config.latents)
    pairs = [(chain_features(r["h"]), chain_features(r["wrong_h"])) for r in train if "wrong_h" in r]
    if not pairs:
        return None
    right, wrong = (np.stack(side) for side in zip(*pairs, strict=True))
    scale = right.std(0) + 1e-3
    gap = (right - wrong) / scale
    fitted = LogisticRegression(C=1e-2, fit_intercept=False, max_iter=500)
    fitted.fit(np.concatenate((gap, -gap)), np.repeat([1, 0], len(gap)))
    return x / scale @ fitted.coef_[0]


def chain_features(z: torch.Tensor) -> np.ndarray:
    """A chain's latents [1 + S, D] -> what the linear controls see of it: last step, mean of the steps, question."""
    return torch.cat((z[-1], z[1:].mean(0) if len(z) > 1 else z[0], z[0])).float().numpy()


def evaluate_candidates(run: str, args) -> dict:
    """Ways of picking one of a question's labelled candidates -> {"n", "k", "random", "oracle", "methods"}.

    README explains the names. energy_last, of a step with nothing after it, is also its next-step energy. A vote weighs
    a token's mean probability (majority_logprob), the chain's coherence (majority_energy) or the probability of being
    right that `combined` gives (majority_combined). ensemble: the sum of the given runs' energies. gate_X is plain X
    where no candidate's equations hold. expected: a plain vote's accuracy with ties broken at random. p_logprob,
    p_majority: `paired_p` with these two.
    """
    model, config = infer.load_world_model(run, args.device)
    folder = args.latents or (
        extract.latents_of_file(config, "candidates", args.candidates, device=args.device, limit=args.limit,
                                llm=args.llm) if args.candidates else
        extract.written_for(config, eval_alignment.held_out(args, config), args.dataset or config.dataset, args.split,
                            args))
    rows = infer.load_chains(run, config, folder, args.limit, logprobs=True, held_out=True)
    if args.k > 1:
        most = max(collections.Counter(r["problem_id"] for r in rows).values())
        if most < args.k:
            raise ValueError(f"--k {args.k}: {folder} holds {most} candidates a question at most")
        number = collections.defaultdict(itertools.count)
        rows = [r for r in rows if next(number[r["problem_id"]]) < args.k]
    rows, question, members = infer.by_question(rows, args.seed)
    right, h = np.array([r["is_valid"] for r in rows]), [r["h"] for r in rows]
    usable = np.array([bool(r["steps"]) for r in rows])  # a chain without steps ranks below all others

    def energy_scores(world_model):
        found = infer.energies(world_model, h)
        by_mode = {mode: -np.array([float(e[mode].mean()) for e in found]) for mode in world_model.ENERGIES}
        return by_mode | {"last": -np.array([float(e["leave_one_out"][-1:].mean()) for e in found])}, found

    def fitted(x, C):
        scores = np.zeros(len(rows))
        if usable.any():
            scores[usable] = infer.cross_validated(x[usable], right[usable], question[usable], args.seed, C)
        return scores

    ours, found = energy_scores(model)
    logprob = np.array([infer.mean_logprob(r) for r in rows])
    features = np.stack([chain_features(z) for z in h])
    scores = {"shortest": -np.array([float(sum(r["n_tokens"][1:])) for r in rows]), "logprob": logprob,
              "energy": ours["leave_one_out"], "energy_next_step": ours["next_step"], "energy_last": ours["last"],
              "combined": fitted(np.stack((logprob, ours["leave_one_out"]), 1), C=1.0),
              "combined_last": fitted(np.stack((logprob, ours["last"]), 1), C=1.0),
              "probe": fitted(features, C=1e-3)}
    if (contrast := contrast_scores(config, features)) is not None:
        scores["contrast"] = contrast
    torch.manual_seed(args.seed)
    untrained = runs.build_model(config).to(model.h_mean.device).eval()
    untrained.fit_standardize(torch.cat(h))
    scores["untrained"], scores["untrained_last"] = (energy_scores(untrained)[0][k] for k in ("leave_one_out", "last"))
    together = [ours["leave_one_out"]]
    for other in args.also:
        theirs, their_config = infer.load_world_model(other, args.device)
        latents.check_same_llm(their_config, latents.read_manifest(folder), other)
        theirs, _ = energy_scores(theirs)
        together.append(theirs["leave_one_out"])
        for name, mode in (("energy", "leave_one_out"), ("energy_next_step", "next_step"), ("energy_last", "last")):
            scores[f"{name} {Path(other).name}"] = theirs[mode]
    if args.ensemble:
        scores["ensemble"] = sum(s / s[usable].std() for s in together)
        scores["combined_ensemble"] = fitted(np.stack((logprob, scores["ensemble"]), 1), C=1.0)
    scores = {name: np.where(usable, values, -np.inf) for name, values in scores.items()}

    answers = [r["steps"][-1] if r["steps"] else "" for r in rows]
    holds = np.array([holds_together(r["steps"]) for r in rows])
    left = [m[holds[m]] if holds[m].any() else m for m in members]
    for name in ("logprob", "energy", "energy_next_step", "combined"):
        scores[f"gate_{name}"] = np.where(holds, scores[name], scores[name] - 1e6)
    source = np.array([r["source"] for r in rows])
    by_source = {s: right[source == s].mean() for s in set(source)}
    sources, truth = [source[m] for m in members], [right[m] for m in members]
    random, oracle = float(np.mean([t.mean() for t in truth])), float(np.mean([t.any() for t in truth]))
    picks = {name: np.array([m[s[m].argmax()] for m in members]) for name, s in scores.items()}
    coherence = np.array([float(model.coherence(e["leave_one_out"].to(model.quantiles.device)).mean()) for e in found])
    votes = {"majority": np.ones(len(rows)), "majority_logprob": np.exp(logprob), "majority_energy": coherence + 1e-6,
             "majority_combined": 1 / (1 + np.exp(-scores["combined"]))}
    for prefix, groups in (("", members), ("gate_", left)):
        for name, weights in votes.items():
            picks[prefix + name] = np.array([m[majority([answers[i] for i in m], weights[m])] for m in groups])

    figures = functools.partial(method_figures, random=random, oracle=oracle, seed=args.seed)
    methods = {"random": figures([t.mean() for t in truth]), "gate": figures([right[m].mean() for m in left])}
    for name, picked in picks.items():
        pairs = balanced_pairwise([scores[name][m] for m in members], truth, sources) if name in scores else None
        alone = float(np.mean([by_source[s] for s in source[picked]]))
        methods[name] = figures(right[picked], pairs=pairs) | {"by_source_alone": alone} | {
            f"p_{other}": paired_p(right[picked], right[picks[other]]) for other in ("logprob", "majority")}
    for name, groups in (("majority", members), ("gate_majority", left)):
        methods[name]["expected"] = majority_expected([[answers[i] for i in m] for m in groups],
                                                      [right[m] for m in groups])
    methods["oracle"] = figures([t.any() for t in truth])
    return {"n": len(members), "k": max(map(len, members)), "random": random, "oracle": oracle, "methods": methods}


def evaluate_nudge(run: str, args) -> dict:
    """Greedy answers with the predicted next step pulling at them, for each of --alphas -> accuracies and energies.

    shuffled: pulled as much, but towards the prediction for the next problem. energy: what R-JEPA gives the written
    chains. p_own, p_shuffled: `paired_p` with alpha 0, and with the same alpha shuffled. Generations are kept in the
    run folder under a name that follows from all that made them, and not made again. --method greedy is alpha 0 alone.
    """
    alphas = (0.0,) if args.method == "greedy" else args.alphas
    model, config = infer.load_world_model(run, args.device)
    made_by = [runs.weights_digest(run), runs.llm_label(config, args.llm), args.max_new_tokens, args.batch_size]
    guide = None
    if args.nudge == "bias" and max(alphas) > 0:
        guide, _, folder = infer.load_beside(run, "", "guide", args.device)
        made_by.append(runs.weights_digest(folder))
    problems = eval_alignment.held_out(args, config)
    llm, truths = infer.llm_of(config, args.llm, args.device), [data.answer_text(p, "final") for p in problems]
    infer.Nudge(model, llm, max(alphas), guide, False)  # may refuse: not after the answers of alpha 0
    made_by = runs.digest(json.dumps([[p["id"], p["question"]] for p in problems] + made_by + [llm.dtype]))
    methods, answers = {}, {}
    for alpha, shuffled in [(a, s) for a in alphas for s in (False, True) if not s or a > 0 and len(problems) > 1]:
        name = f"alpha {alpha:g}" + (" shuffled" if shuffled else "")
        path = Path(run) / f"generations-{args.nudge}-{name.replace(' ', '-')}-{made_by}.jsonl"
        if not path.is_file():
            written = []
            for part in jobs.parts([p["question"] for p in problems], args.batch_size):
                nudge = infer.Nudge(model, llm, alpha, guide, shuffled)
                chains = llm_generate(llm, part, 1, 0.0, 1.0, args.seed, args.max_new_tokens, nudge)
                written += [row[0] for row in chains]
            found = infer.energies(model, [c["h"] for c in written])
            runs.write_jsonl(path, [{"id": p["id"], "steps": c["steps"], "logprob": c["logprob"],
                                     "energy": infer.chain_energy(e)}
                                    for p, c, e in zip(problems, written, found, strict=True)])
        rows = verify.read_jsonl(path)
        answers[name] = right = np.array([bool(r["steps"]) and verify.check_answer(r["steps"][-1], t)
                                          for r, t in zip(rows, truths, strict=True)])
        energy = [r["energy"] for r in rows if r["energy"] is not None]
        methods[name] = method_figures(right, 0.0, 0.0, args.seed, recovered=False) | {
            "energy": float(np.mean(energy)) if energy else None}
    for name, right in answers.items():
        for key, other in (("p_own", "alpha 0"), ("p_shuffled", f"{name} shuffled")):
            if other in answers and other != name:
                methods[name][key] = paired_p(right, answers[other])
    own = methods["alpha 0"]["accuracy"] if "alpha 0" in methods else None
    return {"n": len(problems), "k": 1, "nudge": args.nudge, "random": own, "oracle": own, "methods": methods}


# ----------------------------------------------------------------------------- an LLM on a benchmark


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from n samples (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def grade(problem: dict, text: str, allow_unsafe_code: bool = False) -> bool:
    """Is a written answer right, as its kind of problem is judged?"""
    if problem["kind"] == "number":  # by the answer alone: validate also judges the arithmetic
        return verify.check_answer(text, data.answer_text(problem, "final"))
    return bool(text.strip()) and verify.validate(problem, {"steps": [text]}, allow_unsafe_code).is_valid


def by_subject(bench, problems: list[dict], correct: np.ndarray) -> dict:
    """Accuracy of every subject and their macro average; nothing where there is but one."""
    groups = {}
    for p, c in zip(problems, correct, strict=True):
        groups.setdefault(bench.group(p["subject"]), []).append(float(c))
    found = {name: float(np.mean(values)) for name, values in sorted(groups.items())}
    return {"macro": float(np.mean(list(found.values()))), "subjects": found} if len(found) > 1 else {}


def evaluate_choices(llm, bench, problems: list[dict], shots: list[list[dict]], args) -> dict:
    """Multiple choice by log-likelihood, as lm-evaluation-harness scores it.

    `acc`: the choice with the highest log p(choice | question); `acc_norm`: the same a character of the choice.
    Controls: `no_question` is acc_norm after the prompt with an empty question, `constant` the best position in
    hindsight.
    """
    def scores(contexts: list[str]) -> list[np.ndarray]:
        pairs = [(c, t) for c, p in zip(contexts, problems, strict=True) for t in benchmarks.continuations(p)]
        values = iter(lp for lp, _ in llm.loglikelihoods(pairs))
        return [np.array([next(values) for _ in p["choices"]]) for p in problems]

    lengths = [np.array([len(c) for c in p["choices"]]) for p in problems]
    labels = np.array([p["label"] for p in problems])
    asked = scores([benchmarks.prompt(bench, p, e) for p, e in zip(problems, shots, strict=True)])
    alone = scores([bench.prompt.format(question="").strip() or "\n"] * len(problems))
    picks = {"acc": np.array([s.argmax() for s in asked]),
             "acc_norm": np.array([(s / n).argmax() for s, n in zip(asked, lengths, strict=True)]),
             "no_question": np.array([(s / n).argmax() for s, n in zip(alone, lengths, strict=True)]),
             "constant": np.full(len(problems), np.bincount(labels).argmax())}
    random = float(np.mean([1 / len(p["choices"]) for p in problems]))
    methods = {name: method_figures(pick == labels, random, 1.0, args.seed) for name, pick in picks.items()}
    best = "acc_norm" if len({len(c) for p in problems for c in p["choices"]}) > 1 else "acc"
    return {"n": len(problems), "k": 1, "random": random, "oracle": 1.0, "metric": best, "methods": methods,
            **by_subject(bench, problems, picks[best] == labels)}


def write_answers(llm, bench, problems: list[dict], shots: list[list[dict]], args) -> list[list[str]]:
    """k answers to each problem; kept in out/generations, named after all that made them, and not written again."""
    texts, stop = [benchmarks.prompt(bench, p, e) for p, e in zip(problems, shots, strict=True)], bench.stop
    if args.chat:
        if not getattr(getattr(llm, "tokenizer", None), "chat_template", None) or bench.kind == "number":
            raise ValueError("--chat: " + (f"{args.dataset} is put as a chat already, where there is a template"
                                           if bench.kind == "number" else f"{llm.name} has no chat template"))
        turn, begin, stop = bench.chat or (bench.prompt, "", bench.stop)  # the user's, how the answer begins, and ends
        texts = [chat_text(llm.tokenizer, [{"role": "user", "content": turn.format(question=p["question"])}]) + begin
                 for p in problems]
    made_by = [llm.name, llm.fingerprint(), llm.tokenizer_hash, llm.dtype, llm.prompt, texts, args.k,
               args.temperature, args.top_p, args.seed, args.max_new_tokens, stop]
    key = runs.digest(json.dumps(made_by))[:10]
    path = Path("out/generations") / f"{Path(llm.name).name}-{args.dataset}-{args.split}-k{args.k}-{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = verify.read_jsonl(path, ["id", "answers"]) if path.is_file() else []
    temperature, size = args.temperature if args.k > 1 else 0.0, max(1, args.batch_size // args.k)
    for start in range(len(rows), len(problems), size):
        part = problems[start : start + size]
        if bench.kind == "number":
            chains = llm_generate(llm, [p["question"] for p in part], args.k, temperature, args.top_p, args.seed,
                                  args.max_new_tokens)
            answers = [["\n".join(c["steps"]) for c in row] for row in chains]
        else:
            answers = complete(llm, texts[start : start + size], args.k, temperature, args.top_p, args.seed,
                               args.max_new_tokens, stop)
        rows += [{"id": p["id"], "answers": a} for p, a in zip(part, answers, strict=True)]
        runs.write_jsonl(path, rows)
        print(f"{len(rows)} of {len(problems)} problems")
    print(f"generations: {path}")
    return [row["answers"] for row in rows]


def evaluate_llm(name: str, args) -> dict:
    """An LLM (or a run that reads questions and writes answers) on a data set -> figures as of `evaluate_run`.

    pass@1, pass@10, ... up to k: unbiased estimates from k samples a problem. shuffled: each problem gets the answer to
    the next one.
    """
    if args.dataset in ("", "synthetic"):
        raise ValueError(f"{name} is no run folder; as an LLM it needs --dataset, one of "
                         f"{', '.join(benchmarks.BENCHMARKS)}")
    bench = benchmarks.BENCHMARKS[args.dataset]
    problems = data.load_problems(args.dataset, args.split, args.data_dir, args.limit)
    shots = [[] for _ in problems]
    if args.shots and not bench.shots:
        raise ValueError(f"--shots: {args.dataset} has no split with examples")
    if bench.kind == "choice" and (args.chat or args.k > 1):
        raise ValueError(f"--chat and --k are for what an LLM writes; {args.dataset} is multiple choice")
    if args.shots:
        pool = benchmarks.load(args.dataset, bench.shots, args.data_dir)
        shots = benchmarks.examples_for(problems, pool, args.shots)
    if bench.kind == "math":
        verify.check_math("1", "1")  # is math-verify there?
    if bench.kind == "code" and not args.allow_unsafe_code and (problem := sandbox.sandbox_problem()):
        raise ValueError(f"{problem}, or pass --allow_unsafe_code to run generated code with your rights")
    llm = load_llm(name, args.device)
    print(f"{llm.name} itself on {args.dataset}, {len(problems)} problems")
    asked = {"llm": llm.name} | {key: getattr(args, key) for key in ("dataset", "split", "shots", "chat")}
    if bench.kind == "choice":
        return asked | evaluate_choices(llm, bench, problems, shots, args)
    if bench.kind == "number" and isinstance(llm, HuggingFaceLLM):
        llm.set_prompt("few_shot")
    answers = write_answers(llm, bench, problems, shots, args)
    pairs = [(p, text) for p, row in zip(problems, answers, strict=True) for text in row]
    pairs += [(p, row[0]) for p, row in zip(problems, answers[1:] + answers[:1], strict=True)]
    with ThreadPoolExecutor() as pool:
        graded = np.array(list(pool.map(lambda pair: grade(*pair, args.allow_unsafe_code), pairs)))
    n, k = len(problems), args.k
    right, shuffled = graded[: n * k].reshape(n, k), graded[n * k :]
    random, oracle = float(right.mean()), float(right.any(1).mean())
    figures = functools.partial(method_figures, random=random, oracle=oracle, seed=args.seed)
    methods = {"greedy": figures(right[:, 0], recovered=False)} if k == 1 else {
        f"pass@{j}": figures([pass_at_k(k, int(c), j) for c in right.sum(1)], recovered=False)
        for j in sorted({1, 10, 100, k}) if j <= k}
    if k > 1 and bench.kind == "number":
        methods["majority"] = figures(right[np.arange(n), [majority(row) for row in answers]])
        methods["majority"]["expected"] = majority_expected(answers, right)
    if n > 1:
        methods["shuffled"] = figures(shuffled, recovered=False)
    return asked | {"n": n, "k": k, "random": random, "oracle": oracle,
            "metric": "pass@1" if k > 1 else "greedy", "methods": methods, **by_subject(bench, problems, right.mean(1))}


@plain_errors()
def main(argv=None):
    args = tyro.cli(Args, args=argv)
    config = runs.load_config(args.run)[1] if runs.is_run(args.run) or Path(args.run, "log.jsonl").is_file() else None
    kind = benchmarks.BENCHMARKS[args.dataset].kind if args.dataset in benchmarks.BENCHMARKS else "number"
    asks_llm = config is None or kind != "number"
    is_rjepa = isinstance(config, RJEPAConfig) and not asks_llm
    writes, given = args.method in ("nudge", "greedy"), bool(args.candidates or args.latents)
    if not is_rjepa and (args.method != "all" or given):
        load_note = "" if config else f" ({args.run} holds no config.json: no finished run lies there)"
        raise ValueError("--method, --candidates and --latents need an R-JEPA run, and problems whose answers are "
                         f"numbers: {args.run}{f' on {args.dataset}' * bool(args.dataset)} is none{load_note}")
    if (args.shots or args.chat) and not asks_llm:
        raise ValueError(f"--shots and --chat are for an LLM, and {args.run} is a run that does not read them")
    if writes and given:
        raise ValueError(f"--method {args.method} writes answers: leave out --candidates and --latents")
    if given and (args.dataset or args.data_dir or args.asked_split):
        raise ValueError("--candidates and --latents name the chains: leave out --dataset, --split and --data_dir")
    if is_rjepa and not writes and not given and args.k == 1:
        raise ValueError(f"{args.run} is an R-JEPA run: --candidates FILE, --dataset X --k K with K > 1, or "
                         "--method nudge")
    if asks_llm:
        result = evaluate_llm(args.llm or getattr(config, "llm", args.run), args)
    elif is_rjepa:
        result = (evaluate_nudge if writes else evaluate_candidates)(args.run, args)
    else:
        result = evaluate_run(args.run, args)
    print(f"{'method':32}{'accuracy':>10}{'95 % interval':>20}{'recovered':>11}{'pairwise':>10}")
    for name, m in result["methods"].items():
        more = "".join(f"{m[k]:10.3f}" if m[k] is not None else " " * 10 for k in ("recovered", "pairwise"))
        print(f"{name:32}{m['accuracy']:10.4f}{m['ci95'][0]:12.4f}{m['ci95'][1]:8.4f} {more}")
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
