"""A folder of latents: one vector per reasoning step of many chains. Written by extract.py, read by all that follow.

    shard-00000.safetensors   h [N, D] bf16, offsets int64 [chains + 1], logprobs fp32 [N] where asked for; the header
                              says which LLM, layer, pooling, dtype, quantisation, tokenizer, schema and file, and
                              has the sha256 of that and of the tensors
    index.parquet             a row a chain: text, labels, logprobs, and shard, start, end of its latents
    manifest.json             written last: without it the folder is not complete

Row 0 of a chain is its question, rows 1 … S its steps.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import verify
from config import check, need
from model import to_device

SCHEMA = 1
SAME_LLM = ("llm", "layer", "pooling", "prompt", "dim")  # what a model and the latents it reads must agree on

# ----------------------------------------------------------------------------- which chains


def gold_chains(problems: list[dict], split: str, counterfactual: bool, seed: int) -> list[dict]:
    """Chains of the problems' own solutions, validated by the gate, each with its counterfactual after it if wanted."""
    chains = []
    for problem in problems:
        chain = data.make_chain(problem)
        truth = {"id": problem["id"], "answer": chain["answer"]}
        chain["is_valid"] = verify.answer_value(truth["answer"]) is not None and verify.validate(truth, chain).is_valid
        chains.append(record(chain, problem["id"], split))
        if counterfactual and chain["is_valid"]:
            try:
                wrong, step = data.counterfactual(problem, chain, seed)
            except ValueError:
                continue  # no unambiguous one
            if not verify.check_steps(wrong["steps"]).is_valid:
                continue  # the text has more equations than <<...>> says: the gate finds a second slip
            chains.append(record(wrong | {"id": f"{problem['id']}+wrong"}, problem["id"], split, step))
    return chains


def record(chain: dict, problem_id: str, split: str, wrong_step: int | None = None) -> dict:
    """The columns of index.parquet that describe a chain."""
    return {"id": chain["id"], "problem_id": problem_id, "question": chain["question"], "steps": chain["steps"],
            "answer": "" if chain.get("answer") is None else str(chain["answer"]), "is_valid": chain["is_valid"],
            "source": str(chain.get("source") or ""), "split": split, "wrong_step": wrong_step}  # fmt: skip


DECLARED = re.compile(r"(?:A|Answer|The answer is):?[\s$]*-?[\d.,/]*\d[.\s%]*")


def common_ending(steps: list[str]) -> list[str]:
    """The steps; a last one that declares the answer and nothing else ('A: 21') is written as in GSM8K: '#### 21'."""
    if len(steps) > 1 and DECLARED.fullmatch(steps[-1]) and (value := verify.extract_answer(steps[-1])):
        return [*steps[:-1], f"#### {value}"]
    return steps


def chains_of_file(path: str, kind: str, limit: int = 0) -> list[dict]:
    """Records of a jsonl file's first `limit` problems (0: all) of `chains`, `candidates` or `step_errors`.

    The problem of a line of `chains` is its problem_id. A line without one takes that of another line with its question
    or, where no such line has any, the id of the first. Raises ValueError naming file and field.
    """
    fields = {"chains": ["id", "question", "steps", "is_valid"], "candidates": ["id", "question", "candidates"],
              "step_errors": ["id", "question", "steps", "is_correct", "first_error_step"]}[kind]
    rows, records, seen, n_empty = verify.read_jsonl(path, fields), [], set(), 0
    problem_of = {data.plain_question(str(row["question"])): str(row["problem_id"]) for row in reversed(rows)
                  if row.get("problem_id") is not None}
    for row in rows:
        parts = {str(row["id"]): row}  # id: what has steps and a label
        if kind == "candidates":
            where = f"{path}, {row['id']}"
            if str(row["id"]) in seen:
                raise ValueError(f"{where}: this id is there twice; its candidates would be taken for one problem's")
            seen.add(str(row["id"]))
            parts = {f"{row['id']}/{k}": c for k, c in enumerate(verify.field(row, where, "candidates", list))}
            n_empty += not parts
        for name, part in parts.items():
            label = "is_valid" if kind == "chains" else "is_correct"
            steps, is_valid = checked_steps(row, part, f"{path}, {name}", label)
            if kind == "chains" and not steps and not is_valid:
                n_empty += 1
                continue  # an LLM wrote nothing
            problem_id = row["id"] if row.get("problem_id") is None else row["problem_id"]
            if kind == "chains" and row.get("problem_id") is None:
                problem_id = problem_of.setdefault(data.plain_question(row["question"]), problem_id)
            split = split_of(row, kind, str(problem_id), f"{path}, {name}")
            chain = {"id": name, "question": row["question"].strip(), "steps": steps, "answer": row.get("answer"),
                     "is_valid": is_valid, "source": part.get("source")}
            records.append(record(chain, str(problem_id), split, row.get("first_error_step")))
    if n_empty:
        print(f"{path}: {n_empty} of {len(rows)} lines left out, without steps or candidates", file=sys.stderr)
    return first_problems(records, limit)


