"""Do predicted latents find their targets, or has everything collapsed into one direction?

    python eval_alignment.py out/quickstart
    python eval_alignment.py out/nanojepa-small --dataset gsm8k --data_dir DATA/gsm8k --limit 256
    python eval_alignment.py out/rjepa-small                                    # R-JEPA on its own held-out chains
    python eval_alignment.py out/rjepa-small --latents out/latents/candidates   # does energy tell right from wrong?
    python eval_alignment.py out/rjepa-small --step_errors FILE                 # does it find the first wrong step?
    python eval_alignment.py out/tjepa-small                                    # T-JEPA: masked spans, probes
    python eval_alignment.py out/tjepa-distill --teacher out/tjepa-small        # a student beside its teacher
    python eval_alignment.py out/tjepa-speak                                    # token loss given the question

Looks at problems that the run has never seen (`test`) and prints figures with their controls: mismatched pairs, the
best constant prediction, the same network with fresh weights, words alone (TF-IDF), and whether the prediction is
nearer to the true answer than to a counterfactual one (one step wrong), which the topic alone cannot tell. For R-JEPA:
the error beside predict-the-mean and copy-a-neighbour, energy against correctness, and retrieval of a hidden step. For
T-JEPA: the error of masked spans beside the same controls, and what a linear probe reads from a question's thought.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import benchmarks
import config as cfg
import data
import extract
import infer
import jobs
import latents
import runs
import verify
from model import TextEncoder, alignment, latent_figures, wilson


@dataclass
class Problems:
    """A run and the problems to look at: test problems of the run's own data set unless told otherwise.

    Of an R-JEPA eval_alignment.py looks at `latents`; where neither these nor problems are named, at the chains that
    its training held out.
    """

    run: Annotated[str, tyro.conf.Positional]  # a run folder of train.py
    dataset: Literal[("", *benchmarks.WITH_NUMBERS, "synthetic")] = ""  # empty: the run's own
    split: Literal["", "train", "val", "test"] = ""  # empty: test; of an R-JEPA see `latents`
    data_dir: str = ""  # as in train.py; empty: the run's own
    limit: int = 0  # number of problems (T-JEPA's probes learn from five times as many); 0: all, 256 synthetic ones
    seed: int = 1  # which synthetic problems, which counterfactuals, which distractors
    latents: str = ""  # R-JEPA: a folder of extract.py (of several splits and no --split: not those to train on);
    # empty: its own held-out chains, where no problems are named
    llm: str = ""  # where the run's LLM lies, if not under the name it was trained with
    device: str = "auto"

    def __post_init__(self):
        cfg.not_negative(self, "limit seed")
        self.names_none = not (self.latents or self.dataset or self.data_dir or self.split)
        self.asked_split, self.split = self.split, self.split or "test"


@dataclass
class Args(Problems):
    """Do predicted latents find their targets, or has everything collapsed into one direction?"""

    step_errors: str = ""  # R-JEPA: a jsonl file of chains with the first wrong step known
    plan: bool = False  # R-JEPA: PLAN on the problems' own solutions with a middle step taken out
    quantile: float = 0.9  # PLAN: a gap is a next-step energy above this quantile of verified steps' energies
    logprob_limit: int = 50  # PLAN: chains whose 100 candidates the LLM reads in the gap and weighs itself; 0: of none
    decode_limit: int = 500  # PLAN: chains whose missing step is put into words; 0: of none, which needs no Speaker
    speaker: str = ""  # PLAN: the Speaker's run folder; empty: RUN-speak
    teacher: str = ""  # T-JEPA: a run whose outputs a linear map of this run's is fitted to

    def __post_init__(self):
        super().__post_init__()
        cfg.shares(self, "quantile")
        cfg.not_negative(self, "decode_limit logprob_limit")


def held_out(args, config) -> list[dict]:
    """The problems that an evaluation script's arguments name. Says so where the run may have seen them."""
    dataset = args.dataset or config.dataset
    if args.split == "train" and dataset == config.dataset:
        print("note: --split train: the run was trained on these problems")
    data_dir = args.data_dir or (config.data_dir if dataset == config.dataset else "")
    limit = args.limit or (256 if dataset == "synthetic" else 0)
    return data.load_problems(dataset, args.split, data_dir, limit, args.seed, config.max_problem_steps)


def counterfactuals(problems, config, seed) -> tuple[list[int], list[str], list[str]]:
    """(numbers of the problems that have an unambiguous counterfactual, their true answers, the wrong ones)"""
    kept, right, wrong = [], [], []
    for i, p in enumerate(problems):
        try:
            chain, _ = data.counterfactual(p, data.make_chain(p), seed)
        except ValueError:
            continue
        kept.append(i)
        right.append(data.answer_text(p, config.target_text))
        wrong.append("\n".join(chain["steps"]) if config.target_text == "solution" else chain["steps"][-1])
    return kept, right, wrong


def nearer(pred, right, wrong) -> dict:
    """How often pred [N, C] is nearer (by cosine; a tie counts ½) to right [N, C] than to wrong; chance is 0.5."""
    if not len(pred):
        return {"top1": None, "ci95": None, "n": 0}
    gap = F.cosine_similarity(pred, right) - F.cosine_similarity(pred, wrong)
    share = float(((gap > 1e-9).double() + 0.5 * (gap.abs() <= 1e-9)).mean())
    return {"top1": share, "ci95": list(wilson(share, len(pred))), "n": len(pred)}


