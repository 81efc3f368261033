"""The demo: a model reasons, judges its own steps and corrects them, one tab for each of the project's functions.

    pip install gradio
    python main.py                                      # http://127.0.0.1:7860, with the models of pretrained/
    python main.py --run out/my-rjepa --llm out/my-llm  # another run, in the tabs that its kind fits
    python main.py --host 0.0.0.0 --auth ann:secret     # any other address asks for a name and a password

Everything here is a shell over infer.py and memory.py. Every button is also a function of the API (README has an
example); each returns what the page shows, a line with device and seconds, and the result as JSON. The server checks
every length and range itself (LIMITS), runs one model at a time, and shows all texts as text.
"""

import contextlib
import functools
import html
import inspect
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import numpy as np
import torch
import tyro

import data
import infer
import pictures as pic
import verify
from config import AnswerConfig, NanoJEPAConfig, RJEPAConfig, check, plain_errors
from evaluate_accuracy import majority
from llm import generate, written_steps
from memory import Memory, checked
from model import answer_row, attn_allowed
from pictures import CSS, RANGE, arithmetic, bars, changed, chip, curve, figures, legend, listed, scatter, tag
from runs import encoder_block_size, is_run, load_config, load_run, load_tokenizer, pick_device

WORLDS = {  # R-JEPA runs that the page offers, and what makes them
    "pretrained/rjepa-student": "python train.py rjepa-student --llm pretrained/student --gap_share 0.5 --out_dir "
                                "pretrained/rjepa-student, after python train.py student-small --out_dir "
                                "pretrained/student",
    "pretrained/rjepa-smollm2": "python train.py rjepa-small --out_dir pretrained/rjepa-smollm2",
}  # fmt: skip
OTHERS = {
    "nano": ("pretrained/nanojepa-small", "python train.py nanojepa-synthetic --out_dir pretrained/nanojepa-small"),
    "tjepa": ("pretrained/tjepa-small", "python train.py tjepa-speak --init_from out/tjepa-small --out_dir "
                                        "pretrained/tjepa-small, after python train.py tjepa-small"),
}  # fmt: skip
LIMITS = {  # what the server accepts, whoever asks
    "question": 2000, "step": 500, "steps": 12, "candidate": 2000, "candidates": 8, "truth": 200,  # at most
    "k": (1, 8), "tokens": (1, 256), "temperature": (0, 2), "top_p": (0.05, 1), "seed": (0, 2**31 - 1),
    "nudge": (0, 10), "alpha": (0, 100), "beta": (0, 100), "at": (0, 13), "chains": (5, 60), "nearest": (1, 10),
}  # fmt: skip

# ----------------------------------------------------------------------------- what a request may hold


def text_of(name: str, text, longest: int, empty: bool = False) -> str:
    """The text without space around it. Raises ValueError if it is no text, too long, or empty where it may not be."""
    text = checked(name, "" if text is None else text).strip()
    if len(text) > longest:
        raise ValueError(f"{name}: {len(text):,} characters, at most {longest:,} are read")
    if not text and not empty:
        raise ValueError(f"{name}: empty, write something first")
    return text


def parts_of(name: str, text, split, empty: bool = False) -> list[str]:
    """The parts of a text by split(text), empty ones left out. Raises ValueError as text_of does, or for too many.

    name: of one part, as in LIMITS; its plural there is how many may come.
    """
    most, longest = LIMITS[f"{name}s"], LIMITS[name]
    text = text_of(f"{name}s", text, most * (longest + 2), empty)
    parts = [text_of(name, part, longest) for part in split(text) if part.strip()]
    if len(parts) > most:
        raise ValueError(f"{name}s: {len(parts)} of them, at most {most} are read")
    return parts


def number(name: str, value, whole: bool = True):
    """A number within LIMITS[name]. Raises ValueError for anything else."""
    low, high = LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name}: must be a number from {low:g} to {high:g}")
    if whole and value != int(value):
        raise ValueError(f"{name}: must be a whole number")
    return int(value) if whole else float(value)


CHECKED = {  # argument name: what checks it before any handler sees it (see `answers`)
    "question": lambda text: text_of("question", text, LIMITS["question"]),
    "steps": lambda text: parts_of("step", text, str.splitlines),
    "n": functools.partial(number, "chains"),
    **{name: functools.partial(number, name) for name in ("k", "tokens", "seed", "at", "nearest")},
    **{name: functools.partial(number, name, whole=False) for name in ("temperature", "top_p")},
}


# ----------------------------------------------------------------------------- writing, seen while it happens


