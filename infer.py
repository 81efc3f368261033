"""R-JEPA at work: how coherent is each step of a chain of reasoning?

    python infer.py score out/rjepa-small --question "Tom has 3 apples and buys 4. How many?" --steps "3+4 = 7" "#### 7"
    python infer.py score out/rjepa-small --chains FILE      # one JSON object a line for each chain, then a summary

A step's energy is the L1 error of its latent when it is hidden and predicted from the others (leave-one-out) or from
what comes before it alone (next-step). Two things to know: its target is encoded from the whole chain, and the LLM's
states of later steps have read the hidden one. Its coherence is the share of verified steps whose energy is higher.
"""

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

import latents
from llm import LLM, load_llm
from runs import load_run

# ----------------------------------------------------------------------------- functions to import


def load_world_model(run: str, device: str = "auto"):
    """(model, config) of an R-JEPA run. Raises ValueError for a run of another kind."""
    model, config = load_run(run, device)
    if not hasattr(model, "ENERGIES"):
        raise ValueError(f"{run} is a run of preset '{model.preset}', not of R-JEPA (train.py rjepa-small)")
    return model, config


def llm_of(config, llm: str = "", device: str = "auto") -> LLM:
    """The LLM whose latents a run reads, at its layer and pooling; `llm` says where it lies, if not under its name.

    Raises ValueError where its depth or width is another.
    """
    loaded = load_llm(llm or config.llm, device, layer=config.layer, pooling=config.pooling)
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


def score(model, llm: LLM, question: str, steps: list[str]) -> dict:
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
