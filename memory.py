"""Verified experience: chains that passed the gate, their latents as pointers to the text, and a log of feedback.

    python memory.py remember --latents out/latents/gsm8k            # what extract.py wrote, through the gate again
    python memory.py recall --question "Tom has 3 apples and buys 4. How many?" --steps "3+4 = 7"
    python memory.py log --kind demo --question "..." --steps "3+4 = 7" "#### 7" --truth 7   # prints the id that
    python memory.py rate --id ID --rating up                                                # rate asks for
    python memory.py export --out out/feedback.jsonl                 # for extract.py --chains, to train on
    python memory.py latents --out out/latents.parquet               # the vectors alone, without any text
    python memory.py forget --problem_id gsm8k-train-7               # or --id, --domain, --everything
    python memory.py stats

All is in one DuckDB file, which is opened for each operation and closed after it. Many processes may read; while one
writes, the others wait a few seconds. A write is one transaction: one that is killed leaves nothing behind. Personal
data (what redact.py finds) are cut out of a logged text before it reaches the disk, and a chain that has some is not
remembered.
"""

import contextlib
import datetime
import json
import random
import re
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch

import latents
import verify
from config import check, need, plain_errors, positive
from data import plain_question
from redact import redact
from runs import digest, say, write_atomic, write_jsonl

SCHEMA = 1
MAX_TEXT = 1_100_000  # bytes of one text


def checked(name: str, text) -> str:
    """The text itself. Raises ValueError, without quoting it, for what cannot be stored and returned unchanged."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected a text, got {type(text).__name__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name}: holds half a character (a lone surrogate), which no UTF-8 file can") from None
    if size > MAX_TEXT:
        raise ValueError(f"{name}: {size:,} bytes are more than {MAX_TEXT:,}; shorten it")
    return text


# ----------------------------------------------------------------------------- the file

TABLES = """
CREATE TABLE {0}meta (schema INTEGER, llm VARCHAR, layer INTEGER, pooling VARCHAR, prompt VARCHAR, dim INTEGER);
CREATE TABLE {0}texts (id VARCHAR PRIMARY KEY, problem_id VARCHAR, domain VARCHAR, question VARCHAR,
    steps VARCHAR[], answer VARCHAR, source VARCHAR, created TIMESTAMP);
CREATE TABLE {0}interactions (id VARCHAR, of VARCHAR, created TIMESTAMP, kind VARCHAR, chain VARCHAR,
    question VARCHAR, steps VARCHAR[], answer VARCHAR, truth VARCHAR, rating VARCHAR, is_valid BOOLEAN, reason VARCHAR,
    redactions INTEGER, extra VARCHAR);