class Watch:
    """Runs llm.generate in a thread of its own, and sees and stops it through generate's `nudge` hook.

    nudge: an infer.Nudge to be asked as well.
    """

    def __init__(self, nudge=None):
        self.nudge, self.rows, self.stop, self.chains = nudge, [], threading.Event(), None

    def begin(self, rows):
        self.rows = rows
        if self.nudge:
            self.nudge.begin(rows)

    def step_ended(self, row):
        if self.nudge:
            self.nudge.step_ended(row)

    def move(self, final, h, active):
        if self.stop.is_set():
            raise CancelledError
        return self.nudge.move(final, h, active) if self.nudge else None

    def blend(self, active):
        return self.nudge.blend(active) if self.nudge else None

    def run(self, llm, question: str, k: int, **options):
        """Yields the steps so far of the k chains a few times a second, then sets `chains`.

        Closing the generator stops the writing.
        """
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(generate, llm, [question], k, nudge=self, **options)
            try:
                while not wait([job], 0.25).done:
                    is_chat = llm.end_of_turn is not None
                    yield [written_steps(llm.decode(list(row.ids)), is_chat)[0] for row in self.rows]
            finally:
                self.stop.set()
        self.chains = job.result()[0]


# ----------------------------------------------------------------------------- the handlers


def answers(handler):
    """Wraps a handler, which yields (picture, result or None), so that page and API get (picture, line, result).

    Arguments are checked first (CHECKED). A user's mistake becomes one sentence in the page; texts in it are escaped,
    since the page shows a message as HTML.
    """
    _, *names = inspect.signature(handler).parameters

    @functools.wraps(handler)
    def wrapper(self, *args):
        begun = time.perf_counter()
        try:
            args = [CHECKED[name](arg) if name in CHECKED else arg for name, arg in zip(names, args, strict=True)]
            if isinstance(args[0], str) and args[0] in self.worlds and args[0] not in self.loaded:
                yield gr.skip(), f"loading {args[0]} and its LLM, once …", None
            for picture, result in handler(self, *args):
                run, seconds = result["run"] if result else "…", time.perf_counter() - begun
                line = f"{self.device} · {torch.get_num_threads()} thread(s) · {run} · {seconds:.2f} s"
                yield picture, line, result and {"kind": handler.__name__, **result}
        except (ValueError, OSError, RuntimeError) as error:
            message = " ".join(str(error).split())[:500] or type(error).__name__
            raise gr.Error(html.escape(message, quote=False), print_exception=False) from None

    return wrapper


def synthetic_chains(n: int, split: str, seed: int) -> list[tuple[dict, dict]]:
    return [(p, data.make_chain(p)) for p in data.synthetic_problems(n, split, seed, 4)]


