"""An LLM's hidden states, one latent per reasoning step, written once and trained on for ever after.

    python extract.py --dataset gsm8k --split train --data_dir DATA/gsm8k --out out/latents/gsm8k
    python extract.py --llm Qwen/Qwen3-0.6B --layer -2 --pooling last --out out/latents/qwen
    python extract.py --llm model.gguf --candidates FILE --logprobs --out out/latents/candidates
    python extract.py --llm out/student-small --dataset synthetic --limit 9000 --counterfactual --out out/latents/s

Row 0 of a chain is its question, rows 1 … S its steps; llm.py says what a row is. Several --layer or --pooling come
from one pass, a folder each.

A folder holds shard-00000.safetensors (h [N, D] bf16, offsets int64, logprobs), index.parquet and, last of all,
manifest.json. The same command on an unfinished folder continues with the next shard, to the same bytes.
"""

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import latents
from config import check
from llm import LLM, load_llm
from runs import digest, say, write_atomic

# ----------------------------------------------------------------------------- the folder


def extract(llm: LLM, chains: list[dict], out: Path, description: dict, wanted: list[tuple[int, str]],
            logprobs: bool, shard_size: int, token_budget: int, overwrite: bool = False) -> dict:
    """Writes the latents of chains under `out` -> {"chains", "steps", "tokens", "tokens_per_s"}.

    One (layer, pooling) goes to `out` itself, several to out/layer29-last and so on. All chains are tokenised before
    the first is run: an empty chain or one longer than the context is named while nothing has been written or, with
    overwrite, deleted.
    """
    coded, tokens = [], 0
    for chain in chains:
        try:
            if not chain["steps"] or not all(unit.strip() for unit in (chain["question"], *chain["steps"])):
                raise ValueError("it has no steps, or an empty one")
            ids, spans = llm.encode(chain["question"], chain["steps"])
            if len(ids) > llm.context:
                raise ValueError(f"{len(ids)} tokens are more than the context of {llm.name}, {llm.context}")
        except ValueError as error:
            raise ValueError(f"chain {chain['id']}: {error}") from None
        coded.append((ids, spans))
        tokens += len(ids)
    text = json.dumps([[c["id"], c["question"], c["steps"]] for c in chains])
    common = {"schema": latents.SCHEMA, "llm": llm.name, "dtype": llm.dtype, "quantization": llm.quantization,
              "tokenizer": llm.tokenizer_hash, "prompt": llm.prompt, "logprobs": logprobs, "shard_size": shard_size,
              "token_budget": token_budget, **description, "chains_hash": digest(text)}
    folders = {}
    for layer, pooling in wanted:
        folder = out if len(wanted) == 1 else out / f"layer{layer}-{pooling}"
        folders[layer, pooling] = folder, common | {"layer": layer, "pooling": pooling, "dim": llm.latent_dim(pooling)}
    if not overwrite and all([inspect_folder(folder, header) for folder, header in folders.values()]):
        raise SystemExit(f"{out} is finished. Choose another --out, or --overwrite")
    for folder, _ in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in [folder / "manifest.json", folder / "index.parquet", *folder.glob("shard-*.safetensors")]:
                path.unlink(missing_ok=True)

    progress = None
    if sys.stderr.isatty():
        from tqdm import tqdm

        progress = tqdm(total=tokens, unit="token", unit_scale=True)
    began, done_tokens, records = time.time(), 0, []
    for number, start in enumerate(range(0, len(chains), shard_size)):
        part = range(start, min(start + shard_size, len(chains)))
        name, size = latents.shard_name(number), sum(len(coded[i][0]) for i in part)
        if not all((folder / name).is_file() for folder, _ in folders.values()):
            h, means = run_shard(llm, [coded[i] for i in part], [chains[i]["id"] for i in part], wanted, logprobs,
                                 token_budget)
            for key, (folder, header) in folders.items():
                latents.write_shard(folder / name, h[key], means, header, write_atomic)
            done_tokens += size
            if not progress:
                rate = done_tokens / (time.time() - began)
                say(f"{part.stop:,} of {len(chains):,} chains, {rate:.0f} tokens/s")
        at = 0
        for i in part:
            n = len(coded[i][1])
            records.append({**chains[i], "n_tokens": [e - b for b, e in coded[i][1]], "shard": number, "start": at,
                            "end": at + n})
            at += n
        if progress:
            progress.update(size)
    for folder, header in folders.values():
        latents.write_index(folder, records, header, write_atomic)
    seconds = time.time() - began
    return {"chains": len(chains), "steps": sum(len(c["steps"]) for c in chains), "tokens": tokens,
            "tokens_per_s": round(done_tokens / max(seconds, 1e-9))}


def run_shard(llm, coded, ids, wanted, logprobs, token_budget):
    """One shard's chains in batches of like length -> ({key: [latents a chain]}, [logprobs a chain])."""
    order = sorted(range(len(coded)), key=lambda i: len(coded[i][0]))
    h, means = {key: [None] * len(coded) for key in wanted}, [None] * len(coded)
    while order:
        batch = [order.pop()]  # the longest left decides how many fit
        while order and (len(batch) + 1) * len(coded[batch[0]][0]) <= token_budget:
            batch.append(order.pop())
        rows, spans = zip(*(coded[i] for i in batch), strict=True)
        out, lp = llm.latents(rows, spans, wanted, logprobs)
        for key, of_rows in out.items():
            for i, z in zip(batch, of_rows, strict=True):
                if not torch.isfinite(z).all():
                    raise ValueError(f"chain {ids[i]}: {llm.name} gives values that are not finite at layer {key[0]}; "
                                     "try --dtype fp32")
                h[key][i] = z
        for i, values in zip(batch, lp, strict=False):
            means[i] = values
    return h, means