"""
LATENTS = "CREATE TABLE {}latents (chain VARCHAR, position INTEGER, z FLOAT[{:d}])"  # 0 the question, 1 … S the steps
TEXT = "CASE WHEN position = 0 THEN question ELSE steps[position] END"
WHERE = {"steps": "position > 0", "questions": "position = 0", "all": "true"}
IN_PROCESS = threading.RLock()  # DuckDB refuses a reader beside a writer in one process, whatever the thread


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


def records(found) -> list[dict]:
    """The rows that a query found."""
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


class Memory:
    """One DuckDB file of verified chains, their latents, and logged interactions. Made by the first write.

    origin: says which LLM the latents are from (the keys of latents.SAME_LLM), for instance the manifest of a folder of
    latents. The first chain fixes it for the file. wait_s: how long to wait for another process. What is raised: see
    `open`.
    """

    def __init__(self, path, origin: dict | None = None, wait_s: float = 10.0):
        self.path, self.wait_s = Path(path), wait_s
        self.origin = None if origin is None else {k: origin[k] for k in latents.SAME_LLM}

    def inode(self) -> int | None:
        return self.path.stat().st_ino if self.path.exists() else None

    def connect(self, write: bool):
        """A connection, once no other process is in the way. Raises as `open` does."""
        duckdb = need("duckdb", "duckdb")
        deadline, settings = time.monotonic() + self.wait_s, {"temp_directory": f"{self.path}.spill"}
        while True:
            inode = self.inode()
            try:
                connection = duckdb.connect(str(self.path), read_only=not write, config=settings)
                if inode in (None, self.inode()):
                    return connection
                connection.close()  # `forget` put a new file there in between
            except duckdb.Error as error:
                if "set lock" not in str(error):
                    is_begun = write and inode and isinstance(error, duckdb.IOException)
                    if is_begun and 0 < self.path.stat().st_size < 3 * 4096:  # less than its headers take:
                        self.path.unlink()  # a kill or a full disk came into its making, before this one
                        continue
                    raise ValueError(f"{self.path} cannot be opened: {str(error).splitlines()[0]}") from None
                if time.monotonic() > deadline:
                    pid = re.search(r"PID \d+", str(error))
                    raise TimeoutError(f"{self.path} is in use by another process{f' ({pid[0]})' if pid else ''} for "
                                       f"more than {self.wait_s:g} s: try again when it is done") from None
            time.sleep(random.uniform(0.002, 0.03))

    @contextlib.contextmanager
    def open(self, write: bool = False, create: bool = False):
        """(connection, meta as a dict); with `write` one transaction, which is undone where the block raises.

        Raises FileNotFoundError where there is no file (but with `create`), TimeoutError where another process keeps
        it, ValueError where it is no memory, or one of another LLM, and OSError for a full disk or a damaged file.
        """
        duckdb = need("duckdb", "duckdb")
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder: name a file in it")
        if not self.path.is_file():
            if not create:
                raise FileNotFoundError(f"{self.path}: no such memory; `memory.py remember` or `log` makes one")
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with IN_PROCESS:
            if self.path.is_file() and self.path.stat().st_size:
                with open(self.path, "rb") as file:  # under the lock: closing it drops another thread's file lock
                    if file.read(12)[8:] != b"DUCK":  # DuckDB would open a jsonl or parquet file as a view
                        raise ValueError(f"{self.path} is no memory: not a DuckDB file")
            connection = self.connect(write)
            try:
                tables = {row[0] for row in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
                if write:
                    connection.execute("BEGIN")
                if write and not tables:
                    connection.execute(TABLES.format(""))
                    connection.execute("INSERT INTO meta (schema) VALUES (?)", [SCHEMA])
                elif "meta" not in tables:
                    raise ValueError(f"{self.path} is no memory: it has no table 'meta'")
                meta = (records(connection.execute("SELECT * FROM meta")) or [{}])[0]
                if (schema := meta.get("schema")) != SCHEMA:
                    raise ValueError(f"{self.path} is of schema {schema}, this version reads {SCHEMA}")
                if self.origin is not None and meta["dim"] is not None:
                    latents.check_same_llm(SimpleNamespace(**meta), self.origin, f"{self.path}, with other latents,")
                yield connection, meta
                if write:
                    connection.execute("COMMIT")
            except duckdb.Error as error:  # a full disk, a damaged file
                raise OSError(f"{self.path}: {str(error).splitlines()[0]}") from None
            finally:
                connection.close()

    # ------------------------------------------------------------------------- chains

    def remember_all(self, items, domain: str = "") -> list[verify.Verdict]:
        """Stores those of the items (problem, chain, h) that the gate finds valid, in one transaction -> its verdicts.

        problem {"id", "answer"} as in verify.validate, chain {"question", "steps", ...}, h [1 + S, D] its latents. A
        chain with personal data is refused as "personal_data": its latents would keep what a text must not. A chain
        that is there already stays as it is. Raises ValueError for latents that do not fit.
        """
        import pyarrow as pa

        if self.origin is None:
            raise ValueError(f"{self.path}: say which LLM the latents are from: Memory(path, origin)")
        verdicts, rows, found = [], {}, {}
        for problem, chain, h in items:
            name, texts = f"chain {chain.get('id', '')!r}", [chain["question"], *chain["steps"]]
            answer = chain.get("answer") or problem["answer"]
            labels = [str(problem.get("id", "")), domain, str(chain.get("source") or "")]
            everything = "\n".join(checked(name, text) for text in [*texts, answer, *labels])
            if tuple(h.shape) != (len(texts), self.origin["dim"]):
                raise ValueError(f"{name}: latents of shape {list(h.shape)}, expected "
                                 f"{[len(texts), self.origin['dim']]}: the question's, one a step")
            if not torch.isfinite(h).all():
                raise ValueError(f"{name}: its latents hold values that are not finite")
            verdict = verify.validate(problem, chain)
            if verdict.is_valid and redact(everything)[1]:
                verdict = verify.Verdict(False, "personal_data", "its text holds what redact() would cut")
            if verdict.is_valid:
                key = digest(json.dumps(texts))
                rows[key] = {"id": key, "problem_id": labels[0], "domain": domain, "question": texts[0],
                             "steps": texts[1:], "answer": answer, "source": labels[2]}
                found[key] = h.detach().float().cpu().numpy()
            verdicts.append(verdict)
        if not rows:
            return verdicts
        values = pa.array(np.concatenate(list(found.values())).reshape(-1))
        vectors = pa.table({"chain": [key for key, h in found.items() for _ in h],
                            "position": pa.array([i for h in found.values() for i in range(len(h))], pa.int32()),
                            "z": pa.FixedSizeListArray.from_arrays(values, self.origin["dim"])})
        with self.open(write=True, create=True) as (connection, meta):
            if meta["dim"] is None:
                connection.execute("UPDATE meta SET llm = ?, layer = ?, pooling = ?, prompt = ?, dim = ?",
                                   [self.origin[key] for key in latents.SAME_LLM])
                connection.execute(LATENTS.format("", self.origin["dim"]))
            connection.register("new_texts", pa.Table.from_pylist(list(rows.values())))
            connection.register("new_latents", vectors)
            connection.execute("INSERT INTO latents FROM new_latents WHERE chain NOT IN (SELECT id FROM texts)")
            connection.execute("INSERT INTO texts SELECT *, ? FROM new_texts WHERE id NOT IN (SELECT id FROM texts)",
                               [now()])
        return verdicts

    def recall(self, z, k: int = 5, domain: str = "", positions: str = "steps") -> list[dict]:
        """The k latents nearest to z [D] by cosine (exact, over all), with the texts that they point to.

        positions: "steps", "questions" or "all". -> [{"cos", "cos_mean" (of z and all that was looked at: what a cosine
        has to be above), "chain_id", "position" (0: the question), "text", "question", "domain"}], best first. Raises
        ValueError for another width than the memory's.
        """
        if positions not in WHERE or k < 1:
            raise ValueError(f"positions {positions!r}, k {k}: use one of {', '.join(WHERE)}, and at least 1")
        z = torch.as_tensor(z).detach().float().cpu()
        with self.open() as (connection, meta):
            if meta["dim"] is None:
                return []
            if tuple(z.shape) != (meta["dim"],) or not torch.isfinite(z).all() or not z.any():
                raise ValueError(f"{self.path} holds latents of width {meta['dim']}, the query has shape "
                                 f"{list(z.shape)}; it must be finite and not zero")
            return records(connection.execute(f"""
                SELECT cos, cos_mean, chain AS chain_id, position, {TEXT} AS text, question, domain
                FROM (SELECT *, avg(cos) OVER () AS cos_mean FROM (
                          SELECT chain, position, array_cosine_similarity(z, ?::FLOAT[{meta["dim"]:d}]) AS cos
                          FROM latents WHERE {WHERE[positions]} AND NOT isnan(cos)
                          AND (? = '' OR chain IN (SELECT id FROM texts WHERE domain = ?)))
                      ORDER BY cos DESC, chain, position LIMIT ?) AS nearest
                JOIN texts ON texts.id = nearest.chain ORDER BY cos DESC, chain, position""",
                [z.tolist(), domain, domain, k]))  # fmt: skip

    def vectors(self, positions: str = "steps") -> tuple[torch.Tensor, list[dict]]:
        """(all latents [N, D] fp32, [{"chain_id", "position", "text"}]), in the order in which they were stored."""
        with self.open() as (connection, meta):
            if meta["dim"] is None:
                return torch.zeros(0, 0), []
            found = connection.sql(f"""
                SELECT chain AS chain_id, position, {TEXT} AS text, z
                FROM latents JOIN texts ON texts.id = chain WHERE {WHERE[positions]}
                ORDER BY latents.rowid""").to_arrow_table()
        z = found["z"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, meta["dim"])
        return torch.from_numpy(z.copy()), found.drop_columns("z").to_pylist()

    def export_latents(self, out) -> int:
        """Parquet of chain id, position and latent, without any text; the prompt of the LLM is there as its hash."""
        import pyarrow.parquet as pq

        with self.open() as (connection, meta):
            table = () if meta["dim"] is None else connection.sql("FROM latents ORDER BY rowid").to_arrow_table()
        if not len(table):
            raise ValueError(f"{self.path} holds no latents")
        origin = json.dumps(meta | {"prompt": meta["prompt"] and digest(meta["prompt"])})
        write_atomic(Path(out), lambda path: pq.write_table(table.replace_schema_metadata({"origin": origin}), path))
        return len(table)

    def forget(self, id: str = "", problem_id: str = "", domain: str = "", everything: bool = False) -> int:
        """Deletes the chains that fit all filters, also from the log, or the interaction of that id -> how many.

        everything: all chains and interactions. DuckDB keeps the bytes of deleted rows in its file, so what is left is
        copied to a new file, which then takes the old one's place in one step.
        """
        if everything == bool(id or problem_id or domain):
            raise ValueError("forget needs --id, --problem_id or --domain; or --everything, and nothing else")
        if id and (problem_id or domain) and self.path.is_file() and self.interactions(id):
            raise ValueError(f"id {id!r} is an interaction: it goes without problem_id and domain")
        with self.open(write=True) as (connection, meta):
            connection.execute("COMMIT")  # no checkpoint in a transaction, and no .wal may be left beside the new file
            connection.execute("CHECKPOINT")
            connection.execute("CREATE TEMP TABLE gone AS SELECT id FROM texts WHERE (? = '' OR id = ?) "
                               "AND (? = '' OR problem_id = ?) AND (? = '' OR domain = ?)",
                               [id, id, problem_id, problem_id, domain, domain])  # everything: all three are empty
            connection.execute("INSERT INTO gone SELECT id FROM interactions WHERE of IS NULL AND "
                               "(? OR id = ? OR chain IN (FROM gone))", [everything, id])
            count = connection.execute("SELECT count(*) FROM gone").fetchall()[0][0]
            if count:
                write_atomic(self.path.resolve(), lambda path: self.copy_rest(connection, meta, path))
            connection.execute("BEGIN")
        return count

    def copy_rest(self, connection, meta: dict, path: Path):
        """Writes all but what the table `gone` names to a new file."""
        for stale in (path, Path(f"{path}.wal")):
            stale.unlink(missing_ok=True)
        new = '"new/"'  # DuckDB calls the old file by its name, which has no slash
        connection.execute(f"ATTACH ? AS {new}", [str(path)])
        connection.execute(TABLES.format(f"{new}."))
        rest = {"meta": "true", "texts": "id NOT IN (FROM gone)", "latents": "chain NOT IN (FROM gone)",
                "interactions": "coalesce(of, id) NOT IN (FROM gone)"}
        if meta["dim"] is None:
            del rest["latents"]
        else:
            connection.execute(LATENTS.format(f"{new}.", meta["dim"]))
        for table, stays in rest.items():
            connection.execute(f"INSERT INTO {new}.{table} SELECT * FROM {table} WHERE {stays} ORDER BY rowid")
        connection.execute(f"DETACH {new}")

    # ------------------------------------------------------------------------- feedback

    def log(self, kind: str, question: str, steps: list[str], truth: str | None = None, answer: str | None = None,
            rating: str | None = None, extra: dict | None = None) -> str:
        """Appends one interaction, all its texts redacted, with the gate's verdict on what is left -> its id.

        truth: the right answer, where it is known; without it is_valid is False, for "unverified" or for the first
        step whose arithmetic fails. extra: further values, kept as texts.
        """
        row, count = redact_row({"kind": kind, "question": question, "answer": answer, "truth": truth, "extra": extra,
                                 "steps": list(steps)})
        whole, _ = redact("\n".join(steps))
        if is_cut := whole != "\n".join(row["steps"]):  # a key over several steps
            row["steps"] = whole.split("\n")
        row["extra"] = None if extra is None else json.dumps(row["extra"])
        verdict = judge(row["steps"], row["truth"], row["answer"])
        row |= {"id": uuid.uuid4().hex, "chain": digest(json.dumps([row["question"], *row["steps"]])),
                "rating": rating, "redactions": count + is_cut}
        self.append(row | {"is_valid": verdict.is_valid, "reason": verdict.reason})
        return row["id"]

    def rate(self, id: str, rating: str | None, truth: str | None = None):
        """Appends a rating ("up", "down"; None says nothing new) or the right answer to an interaction.

        No row is ever changed: the latest rating and the latest truth count.
        """
        if not id:
            raise ValueError("rate needs the --id of an interaction, as `log` printed it")
        if rating is None and truth is None:
            raise ValueError("rate needs a rating, or the truth")
        row, count = redact_row({"truth": truth})
        row |= {"id": uuid.uuid4().hex, "of": id, "rating": rating, "redactions": count}
        first = next((r for r in self.interactions(id) if r["of"] is None), None)
        if first is None:
            raise ValueError(f"{self.path} has no interaction of id {id!r}")
        if truth is not None:
            verdict = judge(first["steps"], row["truth"], first["answer"])
            row |= {"is_valid": verdict.is_valid, "reason": verdict.reason}
        self.append(row)

    def append(self, row: dict):
        if row["rating"] not in ("up", "down", None):
            raise ValueError(f"rating {row['rating']!r:.20}: use 'up', 'down' or None")
        row = {"created": now(), **row}
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        with self.open(write=True, create=True) as (connection, _):
            connection.execute(f"INSERT INTO interactions ({names}) VALUES ({marks})", list(row.values()))

    def interactions(self, id: str = "") -> list[dict]:
        """The log's rows, oldest first: all, or those of one interaction: itself, then its ratings."""
        with self.open() as (connection, _):
            return records(connection.execute(
                "SELECT * FROM interactions WHERE ? = '' OR coalesce(of, id) = ? ORDER BY rowid", [id, id]))

    def export(self, out, remembered: bool = False, without: tuple = ()) -> dict:
        """Writes chains for retraining (extract.py --chains): logged ones that the gate accepts and nobody rated down.

        Each is written once, and judged as it is stored. remembered: the stored chains as well. without: jsonl files of
        problems whose questions are left out (test sets). -> {"out", "chains", "interactions", "rated_down",
        "left_out"}.
        """
        tested = {plain_question(redact(checked(f"{path}, a question", row["question"]))[0])  # as they are logged
                  for path in without for row in verify.read_jsonl(path, ["question"])}
        groups, chains, down = {}, {}, set()
        for row in self.interactions():
            groups.setdefault(row["of"] or row["id"], []).append(row)
        for rows in groups.values():
            first = rows[0]
            rating, truth = (next((r[key] for r in reversed(rows) if r[key] is not None), None)
                             for key in ("rating", "truth"))
            if rating == "down":
                down.add(first["chain"])
            if truth is not None and judge(first["steps"], truth, first["answer"]).is_valid:
                chains[first["chain"]] = {"id": first["chain"], "problem_id": digest(plain_question(first["question"])),
                                          "question": first["question"], "steps": first["steps"], "answer": truth,
                                          "is_valid": True, "source": first["kind"]}
        if remembered:
            with self.open() as (connection, _):
                stored = records(connection.execute(
                    "SELECT id, problem_id, question, steps, answer, true AS is_valid, source FROM texts"))
            problem_of = {plain_question(row["question"]): row["problem_id"] for row in stored}
            for chain in chains.values():  # of one problem, whether its chains were logged or stored
                chain["problem_id"] = problem_of.get(plain_question(chain["question"]), chain["problem_id"])
            chains |= {row["id"]: row for row in stored}
        liked = [chain for key, chain in chains.items() if key not in down]
        kept = [chain for chain in liked if plain_question(chain["question"]) not in tested]
        write_jsonl(Path(out), kept)
        return {"out": str(out), "chains": len(kept), "interactions": len(groups), "rated_down": len(down),
                "left_out": len(liked) - len(kept)}

    def stats(self) -> dict:
        """Counts: chains, steps, latents, chains a domain, interactions by verdict and rating; bytes; the origin."""
        with self.open() as (connection, meta):
            def query(sql):
                return connection.execute(sql).fetchall()

            chains, steps = query("SELECT count(*), coalesce(sum(len(steps)), 0)::BIGINT FROM texts")[0]
            n = 0 if meta["dim"] is None else query("SELECT count(*) FROM latents")[0][0]
            domains = dict(query("SELECT domain, count(*) FROM texts GROUP BY ALL ORDER BY ALL"))
            reasons = dict(query("SELECT reason, count(*) FROM interactions WHERE of IS NULL GROUP BY ALL"))
            ratings = dict(query("SELECT rating, count(*) FROM interactions WHERE rating IS NOT NULL GROUP BY ALL"))
        return {"memory": str(self.path), **meta, "chains": chains, "steps": steps, "latents": n, "domains": domains,
                "interactions": reasons, "ratings": ratings, "bytes": self.path.stat().st_size}