class Demo:
    """The models, loaded when first asked for, and a generator for each button."""

    def __init__(self, args):
        self.args, self.device, self.loaded = args, pick_device(args.device), {}
        self.worlds, self.others, self.llm = dict(WORLDS), dict(OTHERS), {}
        if args.run:
            kind = type(load_config(args.run)[1])
            if kind is RJEPAConfig:
                self.worlds = {args.run: ""} | self.worlds
            elif kind in (NanoJEPAConfig, AnswerConfig):
                self.others["nano" if kind is NanoJEPAConfig else "tjepa"] = (args.run, "")
            else:
                raise ValueError(f"--run {args.run}: the demo shows runs of R-JEPA, nanoJEPA, and tjepa-speak")
        if args.llm:
            self.llm[next(iter(self.worlds))] = args.llm
        self.examples = {}  # name: question, steps, answer, the step that is wrong
        long = [(p, c) for p, c in synthetic_chains(40, "test", 7) if len(c["steps"]) > 3]
        for i, (problem, chain) in enumerate(long[:5]):
            wrong, step = data.counterfactual(problem, chain, 1)
            n = len(chain["steps"])
            gap = 1 + i % (n - 2)
            lacking = chain["steps"][:gap] + chain["steps"][gap + 1 :]
            for name, steps, known in ((f"{i + 1}a · right, {n} steps", chain["steps"], None),
                                       (f"{i + 1}b · wrong from step {step} on", wrong["steps"], step),
                                       (f"{i + 1}c · step {gap + 1} left out", lacking, None)):
                self.examples[name] = (problem["question"], "\n".join(steps), chain["answer"], known)

    def missing(self, kind: str) -> str:
        """What to say where the model of a tab is missing, with the command that makes it; empty where it is there."""
        run, command = next(iter(self.worlds.items())) if kind == "world" else self.others[kind]
        return "" if is_run(run) else f"{run} is missing. This makes it: {command}"

    def world(self, run: str):
        """(R-JEPA, LLM, config) of a run that the page offers."""
        if not isinstance(run, str) or run not in self.worlds:
            raise ValueError(f"world: {str(run)[:80]!r} is none of {', '.join(self.worlds)}")
        if not is_run(run):
            raise ValueError(f"{run} is missing. This makes it: {self.worlds[run]}")
        if run not in self.loaded:
            model, config = infer.load_world_model(run, self.device)
            self.loaded[run] = model, infer.llm_of(config, self.llm.get(run, ""), self.device), config
        return self.loaded[run]

    def other(self, kind: str):
        """(run, model, config, tokenizer) of the nanoJEPA or T-JEPA tab."""
        run, _ = self.others[kind]
        if problem := self.missing(kind):
            raise ValueError(problem)
        if kind not in self.loaded:
            shown = {"nano": NanoJEPAConfig, "tjepa": AnswerConfig}[kind]
            model, config = load_run(run, self.device, shown, "another kind than this tab shows")
            self.loaded[kind] = run, model, config, load_tokenizer(run, config)
        return self.loaded[kind]

    def verified(self, run: str):
        """(latents, texts) of verified steps for an R-JEPA run, from --memory or else from a few synthetic chains."""
        _, llm, config = self.world(run)
        if (run, "verified") not in self.loaded:
            try:
                found = infer.load_memory(config, self.args.memory)
            except (ValueError, FileNotFoundError):  # there is no memory, or it holds ratings alone, or another LLM's
                chains = [c for p, c in synthetic_chains(40, "train", 11) if verify.validate(p, c).is_valid]
                h = llm.read_chains([(c["question"], c["steps"]) for c in chains])
                found = torch.cat([x[1:] for x in h]), [s for c in chains for s in c["steps"]]
            self.loaded[run, "verified"] = found
        return self.loaded[run, "verified"]

    def example(self, name):
        return self.examples[name][:3] if isinstance(name, str) and name in self.examples else ("", "", "")

    def candidates(self) -> str:
        """Answers to the first example: right, wrong, and one to another question."""
        right, wrong, _, other, *_ = (steps for _, steps, _, _ in self.examples.values())
        return "\n\n".join((right, wrong, other))

    @answers
    def load(self, run):
        """Loads what a choice of the world model needs."""
        _, llm, _ = self.world(run)
        yield f"{llm.name} is ready", {"run": run, "llm": llm.name}

    # ------------------------------------------------------------------------- a tab each

    @answers
    def score(self, run, question, steps):
        model, llm, _ = self.world(run)
        found = infer.score(model, llm, question, steps)
        known = next((e[3] for e in self.examples.values() if e[:2] == (question, "\n".join(steps))), None)
        rows = []
        for i, step in enumerate(found["steps"], 1):
            c = step["coherence"]
            kind, sign = ("high", "●") if c >= 0.25 else ("middle", "◆") if c >= 0.05 else ("low", "▲")
            notes = [arithmetic(step["text"])]
            if i == found["suspect"]:
                notes.append(chip(f"suspected by its {found['suspect_by']}", "suspect"))
            if i == known:
                notes.append(chip("known to be wrong", "wrong"))
            rows.append(tag("div", tag("b", f"{sign} {i}"), tag("span", step["text"], class_="grow"), *notes,
                            tag("b", f"{c:.2f}"), class_=f"strip {kind}"))
        quantiles = model.quantiles.tolist()
        picture = tag(
            "div", *rows,
            tag("p", "Coherence: the share of verified steps with a higher energy. ", chip("● 0.25 or more", "high"),
                " ", chip("◆ 0.05 to 0.25", "middle"), " ", chip("▲ below 0.05", "low"), class_="legend"),
            tag("div", *(curve(title, [s[key] for s in found["steps"]], quantiles[i]) for i, (key, title) in enumerate((
                ("energy", "energy, the step alone hidden"), ("next_step_energy", "energy, from the steps before it")
            ))), class_="side"), legend(*RANGE))
        verdicts = [verify.check_step(s) for s in steps]
        yield picture, {"run": run, "question": question, **found, "known_wrong_step": known,
                        "arithmetic": ["" if v.is_valid else f"{v.reason}: {v.detail}" for v in verdicts],
                        "verified_range": {"leave_one_out": [quantiles[0][5], quantiles[0][95]],
                                           "next_step": [quantiles[1][5], quantiles[1][95]]}}  # fmt: skip

    @answers
    def rerank(self, run, question, k, temperature, top_p, seed, tokens, alpha, beta):
        options = dict(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=tokens)
        weights = {"alpha": number("alpha", alpha, False), "beta": number("beta", beta, False)}
        model, llm, _ = self.world(run)
        if not any(weights.values()):  # as `infer.py rerank --fit` found them for this run, else 1
            fitted = infer.fitted_weights(run) or {}
            weights = {name: fitted.get(name, 1.0) for name in weights}
        watch = Watch()
        for texts in watch.run(llm, question, k, **options):
            yield tag("div", *(tag("div", tag("b", f"candidate {i} · writing …"), listed(t), class_="card")
                               for i, t in enumerate(texts, 1)), class_="cards"), None
        rows = infer.rerank(model, watch.chains, **weights)
        done = [c for c in rows if c["steps"]]
        if not done:
            raise ValueError("no candidate has a step: allow more tokens, or another seed")
        truth = next((e[2] for e in self.examples.values() if e[0] == question), None)
        voters = sorted(done, key=lambda c: c["candidate"])
        picks = {"majority": voters[majority(["\n".join(c["steps"]) for c in voters])],
                 "logprob": max(done, key=lambda c: c["logprob"]),
                 "JEPA": min(done, key=lambda c: c["energy"]), "score": done[0],
                 "gate": next((c for c in done if not c["arithmetic"]), done[0])}  # fmt: skip
        cards = []
        for c in rows:
            chosen = [chip(f"{name}’s pick", "pick") for name, pick in picks.items() if pick is c]
            shown = figures(logprob=c["logprob"], energy=c["energy"], score=c["score"], answer=c["answer"])
            gate = [chip("✓ arithmetic") if not c["arithmetic"] else chip(f"✗ {c['arithmetic']}", "wrong")]
            if truth is not None:
                right = verify.check_answer(c["answer"] or "", truth)
                gate += [" ", chip("✓ right answer") if right else chip("✗ wrong answer", "wrong")]
            cards.append(tag("div", tag("b", f"candidate {c['candidate']} "), *chosen, listed(c["steps"]), shown, *gate,
                             class_="card chosen" if c is done[0] else "card"))
        formula = f"score = {weights['alpha']:.3g} × mean logprob − {weights['beta']:.3g} × energy"
        about = tag("p", f"Best first: {formula}. JEPA alone picks the lowest energy, the majority the answer that "
                         "most candidates end in, the gate the best score among those whose equations hold.")
        yield tag("div", about, tag("div", *cards, class_="cards")), {
            "run": run, "question": question, "steps": done[0]["steps"], **weights, **options, "candidates": rows,
            "picks": {name: pick["candidate"] for name, pick in picks.items()}}  # fmt: skip

    @answers
    def nudge(self, run, question, alpha, how, temperature, top_p, seed, tokens):
        alpha = number("nudge", alpha, False)
        if how not in ("bias", "hidden"):
            raise ValueError("nudge: must be 'bias' or 'hidden'")
        options = dict(temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=tokens)
        model, llm, _ = self.world(run)
        guide = infer.load_beside(run, "", "guide", self.device)[0] if how == "bias" else None
        chains, quantiles, titles = [], model.quantiles[0].tolist(), ("the LLM’s own", f"nudged, α = {alpha:g}")

        def cards(texts, pictures=("", "")):
            bodies = [listed(texts[0]), *([changed(*texts)] if len(texts) > 1 else [])]
            return tag("div", *(tag("div", tag("b", title), body, *([p] if p else []), class_="card")
                                for title, body, p in zip(titles, bodies, pictures, strict=False)), class_="cards")

        for pull in [infer.Nudge(model, llm, strength, guide) for strength in (0.0, alpha)]:
            watch = Watch(pull)
            for texts in watch.run(llm, question, 1, **options):
                yield cards([c["steps"] for c in chains] + texts), None
            chains += watch.chains
        energies = [infer.energies(model, [c["h"]])[0]["leave_one_out"].tolist() if c["steps"] else []
                    for c in chains]  # one by one: equal chains have equal bits then
        pictures = [curve("energy, the step alone hidden", e, quantiles) if e else "" for e in energies]
        texts = [c["steps"] for c in chains]
        same = ("Both are the same, word for word." if texts[0] == texts[1] else
                "Marked: words that the LLM’s own chain has not.")
        result = {name: {"steps": c["steps"], "logprob": c["logprob"], "energies": e}
                  for name, c, e in zip(("own", "nudged"), chains, energies, strict=True)}
        yield tag("div", cards(texts, pictures), tag("p", same), legend(*RANGE)), {
            "run": run, "question": question, "alpha": alpha, "nudge": how, **options, "steps": texts[1], **result}

    @answers
    def plan(self, run, question, steps, decode, at, tokens):
        if decode not in ("speaker", "llm"):
            raise ValueError("decode: must be 'speaker' or 'llm'")
        if at > len(steps) + 1:
            raise ValueError(f"at: {at}, but only {len(steps) + 1} places are there")
        model, llm, _ = self.world(run)
        speaker = tokenizer = None
        if decode == "speaker":
            speaker, config, folder = infer.load_beside(run, "", "speak", self.device)
            tokenizer = load_tokenizer(folder, config)
        found = infer.plan(model, llm, question, steps, decode, speaker, tokenizer, self.verified(run), at,
                           max_new_tokens=tokens)
        filled = {f["step"]: f for f in found["filled"]}
        seen = f"before step {found['gap']}" if found["gap"] else "nowhere: no next-step energy is above the threshold"
        notes = [chip(f"predicted, put into words by the {'Speaker' if decode == 'speaker' else 'LLM'}", "pick")
                 if i in filled else "" for i in range(1, len(found["steps"]) + 1)]
        near = [part for f in found["filled"] if f["nearest"] for part in (
            tag("h4", "Verified steps nearest to it"), bars([(n["text"], n["cos"]) for n in f["nearest"]]))]
        picture = tag(
            "div", tag("p", "A gap is seen ", tag("b", seen), f" (threshold {found['threshold']:.3f}).",
                       f" You asked for a step before step {at}." if at else ""),
            listed(found["steps"], notes), *(arithmetic(f["text"]) for f in found["filled"]),
            figures(energy_before=found["energy_before"], energy_after=found["energy_after"]),
            curve("energy, from the steps before it", found["next_step_energies"], model.quantiles[1].tolist(),
                  found["threshold"]),
            legend(*RANGE[:1], ("threshold", "threshold of a gap"), ("good", "below it"), ("bad", "above it")), *near)
        yield picture, {"run": run, "question": question, **found}

    @answers
    def nano(self, question, candidates, tokens):
        blocks = parts_of("candidate", candidates, lambda text: text.replace("\r", "").split("\n\n"), empty=True)
        run, model, config, tokenizer = self.other("nano")
        ids = tokenizer.encode(question)
        answer = tokenizer.decode(model.generate([ids], tokens)[0]).strip()
        texts = {"what the model wrote": answer} if answer else {}
        texts |= {f"candidate {i}": block for i, block in enumerate(blocks, 1)}
        alignment, chart = [], []
        if texts:
            latents = model.encode([ids] * len(texts), [tokenizer.encode(t) for t in texts.values()])
            cos = torch.cosine_similarity(*latents, dim=-1).tolist()
            alignment = [{"name": n, "text": t, "cos": c} for (n, t), c in zip(texts.items(), cos, strict=True)]
            rows = [(f"{a['name']}: {' / '.join(a['text'].splitlines())}", a["cos"]) for a in alignment]
            chart = [tag("h4", "Cosine of [PRED] with the latents of answers"), bars(rows)]
        spoken = tokenizer.encode(next(iter(texts.values()), "#### 0"))
        q, a = [*ids[:8], model.pred_id], answer_row(spoken[:8], model.eos_id)
        allowed = attn_allowed(torch.tensor([[0] * len(q) + [1] * len(a)]))[0]
        words = [[tokenizer.decode([i]).strip() or "␣" for i in ids] for ids in (q[:-1], a[1:-1])]
        picture = tag("div", tag("h4", "Greedy answer"), tag("pre", answer or "(nothing)"), *chart,
                      tag("h4", "Isolation: the two views"),
                      pic.mask_picture([*words[0], "[PRED]", "[EOS]", *words[1], "[EOS]"], allowed),
                      legend(("cell", "row may look at column"), ("empty", "may not")),
                      tag("p", "The first tokens of both views. [PRED] sees the question and nothing of the answer. "
                               f"The text is written with answer_context = {config.answer_context}."))
        yield picture, {"run": run, "question": question, "steps": answer.splitlines(),
                        "answer": verify.extract_answer(answer), "alignment": alignment}

    @answers
    def think(self, question, nearest):
        run, model, config, tokenizer = self.other("tjepa")
        read = functools.partial(infer.think, model.text_encoder, tokenizer, encoder_block_size(config))
        if "thoughts" not in self.loaded:
            local = config.dataset == "synthetic" or (config.data_dir and Path(config.data_dir).is_dir())
            source = (config.dataset, "train", config.data_dir) if local else ("synthetic", "train", "")
            problems = data.load_problems(*source, 200, config.seed, config.max_problem_steps)
            texts = [p["question"] for p in problems]
            self.loaded["thoughts"] = texts, read(texts), "training" if local else "synthetic"
        texts, stored, origin = self.loaded["thoughts"]
        thought = read([question])[0]
        found = infer.nearest_texts(thought, stored, texts, nearest)
        yield tag("div", tag("h4", f"Nearest of {len(texts)} {origin} questions to the thought vector"),
                  bars([(n["text"], n["cos"]) for n in found])), {
            "run": run, "question": question, "steps": [], "nearest": found,
            "thought": [round(x, 5) for x in thought.tolist()]}  # fmt: skip

    @answers
    def speak(self, question, temperature, seed, tokens):
        run, model, _, tokenizer = self.other("tjepa")
        ids, length = tokenizer.encode(question), 0
        while length < tokens:  # from the start each time, with the same random numbers: so it can be seen and stopped
            length = min(tokens, max(24, 2 * length))
            found = model.generate([ids], length, temperature, seed)[0]
            written = tokenizer.decode(found)
            picture = tag("div", tag("h4", "Spoken"), tag("pre", written or "(nothing)"))
            if len(found) < length:
                break
            yield picture, None
        answer = verify.extract_answer(written)
        yield picture, {"run": run, "question": question, "response": written, "steps": data.split_steps(written),
                        "answer": answer, "temperature": temperature, "seed": seed}

    @answers
    def latent_map(self, run, n):
        model, llm, _ = self.world(run)
        chains, points = [], {}  # points by what was said up to there: a wrong chain begins as the right one does
        for problem, chain in synthetic_chains(n, "test", 11):
            with contextlib.suppress(ValueError):  # no step of it can be made wrong
                chains += [(chain, None), data.counterfactual(problem, chain, 1)]
        read = llm.read_chains([(chain["question"], chain["steps"]) for chain, _ in chains])
        for (chain, at), h in zip(chains, read, strict=True):
            latents = model.standardize(h[1:].to(model.h_mean.device)).cpu()
            for i, (step, z) in enumerate(zip(chain["steps"], latents, strict=True), 1):
                shape = "good" if not at else "bad" if i == at else "after"
                points.setdefault((chain["question"], *chain["steps"][:i]), (step, shape, z))
        texts, shapes, z = zip(*points.values(), strict=True)
        z = torch.stack(z).numpy()
        _, s, axes = np.linalg.svd(z - z.mean(0), full_matrices=False)
        at, share = (z - z.mean(0)) @ axes[:2].T, (s[:2] ** 2 / (s**2).sum()).tolist()
        counts = Counter(shapes)
        placed = [(*xy, shape, step) for xy, shape, step in zip(at.tolist(), shapes, texts, strict=True)]
        picture = tag("div", scatter(placed), legend(
            ("good", f"a verified step ({counts['good']})"), ("bad", f"a wrong step ({counts['bad']})"),
            ("after", f"consistent, after a wrong step ({counts['after']})")), tag(
            "p", f"Each point is a step of {len(chains)} synthetic chains, in the LLM’s latents; point at one to read "
                 f"it. The two axes (PCA) hold {sum(share):.0%} of the variance."))
        kinds = {"good": "verified", "bad": "wrong", "after": "after"}
        yield picture, {"run": run, "question": f"map of {len(chains)} synthetic chains", "steps": [],
                        "variance": share,
                        "points": [{"text": step, "kind": kinds[shape], "x": round(x, 3), "y": round(y, 3)}
                                   for x, y, shape, step in placed]}  # fmt: skip

    def feedback(self, rating, result, agreed, truth):
        """Appends a rated result to the log of --memory, without personal data, if the user has agreed to it."""
        try:
            if agreed is not True:
                raise ValueError("Nothing was kept: agree to it first, with the box beside the buttons.")
            if not isinstance(result, dict) or not isinstance(result.get("steps"), list):
                raise ValueError("There is no result to rate yet.")
            rows = [r.get("text") if isinstance(r, dict) else r for r in result["steps"]]
            steps = [text_of("step", r, 4 * LIMITS["step"]) for r in rows[: 4 * LIMITS["steps"]]]
            question = text_of("question", result.get("question"), LIMITS["question"])
            kind = text_of("kind", result.get("kind"), 40)
            truth = text_of("right answer", truth, LIMITS["truth"], True) or None
            if question in {example[0] for example in self.examples.values()}:
                truth = None  # a test problem: without an answer nothing is learnt from it
            memory = Memory(self.args.memory)
            id = memory.log(kind, question, steps, truth, rating=rating, extra={"run": str(result.get("run"))[:200]})
            row = memory.interactions(id)[0]
        except (ValueError, OSError) as error:
            raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from None
        verdict = "holds: it may be learnt from" if row["is_valid"] else f"does not pass the gate ({row['reason']})"
        return f"Kept with {row['redactions']} redaction(s). The chain {verdict}."