def evaluate_nanojepa(run: str, args) -> dict:
    """The figures of model.alignment for a run on held-out problems, with the controls named above.

    `counterfactual`: see `nearer`. `lexical` is no network but TF-IDF of the texts' words and numbers, with weights
    from these very texts.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    model, config = runs.load_run(run, args.device)
    tokenizer = runs.load_tokenizer(run, config)
    problems = held_out(args, config)
    if len(problems) < 2:
        raise ValueError(f"{len(problems)} problem: a pair is needed to mismatch, raise --limit")
    examples = data.encode_problems(problems, tokenizer, config)
    questions, answers = [e["question"] for e in examples], [e["target"] for e in examples]
    pred, target = model.encode(questions, answers)
    result = alignment(pred, target)
    kept, *versions = counterfactuals(problems, config, args.seed)
    latent = [model.encode_answers([tokenizer.encode(t) for t in texts]) if kept else pred[:0] for texts in versions]
    result["counterfactual"] = nearer(pred[kept], *latent)

    torch.manual_seed(args.seed)
    untrained = runs.build_model(config).to(pred.device).eval()
    untrained.fit_standardize(answers)  # on the very answers it is asked for: in favour of the control
    result["untrained"] = alignment(*untrained.encode(questions, answers))
    texts = [[p["question"] for p in problems], [data.answer_text(p, config.target_text) for p in problems], *versions]
    words = TfidfVectorizer(token_pattern=r"\w+").fit(sum(texts, []))
    asked, said, *latent = (torch.from_numpy(words.transform(part).toarray()) for part in texts if part)
    result["lexical"] = {k: v for k, v in alignment(asked, said).items() if k.startswith(("cos", "gap", "retrieval"))}
    result["lexical"]["counterfactual"] = nearer(asked[kept], *latent or (asked[:0], asked[:0]))
    return result


# ----------------------------------------------------------------------------- R-JEPA


def pairwise(scores, right) -> float | None:
    """Over pairs of a right and a wrong candidate of one problem: how often the right one scores higher (tie ½).

    scores, right (bool): an array for each problem. -> the mean over problems that have such pairs; None without any.
    """
    wins = [np.mean((s[r][:, None] > s[~r]) + 0.5 * (s[r][:, None] == s[~r]))
            for s, r in zip(scores, right, strict=True) if 0 < r.sum() < len(r)]
    return float(np.mean(wins)) if wins else None


def ranking_figures(score: np.ndarray, is_valid: np.ndarray, group: list[str]) -> dict:
    """AUROC of score [n] for is_valid, overall and within groups (`pairwise`), and Spearman's rho; None where all
    are of one kind."""
    from scipy.stats import spearmanr
    from sklearn.metrics import roc_auc_score

    if is_valid.all() or not is_valid.any():
        return {"auroc": None, "auroc_within": None, "spearman": None}
    group = np.array(group)
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    rho = float(spearmanr(score, is_valid).statistic) if np.ptp(score) else None  # of a constant there is none
    return {"auroc": float(roc_auc_score(is_valid, score)), "spearman": rho,
            "auroc_within": pairwise([score[m] for m in members], [is_valid[m] for m in members])}


def add_ranks(ranks: dict, guesses: dict, among: torch.Tensor, own: list[int], k: int, of: str = "") -> dict:
    """Appends to `ranks` the rank (from 1) of among[0] in among [n, C] by cosine to each guess [C]; a tie is a loss.

    among[0] is step k of a chain; its chain's `own` other steps follow, of which the baselines may not pick the
    neighbours, since they are made of these. NAME_others: the rank among other chains' steps alone. `of` is put behind
    every name. -> by guess the scores of the right one and of other chains' steps.
    """
    rest, scores = [0, *range(1 + len(own), len(among))], {}
    near = [i for i, s in enumerate(own, 1) if abs(s - k) == 1]
    for name, guess in guesses.items():
        score = F.cosine_similarity(guess[None], among)
        score[near if name in ("copy", "neighbours") else []] = -2.0
        ranks.setdefault(f"{name}{of}", []).append(1 + int((score[1:] >= score[0]).sum()))
        ranks.setdefault(f"{name}{of}_others", []).append(1 + int((score[1 + len(own) :] >= score[0]).sum()))
        scores[name] = score[rest].cpu().numpy()
    return scores


def rank_figures(ranks: dict[str, list[int]]) -> dict:
    return {name: {"top1": float(np.mean(np.array(r) == 1)), "mrr": float(np.mean(1 / np.array(r))), "n": len(r)}
            for name, r in ranks.items()}


def draw_candidates(rng, n_steps: list[int], c: int, k: int, others, n: int) -> tuple[list[int], list[tuple]]:
    """n candidates for step k of chain c -> (the chain's own other steps, (chain, step) of every candidate).

    The right one comes first, then the chain's own other steps, then steps of the chains `others`, drawn with
    replacement. n_steps: of every chain.
    """
    own = [s for s in range(1, n_steps[c] + 1) if s != k]
    far = [(o, int(rng.integers(1, n_steps[o] + 1))) for o in rng.choice(others, max(0, n - 1 - len(own)))]
    return own, [(c, k), *((c, s) for s in own), *far]


@torch.no_grad()
def step_retrieval(model, rows: list[dict], seed: int, n_candidates: int = 100) -> dict:
    """A hidden middle step among n_candidates, the chain's other steps among them: is it the step or the topic?

    By cosine, in target space to z_pred and in the LLM's standardised space to W_out(z_pred). Baselines in target
    space: the step before (copy), the mean of both neighbours (neither of these two can pick a neighbour itself), and
    the mean target of that position in the other chains. At most 2,000 chains are looked at.
    """
    rng = np.random.default_rng(seed)
    rows = [r for r in rows if r["is_valid"] and 3 <= r["n_steps"] < n_candidates][:2000]
    problem, n_steps = np.array([r["problem_id"] for r in rows]), [r["n_steps"] for r in rows]
    if len(set(problem)) < 2:
        return {"n": 0}
    h, is_real = latents.pad_latents([r["h"] for r in rows], model.h_mean.device)
    chain, step, z_pred, z_all = model.hidden_steps(h, is_real)
    x_all, x_pred = model.standardize(h), model.w_out(z_pred)
    goes_on = F.pad(is_real[:, 1:], (0, 1))  # of the last steps, "#### 42", no mean is wanted
    sums, counts = (z_all * goes_on[..., None]).sum(0), goes_on.sum(0)  # (S, C), (S,)
    at = {pair: i for i, pair in enumerate(zip(chain.tolist(), step.tolist(), strict=True))}
    ranks = {}
    for c in range(len(rows)):
        k = int(rng.integers(2, n_steps[c]))  # a middle step
        own, where = draw_candidates(rng, n_steps, c, k, np.flatnonzero(problem != problem[c]), n_candidates)
        where = torch.tensor(where, device=h.device).T
        z, x, i = z_all[where[0], where[1]], x_all[where[0], where[1]], at[c, k]
        position = (sums[k] - z_all[c, k]) / (counts[k] - 1).clamp_min(1)
        add_ranks(ranks, {"z_pred": z_pred[i], "copy": z_all[c, k - 1], "position": position,
                          "neighbours": (z_all[c, k - 1] + z_all[c, k + 1]) / 2}, z, own, k)
        add_ranks(ranks, {"W_out": x_pred[i]}, x, own, k)
    return {"n": len(rows), "candidates": n_candidates, **rank_figures(ranks)}


def adds(scores: list[dict[str, np.ndarray]], known: tuple[str, ...], new: str, seed: int) -> dict:
    """Does the score `new` find more of the right candidates if it is added to the `known` ones?

    scores: for each chain its candidates' scores [n] by name, the right candidate first. Without and with `new` they
    are weighed by a fit on other chains (`infer.cross_validated`). -> {"without", "with": {"top1", "ci95"}, "p", "n"}
    """
    chain = np.repeat(np.arange(len(scores)), [len(s[new]) for s in scores])
    right = np.concatenate([np.arange(len(s[new])) == 0 for s in scores])
    hits = []
    for names in (known, (*known, new)):
        x = np.stack([np.concatenate([s[name] for s in scores]) for name in names], 1)
        fitted = infer.cross_validated(x, right, chain, seed, 1.0)
        hits.append(np.array([(fitted[chain == c][1:] < fitted[chain == c][0]).all() for c in range(len(scores))]))
    top1 = [{"top1": float(hit.mean()), "ci95": list(wilson(float(hit.mean()), len(hit)))} for hit in hits]
    return {"without": top1[0], "with": top1[1], "p": paired_p(*hits), "n": len(scores)}


def paired_p(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p of the exact McNemar test; a and b (bool [n]): where two methods are right on the same problems."""
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def numbers(text: str) -> list:
    return list(map(data.number, data.NUMBER.findall(text)))


@torch.no_grad()
def evaluate_plan(run: str, args) -> dict:
    """PLAN on chains of three steps and more, a middle one of which is taken out before the LLM reads them.

    -> {"n", "retrieval" and "together" (see `plan_retrieval`), "gaps" (infer.find_gap on the chains with and without
    the gap)} and, with --decode_limit, what `plan_texts` says.
    """
    model, config = infer.load_world_model(run, args.device)
    llm = infer.llm_of(config, args.llm, args.device)
    problems = held_out(args, config)
    chains = [c for c in (data.make_chain(p) for p in problems) if len(c["steps"]) >= 3]
    if len(chains) < 2:
        raise ValueError(f"{len(chains)} of {len(problems)} solutions have three steps and more: raise --limit, or "
                         "take another data set")
    if args.decode_limit:
        speaker, its_config, its_folder = infer.load_beside(run, args.speaker, "speak", args.device)
        beside = speaker, its_config, runs.load_tokenizer(its_folder, its_config)
    rng, device = np.random.default_rng(args.seed), model.h_mean.device
    for c in chains:
        c["hole"] = k = int(rng.integers(2, len(c["steps"])))
        c["before"], c["missing"], c["after"] = c["steps"][: k - 1], c["steps"][k - 1], c["steps"][k:]
    read_whole = llm.read_chains([(c["question"], c["steps"]) for c in chains])
    read_gapped = llm.read_chains([(c["question"], c["before"] + c["after"]) for c in chains])
    for c, whole, gapped in zip(chains, read_whole, read_gapped, strict=True):
        c["whole"], c["gapped"] = whole, gapped
    holes = [c["hole"] for c in chains]
    slots = torch.tensor(holes, device=device)
    around = model.around(*latents.with_slots(read_gapped, holes, device), slots)
    ahead = model.predict_next(*latents.pad_latents([c["gapped"][: c["hole"]] for c in chains], device))
    folder = args.latents or config.latents
    seen = [r["h"] for r in infer.load_chains(run, config, folder) if r["is_valid"] and r["split"] == "train"]
    if not seen:
        raise ValueError(f"{folder} holds no verified chain of a training split")
    result = {"n": len(chains)} | plan_retrieval(model, llm, chains, around[0][:, 0], ahead, seen, rng, args)

    found = [[infer.find_gap(model, e["next_step"], args.quantile)[0] for e in infer.energies(model, zs)]
             for zs in (read_gapped, read_whole)]
    flagged, false = (sum(g is not None for g in gaps) for gaps in found)
    result["gaps"] = {"recall": flagged / len(chains), "false_alarms": false / len(chains),
                      "precision": flagged / max(1, flagged + false),
                      "located": float(np.mean([g == k for g, k in zip(found[0], holes, strict=True)]))}
    if not args.decode_limit:
        return result

    n = min(args.decode_limit, len(chains))
    z_true = model.target_of(*latents.pad_latents(read_whole[:n], device), slots[:n])
    said, rows = plan_texts(llm, chains[:n], [t[:n] for t in around], ahead[:n], z_true, *beside)
    made_by = [runs.weights_digest(its_folder), runs.llm_label(config, args.llm), [row["truth"] for row in rows]]
    name = f"{args.dataset or config.dataset}-{args.split}-n{n}-{runs.digest(json.dumps(made_by))[:8]}"
    path = Path(its_folder) / f"generations-plan-{name}.jsonl"
    runs.write_jsonl(path, rows)
    print(f"generations: {path}")
    return result | said


def plan_retrieval(model, llm, chains: list[dict], z_pred, z_next, seen: list[torch.Tensor], rng, args) -> dict:
    """How well PLAN tells the missing step from 99 others -> {"retrieval": {NAME: top-1, ...}, "together"}.

    z_pred [n, C]: the predictions of `evaluate_plan`'s chains; z_next: from the steps before the gap alone; seen: the
    latents of training chains.

    The true step's latent, as the LLM had it in the whole chain, is to be found by cosine in the LLM's standardised
    space, among the chain's other steps and steps of other chains. Beside the prediction (plan) and z_next (next_step):
    the step before (copy), the mean of both neighbours, and the mean training latent of the position. What another
    chain's step brings along is its topic; so the first --logprob_limit chains have every candidate read by the LLM in
    the gap's place, too (NAME_placed; in NAME_centred guess and candidates are each less these candidates' mean). For
    these there is also what the LLM itself knows: a candidate's mean logprob after the steps before (llm_logprob), or
    that of it and all that follows (llm_chain). It has just read some of them, and finds a line likely that it has
    read; in NAME_others none is of this chain. p_plan: `paired_p` with the prediction; of llm_X with plan_placed.
    together: what PLAN's cosine adds (`adds`) to scores of plan_placed_others' candidates that need no world model.
    """
    def space(z):
        return model.standardize(z.to(model.h_mean.device))

    mean_of = {k: space(torch.stack([z[k] for z in seen if len(z) > k + 1] or [z[-1] for z in seen]).float()).mean(0)
               for k in {c["hole"] for c in chains}}  # of the last steps, "#### 42", only where there is nothing else
    x, n_steps = [space(c["whole"]) for c in chains], [len(c["steps"]) for c in chains]
    if n_weighed := min(args.logprob_limit, len(chains)):
        print(f"{n_weighed} chains, of each 100 candidates for the LLM to weigh (--logprob_limit)", flush=True)
    ranks, weighed, predicted, predicted_next = {}, [], model.w_out(z_pred), model.w_out(z_next)
    for i, chain in enumerate(tqdm(chains, unit="chain", disable=not (n_weighed and sys.stderr.isatty()))):
        k = chain["hole"]
        own, where = draw_candidates(rng, n_steps, i, k, [o for o in range(len(chains)) if o != i], 100)
        among = torch.stack([x[o][s] for o, s in where])
        before, after = space(chain["gapped"][k - 1]), space(chain["gapped"][k])
        guesses = {"plan": predicted[i], "next_step": predicted_next[i], "copy": before,
                   "neighbours": (before + after) / 2, "position": mean_of[k]}
        add_ranks(ranks, guesses, among, own, k)
        if i >= n_weighed:
            continue
        texts = [chains[o]["steps"][s - 1] for o, s in where]
        placed, means = llm.read_next(chain["question"], chain["before"], texts, chain["after"])
        placed = space(placed)
        middle = placed.mean(0)
        weighed.append(add_ranks(ranks, guesses, placed, own, k, of="_placed"))
        add_ranks(ranks, {name: guess - middle for name, guess in guesses.items()}, placed - middle, own, k,
                  of="_centred")
        for name, values in zip(("llm_logprob", "llm_chain"), means.T, strict=True):
            others = values[1 + len(own) :]
            weighed[-1][name] = torch.cat((values[:1], others)).cpu().numpy()
            for of, rivals in (("", values[1:]), ("_others", others)):
                ranks.setdefault(name + of, []).append(1 + int((rivals >= values[0]).sum()))
    retrieval, hits = rank_figures(ranks), {name: np.array(r) == 1 for name, r in ranks.items()}
    for name, hit in hits.items():
        kind = next((kind for kind in ("_centred", "_placed") if kind in name), "_placed" * ("llm" in name))
        plan = hits["plan" + kind + "_others" * name.endswith("_others")]
        retrieval[name]["p_plan"] = paired_p(hit, plan[: len(hit)])
    simple = ("copy", "neighbours", "position")
    together = {"+".join(known): adds(weighed, known, "plan", args.seed)
                for known in (("llm_logprob",), simple, ("llm_logprob", *simple), ("llm_chain", *simple))
                if n_weighed > 1}
    return {"retrieval": retrieval, "together": together}


def plan_texts(llm, chains: list[dict], around: list[torch.Tensor], z_next, z_true, speaker, config,
               tokenizer) -> tuple[dict, list[dict]]:
    """The missing step in words -> ({"decoded", "given_away"}, rows of texts to keep).

    around: as model.RJEPA.around makes it of `evaluate_plan`'s chains; z_next, z_true [n, C]: the predictions from the
    steps before the gap alone, and the true targets; then a Speaker with its config and tokenizer.

    decoded: shares of texts whose equations hold, whose last number is the true step's, and of both (right). The
    Speaker says the predicted latent (speaker), another chain's (shuffled), the true one (true), or says the predicted
    one with as many `tries` as infer.py gives. One that does not read what follows also says z_next with what stands
    before the gap alone (before); one that was trained for it (alone_share) the predicted latent without the
    surroundings (alone). The LLM goes on from the steps before (llm_before, and with `tries`).
    given_away: what such a Speaker recovers of a step from its target latent alone, which was encoded with the whole
    chain in view; and from another's (shuffled).
    """
    n, (context, allowed, offsets) = len(chains), around
    truths = [" ".join(c["missing"].split()) for c in chains]
    reads = [data.read_around(config, tokenizer, c["question"], c["before"], c["after"]) for c in chains]
    asked = [(c["question"], c["before"]) for c in chains]
    z_pred, alone = context[:, 0], torch.zeros_like(allowed)
    alone[:, 0] = True

    def say(z, allowed, reads=None, tries=1):
        """Texts from latents z [n, C] in place of the predicted ones."""
        z = torch.cat((z[:, None], context[:, 1:]), dim=1)
        return infer.say(speaker, tokenizer, z, allowed, offsets, reads, config.block_size, tries)

    def go_on(rows, temperature=0.0, seed=1):
        return infer.next_lines(llm, [asked[i] for i in rows], 64, (), temperature, seed)

    texts = {"speaker": say(z_pred, allowed, reads), "speaker_shuffled": say(z_pred.roll(1, 0), allowed, reads),
             "speaker_tries": say(z_pred, allowed, reads, infer.TRIES),
             "speaker_tries_shuffled": say(z_pred.roll(1, 0), allowed, reads, infer.TRIES),
             "speaker_true": say(z_true, allowed, reads),
             "llm_before": go_on(range(n)), "llm_before_tries": infer.until_it_holds(go_on, n)}
    if config.reads != "all":
        texts["speaker_before"] = say(z_next, allowed & (offsets <= 0), reads)
    if knows_alone := config.alone_share > 0:
        texts["speaker_alone"] = say(z_pred, alone)

    def recovered(said):
        """Shares of the true step's words and numbers that a text holds, and of texts that are the same."""
        words = [np.mean([w in s.split() for w in t.split()]) for t, s in zip(truths, said, strict=True)]
        both = [(set(numbers(t)), set(numbers(s))) for t, s in zip(truths, said, strict=True)]
        whole = [t == s for t, s in zip(truths, said, strict=True)]
        shares = [len(t & s) / len(t) for t, s in both if t]
        return {"words": float(np.mean(words)), "whole": float(np.mean(whole)),
                "numbers": float(np.mean(shares)) if shares else None}

    given_away = {name: recovered(say(z, alone)) for name, z in (("true", z_true), ("shuffled", z_true.roll(1, 0)))
                  if knows_alone}
    decoded, rows = {}, [{"id": c["id"], "step": c["hole"], "truth": t} for c, t in zip(chains, truths, strict=True)]
    for name, said in texts.items():
        holds = np.array([bool(t.strip()) and verify.check_step(t).is_valid for t in said])
        number = np.array([numbers(t)[-1:] == numbers(truth)[-1:] != [] for t, truth in zip(said, truths, strict=True)])
        right = float((holds & number).mean())
        decoded[name] = {"n": n, "holds": float(holds.mean()), "number": float(number.mean()), "right": right,
                         "ci95": list(wilson(right, n))}
        for row, text, is_right in zip(rows, said, (holds & number).tolist(), strict=True):
            row[name] = {"text": text, "is_right": is_right}
    return {"decoded": decoded, "given_away": given_away}, rows


@torch.no_grad()
def evaluate_rjepa(run: str, args) -> dict:
    """Error, collapse and, where there are right and wrong chains, energy against correctness.

    The chains are those of --latents (of several splits and no --split: not those to train on); with --dataset, --split
    or --data_dir the solutions of these problems and their counterfactuals; with none of these what the run's training
    held out or, where it names no latents, solutions too.
    """
    model, config = infer.load_world_model(run, args.device)
    if args.latents and (args.dataset or args.data_dir):
        raise ValueError("--latents names the chains: leave out --dataset and --data_dir")
    own = args.names_none and (config.held_out or config.latents)
    folder = args.latents or own or extract.gold_for(config, held_out(args, config), args.dataset or config.dataset,
                                                     args.split, args)
    wanted = "val" if own else args.asked_split * bool(args.latents)
    rows = infer.load_chains(run, config, folder, held_out=not wanted)
    rows = [r for r in rows if r["steps"] and wanted in ("", r["split"])]
    rows = latents.first_problems(rows, args.limit)
    if len(rows) < 2:
        raise ValueError(f"{folder}: {len(rows)} chain to look at" + f", of the split {wanted}" * bool(wanted))
    n_train = sum(r["split"] == "train" for r in rows)
    print(f"{len(rows):,} chains of {folder}" + ", which its training held out" * bool(own)
          + f", {n_train:,} of a training split" * bool(n_train))
    found = infer.energies(model, [r["h"] for r in rows])
    z_pred, z_target, z_copy = [], [], []
    valid = [r for r in rows if r["is_valid"]]  # what training evaluates on, too
    valid = valid if len(valid) > 1 else rows
    for start in range(0, len(valid), 64):
        h, is_real = latents.pad_latents([r["h"] for r in valid[start : start + 64]], model.h_mean.device)
        chain, step, z, z_all = model.hidden_steps(h, is_real)
        z_pred.append(z.cpu()), z_target.append(z_all[chain, step].cpu()), z_copy.append(z_all[chain, step - 1].cpu())
    result = latent_figures(torch.cat(z_pred), torch.cat(z_target), torch.cat(z_copy))
    result["retrieval"] = step_retrieval(model, rows, args.seed)
    is_valid, group = np.array([r["is_valid"] for r in rows]), [r["problem_id"] for r in rows]
    for mode in model.ENERGIES:
        for of, reduce in (("", torch.mean), ("_max", torch.amax), ("_last", lambda e: e[-1])):
            result[mode + of] = ranking_figures(np.array([-float(reduce(e[mode])) for e in found]), is_valid, group)
    logprob = np.array([infer.mean_logprob(r) for r in rows])
    by_logprob = {} if np.isnan(logprob).any() else ranking_figures(logprob, is_valid, group)
    result |= {"logprob": by_logprob, "auroc_correct": result["leave_one_out"]["auroc"],
               "auroc_logprob": by_logprob.get("auroc")}
    plot_energies(Path(run), model, rows, found)
    return result | {"n": len(rows), "n_valid": int(is_valid.sum())}


def plot_energies(run: Path, model, rows: list[dict], found: list[dict]):
    """energies.png in the run folder: histogram of chains' energies by validity, and the energy along a chain."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11, 4))
    axes = fig.subplots(1, 2)
    for valid, label in ((True, "right"), (False, "wrong")):
        of = [e["leave_one_out"] for e, r in zip(found, rows, strict=True) if r["is_valid"] == valid]
        if of:
            axes[0].hist([float(e.mean()) for e in of], bins=40, alpha=0.5, density=True, label=label)
            longest = max(map(len, of))
            along = [[float(e[k]) for e in of if len(e) > k] for k in range(longest)]
            points = [(k + 1, np.mean(v)) for k, v in enumerate(along) if len(v) >= 5]
            if points:
                axes[1].plot(*zip(*points, strict=True), marker=".", label=label)
    axes[0].set(xlabel="mean leave-one-out energy of a chain", ylabel="density")
    axes[1].set(xlabel="step", ylabel="mean leave-one-out energy")
    for ax in axes:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    fig.tight_layout()
    try:
        fig.savefig(run / "energies.png", dpi=110)
    except OSError as error:  # the figures are there all the same
        runs.say(f"{run / 'energies.png'} could not be written: {error.strerror}")


def evaluate_step_errors(run: str, args) -> dict:
    """How often infer.suspect names the first wrong step -> {"top1", "ci95", "top1_NAME" of other ways, "n"}.

    Other ways: the highest leave_one_out energy, next_step energy, or difference of the two (untrained: with fresh
    weights); the lowest logprob; the last step; the middle one; a random one. gate: a false equation and nothing else;
    gate_X: a false equation or, where there is none, what X says.
    """
    model, config = infer.load_world_model(run, args.device)
    folder = args.latents or extract.latents_of_file(config, "step_errors", args.step_errors, device=args.device,
                                                     limit=args.limit, llm=args.llm)
    rows = infer.load_chains(run, config, folder, args.limit, logprobs=True, held_out=True)
    rows = [r for r in rows if r["wrong_step"] is not None]
    if not rows:
        raise ValueError(f"{args.step_errors}: no chain with a first wrong step")
    torch.manual_seed(args.seed)
    untrained, h, hits = runs.build_model(config).to(model.h_mean.device), [r["h"] for r in rows], {}
    untrained.fit_standardize(torch.cat(h))
    for row, e, control in zip(rows, infer.energies(model, h), infer.energies(untrained, h), strict=True):
        loo, ahead, truth = e["leave_one_out"], e["next_step"], row["wrong_step"] - 1
        number, by = infer.suspect(row["steps"], e)
        guesses = {"top1_leave_one_out": loo, "top1_next_step": ahead, "top1_difference": ahead - loo,
                   "top1_untrained": control["next_step"] - control["leave_one_out"],
                   "top1_logprob": -torch.tensor(row["logprobs"][1:]), "top1_last": torch.arange(len(loo))}
        right = {name: float(int(values.argmax()) == truth) for name, values in guesses.items()}
        right |= {"top1_middle": float((len(loo) - 1) // 2 == truth), "top1_random": 1 / len(loo)}
        right["top1"] = float(number - 1 == truth)
        for name in ("middle", "random", "untrained"):
            right[f"top1_gate_{name}"] = right["top1" if by == "equation" else f"top1_{name}"]
        right["top1_gate"] = right["top1"] * (by == "equation")
        for name, value in right.items():
            hits.setdefault(name, []).append(value)
    found = {k: float(np.mean(v)) for k, v in hits.items()}
    return found | {"ci95": list(wilson(found["top1"], len(rows))), "n": len(rows)}


# ----------------------------------------------------------------------------- T-JEPA


def probes(encoder, tokenizer, train_problems: list[dict], problems: list[dict], seed: int) -> dict:
    """R2 on `problems` of ridge regressions, fitted on `train_problems`, from the question's thought vector.

    steps: how many steps the solution has; magnitude: log10(1 + |answer|). Predicting the mean gets 0; None where all
    problems have the same value.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def labels(some):
        answers = [verify.answer_value(data.answer_text(p, "final")) for p in some]
        kept = [i for i, a in enumerate(answers) if a is not None]
        steps = [len(data.split_steps(some[i]["answer"])) - 1 for i in kept]
        return kept, {"steps": np.array(steps), "magnitude": np.log10([1 + abs(float(answers[i])) for i in kept])}

    features, truths = [], []
    for some in (train_problems, problems):
        kept, truth = labels(some)
        features.append(encoder.thoughts([tokenizer.encode(some[i]["question"]) for i in kept]).cpu().numpy())
        truths.append(truth)
    result, rng = {"n_train": len(features[0]), "n": len(features[1])}, np.random.default_rng(seed)
    for name in truths[0]:
        fitted = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11))).fit(features[0], truths[0][name])
        truth, error = truths[1][name], truths[1][name] - fitted.predict(features[1])
        r2 = [1 - np.square(error[i]).mean() / truth[i].var() for i in
              (np.arange(len(truth)), *rng.integers(0, len(truth), (1000, len(truth)))) if truth[i].var() > 0]
        result[name] = {"r2": float(r2[0]), "ci95": [float(x) for x in np.quantile(r2[1:], [0.025, 0.975])]} if (
            truth.var() > 0) else {"r2": None, "ci95": None}
    return result


