"""An LLM's hidden states, one latent per reasoning step: extracted once, then trained on as often as wanted.

    python extract.py --dataset gsm8k --split train --data_dir DATA/gsm8k --out out/latents/gsm8k
    python extract.py --llm Qwen/Qwen3-0.6B --layer -2 --pooling last --out out/latents/qwen
    python extract.py --llm model.gguf --candidates FILE --logprobs --out out/latents/candidates
    python extract.py --llm out/student-small --dataset synthetic --limit 9000 --counterfactual --out out/latents/s
    python extract.py --dataset svamp --split test --generate 8 --prompt few_shot --out out/latents/written
    python extract.py --generate 4 --endpoint http://localhost:8000/v1 --llm qwen3-8b --out out/teacher    # no latents
    torchrun --standalone --nproc_per_node 8 extract.py ...                                     # a process a GPU

llm.py says what a latent is, latents.py what a folder of them holds. With --generate the chains are those that the LLM
writes itself, with the gate's verdict. Several --layer or --pooling come from one pass, with a folder for each. On an
unfinished folder the same command makes the missing shards, byte for byte the same with any number of processes.
"""

import itertools
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro

import benchmarks
import data
import latents
import runs
import verify
from config import POOLING, check, need, not_negative, plain_errors, positive
from llm import LLM, generate, llm_of, load_llm, shot_messages

# ----------------------------------------------------------------------------- the folder


def extract(llm: LLM, chains: list[dict], out: Path, description: dict, wanted: list[tuple[int, str]],
            logprobs: bool, shard_size: int, token_budget: int, overwrite: bool = False) -> dict:
    """Writes the latents of chains under `out` -> {"chains", "steps", "tokens", "tokens_per_s"}.

    One (layer, pooling) goes to `out` itself, several to out/layer29-last and so on. All chains are tokenised before
    the first is run: an empty chain or one longer than the context is an error before anything is written or, with
    overwrite, deleted.
    """
    coded = []
    if not chains:
        raise ValueError("there is no chain to extract")
    for chain in chains:
        try:
            is_empty = not chain["steps"] and chain["is_valid"]  # of a wrong candidate there may be nothing
            if is_empty or not all(unit.strip() for unit in (chain["question"], *chain["steps"])):
                raise ValueError("it has no steps, or an empty one")
            ids, spans = llm.encode(chain["question"], chain["steps"])
            llm.check_room([ids], 0)
        except ValueError as error:
            raise ValueError(f"chain {chain['id']}: {error}") from None
        coded.append((ids, spans))
    text = json.dumps([[c["id"], c["question"], c["steps"]] for c in chains])
    common = common_header(llm, logprobs, {**description, "shard_size": shard_size, "token_budget": token_budget,
                                           "chains_hash": runs.digest(text)})
    folders = {}
    for layer, pooling in wanted:
        folder = out if len(wanted) == 1 else out / f"layer{layer}-{pooling}"
        folders[layer, pooling] = folder, common | {"layer": layer, "pooling": pooling, "dim": llm.latent_dim(pooling)}
    shards = [range(at, min(at + shard_size, len(chains))) for at in range(0, len(chains), shard_size)]

    def make(number):
        part = shards[number]
        h, means = llm.read_coded([coded[i] for i in part], wanted, logprobs, token_budget)
        ids = [chains[i]["id"] for i in part]
        for (layer, _), of_chains in h.items():
            refuse_not_finite(llm, ids, of_chains, f"at layer {layer}")
        if logprobs:
            refuse_not_finite(llm, ids, means, "as logprobs")

        def write():
            for key, (folder, header) in folders.items():
                path = folder / latents.shard_name(number)
                latents.write_shard(path, h[key], means, header, runs.write_atomic)

        return sum(len(coded[i][0]) for i in part), write

    def records():
        return [{**chains[i], "n_tokens": [end - begin for begin, end in coded[i][1]], "shard": number}
                for number, part in enumerate(shards) for i in part]

    _, rate = write_shards(out, [*folders.values()], overwrite, [len(part) for part in shards], "chains", make, records)
    return {"chains": len(chains), "steps": sum(len(c["steps"]) for c in chains),
            "tokens": sum(len(ids) for ids, _ in coded), "tokens_per_s": rate}