# ----------------------------------------------------------------------------- the page


DOWNLOAD = """result => { if (!result) return; const link = document.createElement('a');
link.href = URL.createObjectURL(new Blob([JSON.stringify(result, null, 2)], {type: 'application/json'}));
link.download = `nano-jepa-${result.kind}.json`; link.click(); URL.revokeObjectURL(link.href); }"""


def build(demo: Demo) -> gr.Blocks:
    """The page. All handlers that run a model share one concurrency id, so that one of them runs at a time.

    preprocess is off: handlers get what was sent unchanged and check it, whether it came from the page or the API.
    """
    one = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "once", "preprocess": False}
    quick = {"concurrency_limit": 4, "concurrency_id": "quick", "preprocess": False}
    kinds = dict.fromkeys(("score", "rerank", "nudge", "plan", "latent_map"), "world")
    kinds |= {"nano": "nano", "think": "tjepa", "speak": "tjepa"}

    def slider(label, name, value, step=1):
        low, high = LIMITS[name]
        return gr.Slider(low, high, value, step=step, label=label, min_width=140)

    def sampling(temperature, nucleus=True):
        with gr.Accordion("Sampling", open=False), gr.Row():
            return [slider("temperature (0: greedy)", "temperature", temperature, 0.05),
                    *([slider("top-p", "top_p", 0.95, 0.05)] if nucleus else []),
                    gr.Number(1, label="seed", precision=0, min_width=140), slider("new tokens", "tokens", 160)]

    def button(words, handler, inputs, stop=False):
        """A tab's button, the picture and the line that it fills, and below them the result with its rating."""
        name = handler.__name__
        if problem := demo.missing(kinds[name]):
            gr.HTML(tag("p", problem, class_="missing"))
        with gr.Row():
            run = gr.Button(words, variant="primary", elem_id=f"run-{name}")
            halt = gr.Button("Stop", min_width=80, scale=0, elem_id=f"stop-{name}") if stop else None
        shown = [gr.HTML(elem_classes="picture", min_height=40, elem_id=f"picture-{name}"), gr.Textbox(
            show_label=False, container=False, lines=1, interactive=False, elem_classes="line-about",
            elem_id=f"line-{name}", placeholder="device · threads · run · seconds")]
        with gr.Accordion("Result as JSON, and what you think of it", open=False):
            result = gr.JSON(label="result", max_height=260)
            gr.Button("Save as a file", size="sm").click(None, result, None, js=DOWNLOAD, api_visibility="private")
            agreed = gr.Checkbox(False, label="keep my rating and this text, without personal data, in "
                                              f"{demo.args.memory}")
            truth = gr.Textbox(label="right answer, if you know it: the gate judges the chain by it", max_length=200)
            with gr.Row():
                thumbs = [(rating, gr.Button(f"{sign} {rating}", size="sm", min_width=60))
                          for rating, sign in (("up", "👍"), ("down", "👎"))]
            said = gr.Textbox(show_label=False, container=False, interactive=False, placeholder="nothing is kept yet")
            for rating, thumb in thumbs:
                thumb.click(functools.partial(demo.feedback, rating), [result, agreed, truth], said, **quick,
                            api_name=f"rate_{name}_{rating}", api_visibility="undocumented")
        event = run.click(handler, inputs, [*shown, result], api_name=name, api_description=words, **one)
        if halt:
            halt.click(None, None, None, cancels=[event], queue=False, api_visibility="private")

    with gr.Blocks(title="nano-jepa", analytics_enabled=False) as page:
        gr.HTML(tag("div", tag("h1", "nano-jepa", style="font-size:1.5em;font-weight:600"), tag(
            "p", "World models of text reasoning: they predict the latent of a reasoning step, not its words. How far "
            "off they are says how well a step follows. The models here are small, the examples synthetic.")))
        first = next(iter(demo.examples))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                world = gr.Dropdown(list(demo.worlds), value=next(iter(demo.worlds)), label="R-JEPA run (with its LLM)",
                                    elem_id="world")
                status = gr.Textbox(show_label=False, container=False, interactive=False, lines=2,
                                    placeholder="loaded at first use; SmolLM2 takes some seconds")
                example = gr.Dropdown(list(demo.examples), value=first, label="Example", elem_id="example")
                question = gr.Textbox(demo.examples[first][0], label="Question", lines=4, elem_id="question",
                                      max_length=LIMITS["question"])
                steps = gr.Textbox(demo.examples[first][1], label="Steps, one a line (for Score and Plan)", lines=6,
                                   elem_id="steps")
                answer = gr.Textbox(demo.examples[first][2], label="Right answer, where it is known", interactive=False)
            with gr.Column(scale=5, min_width=320), gr.Tabs():
                with gr.Tab("Score"):
                    gr.HTML(tag("p", "How coherent is each step, and which one is suspect: the first false equation, "
                                     "else the step that those after it support and those before it do not?"))
                    button("Score the steps", demo.score, [world, question, steps])
                with gr.Tab("Rerank"):
                    gr.HTML(tag("p", "The LLM writes K candidates. Which does a vote, the world model, the gate pick?"))
                    with gr.Row():
                        k = slider("candidates K", "k", 4)
                        alpha, beta = (gr.Number(0, label=f"{name} (both 0: as fitted)", min_width=140)
                                       for name in ("α of logprob", "β of energy"))
                    button("Write and rank", demo.rerank, [world, question, k, *sampling(0.8), alpha, beta], stop=True)
                with gr.Tab("Nudge"):
                    gr.HTML(tag("p", "The predicted next step pulls at what the LLM writes; at α = 0 not at all."))
                    with gr.Row():
                        strength = slider("α", "nudge", 0, 0.05)
                        how = gr.Radio(["bias", "hidden"], value="bias", label="pulls at the logits, or a hidden state")
                    button("Write both", demo.nudge, [world, question, strength, how, *sampling(0)], stop=True)
                with gr.Tab("Plan"):
                    gr.HTML(tag("p", "Where is a step missing, and which? Examples c lack one."))
                    with gr.Row():
                        decode = gr.Radio(["speaker", "llm"], value="speaker", label="who puts it into words")
                        at = gr.Number(0, label="before which step (0: find it)", precision=0, min_width=140)
                        length = slider("new tokens", "tokens", 64)
                    button("Fill the gap", demo.plan, [world, question, steps, decode, at, length])
                with gr.Tab("nanoJEPA"):
                    gr.HTML(tag("p", "[PRED] predicts the latent of an answer it cannot see. How near are these?"))
                    candidates = gr.Textbox(demo.candidates(), lines=6, elem_id="candidates",
                                            label="Candidate answers, an empty line between two")
                    length = slider("new tokens", "tokens", 160)
                    button("Answer and compare", demo.nano, [question, candidates, length])
                with gr.Tab("T-JEPA"):
                    gr.HTML(tag("p", "An encoder thinks: texts become latents. Then a decoder that reads them speaks."))
                    button("Think", demo.think, [question, slider("nearest texts", "nearest", 5)])
                    button("Speak", demo.speak, [question, *sampling(0, False)], stop=True)
                with gr.Tab("Latent map"):
                    gr.HTML(tag("p", "Where do right and wrong steps lie among an LLM’s latents?"))
                    button("Draw", demo.latent_map, [world, slider("chains", "chains", 24)])
        example.input(demo.example, example, [question, steps, answer], **quick, api_visibility="private")
        nowhere, result = gr.Textbox(visible=False), gr.JSON(visible=False)
        world.input(demo.load, world, [nowhere, status, result], **one, api_name="load")
    return page.queue(max_size=16, default_concurrency_limit=1)