@torch.no_grad()
def teacher_alignment(encoder, teacher, train_rows: list[list[int]], rows: list[list[int]]) -> dict:
    """Mean cosine of the teacher's outputs on `rows` (token ids) and a linear map of the encoder's.

    The map is fitted by least squares on `train_rows`, so that runs with and without a projection of their own compare.
    best_constant: the cosine of the teacher's mean output.
    """
    def outputs(net, some):
        device, out = net.embed.weight.device, []
        for row in some:
            z = net(torch.tensor([row], device=device), torch.ones(1, len(row), dtype=torch.bool, device=device))[0]
            out.append(F.layer_norm(z.float(), z.shape[-1:]).cpu())
        return torch.cat(out)

    def inputs(some):
        x = outputs(encoder, some)
        return torch.cat((x, torch.ones(len(x), 1)), dim=1)

    # LayerNorm's outputs sum to 0, so the columns are dependent. PyTorch's default driver takes memory that it has not
    # set for pivots then (its issue 187411), and now and again leaves the constant out.
    weights = torch.linalg.lstsq(inputs(train_rows), outputs(teacher, train_rows), rcond=1e-5, driver="gelsd").solution
    target = outputs(teacher, rows)
    return {"cos": float(F.cosine_similarity(inputs(rows) @ weights, target, dim=-1).mean()),
            "best_constant": float(F.cosine_similarity(target.mean(0)[None], target, dim=-1).mean()), "n": len(target)}