def write_shards(out: Path, folders: list[tuple[Path, dict]], overwrite: bool, sizes: list[int], unit: str, make,
                 records) -> tuple[list[dict], int]:
    """Writes the shards that are missing, then index and manifest; all processes of torchrun share the work.

    folders: (folder, header) pairs, all under `out`, which is locked meanwhile. sizes: how many of `unit` each shard
    holds, for the progress lines. make(number) reads or generates a shard's chains -> (their tokens, a function that
    writes them to every folder: a thread runs it while the next shard is made). records() -> what the index lists,
    asked for once all shards are there. -> (the records, none on other processes than rank 0; tokens/s of all).
    Raises SystemExit for what `inspect_folder` refuses, and where all folders are finished.
    """
    overwrite = overwrite and not runs.add_up(runs.is_restart())  # a restarted job continues what it has written itself
    with runs.lock(out, "--out"), ThreadPoolExecutor(1) as thread:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = missing_shards(out, folders, overwrite, len(sizes), rank, world)[rank::world]
        began, tokens, writing, found = time.perf_counter(), 0, None, []
        for number in mine:
            n, write = make(number)
            if writing:
                writing.result()  # raises what went wrong in the thread
            writing = thread.submit(write)
            tokens += n
            runs.say(f"{sum(sizes[: number + 1]):,} of {sum(sizes):,} {unit}, "
                     f"{tokens / (time.perf_counter() - began):.0f} tokens/s" + " a process" * (world > 1))
        if writing:
            writing.result()
        tokens = runs.add_up(tokens)  # all shards are there
        if rank == 0:
            found = records()
            for folder, header in folders:
                latents.write_index(folder, found, header, runs.write_atomic)
        seconds = time.perf_counter() - began
        runs.add_up()  # nobody gives up the lock before the index is written
    return found, round(tokens / max(seconds, 1e-9))


def missing_shards(out: Path, folders, overwrite: bool, n_shards: int, rank: int, world: int) -> list[int]:
    """Inspects and makes the folders (with overwrite, empties them) -> numbers of the shards that one of them lacks."""
    if not overwrite and all([inspect_folder(folder, header, rank, world) for folder, header in folders]):
        raise SystemExit(f"{out} is finished. Choose another --out, or --overwrite")
    for folder, _ in folders if rank == 0 else ():
        folder.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for path in (folder / "manifest.json", folder / "index.parquet", *folder.glob("shard-*.safetensors")):
                path.unlink(missing_ok=True)
    runs.add_up()  # rank 0 has emptied the folders
    missing = [number for number in range(n_shards)
               if not all((folder / latents.shard_name(number)).is_file() for folder, _ in folders)]
    runs.add_up()  # all have looked: only now may anyone write
    return missing


def common_header(llm: LLM, logprobs: bool, description: dict) -> dict:
    """The part of the headers of shards and manifest that no layer or pooling changes."""
    return {"schema": latents.SCHEMA, "llm": llm.name, "weights": llm.weights, "dtype": llm.dtype,
            "quantization": llm.quantization, "tokenizer": llm.tokenizer_hash, "prompt": llm.prompt,
            "logprobs": logprobs, **description}