def inspect_folder(folder: Path, header: dict) -> bool:
    """Whether this very extraction is finished there (of several folders some may be). Changes nothing.

    Raises SystemExit for a folder of another extraction or with foreign files.
    """
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise SystemExit(f"--out {folder} is a file: choose a folder")
    is_finished = (folder / "manifest.json").is_file()
    if is_finished and header != {k: v for k, v in latents.read_manifest(folder).items() if k in header}:
        raise SystemExit(f"{folder} is finished, by another command. Choose another --out, or --overwrite")
    shards = sorted(folder.glob("shard-*.safetensors"))
    if not shards and any(p.suffix != ".tmp" and not p.is_dir() for p in folder.iterdir()):
        raise SystemExit(f"{folder} holds other files: choose another --out")
    for path in shards:
        _, there = latents.read_shard(path)
        if wrong := {k: (there.get(k), v) for k, v in header.items() if there.get(k) != v}:
            what = ", ".join(f"{k}: {a} there, {b} here" for k, (a, b) in wrong.items())
            raise SystemExit(f"{path} is of another extraction ({what}). Choose another --out, or --overwrite")
    return is_finished


@dataclass
class Args:
    """Latents of the chains of a data set's split, of labelled candidates, or of chains in a file."""

    llm: str = "smollm2"  # Hugging Face name or folder, GGUF file, or a run folder of this project
    out: str = "out/latents/new"  # folder to write
    dataset: Literal["gsm8k", "synthetic"] = "gsm8k"  # its own worked solutions, as chains
    split: Literal["train", "val", "test"] = "train"  # `train` of gsm8k is the whole file, val chains marked as such
    data_dir: str = ""  # as in train.py
    counterfactual: bool = False  # also each chain with one step made wrong and the rest consistent with it
    chains: str = ""  # a jsonl file of chains instead of a data set
    candidates: str = ""  # a jsonl file of labelled candidates instead
    step_errors: str = ""  # a jsonl file of chains with the first wrong step known instead
    layer: tuple[int, ...] = (-2,)  # index into hidden_states; several: one folder each
    pooling: tuple[Literal["mean", "last", "both"], ...] = ("last",)  # over a step's tokens; several: one folder each
    prompt: str = ""  # around every question: few_shot, a file or a text with {question} in it; empty: nothing
    logprobs: bool = False  # mean logprob of each step's tokens as well; runs all layers and the LM head
    quantize: Literal["none", "nf4"] = "none"  # load the LLM in 4 bits (CUDA, bitsandbytes)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # the LLM's; auto: bf16 where the hardware computes in it
    limit: int = 0  # the first N problems; 0: all (synthetic: needed)
    seed: int = 1  # which synthetic problems, which counterfactuals
    max_problem_steps: int = 8  # of synthetic problems
    shard_size: int = 512  # chains a shard
    token_budget: int = 4096  # tokens a batch, padding included
    device: str = "auto"
    threads: int = 0  # CPU threads; 0: PyTorch's own choice
    overwrite: bool = False  # start again in a finished or foreign folder (replaces shards, index, manifest)

    def __post_init__(self):
        for name in ("shard_size", "token_budget"):
            check(self, name, getattr(self, name) > 0, "must be positive")
        for name in ("limit", "seed", "threads"):
            check(self, name, getattr(self, name) >= 0, "must not be negative")
        check(self, "layer", bool(self.layer) and bool(self.pooling), "needs at least one layer and pooling")
        files = [x for x in (self.chains, self.candidates, self.step_errors) if x]
        if len(files) > 1:
            raise ValueError("give one of --chains, --candidates, --step_errors")


def latents_of_file(config, kind: str, path: str, device: str = "auto", limit: int = 0) -> Path:
    """The folder with the latents and logprobs of a file of `candidates` or `step_errors` for an R-JEPA's config.

    Extracted where it is not there yet, into out/latents.
    """
    data_hash = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]
    name = config.llm.rsplit("/", 1)[-1] + (f"-{digest(config.prompt)[:6]}" if config.prompt else "")
    folder = Path("out/latents") / f"{kind}-{data_hash}-{limit}-{name}-layer{config.layer}-{config.pooling}"
    if not (folder / "manifest.json").is_file():
        main(["--" + kind, path, "--llm", config.llm, "--layer", str(config.layer), "--pooling", config.pooling,
              "--prompt", config.prompt, "--logprobs", "--limit", str(limit), "--device", device, "--out", str(folder)])
    return folder


def main(argv=None):
    args = tyro.cli(Args, args=argv)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        chains, description = latents.chains_to_extract(args)
        llm = load_llm(args.llm, args.device, args.dtype, args.quantize).set_prompt(args.prompt)
        wanted = sorted({(llm.layer_index(layer), pooling) for layer in args.layer for pooling in args.pooling})
        out = Path(args.out)
        say(f"{len(chains):,} chains, {llm.name} ({llm.dtype}, {llm.quantization}) on {llm.device}, "
            + ", ".join(f"layer {layer} {pooling}" for layer, pooling in wanted) + f" -> {out}")
        result = extract(llm, chains, out, description, wanted, args.logprobs, args.shard_size, args.token_budget,
                         args.overwrite)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    layers = sorted({layer for layer, _ in wanted})
    print(json.dumps({"out": str(out), **result, "dim": llm.latent_dim(args.pooling[0]),
                      "layer": layers[0] if len(layers) == 1 else layers}))


if __name__ == "__main__":
    sys.exit(main())