def evaluate_tjepa(run: str, args) -> dict:
    """Masked spans (a pre-trained run), probes beside those of three random encoders, alignment to --teacher.

    A run on --text is looked at on its own held-out documents, and on problems where --dataset names some.
    """
    encoder, config, tokenizer = runs.load_encoder(run, args.device)
    device, own_text, result = encoder.embed.weight.device, getattr(config, "text", ""), {}
    problems = held_out(args, config) if args.dataset or not own_text else []
    if isinstance(config, cfg.TJEPAConfig):
        if own_text:
            print("documents: the run's own held-out ones, which its evaluations have seen")
        texts = (data.load_texts(config, "val")[: args.limit or None] if own_text
                 else [data.document_text(p) for p in problems])
        documents = [d for t in texts for d in data.encode_document(t, tokenizer, config.block_size)]
        if not documents:
            raise ValueError(f"no document of two sentences and more among {len(texts)}"
                             + ": raise --limit" * bool(args.limit))
        torch.manual_seed(args.seed)
        figures = [jobs.span_figures(net, documents, device) for net in
                   (runs.load_run(run, args.device)[0], runs.build_model(config).to(device).eval())]
        result |= figures[0] | {"untrained": figures[1]}
    if len(problems) < 2:
        if args.teacher or not result:
            raise ValueError(f"probes and --teacher need two problems, here are {len(problems)}: name a --dataset, or "
                             "raise --limit")
        return result
    dataset = args.dataset or config.dataset
    data_dir = args.data_dir or (config.data_dir if dataset == config.dataset else "")
    limit = min(2000, config.limit or config.n_synthetic) if dataset == "synthetic" else 5 * args.limit
    train_problems = data.load_problems(dataset, "train", data_dir, limit, config.seed, config.max_problem_steps)
    untrained = []
    for seed in range(args.seed, args.seed + 3):
        torch.manual_seed(seed)
        untrained.append(TextEncoder(config.vocab_size, *runs.encoder_shape(config)).eval().to(device))
    print(f"probes: {len(train_problems) + len(problems):,} questions, read by four encoders", flush=True)
    result["probe"], *random = (probes(net, tokenizer, train_problems, problems, args.seed)
                                for net in (encoder, *untrained))
    result["probe_random"] = {name: [r[name]["r2"] for r in random] for name in ("steps", "magnitude")}
    if args.teacher:
        teacher, theirs, other = runs.load_encoder(args.teacher, args.device)
        if runs.tokenizer_digest(other) != runs.tokenizer_digest(tokenizer):
            raise ValueError(f"{run} and --teacher {args.teacher} read other tokens: they cannot be compared")
        parts = [[tokenizer.encode(p["question"])[: runs.encoder_block_size(theirs)] for p in some]
                 for some in (train_problems[:1000], problems[:1000])]
        result["teacher"] = teacher_alignment(encoder, teacher, *parts)
        result["teacher_random"] = teacher_alignment(untrained[0], teacher, *parts)
    return result | {"n_problems": len(problems)}