def extract_written(llm: LLM, splits: list[tuple[str, list[dict]]], out: Path, dataset: str, k: int, temperature: float,
                    top_p: float, seed: int, max_new_tokens: int, overwrite: bool = False) -> dict:
    """Writes the latents of k chains that the LLM writes for each problem -> {"chains", "steps", "tokens", ...}.

    splits: (split, problems) pairs, the first of which names the folder's split. The latents are taken while the LLM
    writes, at its layer and pooling, with logprobs. `is_valid`: the answer is right and, for training problems, every
    step passes the gate. A shard holds all chains of some problems and their texts, so that an interrupted run goes on
    with the next shard.
    """
    problems = [(split, p) for split, part in splits for p in part]
    text = json.dumps([[p["id"], p["question"], p["answer"]] for _, p in problems])
    header = common_header(llm, True, {
        "dataset": dataset, "split": splits[0][0], "layer": llm.layer, "pooling": llm.pooling,
        "dim": llm.latent_dim(llm.pooling), "k": k, "temperature": temperature, "top_p": top_p, "seed": seed,
        "max_new_tokens": max_new_tokens, "chains_hash": runs.digest(text)})
    per_shard = max(1, 64 // k)
    shards = [problems[at : at + per_shard] for at in range(0, len(problems), per_shard)]

    def make(number):
        part, rows, h, means = shards[number], [], [], []
        chains = generate(llm, [p["question"] for _, p in part], k, temperature, top_p, seed, max_new_tokens)
        for (split, p), written in zip(part, chains, strict=True):
            truth = data.answer_text(p, "final")
            for i, c in enumerate(written):
                answer = c["steps"][-1] if c["steps"] else ""
                chain = {"id": f"{p['id']}/{i}", "question": p["question"], "steps": c["steps"], "answer": answer,
                         "source": llm.name, "is_valid": verify.check_answer(answer, truth)}
                if split != "test" and c["steps"]:  # may be trained on: every equation must hold as well
                    chain["is_valid"] = verify.validate({"id": p["id"], "answer": truth}, chain).is_valid
                chain["answer"] = verify.extract_answer(truth)
                rows.append(latents.record(chain, p["id"], split) | {
                    "n_tokens": [len(llm.question_ids(p["question"])), *c["n_tokens"]], "shard": number})
                h.append(c["h"])
                means.append([0.0, *c["logprobs"]])
        refuse_not_finite(llm, [r["id"] for r in rows], h, f"at layer {llm.layer}")

        def write():
            latents.write_shard(out / latents.shard_name(number), h, means, header, runs.write_atomic, rows)

        return sum(sum(r["n_tokens"][1:]) for r in rows), write

    def records():
        paths = [out / latents.shard_name(number) for number in range(len(shards))]
        return [r for path in paths for r in latents.read_shard(path)[1]["records"]]

    sizes = [len(part) for part in shards]
    rows, rate = write_shards(out, [(out, header)], overwrite, sizes, "problems", make, records)
    return {"chains": len(rows), "steps": sum(len(r["steps"]) for r in rows),
            "tokens": sum(sum(r["n_tokens"][1:]) for r in rows),
            "right": sum(r["is_valid"] for r in rows) / max(1, len(rows)), "tokens_per_s": rate}


def ask_endpoint(args, splits: list[tuple[str, list[dict]]]) -> dict:
    """k chains per problem from a server with OpenAI's chat API -> {"chains", "steps", "tokens", "right", ...}.

    The gate judges each chain, which is appended to OUT/chains.jsonl with the verdict, for `--chains` to read. Problems
    whose chains are there are not asked again; asking stops once --max_tokens_total tokens (prompts included) have
    been used. The key is OPENAI_API_KEY.
    """
    openai = need("openai", "openai")
    path, problems = Path(args.out) / "chains.jsonl", [p for _, part in splits for p in part]
    split_of = {p["id"]: split for split, part in splits for p in part}
    if args.overwrite and path.is_file():
        olds = (path.with_suffix(f".jsonl.old{n or ''}") for n in itertools.count())
        os.replace(path, next(old for old in olds if not old.exists()))  # they may have cost money
    if path.is_file() and not path.read_bytes().endswith(b"\n"):  # a half-written line
        whole = path.read_bytes().rpartition(b"\n")[0]
        runs.write_atomic(path, lambda p: p.write_bytes(whole + b"\n" * bool(whole)))
    rows = verify.read_jsonl(path, ["problem_id", "made_by"]) if path.is_file() and path.stat().st_size else []
    made_by = f"{args.llm} temperature {args.temperature:g} top_p {args.top_p:g} seed {args.seed} on {args.dataset}"
    if foreign := {r["made_by"] for r in rows} - {made_by}:
        raise ValueError(f"{path} holds chains of {foreign.pop()}, not of {made_by}: choose another --out, or "
                         "--overwrite")
    n_there, asked = Counter(r["problem_id"] for r in rows), {p["id"]: p["question"] for p in problems}
    if other := next((r for r in rows if asked.get(r["problem_id"], r["question"]) != r["question"]), None):
        raise ValueError(f"{path} has another question as {other['problem_id']}: choose another --out")
    client = openai.OpenAI(base_url=args.endpoint, api_key=os.environ.get("OPENAI_API_KEY") or "none", max_retries=5)
    runs.say(f"asking {args.endpoint} for {args.generate} chains to each of {len(problems):,} problems; "
             f"{len(rows):,} are there")
    paid = used = sum(r["tokens"] for r in rows)
    began, lines = time.perf_counter(), threading.Lock()

    def ask(problem):
        nonlocal used
        while (n := n_there[problem["id"]]) < args.generate and used < (args.max_tokens_total or used + 1):
            reply = client.chat.completions.create(  # a server may give fewer than n
                model=args.llm, messages=shot_messages(problem["question"]),
                n=args.generate - n, temperature=args.temperature, top_p=args.top_p, seed=args.seed + n,
                max_tokens=args.max_new_tokens)
            if not getattr(reply, "choices", None):
                raise ValueError(f"--endpoint {args.endpoint}: no reply of OpenAI's chat API ({str(reply)[:60]!r}); "
                                 "its address usually ends in /v1")
            if args.max_tokens_total and not reply.usage:
                raise ValueError(f"--endpoint {args.endpoint} does not say how many tokens it used: --max_tokens_total "
                                 "cannot be kept, leave it out")
            spent, truth = reply.usage.total_tokens if reply.usage else 0, data.answer_text(problem, "final")
            for i, choice in enumerate(reply.choices[: args.generate - n]):
                steps = data.split_steps(choice.message.content or "")
                chain = {"id": f"{problem['id']}/{n + i}", "steps": steps}
                verdict = verify.validate(problem | {"answer": truth}, chain)
                row = {**chain, "problem_id": problem["id"], "split": split_of[problem["id"]],
                       "question": problem["question"], "answer": verify.extract_answer(truth),
                       "is_valid": verdict.is_valid, "reason": verdict.reason, "source": args.llm,
                       "made_by": made_by, "tokens": 0 if i else spent}
                with lines:
                    runs.append_line(path, row)
                    rows.append(row)
            n_there[problem["id"]] += len(reply.choices)
            with lines:
                used += spent

    with ThreadPoolExecutor(args.concurrency) as pool:
        try:
            for done, _ in enumerate(pool.map(ask, problems), 1):
                if done % 100 == 0:
                    runs.say(f"{done:,} of {len(problems):,} problems, {used:,} tokens")
        except (openai.OpenAIError, OSError) as error:
            pool.shutdown(cancel_futures=True)
            raise ValueError(f"--endpoint {args.endpoint}: {type(error).__name__}: {str(error)[:300]}; {len(rows)} "
                             f"chains are in {path}, to which the same command, without --overwrite, adds") from None
    missing = sum(n_there[p["id"]] < args.generate for p in problems)
    if missing:
        runs.say(f"--max_tokens_total {args.max_tokens_total} is used up: {missing} problems are still to be asked")
    return {"chains": len(rows), "steps": sum(len(r["steps"]) for r in rows), "tokens": used, "missing": missing,
            "right": sum(r["is_valid"] for r in rows) / max(1, len(rows)),
            "reasons": dict(Counter(r["reason"] for r in rows).most_common()),
            "tokens_per_s": round((used - paid) / max(time.perf_counter() - began, 1e-9)), "dim": None, "layer": None}


def refuse_not_finite(llm, ids, of_chains, where):
    if not torch.isfinite(torch.cat(of_chains)).all():
        bad = next(name for name, z in zip(ids, of_chains, strict=True) if not torch.isfinite(z).all())
        raise ValueError(f"chain {bad}: {llm.name} gives values that are not finite {where}; try --dtype fp32")


def inspect_folder(folder: Path, header: dict, rank: int, world: int) -> bool:
    """Whether this very extraction is finished there (of several folders some may be). Changes nothing.

    If it is unfinished, each process checks its share of the shards. Raises SystemExit for a folder of another
    extraction or with foreign files, ValueError for damage.
    """
    if not folder.exists():
        return False
    is_finished = (folder / "manifest.json").is_file()
    if is_finished and header != {k: v for k, v in latents.read_manifest(folder).items() if k in header}:
        raise SystemExit(f"{folder} is finished, by another command. Choose another --out, or --overwrite")
    shards = sorted(folder.glob("shard-*.safetensors"))
    if not shards and any(runs.is_foreign(p.name) and not p.is_dir() for p in folder.iterdir()):
        raise SystemExit(f"{folder} holds other files: choose another --out, or --overwrite (which leaves them there)")
    for path in shards if is_finished else shards[rank::world]:
        _, there = latents.read_shard(path)
        if wrong := {k: (there.get(k), v) for k, v in header.items() if there.get(k) != v}:
            what = ", ".join(f"{k}: {a} there, {b} here" for k, (a, b) in wrong.items())
            raise SystemExit(f"{path} is of another extraction ({what}). Choose another --out, or --overwrite")
    return is_finished


@dataclass
class Args:
    """Latents of the chains of a data set's split, of labelled candidates, or of chains in a file."""

    llm: str = "smollm2"  # Hugging Face name or folder, GGUF file, or a run folder of this project
    name: str = ""  # what the latents shall call the LLM, if it lies elsewhere than under its name
    out: str = "out/latents/new"  # folder to write
    dataset: Literal[(*benchmarks.WITH_NUMBERS, "synthetic")] = "gsm8k"  # its own worked solutions, as chains
    split: Literal["train", "val", "test"] = "train"  # `train` of gsm8k is the whole file, val chains marked as such
    data_dir: str = ""  # as in train.py
    counterfactual: bool = False  # also each chain with one step made wrong and the rest consistent with it
    chains: str = ""  # a jsonl file of chains instead of a data set
    candidates: str = ""  # a jsonl file of labelled candidates instead
    step_errors: str = ""  # a jsonl file of chains with the first wrong step known instead
    layer: tuple[int, ...] = (-2,)  # index into hidden_states; several: one folder each
    pooling: tuple[POOLING, ...] = ("mean",)  # over a step's tokens; several: one folder each
    prompt: str = ""  # around every question: few_shot, a file or a text with {question} in it; empty: nothing
    generate: int = 0  # write this many chains for each problem instead of reading its own solution; with logprobs
    endpoint: str = ""  # --generate: URL of a server with OpenAI's chat API that is asked for --llm; no latents
    concurrency: int = 8  # requests to it at a time
    # ask no more once it has used so many tokens, prompts included (requests on their way come on top); 0: no limit
    max_tokens_total: int = 0
    temperature: float = 0.8  # of what is written; 0: greedy
    top_p: float = 0.95
    max_new_tokens: int = 256
    logprobs: bool = False  # mean logprob of each step's tokens as well; runs all layers and the LM head
    quantize: Literal["none", "nf4"] = "none"  # load the LLM in 4 bits (CUDA, bitsandbytes)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # the LLM's; auto: bf16 where the hardware computes in it
    limit: int = 0  # the first N problems (`train`: and a twentieth as many of val); 0: all (synthetic: needed)
    seed: int = 1  # which synthetic problems, which counterfactuals
    max_problem_steps: int = 8  # of synthetic problems
    shard_size: int = 512  # chains a shard
    token_budget: int = 0  # tokens a batch, padding included; 0: 4,096, on a GPU 16,384
    device: str = "auto"
    threads: int = 0  # CPU threads; 0: PyTorch's own choice
    overwrite: bool = False  # start again in a finished or foreign folder (replaces shards, index, manifest)

    def __post_init__(self):
        positive(self, "shard_size max_new_tokens concurrency")
        if self.endpoint and not (self.generate and self.endpoint.startswith(("http://", "https://"))):
            raise ValueError(f"--endpoint {self.endpoint}: needs an address with http:// or https://, and --generate K")
        not_negative(self, "limit seed threads generate token_budget max_tokens_total temperature")
        check(self, "layer", bool(self.layer) and bool(self.pooling), "needs at least one layer and pooling")
        files = [x for x in (self.chains, self.candidates, self.step_errors) if x]
        if len(files) + bool(self.generate) > 1:
            raise ValueError("give one of --chains, --candidates, --step_errors, --generate")
        check(self, "split", self.split == "train" or not files,
              "is a data set's; of a file every line's field 'split' says it")
        check(self, "counterfactual", not (self.counterfactual and (files or self.generate)),
              "is made of a data set's own solutions; leave it out")
        if self.generate and (len(self.layer), len(self.pooling)) != (1, 1):
            raise ValueError("--generate takes one --layer and one --pooling")
        check(self, "top_p", 0 < self.top_p <= 1, "must lie in (0, 1]")


def is_kept(folder: Path) -> bool:
    """Whether latents are there already; says so, since they may have been made by older code."""
    if there := (folder / "manifest.json").is_file():
        runs.say(f"{folder}: as it was made before")
    return there


def latents_of_file(config, kind: str, path: str, device: str = "auto", limit: int = 0, llm: str = "") -> Path:
    """The folder in out/latents with the latents and logprobs of a file of `candidates` or `step_errors`, for an
    R-JEPA's config; extracted if it is not there yet."""
    verify.check_file(path)
    data_hash = runs.digest_file(path)[:8]
    name = f"{kind}-{data_hash}-{limit}-{runs.llm_label(config, llm)}-layer{config.layer}-{config.pooling}"
    folder = Path("out/latents") / name
    if not is_kept(folder):
        run(Args(**{kind: path}, llm=llm or config.llm, name=config.llm, layer=(config.layer,),
                 pooling=(config.pooling,), prompt=config.prompt, logprobs=True, limit=limit, device=device,
                 out=str(folder)))
    return folder


def written_for(config, problems: list[dict], dataset: str, split: str, args) -> Path:
    """The folder with args.k chains that an R-JEPA's LLM writes for each problem; written if it is not there yet.

    Valid are those whose answer is right, whatever the split: the chains are for evaluation, not for training.
    """
    what = [[p["id"], p["question"]] for p in problems], args.top_p, args.max_new_tokens
    kind = "written" if split == "test" else "judged"  # "written" would hold chains whose steps were judged, too
    name = (f"{kind}-{dataset}-{split}-{len(problems)}-{runs.llm_label(config, args.llm)}-layer{config.layer}"
            f"-{config.pooling}-k{args.k}-t{args.temperature}-seed{args.seed}-{runs.digest(json.dumps(what))[:6]}")
    folder = Path("out/latents") / name
    if not is_kept(folder):
        llm = llm_of(config, args.llm, args.device)
        runs.say(f"{args.k} chains for {len(problems):,} problems -> {folder}")
        extract_written(llm, [("test", problems)], folder, dataset, args.k, args.temperature, args.top_p, args.seed,
                        args.max_new_tokens)
    return folder


def gold_for(config, problems: list[dict], dataset: str, split: str, args) -> Path:
    """The folder with the latents and logprobs of problems' own solutions and their counterfactuals, for an R-JEPA's
    config; extracted if it is not there yet."""
    what = [[p["id"], p["question"], p["answer"]] for p in problems], args.seed
    name = (f"gold-{dataset}-{split}-{len(problems)}-{runs.llm_label(config, args.llm)}-layer{config.layer}"
            f"-{config.pooling}-{runs.digest(json.dumps(what))[:6]}")
    folder = Path("out/latents") / name
    if not is_kept(folder):
        llm = llm_of(config, args.llm, args.device)
        runs.say(f"the solutions of {len(problems):,} problems and their counterfactuals -> {folder}")
        extract(llm, latents.gold_chains(problems, split, True, args.seed), folder,
                {"dataset": dataset, "split": split, "seed": args.seed}, [(llm.layer, llm.pooling)], True, 512,
                llm.token_budget)
    return folder


def leave_out_a_step(config, chains: list[dict], seed: int, device: str = "auto"):
    """Sets "hole", a random step of each chain, and "gapped", the LLM's latents of the chain without that step.

    PLAN meets such chains; had the LLM read the step, its states of later steps would give it away. config: of the
    R-JEPA, beside whose latents these have a folder, made if it is not there yet.
    """
    rng, left = np.random.default_rng(seed), []
    for c in chains:
        c["hole"] = k = int(rng.integers(1, len(c["h"])))
        steps = c["steps"][: k - 1] + c["steps"][k:]
        left.append(latents.record(c | {"steps": steps, "is_valid": False}, c["problem_id"], c["split"]))
    texts = [[c["id"], c["question"], c["steps"]] for c in left]
    what = [runs.llm_label(config), latents.read_manifest(config.latents), texts]
    folder = Path(f"{Path(config.latents)}-gaps-{runs.digest(json.dumps(what, sort_keys=True))[:6]}")
    if not runs.add_up(is_kept(folder)):  # the sum: all processes decide alike
        runs.say(f"{len(chains):,} chains with a step left out -> {folder}")
        llm = llm_of(config, device=device)
        try:  # a fixed token budget: the batches do not depend on the device
            extract(llm, left, folder, {"dataset": config.dataset, "split": "train", "seed": seed},
                    [(llm.layer, llm.pooling)], False, 512, 8192)
        except SystemExit as error:
            if not is_kept(folder):  # by another training that came first
                fault, *advice = re.split(r"[.:,] (?:or )?choose another", str(error), flags=re.I)
                if advice:
                    raise SystemExit(f"{fault}. Unless another training is making it, delete {folder}") from None
                raise
    rows, manifest = latents.load_latents(folder)
    latents.check_same_llm(config, manifest, f"{config.latents} and {folder}")
    for c, row in zip(chains, rows, strict=True):
        c["gapped"] = row["h"]


def run(args) -> dict:
    """What the arguments ask for -> the figures that `main` prints."""
    out, writes = Path(args.out), args.generate > 0
    chains, description = (latents.problems_to_extract(args), {}) if writes else latents.chains_to_extract(args)
    if args.endpoint:
        with runs.lock(out, "--out"):
            return {"out": str(out), **ask_endpoint(args, chains)}
    llm = load_llm(args.llm, args.device, args.dtype, args.quantize, args.layer[0], args.pooling[0])
    llm.set_prompt(args.prompt).name = args.name or llm.name
    wanted = sorted({(llm.layer_index(layer), pooling) for layer in args.layer for pooling in args.pooling})
    n = args.generate * sum(len(problems) for _, problems in chains) if writes else len(chains)
    what = " to write" if writes else (f" ({sum(c['is_valid'] for c in chains):,} valid, "
                                       f"{sum(c['wrong_step'] is not None for c in chains):,} with a wrong step known)")
    runs.say(f"{n:,} chains{what}, {llm.name} ({llm.dtype}, {llm.quantization}) on {llm.device}, "
             + ", ".join(f"layer {layer} {pooling}" for layer, pooling in wanted) + f" -> {out}")
    if writes:
        result = extract_written(llm, chains, out, args.dataset, args.generate, args.temperature, args.top_p,
                                 args.seed, args.max_new_tokens, args.overwrite)
    else:
        result = extract(llm, chains, out, description, wanted, args.logprobs, args.shard_size,
                         args.token_budget or llm.token_budget, args.overwrite)
    for name, found in (("dim", {llm.latent_dim(pooling) for _, pooling in wanted}),
                        ("layer", {layer for layer, _ in wanted})):
        result[name] = sorted(found) if len(found) > 1 else found.pop()
    return {"out": str(out), **result}


@plain_errors()
def main(argv=None):
    args = tyro.cli(Args, args=argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    with runs.processes(runs.pick_device(args.device)) as (rank, world):
        if args.endpoint and world > 1:
            raise ValueError("--endpoint asks a server, with --concurrency: run it without torchrun")
        result = run(args)
    if rank == 0:
        print(json.dumps(result))
    runs.leave()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