def redact_row(row: dict) -> tuple[dict, int]:
    """(row with every text in it, also in lists and dicts, checked and redacted; how many places were cut out)."""
    count = 0

    def clean(name, value):
        nonlocal count
        if value is None:
            return None
        if isinstance(value, list):
            return [clean(f"{name} {i}", part) for i, part in enumerate(value, 1)]
        if isinstance(value, dict):
            return {clean(name, str(key)): clean(name, str(part)) for key, part in value.items()}
        text, n = redact(checked(name, value))
        count += n
        return text

    return {name: clean(name, value) for name, value in row.items()}, count


def judge(steps: list[str], truth: str | None, answer: str | None) -> verify.Verdict:
    """The gate's verdict. Without the truth never valid: "unverified", or what is wrong with a step's arithmetic."""
    if truth is not None:
        if verify.answer_value(truth) is None:
            raise ValueError(f"--truth {truth:.40}: holds no number")
        return verify.validate({"answer": truth}, {"steps": steps, "answer": answer})
    verdict = verify.check_steps(steps)
    return verify.Verdict(False, "unverified" if steps else "no_steps") if verdict.is_valid else verdict


# ----------------------------------------------------------------------------- command line


@dataclass
class Stats:
    """What the memory holds."""

    memory: str = "out/memory.duckdb"  # the file

    def run(self) -> dict:
        return Memory(self.memory).stats()