def evaluate_answers(run: str, args) -> dict:
    """Token loss of held-out responses in nats: given their question, given another problem's, and the gap between.

    It compares runs of one tokenizer; lm_loss_per_character compares all.
    """
    model, config = runs.load_run(run, args.device)
    tokenizer, problems = runs.load_tokenizer(run, config), held_out(args, config)
    if len(problems) < 2:
        raise ValueError(f"{len(problems)} problem: a pair is needed to mismatch, raise --limit")
    examples = data.encode_problems(problems, tokenizer, config)
    losses = jobs.answer_losses(model, examples, config, model.text_encoder.embed.weight.device)
    own, other, n = losses["lm_loss"][:, 0], losses["lm_loss_shuffled"][:, 0], losses["lm_loss"][:, 1]
    draws = np.random.default_rng(args.seed).integers(0, len(n), (1000, len(n)))
    characters = sum(len(data.answer_text(p, config.answer_text)) for p in problems)
    result = {"n": len(n), "tokens": int(n.sum()), "lm_loss_per_character": float((own * n).sum() / characters)}
    for name, values in (("lm_loss", own), ("lm_loss_shuffled", other), ("gap", other - own)):
        means = (values * n)[draws].sum(1) / n[draws].sum(1)
        result[name] = float(np.average(values, weights=n))
        result[f"{name}_ci95"] = [float(x) for x in np.quantile(means, [0.025, 0.975])]
    return result