def checked_steps(row: dict, part: dict, where: str, label: str) -> tuple[list[str], bool]:
    """(steps without empty ones, whether they are right) of a line of a file, or of the candidate `part` in it."""
    steps, is_valid = verify.field(part, where, "steps", list), verify.field(part, where, label, bool)
    wrong_step = row.get("first_error_step")
    if not all(isinstance(s, str) for s in steps):
        raise ValueError(f"{where}: field 'steps' must be a list of texts")
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError(f"{where}: field 'question' must be a text that is not empty")
    if is_valid and wrong_step is not None:
        raise ValueError(f"{where}: field 'first_error_step' is {wrong_step}, but '{label}' is true")
    if wrong_step is not None:
        if type(wrong_step) is not int or not 1 <= wrong_step <= len(steps):
            raise ValueError(f"{where}: field 'first_error_step' must be a step's number, 1 to {len(steps)}")
        if not all(s.strip() for s in steps):
            raise ValueError(f"{where}: field 'steps' has an empty one; first_error_step would lose its step")
    return common_ending([s for s in steps if s.strip()]), is_valid


def split_of(row: dict, kind: str, problem_id: str, where: str) -> str:
    """The split of a line of a file: `test` unless it is of chains, or if an id names a test problem; else what its
    field `split` says or, without one, what follows from its problem's id: `val` for a twentieth, else `train`."""
    split = row.get("split")
    if split not in (None, "train", "val", "test"):
        raise ValueError(f"{where}: field 'split' is {split!r}, not train, val or test")
    if kind != "chains" or "-test-" in problem_id or "-test-" in str(row["id"]):
        return "test"
    is_20th = int(hashlib.sha256(problem_id.encode()).hexdigest(), 16) % data.VAL_EVERY == 0
    return split or ("val" if is_20th else "train")


def chains_to_extract(args) -> tuple[list[dict], dict]:
    """(records, description kept with the latents) of what extract.Args asks for."""
    for kind in ("chains", "candidates", "step_errors"):
        if path := getattr(args, kind):
            records = chains_of_file(path, kind, args.limit)
            split = "test" if any(r["split"] == "test" for r in records) else "train"
            return records, {"dataset": kind, "split": split, "seed": args.seed}
    records = [r for split, problems in problems_to_extract(args)
               for r in gold_chains(problems, split, args.counterfactual, args.seed)]
    return records, {"dataset": args.dataset, "split": args.split, "seed": args.seed}