@dataclass
class Remember(Stats):
    """Stores the verified training chains of a finished folder of latents, after the gate has seen them again."""

    latents: str = ""  # folder that extract.py wrote
    domain: str = ""  # name for these chains; empty: the folder's data set
    allow_test: bool = False  # also chains of a test split; what is remembered helps with them afterwards

    def __post_init__(self):
        check(self, "latents", bool(self.latents), "name the folder that extract.py wrote")

    def run(self) -> dict:
        rows, manifest = latents.load_latents(self.latents)
        if not self.allow_test and (manifest["split"] == "test" or any(r["split"] == "test" for r in rows)):
            raise ValueError(f"--latents {self.latents} is of a test split: the memory refuses it (--allow_test)")
        kept = [r for r in rows if r["is_valid"] and r["split"] in ("train", "test")]
        known = [r for r in kept if verify.answer_value(r["answer"]) is not None]
        say(f"{len(known):,} of {len(rows):,} chains are marked valid and of the split "
            f"train{' or test' * self.allow_test}")
        memory, items = Memory(self.memory, manifest), []
        for r in known:
            problem_id = r["problem_id"]
            if r["split"] == "test" and "-test-" not in problem_id:  # the split is read off it when it is exported
                problem_id = f"{manifest['dataset']}-test-{problem_id}"
            # the file's answer is the truth here: what the chain itself says must be read off its last step
            items.append(({"id": problem_id, "answer": r["answer"]}, r | {"answer": None}, r["h"]))

        def n_stored():
            return memory.stats()["chains"] if memory.path.is_file() else 0

        before, verdicts = n_stored(), memory.remember_all(items, self.domain or manifest["dataset"])
        reasons = Counter(v.reason for v in verdicts) + Counter(no_answer=len(kept) - len(known))
        return {"memory": self.memory, "remembered": reasons.pop("ok", 0), "new": n_stored() - before,
                "refused": dict(reasons)}