def print_figures(result: dict, name: str = ""):
    """Every number of a nested result on a line of its own."""
    for key, value in result.items():
        if isinstance(value, dict):
            print_figures(value, f"{name}{key} ")
        else:
            print(f"{name + key:40}{value:.4f}" if isinstance(value, float) else f"{name + key:40}{value}")


@cfg.plain_errors()
def main(argv=None):
    args = tyro.cli(Args, args=argv)
    config = runs.load_config(args.run)[1]
    evaluate = {cfg.NanoJEPAConfig: evaluate_nanojepa, cfg.RJEPAConfig: evaluate_rjepa, cfg.TJEPAConfig: evaluate_tjepa,
                cfg.DistillConfig: evaluate_tjepa, cfg.AnswerConfig: evaluate_answers}.get(type(config))
    if args.teacher and evaluate is not evaluate_tjepa:
        raise ValueError(f"--teacher is for encoders of T-JEPA, pre-trained or distilled; {args.run} is none")
    if (args.latents or args.step_errors or args.plan) and evaluate is not evaluate_rjepa:
        raise ValueError(f"--latents, --step_errors and --plan are for R-JEPA runs; {args.run} is none")
    if evaluate is None:
        raise ValueError(f"{args.run} is a guide or Speaker of an R-JEPA: evaluate_accuracy.py --method nudge and "
                         "eval_alignment.py --plan look at these, beside their R-JEPA")
    if evaluate is evaluate_rjepa:
        evaluate = evaluate_plan if args.plan else evaluate_step_errors if args.step_errors else evaluate_rjepa
    result = evaluate(args.run, args)
    print_figures(result)
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
