"""Exact match on held-out problems, beside what chance, a constant and a wrong pairing would get.

    python evaluate_accuracy.py out/nanojepa-small --dataset gsm8k --data_dir DATA/gsm8k
    python evaluate_accuracy.py out/student-small --limit 1000 --k 8        # sample 8, compare ways of picking one

Every generation is written to RUN/generations-*.jsonl. An answer counts where verify.check_answer says so, that is
by value (18 = 18.00 = $18); text without `#### n` counts by its last number and is reported apart as `strict`.
"""

import json
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import data
import eval_alignment
import verify
from config import check
from model import wilson
from train import load_run, load_tokenizer, write_atomic


@dataclass
class Args(eval_alignment.Args):
    """Exact match of generated answers."""

    k: int = 1  # candidates per problem: 1 is greedy, more are sampled
    temperature: float = 0.8  # of the samples
    max_new_tokens: int = 256
    batch_size: int = 128  # candidates generated at a time

    def __post_init__(self):
        super().__post_init__()
        for name in ("k", "max_new_tokens", "batch_size", "temperature"):
            check(self, name, getattr(self, name) > 0, "must be positive")


def interval(right: np.ndarray, seed: int, draws: int = 2000) -> list[float]:
    """95 % interval of a mean over problems, right: float [n]. Wilson's for right and wrong, else a bootstrap."""
    if np.isin(right, (0.0, 1.0)).all():
        return list(wilson(float(right.mean()), len(right)))
    rng = np.random.default_rng(seed)
    means = right[rng.integers(0, len(right), (draws, len(right)))].mean(1)
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def generate(model, tokenizer, examples, args) -> list[list[str]]:
    """K answer texts for every problem; greedy for k = 1. Batches hold questions of like length."""
    questions = [e["question"] for e in examples for _ in range(args.k)]
    order = sorted(range(len(questions)), key=lambda i: len(questions[i]))
    texts = [""] * len(questions)
    for start in range(0, len(order), args.batch_size):
        part = order[start : start + args.batch_size]
        out = model.generate([questions[i] for i in part], args.max_new_tokens,
                             temperature=args.temperature if args.k > 1 else 0.0, seed=args.seed + start)
        for i, tokens in zip(part, out, strict=True):
            texts[i] = tokenizer.decode(tokens)
    return [texts[i : i + args.k] for i in range(0, len(texts), args.k)]


def majority(texts: list[str]) -> int:
    """Index of the first candidate with the most frequent answer; one without an answer never votes."""
    votes = Counter(v for t in texts if (v := verify.answer_value(t)) is not None)
    if not votes:
        return 0
    winner = votes.most_common(1)[0][0]
    return next(i for i, t in enumerate(texts) if verify.answer_value(t) == winner)


def pairwise(scores: np.ndarray, right: np.ndarray) -> float | None:
    """Over pairs of a right and a wrong candidate of one problem: how often the right one scores higher (tie ½)."""
    wins = [np.mean((s[r][:, None] > s[~r]) + 0.5 * (s[r][:, None] == s[~r]))
            for s, r in zip(scores, right.astype(bool), strict=True) if 0 < r.sum() < len(r)]
    return float(np.mean(wins)) if wins else None


def evaluate_run(run: str, args) -> dict:
    """Generates, saves and scores -> {"n", "k", "random", "oracle", "methods": {NAME: figures}}."""
    model, config = load_run(run, args.device)
    tokenizer = load_tokenizer(run, config)
    problems = eval_alignment.held_out(args, config)
    texts = generate(model, tokenizer, data.encode_problems(problems, tokenizer, config), args)
    truths = [data.answer_text(p, "final") for p in problems]
    right = np.array([[verify.check_answer(t, truth) for t in row] for row, truth in zip(texts, truths, strict=True)])
    name = (f"generations-{args.dataset or config.dataset}-{args.split}-n{len(problems)}-k{args.k}"
            f"-t{args.temperature}-m{args.max_new_tokens}-seed{args.seed}.jsonl")
    lines = [json.dumps({"id": p["id"], "question": p["question"], "truth": truth,
                         "candidates": [{"text": t, "is_correct": bool(r)} for t, r in zip(row, ok, strict=True)]})
             for p, truth, row, ok in zip(problems, truths, texts, right, strict=True)]
    write_atomic(Path(run) / name, lambda path: path.write_text("\n".join(lines) + "\n"))
    print(f"generations: {Path(run) / name}")

    def figures(scores_of_problems, recovered=True, pairs=None):
        correct = np.asarray(scores_of_problems, dtype=float)
        gained = (correct.mean() - random) / (oracle - random) if recovered and oracle > random else None
        return {"accuracy": float(correct.mean()), "ci95": interval(correct, args.seed), "recovered": gained,
                "pairwise": pairs}

    n, first = len(problems), np.arange(len(problems))
    random, oracle = float(right.mean()), float(right.any(1).mean())
    methods = {}
    if args.k == 1:
        methods["greedy"] = figures(right[:, 0], recovered=False)
        strict = [r and verify.extract_answer(t[0], "strict") is not None
                  for t, r in zip(texts, right[:, 0], strict=True)]
        methods["greedy_strict"] = figures(strict, recovered=False)
    else:
        methods["random"] = figures(right.mean(1))
        lengths = -np.array([[len(t) for t in row] for row in texts], dtype=float)
        methods["shortest"] = figures(right[first, lengths.argmax(1)], pairs=pairwise(lengths, right))
        methods["majority"] = figures(right[first, [majority(row) for row in texts]])
        methods["oracle"] = figures(right.any(1))
    # controls: the best single answer to everything, in hindsight, and the model's own answers to other questions
    constant = statistics.mode(truths)
    methods["constant"] = figures([verify.check_answer(constant, t) for t in truths], recovered=False)
    others = [truths[(i + n // 2) % n] for i in range(n)]
    methods["shuffled"] = figures([np.mean([verify.check_answer(t, truth) for t in row])
                                   for row, truth in zip(texts, others, strict=True)], recovered=False)
    return {"n": n, "k": args.k, "random": random, "oracle": oracle, "methods": methods,
            "unparsed": float(np.mean([verify.answer_value(t) is None for row in texts for t in row]))}


def main():
    args = tyro.cli(Args)
    try:
        result = evaluate_run(args.run, args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{'method':16}{'accuracy':>10}{'95 % interval':>20}")
    for name, m in result["methods"].items():
        print(f"{name:16}{m['accuracy']:10.4f}{m['ci95'][0]:12.4f}{m['ci95'][1]:8.4f}")
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
