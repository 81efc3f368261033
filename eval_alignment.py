"""Do predicted latents find their targets, or has everything collapsed into one direction?

    python eval_alignment.py out/quickstart
    python eval_alignment.py out/nanojepa-small --dataset gsm8k --data_dir DATA/gsm8k --limit 256

Looks at problems that the run has never seen (`test`) and prints a table with its controls: mismatched pairs, the
best constant prediction, the same network with fresh weights, and whether the prediction is nearer to the true
answer than to a counterfactual one (same words, one step wrong), which the topic alone cannot tell.
"""

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

import data
from config import check
from model import alignment, wilson
from train import build_model, load_run, load_tokenizer


@dataclass
class Args:
    """A run and the problems to look at: test problems of the run's own data set unless told otherwise."""

    run: Annotated[str, tyro.conf.Positional]  # a run folder of train.py
    dataset: Literal["", "gsm8k", "synthetic"] = ""  # empty: the run's own
    split: Literal["train", "val", "test"] = "test"
    data_dir: str = ""  # as in train.py; empty: the run's own
    limit: int = 0  # number of problems; 0: all there are, 256 synthetic ones
    seed: int = 1  # which synthetic problems, which counterfactuals
    device: str = "auto"

    def __post_init__(self):
        for name in ("limit", "seed"):
            check(self, name, getattr(self, name) >= 0, "must not be negative")


def held_out(args, config) -> list[dict]:
    """The problems that an evaluation script's arguments name. Says so where the run may have seen them."""
    dataset = args.dataset or config.dataset
    if args.split == "train" and dataset == config.dataset:
        print("note: --split train: the run was trained on these problems")
    data_dir = args.data_dir or (config.data_dir if dataset == config.dataset else "")
    limit = args.limit or (256 if dataset == "synthetic" else 0)
    return data.load_problems(dataset, args.split, data_dir, limit, args.seed, config.max_problem_steps)


@torch.no_grad()
def counterfactual_pairs(model, config, tokenizer, problems, pred, seed) -> dict:
    """How often pred_latent is nearer (cosine) to the true answer's latent than to a counterfactual one's.

    Chance is 0.5. Problems whose solution allows no unambiguous counterfactual are left out; n says how many remain.
    """
    kept, right, wrong = [], [], []
    for i, p in enumerate(problems):
        try:
            chain, _ = data.counterfactual(p, data.make_chain(p), seed)
        except ValueError:
            continue
        kept.append(i)
        right.append(tokenizer.encode(data.answer_text(p, config.target_text)))
        wrong.append(tokenizer.encode("\n".join(chain["steps"]) if config.target_text == "solution"
                                      else chain["steps"][-1]))
    if not kept:
        return {"top1": None, "ci95": None, "n": 0}
    questions = [tokenizer.encode(problems[i]["question"]) for i in kept]
    true_latent, false_latent = model.encode(questions, right)[1], model.encode(questions, wrong)[1]
    nearer = F.cosine_similarity(pred[kept], true_latent) > F.cosine_similarity(pred[kept], false_latent)
    share = float(nearer.float().mean())
    return {"top1": share, "ci95": list(wilson(share, len(kept))), "n": len(kept)}


def evaluate_nanojepa(run: str, args) -> dict:
    """The figures of model.alignment for a run on held-out problems, with the controls named above."""
    model, config = load_run(run, args.device)
    tokenizer = load_tokenizer(run, config)
    problems = held_out(args, config)
    if len(problems) < 2:
        raise ValueError(f"{len(problems)} problem: a pair is needed to mismatch, raise --limit")
    examples = data.encode_problems(problems, tokenizer, config)
    questions, answers = [e["question"] for e in examples], [e["target"] for e in examples]
    pred, target = model.encode(questions, answers)
    result = alignment(pred, target)
    result["counterfactual"] = counterfactual_pairs(model, config, tokenizer, problems, pred, args.seed)

    torch.manual_seed(args.seed)
    untrained = build_model(config).to(pred.device).eval()
    untrained.fit_standardize(answers)  # on the very answers it is asked for: in favour of the control
    result["untrained"] = alignment(*untrained.encode(questions, answers))
    return result


def print_table(result: dict):
    names = "cos_matched cos_mismatched gap retrieval_top1 chance_top1 effective_rank std predict_mean_cos".split()
    print(f"{'':18}{'trained':>10}{'untrained':>11}")
    for name in names:
        print(f"{name:18}{result[name]:10.4f}{result['untrained'][name]:11.4f}")
    lo, hi = result["retrieval_ci95"]
    print(f"retrieval among {result['n']}: 95 % interval {lo:.4f} to {hi:.4f}")
    if (pairs := result["counterfactual"])["n"]:
        print(f"nearer to the true than to a counterfactual answer: {pairs['top1']:.3f} of {pairs['n']} (chance 0.5)")


def main():
    args = tyro.cli(Args)
    try:
        result = evaluate_nanojepa(args.run, args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print_table(result)
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