@dataclass
class Recall(Stats):
    """The stored steps nearest to the last step of a chain, or the stored questions nearest to a question alone."""

    question: str = ""  # embedded by the memory's LLM
    steps: tuple[str, ...] = ()  # after the question; the last one is searched with
    positions: Literal["like", "steps", "questions", "all"] = "like"  # where to search; like: what is searched with
    domain: str = ""  # only chains of this one
    k: int = 5  # how many
    llm: str = ""  # where the memory's LLM lies, if not under its name
    device: str = "auto"

    def __post_init__(self):
        positive(self, "k")
        check(self, "question", bool(self.question.strip()), "must not be empty")

    def run(self) -> dict:
        from llm import llm_of

        memory = Memory(self.memory)
        meta = memory.stats()
        if meta["dim"] is None:
            raise ValueError(f"{self.memory} holds no chains")
        z = llm_of(SimpleNamespace(**meta), self.llm, self.device).step_latents(self.question, list(self.steps))[-1]
        positions = self.positions if self.positions != "like" else "steps" if self.steps else "questions"
        return {"nearest": memory.recall(z, self.k, self.domain, positions)}


@dataclass
class Log(Stats):
    """Appends an interaction to the log, without personal data."""

    kind: str = ""  # where it is from: demo, rerank, ...
    question: str = ""
    steps: tuple[str, ...] = ()
    truth: str | None = None  # the right answer, if it is known
    answer: str | None = None  # the one given
    rating: Literal["up", "down"] | None = None

    def __post_init__(self):
        for name in ("kind", "question"):
            check(self, name, bool(getattr(self, name).strip()), "must not be empty")

    def run(self) -> dict:
        memory = Memory(self.memory)
        id = memory.log(self.kind, self.question, list(self.steps), self.truth, self.answer, self.rating)
        return {k: v for k, v in memory.interactions(id)[0].items() if k in ("id", "is_valid", "reason", "redactions")}