def problems_to_extract(args) -> list[tuple[str, list[dict]]]:
    """(split, its problems) of the data set that extract.Args names; `train` comes with `val`, held out of it."""
    if args.dataset == "synthetic":
        check(args, "limit", args.limit > 0, "must say how many synthetic problems to make")
    found = []
    for split in ("train", "val") if args.split == "train" else (args.split,):
        limit = args.limit if split == args.split else -(-args.limit // data.VAL_EVERY)
        found.append((split, data.load_problems(args.dataset, split, args.data_dir, limit, args.seed,
                                                args.max_problem_steps)))
    return found


# ----------------------------------------------------------------------------- writing and reading


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def digest(tensors: dict[str, torch.Tensor], header: dict) -> str:
    """sha256 of a header, unless it is empty, and of the tensors in the order of their names."""
    total = hashlib.sha256(json.dumps(header).encode() if header else b"")
    for name in sorted(tensors):
        total.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write_shard(path: Path, latents: list[torch.Tensor], logprobs: list, header: dict, write,
                records: list[dict] | None = None):
    """One shard from its chains' latents [1 + S, D] and logprobs [1 + S]; `write` is runs.write_atomic.

    records: what the index needs to know of chains whose text is nowhere else; kept in the header.
    """
    from safetensors.torch import save_file

    h = torch.cat(latents).bfloat16()
    ends = torch.tensor([0] + [len(z) for z in latents]).cumsum(0)
    tensors = {"h": h, "offsets": ends}
    if header["logprobs"]:
        tensors["logprobs"] = torch.cat([torch.as_tensor(values) for values in logprobs])
    header = header | {"file": path.name} | ({} if records is None else {"records": records})
    # one entry: safetensors writes several in an order that differs from process to process
    metadata = {"header": json.dumps(header | {"sha256": digest(tensors, header)})}
    write(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_shard(path: Path) -> tuple[dict, dict]:
    """(tensors, header) of a shard. Raises ValueError naming the file where it is damaged or of another schema."""
    from safetensors import SafetensorError, safe_open

    also = " and the manifest.json beside it" * (path.parent / "manifest.json").is_file()
    again = f"delete it{also}, and run the same extract.py command again: it makes what is missing anew"
    try:
        with safe_open(path, "pt") as f:
            header, tensors = json.loads(f.metadata()["header"]), {key: f.get_tensor(key) for key in f.keys()}
        h, offsets, checksum, name = tensors["h"], tensors["offsets"], header.pop("sha256"), header["file"]
        intact = digest(tensors, header) == checksum and h.dim() == 2 and int(offsets[-1]) == len(h)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error)[:120]}): {again}") from None
    if header.get("schema") != SCHEMA:
        raise ValueError(f"{path} is of schema {header.get('schema')}, this version reads {SCHEMA}: extract again")
    if not intact:
        raise ValueError(f"{path} is damaged (it does not have the checksum of its header): {again}")
    if name != path.name:
        raise ValueError(f"{path} was written as {name}: give it this name back, or {again}")
    if not all(torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError(f"{path} holds values that are not finite: extract again with --dtype fp32")
    return tensors, header


def write_index(folder: Path, records: list[dict], header: dict, write):
    """index.parquet from the records (with n_tokens and shard, in the order of their latents), then manifest.json."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    n_shards, logprobs = 1 + max(r["shard"] for r in records), [None] * len(records)
    ends = [0] * n_shards
    for r in records:
        r["start"] = ends[r["shard"]]
        r["end"] = ends[r["shard"]] = r["start"] + len(r["n_tokens"])
    for path in (folder / shard_name(i) for i in range(n_shards)):
        if not path.is_file():
            raise ValueError(f"{path} is missing: all processes must write to one folder; run the same command again")
    if header["logprobs"]:
        by_shard = [read_shard(folder / shard_name(i))[0]["logprobs"] for i in range(n_shards)]
        logprobs = [by_shard[r["shard"]][r["start"] : r["end"]].tolist() for r in records]
    text, texts, ints = pa.string(), pa.list_(pa.string()), pa.list_(pa.int32())
    schema = pa.schema({
        "id": text, "problem_id": text, "question": text, "steps": texts, "answer": text, "is_valid": pa.bool_(),
        "source": text, "split": text, "wrong_step": pa.int32(), "n_steps": pa.int32(), "n_tokens": ints,
        "logprobs": pa.list_(pa.float32()), "shard": pa.int32(), "start": pa.int64(), "end": pa.int64()})  # fmt: skip
    rows = [{**r, "n_steps": len(r["steps"]), "logprobs": lp} for r, lp in zip(records, logprobs, strict=True)]
    table = pa.Table.from_pylist(rows, schema)
    write(folder / "index.parquet", lambda path: pq.write_table(table, path, compression="zstd"))
    manifest = {**header, "chains": len(records), "rows": sum(r["end"] - r["start"] for r in records),
                "tokens": sum(sum(r["n_tokens"]) for r in records), "shards": n_shards,
                "index": hashlib.sha256((folder / "index.parquet").read_bytes()).hexdigest()}
    write(folder / "manifest.json", lambda path: path.write_text(json.dumps(manifest, indent=2) + "\n"))


def read_manifest(folder) -> dict:
    """Raises FileNotFoundError or ValueError that says what to do."""
    if not str(folder):
        raise ValueError("the run names no folder of latents (one of pretrained/ comes without): extract some, and "
                         'name them with --latents or, where that is no option, as "latents" in its config.json')
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        unfinished = any(Path(folder).glob("shard-*"))
        raise FileNotFoundError(f"{folder} " + ("is an unfinished extraction: run the same extract.py command again"
                                                if unfinished else "holds no latents (no manifest.json)"))
    try:
        manifest = json.loads(path.read_text())
        missing = {"schema", "shards", "split", "index", *SAME_LLM} - manifest.keys()
    except (ValueError, AttributeError) as error:  # no JSON, no UTF-8, no object
        raise ValueError(f"{path} is damaged ({error}): delete it, and run the same extract.py command again") from None
    if missing or manifest["schema"] != SCHEMA:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing)) or 'this schema'}: extract again")
    return manifest


def check_same_llm(config, ours: dict, what: str):
    """Raises ValueError where a run's config and a manifest (`ours`) differ in LLM, layer, pooling, prompt, width or,
    if both name them, in the LLM's weights."""
    pairs = {k: (getattr(config, k), ours[k]) for k in SAME_LLM}
    pairs["llm"] = tuple(str(Path(name)) for name in pairs["llm"])  # out/student/ is out/student
    wrong = {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}
    weights = getattr(config, "llm_weights", ""), ours.get("weights", "")
    if all(weights) and weights[0] != weights[1]:
        wrong["weights of the LLM"] = weights
    if wrong:
        text = ", ".join(f"{k}: {a} there, {b} here" for k, (a, b) in wrong.items())
        raise ValueError(f"{what} does not fit ({text})")


def select(folder, where: str = "") -> list[dict]:
    """Rows of index.parquet, in their order.

    where: only those for which this SQL condition holds, such as "n_steps >= 4 and is_valid" (DuckDB, whose words a
    ValueError repeats); empty: all.
    """
    path = Path(folder) / "index.parquet"
    if not where:
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    duckdb = need("duckdb", "duckdb")
    connection = duckdb.connect(config={"threads": 1})
    try:
        return connection.read_parquet(str(path)).filter(where).order("shard, start").to_arrow_table().to_pylist()
    except duckdb.Error as error:
        raise ValueError(f"--where {where}: {str(error).splitlines()[0]}") from None


def load_latents(folder, where: str = "") -> tuple[list[dict], dict]:
    """(rows of the index, each with its latents "h" [1 + S, D] bf16, manifest). Checks every shard against it."""
    folder, manifest = Path(folder), read_manifest(folder)
    index = folder / "index.parquet"
    if not index.is_file() or hashlib.sha256(index.read_bytes()).hexdigest() != manifest["index"]:
        raise ValueError(f"{index} is missing or damaged: delete manifest.json beside it and run extract.py again")
    rows = select(folder, where)
    shards = {}
    for row in rows:
        if row["shard"] not in shards:
            path = folder / shard_name(row["shard"])
            tensors, header = read_shard(path)
            names = sorted({*header, *SAME_LLM} - {"file", "records"})
            if wrong := [k for k in names if header.get(k) != manifest.get(k)]:
                raise ValueError(f"{path} is of another extraction than manifest.json ({', '.join(wrong)} differ)")
            if tensors["h"].shape[1] != manifest["dim"]:
                raise ValueError(f"{path} has width {tensors['h'].shape[1]}, manifest.json says {manifest['dim']}")
            shards[row["shard"]] = tensors["h"]
        row["h"] = shards[row["shard"]][row["start"] : row["end"]]
        if len(row["h"]) != 1 + row["n_steps"]:
            raise ValueError(f"{folder}: chain {row['id']} has {len(row['h'])} latents for {row['n_steps']} steps")
    return rows, manifest


# ----------------------------------------------------------------------------- masks and batches


def draw_masks(n, config, rng) -> tuple[np.ndarray, np.ndarray]:
    """Which steps of chains of n [B] steps are hidden, and which of these are asked for: bool [B, 1 + max(n)] each.

    A chain hides a suffix, a single step, or a block of steps (mask = random: any steps), never the question. Half of
    the suffixes ask for their first step alone, without telling how many follow, as decoding does.
    """
    if n.min() < 1:
        raise ValueError("a chain without steps has none to hide: leave it out")
    B, at, u = len(n), np.arange(1 + n.max()), rng.random(len(n))
    is_suffix, is_block = u < config.suffix_share, u >= config.suffix_share + config.single_share
    size = np.where(is_block, np.rint(n * rng.uniform(config.mask_min, config.mask_max, B)).clip(1), 1)
    first = 1 + np.floor(rng.random(B) * (n - size + 1))
    last = np.where(is_suffix, n, first + size - 1)
    is_hidden = (first[:, None] <= at) & (at <= last[:, None])
    if config.mask == "random":
        any_of_them = shuffled(n, rng).argsort(1) - 1 < size[:, None]  # the rank of every step in a random order
        is_hidden = np.where(is_suffix[:, None], is_hidden, any_of_them & (at > 0) & (at <= n[:, None]))
    first_alone = is_suffix & (rng.random(B) < 0.5)
    return is_hidden, is_hidden & (~first_alone[:, None] | (at == first[:, None]))


def shuffled(n, rng) -> np.ndarray:
    """int [B, 1 + max(n)]: 0, then the steps 1 … n of each chain in random order, then the numbers above n."""
    at = np.arange(1 + n.max())
    key = np.where(at > n[:, None], 2.0, rng.random((len(n), len(at))))
    key[:, 0] = -1.0
    return key.argsort(1)


def first_problems(rows: list[dict], limit: int) -> list[dict]:
    """The chains of the first `limit` problems; 0: of all."""
    kept = set(list(dict.fromkeys(r["problem_id"] for r in rows))[: limit or None])
    return [r for r in rows if r["problem_id"] in kept]


def pad_latents(parts: list[torch.Tensor], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """[1 + S, D] each -> h [B, S_max, D] fp32, zero-padded, and is_real bool [B, S_max]."""
    h = torch.nn.utils.rnn.pad_sequence([p.float() for p in parts], batch_first=True)
    lengths = torch.tensor([len(p) for p in parts])
    return to_device(h, device), to_device(torch.arange(h.shape[1]) < lengths[:, None], device)


def with_slots(parts: list[torch.Tensor], slots: list[int], device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """pad_latents of chains [1 + S, D], each with an empty row inserted as step slots[i], 1 … S + 1."""
    return pad_latents([torch.cat((z[:at], z.new_zeros(1, z.shape[1]), z[at:]))
                        for z, at in zip(parts, slots, strict=True)], device)


def join(chains: list[dict]) -> tuple[torch.Tensor, np.ndarray]:
    """Latents "h" and "wrong_h" of chains -> (table [U, D] of all, int [n, 2]: where a chain's own and its wrong ones
    begin in it).

    Replaces them by views of the table. A chain without wrong ones has its own start twice; wrong ones that several
    chains share are in the table once.
    """
    parts = {id(c[key]): c[key] for key in ("h", "wrong_h") for c in chains if key in c}
    begins = dict(zip(parts, np.cumsum([0, *map(len, parts.values())]), strict=False))
    starts = np.array([[begins[id(c.get(key, c["h"]))] for key in ("h", "wrong_h")] for c in chains])
    table = torch.cat(list(parts.values()))
    for c, at in zip(chains, starts, strict=True):
        for key, begin in zip(("h", "wrong_h"), at, strict=True):
            if key in c:
                c[key] = table[begin : begin + len(c[key])]
    return table, starts


def collate(chains: list[dict], config, rng, device=None, with_wrong: bool | None = None, joined=None) -> dict:
    """Chains with latents "h" (and "wrong_h", "wrong_step") -> the batch that RJEPA.forward documents.

    with_wrong: whether the batch has wrong chains, the same for all processes; None: if one of these chains has. A
    counterfactual (which has a wrong_step) gets the mask of its chain, any other wrong chain one of its own. If the
    chains have "gapped" latents and a "hole" (extract.leave_out_a_step), config.gap_share of them hide that step alone
    and do not count for the margin.
    joined: (table, starts [B, 2]) as `join` makes it, where the table is there already, maybe on the device. The masks
    stay on the CPU: asking where they are True then waits for no GPU.
    """
    table, starts = joined or join([dict(c) for c in chains])
    lengths, B = np.array([c["h"].shape[0] for c in chains]), len(chains)
    with_wrong = any("wrong_h" in c for c in chains) if with_wrong is None else with_wrong
    pairs = with_wrong and (config.hard_negatives or config.lambda_margin > 0)
    row = np.arange(B)  # whose mask and order a chain has
    if pairs:
        other = np.array(["wrong_h" in c and "wrong_step" not in c for c in chains])
        wrong = [c["wrong_h"].shape[0] if is_other else 0 for c, is_other in zip(chains, other, strict=True)]
        row = np.concatenate((row, row + B * other))
        lengths = np.concatenate((lengths, np.where(other, wrong, lengths)))
    is_real = np.arange(lengths.max()) < lengths[:, None]
    order = shuffled(lengths - 1, rng)[row] if config.shuffle_steps else np.arange(lengths.max())
    order = np.where(is_real, order, 0)
    is_hidden, is_target = draw_masks(lengths - 1, config, rng)
    has_gap, is_gapped = "gapped" in chains[0], np.zeros((B, 1), bool)
    if has_gap:
        is_gapped, hole = rng.random((B, 1)) < config.gap_share, np.array([[c["hole"]] for c in chains])
        for mask in (is_hidden, is_target):
            mask[:B] = np.where(is_gapped, np.arange(mask.shape[1]) == hole, mask[:B])
    is_hidden, is_target = is_hidden[row], is_target[row]
    both = {"is_real": is_real, "is_visible": is_real & ~is_hidden, "is_target": is_target}
    both = {k: torch.from_numpy(v) for k, v in both.items()}
    rows = torch.from_numpy(starts.T.reshape(-1)[: len(lengths), None] + order)
    both["h"] = to_device(table[to_device(rows, table.device)], device)
    batch = {k: v[:B] for k, v in both.items()}
    if has_gap:
        gapped = with_slots([c["gapped"] for c in chains], hole[:, 0].tolist(), device)[0].to(batch["h"].dtype)
        gapped = F.pad(gapped, (0, 0, 0, batch["h"].shape[1] - gapped.shape[1]))
        batch["context_h"] = torch.where(to_device(torch.from_numpy(is_gapped)[..., None], device), gapped, batch["h"])
    if pairs:
        batch |= {f"wrong_{k}": v[B:] for k, v in both.items()}
        wrong_step = np.array([c.get("wrong_step", 2**31) for c in chains])
        is_wrong = is_real[:B] & (order[:B] >= wrong_step[:, None])
        counts = (is_wrong | other[:, None]) & ~is_gapped  # what is predicted from a gap is not compared
        more = {"is_wrong": is_wrong, "right_counts": is_target[:B] & counts, "wrong_counts": is_target[B:] & counts}
        batch |= {k: torch.from_numpy(v) for k, v in more.items()}
    n = int(lengths[:B].sum())
    return {**batch, "n_tokens": n, "n_filled": n, "n_slots": is_real[:B].size}


class Batches(data.Batches):
    """Deterministic batches of chains of like length: a pure function of (seed, index)."""

    unit, table = "chains", None

    def measure(self) -> np.ndarray:
        self.with_wrong = any("wrong_h" in c for c in self.examples)
        return np.array([len(c["h"]) for c in self.examples])

    def chains(self, index: int) -> tuple[list[dict], np.random.Generator]:
        """The chains of a batch, and a generator that follows from its index."""
        return super().__call__(index), np.random.default_rng([self.seed, 1, index])

    def __call__(self, index: int, device=None) -> dict:
        if self.table is None:
            self.table, self.starts = join(self.examples)
            if torch.device(device or "cpu").type == "cuda":
                size = self.table.numel() * self.table.element_size()
                if size < torch.cuda.get_device_properties(device).total_memory / 16:
                    self.table = self.table.to(device)  # a batch is gathered there
        chains, rng = self.chains(index)
        joined = self.table, self.starts[self.indices(index)]
        return collate(chains, self.config, rng, device, self.with_wrong, joined)

    def shuffle(self, kept: np.ndarray, rng) -> np.ndarray:
        order = kept[np.argsort(self.lengths[kept] + rng.uniform(0, 2, len(kept)))]
        return order.reshape(self.per_epoch, self.batch_size)[rng.permutation(self.per_epoch)]


def training_chains(rows: list[dict], manifest: dict, folder) -> tuple[list[dict], list[dict]]:
    """(train, val): verified chains, each with the latents of a wrong chain of its problem where there is one.

    That is its counterfactual ("wrong_h", "wrong_step") or, of chains that an LLM wrote, one that the gate rejected
    ("wrong_h" alone). Raises ValueError for latents of a test split.
    """
    if manifest["split"] == "test" or any(r["split"] == "test" for r in rows):
        raise ValueError(f"{folder} holds latents of a test split: training refuses them (extract --split train)")
    wrong, chains = {}, {"train": [], "val": []}
    for r in rows:
        if not r["is_valid"] and r["steps"]:
            wrong.setdefault(r["problem_id"], []).append(r)
    for r in rows:
        if not r["is_valid"]:
            continue
        others = wrong.get(r["problem_id"], [])
        r = {k: v for k, v in r.items() if k != "wrong_step"}
        if others:
            other = others[len(chains[r["split"]]) % len(others)]
            if other["wrong_step"] is None:
                r["wrong_h"] = other["h"]
            elif len(other["h"]) == len(r["h"]):
                r |= {"wrong_h": other["h"], "wrong_step": other["wrong_step"]}
        chains[r["split"]].append(r)
    return chains["train"], chains["val"]