# ----------------------------------------------------------------------------- command line


@dataclass
class Args:
    """The demo in a browser."""

    run: str = ""  # another run folder, shown first in the tabs that its kind fits
    llm: str = ""  # where the LLM of the first R-JEPA run lies, if not under the name it was trained with
    host: str = "127.0.0.1"  # any other needs --auth
    port: int = 7860
    auth: str = ""  # USER:PASSWORD that the page asks for
    memory: str = "out/memory.duckdb"  # memory.py's file: PLAN's verified steps, and the feedback of those who agree
    device: str = "auto"

    def __post_init__(self):
        check(self, "port", 0 < self.port < 2**16, "must lie in [1, 65535]")
        if self.auth and not all(self.auth.partition(":")[::2]):
            raise ValueError("--auth: write it as USER:PASSWORD")
        local = self.host in ("127.0.0.1", "localhost", "::1")
        check(self, "host", local or bool(self.auth), "others could use it: add --auth USER:PASSWORD, or leave it out")


@plain_errors()
def main(argv=None):
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    args = tyro.cli(Args, args=argv)
    page = build(Demo(args))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    print(f"http://{args.host}:{args.port}  (Ctrl-C ends it)", file=sys.stderr)
    page.launch(server_name=args.host, server_port=args.port, quiet=True, share=False, ssr_mode=False, css=CSS,
                theme=gr.themes.Default(**fonts), auth=tuple(args.auth.split(":", 1)) if args.auth else None,
                show_error=False, max_file_size=1, enable_monitoring=False, footer_links=["api", "settings"])


if __name__ == "__main__":
    sys.exit(main())