@dataclass
class Rate(Stats):
    """Appends a rating to a logged interaction, or the right answer."""

    id: str = ""  # as `log` printed it, or infer.py --log as "interaction"
    rating: Literal["up", "down"] | None = None
    truth: str | None = None  # the right answer: the gate judges the chain by it

    def run(self) -> dict:
        Memory(self.memory).rate(self.id, self.rating, self.truth)
        return {"id": self.id, "rating": self.rating, "truth": self.truth}


@dataclass
class Forget(Stats):
    """Deletes chains (text and latents) or a logged interaction; several filters narrow it down."""

    id: str = ""  # of a chain, or of an interaction, which goes with its ratings
    problem_id: str = ""  # all chains of a problem
    domain: str = ""  # all chains of a domain
    everything: bool = False  # all chains and interactions

    def run(self) -> dict:
        count = Memory(self.memory).forget(self.id, self.problem_id, self.domain, self.everything)
        if not count and not self.everything:  # who misspelt it would think that it is gone
            raise ValueError(f"{self.memory} holds no chain or interaction of that id, problem, domain: nothing "
                             "forgotten")
        return {"forgotten": count}


@dataclass
class Export(Stats):
    """Writes logged chains that the gate accepts and nobody rated down, for extract.py --chains."""

    out: str = "out/feedback.jsonl"
    remembered: bool = False  # the stored chains as well
    without: tuple[str, ...] = ()  # jsonl files of problems whose questions are left out: test sets

    def run(self) -> dict:
        return Memory(self.memory).export(self.out, self.remembered, self.without)


@dataclass
class Latents(Stats):
    """Writes the latents alone: chain ids, positions, vectors; no text."""

    out: str = "out/latents.parquet"

    def run(self) -> dict:
        return {"out": self.out, "latents": Memory(self.memory).export_latents(self.out)}


COMMANDS = {kind.__name__.lower(): kind for kind in (Stats, Remember, Recall, Log, Rate, Forget, Export, Latents)}


@plain_errors()
def main(argv=None):
    import tyro

    args = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=argv, prog="memory.py", description=__doc__)
    result = args.run()
    for found in result.get("nearest", []):
        cos = f"{found['cos']:.3f} (mean {found['cos_mean']:.3f})"
        print(f"{cos}  {found['chain_id']} {found['position']}  {found['text'][:90]}")
    print(json.dumps(result, allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())
