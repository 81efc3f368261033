"""R-JEPA at work: how coherent is each step of a chain of reasoning?

    python infer.py score out/rjepa-small --question "Tom has 3 apples and buys 4. How many?" --steps "3+4 = 7" "#### 7"
    python infer.py score out/rjepa-small --chains FILE      # one JSON object a line for each chain, then a summary

A step's energy is the L1 error of its latent when it is hidden and predicted from the others (leave-one-out) or from
what comes before it alone (next-step). Two things to know: its target is encoded from the whole chain, and the LLM's
states of later steps have read the hidden one. Its coherence is the share of verified steps whose energy is higher.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

import extract
import latents
from train import load_run

# ----------------------------------------------------------------------------- functions to import


def load_world_model(run: str, device: str = "auto"):
    """(model, config) of an R-JEPA run. Raises ValueError for a run of another kind."""
    model, config = load_run(run, device)
    if not hasattr(model, "ENERGIES"):
        raise ValueError(f"{run} is a run of preset '{model.preset}', not of R-JEPA (train.py rjepa-small)")
    return model, config


def llm_of(config, llm: str = "", device: str = "auto") -> extract.LLM:
    """The LLM whose latents a run reads, at its layer and pooling; `llm` says where it lies, if not under its name.

    Raises ValueError where its depth or width is another.
    """
    loaded = extract.load_llm(llm or config.llm, device, layer=config.layer, pooling=config.pooling)
    loaded.set_prompt(config.prompt)
    ours = {k: getattr(loaded, k) for k in ("layer", "pooling", "prompt")}
    ours["dim"] = loaded.latent_dim(config.pooling)
    ours["llm"] = config.llm if llm else loaded.name
    latents.check_same_llm(config, ours, f"the run's LLM and --llm {llm or config.llm}")
    return loaded


@torch.no_grad()
def energies(model, chains: list[torch.Tensor], batch_size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Latents [1 + S, D] of chains -> for each {"leave_one_out": [S], "next_step": [S]}, fp32 on the CPU.

    Chains of like length share a batch; a chain's energies do not depend on its company.
    """
    out, order = [{} for _ in chains], sorted(range(len(chains)), key=lambda i: len(chains[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        h, is_real = latents.pad_latents([chains[i] for i in part], model.h_mean.device)
        for mode in model.ENERGIES:
            for i, row in zip(part, model.energy(h, is_real, mode).cpu(), strict=True):
                out[i][mode] = row[1 : len(chains[i])]
    return out


def score(model, llm: extract.LLM, question: str, steps: list[str]) -> dict:
    """Energies and coherence of a chain and of its steps.

    -> {"energy", "energy_max", "energy_last", "next_step_energy", "coherence", "suspect" (1-based: the step of the
    highest leave-one-out energy), "steps": [{"text", "energy", "next_step_energy", "coherence"}]}
    """
    if not steps or not all(unit.strip() for unit in (question, *steps)):
        raise ValueError("score needs a question and at least one step, none of them empty")
    e = energies(model, [llm.step_latents(question, steps)])[0]
    loo, ahead = e["leave_one_out"], e["next_step"]
    coherence = model.coherence(loo.to(model.quantiles.device)).cpu()
    rows = [{"text": t, "energy": float(a), "next_step_energy": float(b), "coherence": float(c)}
            for t, a, b, c in zip(steps, loo, ahead, coherence, strict=True)]
    return {"energy": float(loo.mean()), "energy_max": float(loo.max()), "energy_last": float(loo[-1]),
            "next_step_energy": float(ahead.mean()), "coherence": float(coherence.mean()),
            "suspect": int(loo.argmax()) + 1, "steps": rows}


# ----------------------------------------------------------------------------- writing


def sample(logits, temperature: float, top_p: float, generators) -> torch.Tensor:
    """Next tokens [B] of logits [B, V]: the highest at temperature 0, else nucleus sampling, a generator a row."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0).cpu()  # the first that passes top_p stays
    drawn = torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)])
    return order.gather(1, drawn.to(order.device)[:, None])[:, 0]


def written_steps(text: str) -> tuple[list[str], list[tuple[int, int]], bool]:
    """(steps of a text, a line each, where each lies, whether it is over): over after '#### n' or an empty line."""
    steps, spans, at = [], [], 0
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if stripped:
            begin = at + line.index(stripped)
            steps.append(stripped), spans.append((begin, begin + len(stripped)))
        at += len(line)
        if line.endswith("\n") and (stripped.startswith("####") or (steps and not stripped)):
            return steps, spans, True
    return steps, spans, bool(steps) and steps[-1].startswith("####")


class Row:
    """One chain while it is written: its tokens, their states at the LLM's layer, their logprobs."""

    def __init__(self, llm, question_latent):
        self.llm, self.question_latent = llm, question_latent
        self.ids, self.states, self.logprobs, self.text = [], [], [], ""

    def append(self, token: int, state, logprob: float) -> bool:
        """Whether a line has ended with this token."""
        self.ids.append(token), self.states.append(state), self.logprobs.append(logprob)
        if "\n" not in self.llm.decode([token]):
            return False
        self.text = self.llm.decode(self.ids)
        return True

    def chain(self) -> dict:
        """{"steps", "h" [1 + S, D] fp32 on the CPU, "logprobs" [S], "logprob" (mean over the tokens of all steps)}."""
        text = self.llm.decode(self.ids)
        steps, units, is_over = written_steps(text)
        ends = [min(len(self.llm.decode(self.ids[: i + 1])), len(text)) for i in range(len(self.ids))]
        pieces = list(zip([0, *ends], ends, strict=False))
        spans, pooled = extract.unit_spans(pieces, text, units, skip=0), [self.question_latent]
        for begin, end in spans:
            pooled.append(extract.pool(torch.stack(self.states[begin:end]), self.llm.pooling))
        means = [sum(self.logprobs[begin:end]) / (end - begin) for begin, end in spans]
        n = [end - begin for begin, end in spans]
        total = sum(m * c for m, c in zip(means, n, strict=True)) / max(1, sum(n))
        return {"steps": steps, "h": torch.stack(pooled).cpu(), "logprobs": means, "n_tokens": n,
                "logprob": total if steps else float("-inf"), "is_over": is_over}


@torch.no_grad()
def generate(llm: extract.LLM, questions: list[str], k: int = 1, temperature: float = 0.8, top_p: float = 0.95,
             seed: int = 1, max_new_tokens: int = 256, nudge=None) -> list[list[dict]]:
    """k chains for each question, with their latents and logprobs, as `Row.chain` gives them.

    A question is read once for all its candidates. Candidate i of a question follows from (seed, question, i) up to
    the rounding of a batch. temperature 0 is greedy. nudge: see `Nudge`.
    """
    rows = [llm.question_ids(q) for q in questions]
    logits, prompts, memory = llm.begin(rows, k, max_new_tokens)
    writing, generators, current = [], [], []
    for question, row, h in zip(questions, rows, prompts, strict=True):
        begin, end = llm.question_span(question)
        latent = extract.pool(h[begin:end], llm.pooling)
        for i in range(k):
            writing.append(Row(llm, latent))
            key = hashlib.sha256(f"{seed}:{i}:{question}".encode()).digest()[:7]
            generators.append(torch.Generator().manual_seed(int.from_bytes(key, "big")))
            current.append(h[len(row) - 1])
    chosen, h = list(range(len(writing))), torch.stack(current)
    if nudge is not None:
        nudge.begin(writing)
    for _ in range(max_new_tokens):
        active = [writing[i] for i in chosen]
        biased = logits if nudge is None else nudge.logits(logits, h, active)
        tokens = sample(biased, temperature, top_p, [generators[i] for i in chosen])
        logprob = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        logits, h = llm.advance(tokens, memory, *(() if nudge is None else nudge.blend(active)))
        keep = []
        for j, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if token in llm.stop_ids:
                continue
            if row.append(token, h[j], logprob[j]):
                if written_steps(row.text)[2]:
                    continue
                if nudge is not None:
                    nudge.step_ended(row)
            keep.append(j)
        if not keep:
            break
        if len(keep) < len(active):
            at = torch.tensor(keep, device=logits.device)
            memory.select(at)
            logits, h, chosen = logits[at], h[at], [chosen[j] for j in keep]
    chains = [row.chain() for row in writing]
    return [chains[i : i + k] for i in range(0, len(chains), k)]


# ----------------------------------------------------------------------------- command line


@dataclass
class Score:
    """Energies and coherence of one chain, or of every chain in a file."""

    run: Annotated[str, tyro.conf.Positional]  # an R-JEPA run folder
    question: str = ""
    steps: tuple[str, ...] = ()  # one text a step
    chains: str = ""  # a jsonl file of chains instead
    llm: str = ""  # where the run's LLM lies, if not under the name it was trained with
    limit: int = 0  # the first N chains of the file; 0: all
    device: str = "auto"


def run_score(args: Score) -> dict:
    if bool(args.chains) == bool(args.question):
        raise ValueError("give --question and --steps, or --chains FILE")
    model, config = load_world_model(args.run, args.device)
    llm = llm_of(config, args.llm, args.device)
    if not args.chains:
        return score(model, llm, args.question, list(args.steps))
    found = []
    for chain in latents.chains_of_file(args.chains, "chains", args.limit):
        found.append(score(model, llm, chain["question"], chain["steps"]))
        print(json.dumps({"id": chain["id"], **found[-1]}))
    if not found:
        raise ValueError(f"{args.chains}: no chain")
    return {"n": len(found), **{k: sum(f[k] for f in found) / len(found) for k in ("energy", "coherence")}}


COMMANDS = {"score": (Score, run_score)}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        raise SystemExit(f"infer.py COMMAND RUN ...; commands: {', '.join(COMMANDS)}")
    kind, function = COMMANDS[argv[0]]
    args = tyro.cli(kind, args=argv[1:], prog=f"infer.py {argv[0]}")
    try:
        result = function(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    if argv[0] == "score" and "steps" in result:
        for i, s in enumerate(result["steps"], 1):
            mark = " <- suspect" if i == result["suspect"] else ""
            print(f"{i:3}  energy {s['energy']:.3f}  next {s['next_step_energy']:.3f}  coherence {s['coherence']:.2f}  "
                  f"{s['text'][:80]}{mark}")
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
