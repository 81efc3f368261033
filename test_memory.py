"""The memory's tests: what is stored and forgotten, who reads beside a writer, kills, personal data, the feedback log.

    pytest -q test_memory.py
"""

import functools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import latents
import memory as mem
import verify
from test_core import fork, refused, result_of, shared_data, write_jsonl, write_latents

ORIGIN = {"llm": "toy", "layer": 2, "pooling": "last", "prompt": "", "dim": 8}


def a_chain(i=0, question="", steps=None):
    """(problem, chain, latents) that the gate accepts, another one for every i."""
    steps = steps or [f"{i} + 2 = {i + 2} pens", f"{i + 2} * 2 = {2 * i + 4}", f"#### {2 * i + 4}"]
    chain = {"id": f"c{i}", "question": question or f"Tom has {i} pens, gets 2, doubles them?", "steps": steps,
             "answer": f"{2 * i + 4}", "source": "toy"}
    h = torch.randn(1 + len(steps), 8, generator=torch.Generator().manual_seed(i))
    return {"id": f"p{i}", "answer": chain["answer"]}, chain, h


def a_memory(tmp_path, n=0, **kw):
    memory = mem.Memory(tmp_path / "m.duckdb", ORIGIN, **kw)
    if n:
        assert all(v.is_valid for v in memory.remember_all([a_chain(i) for i in range(n)], "toy"))
    return memory


def remember(memory, problem, chain, h, domain=""):
    """The verdict on one chain, which is stored if it is valid."""
    return memory.remember_all([(problem, chain, h)], domain)[0]


def bytes_beside(path):
    """All bytes of the database and of whatever lies beside it under its name."""
    return b"".join(p.read_bytes() for p in sorted(Path(path).parent.glob(Path(path).name + "*")) if p.is_file())


def test_memory_holds_verified_chains_alone(tmp_path):
    memory = a_memory(tmp_path)
    problem, chain, h = a_chain(3)
    wrong = chain | {"steps": ["3 + 2 = 6 pens", "6 * 2 = 12", "#### 10"]}
    verdict = remember(memory, problem, wrong, h)
    assert (verdict.is_valid, verdict.reason) == (False, "arithmetic")
    assert not memory.path.exists(), "nothing is written for a chain that is not valid"
    assert remember(memory, problem, chain, h, domain="toy") == verify.Verdict(True, "ok")
    remember(memory, problem, chain, h)
    remember(memory, problem, chain | {"answer": "11"}, h)
    for private in ({"question": "Tom (tom@example.org) has 3 pens?"}, {"source": "tom@example.org"}):
        assert remember(memory, problem, chain | private, h).reason == "personal_data"
    stats = memory.stats()
    assert {k: stats[k] for k in ("chains", "steps", "latents", "domains", "llm", "dim")} == {
        "chains": 1, "steps": 3, "latents": 4, "domains": {"toy": 1}, "llm": "toy", "dim": 8}


@pytest.mark.parametrize("h, message", [
    (torch.zeros(3, 8), "shape"), (torch.zeros(4, 7), "shape"), (torch.full((4, 8), float("nan")), "not finite")])
def test_memory_refuses_latents_that_do_not_fit(tmp_path, h, message):
    memory = a_memory(tmp_path)
    refused(ValueError, message, remember, memory, *a_chain(3)[:2], h)
    assert not memory.path.exists()


def test_memory_is_of_one_llm(tmp_path):
    memory = a_memory(tmp_path, n=1)
    for field, value in (("llm", "other"), ("layer", 3), ("pooling", "mean"), ("prompt", "{question}!"), ("dim", 9)):
        other = mem.Memory(memory.path, ORIGIN | {field: value})
        with pytest.raises(ValueError, match=f"{field}: {ORIGIN[field]} there, {value} here"):
            remember(other, *a_chain(1)[:2], torch.ones(4, 9 if field == "dim" else 8))
        refused(ValueError, field, other.recall, torch.ones(8))
    refused(ValueError, "width 8", memory.recall, torch.ones(9))
    refused(ValueError, "which LLM", remember, mem.Memory(memory.path), *a_chain(1))


def test_recall_is_exact_cosine(tmp_path):
    memory = a_memory(tmp_path, n=40)
    memory.remember_all([a_chain(i) for i in range(40, 50)], "others")
    chains = [a_chain(i) for i in range(50)]
    z = torch.randn(8, generator=torch.Generator().manual_seed(99))
    for positions, rows in (("steps", slice(1, None)), ("questions", slice(0, 1)), ("all", slice(0, None))):
        for domain, part in (("", chains), ("others", chains[40:])):
            texts = [t for _, c, _ in part for t in [c["question"], *c["steps"]][rows]]
            cos = torch.cosine_similarity(torch.cat([h[rows] for *_, h in part]).double(), z.double()[None], dim=1)
            best = cos.argsort(descending=True)[:7].tolist()
            found = memory.recall(z, 7, domain, positions)
            assert [f["text"] for f in found] == [texts[i] for i in best]
            assert np.allclose([f["cos"] for f in found], cos[best], atol=1e-6)
            assert found[0]["cos_mean"] == pytest.approx(float(cos.mean()), abs=1e-6)
    assert set(found[0]) == {"cos", "cos_mean", "chain_id", "position", "text", "question", "domain"}
    h, rows = memory.vectors()
    assert torch.equal(h, torch.cat([h[1:] for *_, h in chains])) and rows[0]["text"] == chains[0][1]["steps"][0]
    for bad in (torch.zeros(8), torch.full((8,), float("inf"))):
        refused(ValueError, "finite and not zero", memory.recall, bad)


def test_what_is_forgotten_is_not_in_the_file(tmp_path):
    memory = a_memory(tmp_path, n=300)
    secret = a_chain(777, question="The zebra Xylophonia has 777 pens, gets 2, doubles them?")
    remember(memory, *secret, domain="zoo")
    memory.log("demo", secret[1]["question"], secret[1]["steps"], truth="1558")
    needles = [b"Xylophonia", b"779 * 2 = 1558"]
    assert all(needle in bytes_beside(memory.path) for needle in needles)
    memory.path.chmod(0o600)
    refused(ValueError, "forget needs", memory.forget)
    assert memory.forget(problem_id="p777", domain="toy") == 0
    assert memory.forget(problem_id="p777") == 2  # the chain, and its like in the log
    assert memory.path.stat().st_mode & 0o777 == 0o600
    assert not any(needle in bytes_beside(memory.path) for needle in needles)
    stats = memory.stats()
    assert (stats["chains"], stats["latents"], stats["domains"]) == (300, 1200, {"toy": 300})
    assert not (memory.vectors(positions="all")[0][:, None] == secret[2]).all(-1).any()
    log_id = memory.log("demo", "Who is Quetzalia?", ["1+1 = 2"], truth="2")
    memory.rate(log_id, "up")
    refused(ValueError, "goes without problem_id", memory.forget, id=log_id, problem_id="nope")
    assert memory.forget(id=log_id) == 1 and memory.interactions() == []
    assert b"Quetzalia" not in bytes_beside(memory.path)
    z = secret[2][1]
    assert all("777" not in found["text"] for found in memory.recall(z))
    assert remember(memory, *secret).is_valid and memory.forget(everything=True) == 301
    assert memory.stats()["latents"] == 0 and memory.recall(z) == [] and b"pens" not in bytes_beside(memory.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.duckdb"]


def test_a_key_over_several_steps_and_a_test_question_do_not_get_far(tmp_path):
    memory = a_memory(tmp_path)
    key = ["-----BEGIN RSA PRIVATE KEY-----", "MIIEpAIBAAKCAQEAsecretbody", "-----END RSA PRIVATE KEY-----"]
    log_id = memory.log("demo", "What is this?", ["1+1 = 2", *key])
    logged = memory.interactions(log_id)[0]
    assert logged["steps"] == ["1+1 = 2", "[KEY]"] and logged["redactions"] == 2  # its first line, then all
    assert b"secretbody" not in bytes_beside(memory.path)
    for question in ("Who has 2 pens?", "Who has  2 PENS?", "Who has 3 pens?"):
        memory.log("demo", question, ["1+1 = 2"], truth="2")
    tests = write_jsonl(tmp_path / "test.jsonl", [{"question": "Who has 2 pens?", "answer": "#### 2"}])
    found = memory.export(tmp_path / "fed.jsonl", without=[tests])
    assert (found["chains"], found["left_out"]) == (1, 2) and "3 pens" in (tmp_path / "fed.jsonl").read_text()
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"question": 3, "answer": "#### 2"}])
    refused(ValueError, "odd.jsonl, a question: expected a text", memory.export, tmp_path / "fed.jsonl", without=[odd])
    memory.export(tmp_path / "fed.jsonl")
    rows = verify.read_jsonl(tmp_path / "fed.jsonl")
    assert len(rows) == 3 and len({r["problem_id"] for r in rows}) == 2  # a problem lies in one split


def test_exported_latents_hold_no_text(tmp_path):
    memory = mem.Memory(tmp_path / "m.duckdb", ORIGIN | {"prompt": "Solve {question} now"})
    memory.remember_all([a_chain(i) for i in range(5)], "toy")
    assert memory.export_latents(tmp_path / "z.parquet") == 20
    raw, table = (tmp_path / "z.parquet").read_bytes(), pq.read_table(tmp_path / "z.parquet")
    assert not any(word in raw for word in (b"pens", b"Tom", b"####", b"Solve", b"p3", b" + 2"))
    assert np.allclose(table["z"].to_pylist(), torch.cat([a_chain(i)[2] for i in range(5)]))
    assert table["position"].to_pylist() == [0, 1, 2, 3] * 5


def adversarial_strings(n=1000):
    rng = random.Random(5)
    pieces = ["'; DROP TABLE texts; --", "\"", "$1", "?", "{0}", "%s", "\0", "\x01\x1b[31m", "\r\n", "\u202e", "\u200f",
              "😀", "e\u0301", "\ufeff", "<script>", "\\", "\t", "NULL", "é", "\u2028", "\x7f", "٣", "' OR 1=1 --", "a"]
    fixed = ["x" * 1_000_000, "\ud800", "a\udfffb", "'" * 9, "\0", *pieces]
    return fixed + ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(n - len(fixed))]


def test_adversarial_texts_come_back_unchanged_or_are_refused(tmp_path):
    memory, kept, n_refused = a_memory(tmp_path), [], 0
    for i, text in enumerate(adversarial_strings()):
        problem, chain, h = a_chain(i, question=f"{i} {text}")
        try:
            mem.checked("question", chain["question"])
            kept.append((problem, chain | {"source": text[:100]}, h))
        except ValueError as error:
            assert "surrogate" in str(error)
            refused(ValueError, "surrogate", remember, memory, problem, chain, h, text)
            n_refused += 1
    assert n_refused == 2 and all(v.is_valid for v in memory.remember_all(kept, "' OR 1=1 --"))
    _, rows = memory.vectors("questions")
    assert [row["text"] for row in rows] == [chain["question"] for _, chain, _ in kept]
    hard = [chain["question"] for _, chain, _ in kept[1::50]]
    ids = [memory.log(text[:40], text, [text], answer=text, extra={text: text}) for text in hard]
    stored = {row["id"]: row for row in memory.interactions()}
    for id, text in zip(ids, hard, strict=True):
        row = stored[id]
        assert (row["question"], row["steps"], row["answer"], json.loads(row["extra"])) == (
            text, [text], text, {text: text})
    refused(ValueError, "1,100,001 bytes are more than", memory.log, "demo", "x" * 1_100_001, [])
    assert memory.recall(kept[7][2][1], 1, "' OR 1=1 --")[0]["question"] == kept[7][1]["question"]
    assert memory.forget(domain="' OR 1=1") == 0 and memory.stats()["chains"] == len(kept)


# what one process of the tests below does, n times
READER = """
import memory as mem, torch
memory = mem.Memory(sys.argv[1], wait_s=60)
for i in range(int(sys.argv[2])):
    found = memory.recall(torch.ones(8), 3)
    assert len(found) == 3, found
print(memory.stats()["chains"])
"""
WRITER = """
import threading, memory as mem, test_memory as t
memory, (n, first, kill_after) = mem.Memory(sys.argv[1], t.ORIGIN, wait_s=60), map(float, sys.argv[2:])
for i in range(int(first), int(first + n)):
    problem, chain, h = t.a_chain(i)
    assert t.remember(memory, problem, chain, h).is_valid
    if i % 5 == 0:
        assert memory.forget(problem_id=problem["id"]) == 1
    print(i, flush=True)
    if kill_after and i == first + 1:
        threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
"""


def test_readers_and_a_writer_at_once(tmp_path):
    memory = a_memory(tmp_path, n=3, wait_s=0.2)
    code = f"exec({WRITER!r} if os.environ['RANK'] == '0' else {READER!r})"
    ends, _, error = fork("-c", memory.path, 20, 1000, 0, n=3, code=code)
    assert not any(ends), error
    assert memory.stats()["chains"] == 3 + 16


def test_a_file_in_use_is_named_with_the_process(tmp_path):
    memory = a_memory(tmp_path, n=1, wait_s=0.1)
    holder = "import duckdb, sys; c = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == 'r'); print(1, flush=True);"
    for how in "rw":
        process = subprocess.Popen([sys.executable, "-c", holder + "sys.stdin.read()", memory.path, how],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        if how == "r":
            assert memory.stats()["chains"] == 1
        for call in (lambda: remember(memory, *a_chain(1)), lambda: memory.forget(everything=True), memory.stats)[
                : 2 if how == "r" else 3]:
            refused(TimeoutError, rf"m.duckdb is in use by another process \(PID {process.pid}\)", call)
        process.communicate()
    assert remember(memory, *a_chain(1)).is_valid


def test_a_second_thread_does_not_give_the_first_ones_lock_away(tmp_path):
    memory = a_memory(tmp_path, 1)
    held, done = threading.Event(), threading.Event()

    def write():
        with memory.open(write=True):
            held.set(), done.wait()

    threads = [threading.Thread(target=write), threading.Thread(target=memory.stats)]
    threads[0].start(), held.wait(), threads[1].start()
    time.sleep(0.2)
    try:
        other = subprocess.run([sys.executable, "-c", "import duckdb, sys; duckdb.connect(sys.argv[1])", memory.path],
                               capture_output=True, text=True)
        assert other.returncode == 1 and "set lock" in other.stderr
    finally:
        done.set()
    for thread in threads:
        thread.join()


def test_a_damaged_file_and_a_linked_one(tmp_path):
    memory = a_memory(tmp_path, 300)
    whole = memory.path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20000] + b"\xff" * 100 + whole[20100:]):
        memory.path.write_bytes(damaged)
        for use in (memory.vectors, lambda: memory.log("demo", "q?", ["1 = 1"])):
            with pytest.raises((ValueError, OSError), match="m.duckdb"):
                use()
    memory.path.write_bytes(whole)
    (tmp_path / "link.duckdb").symlink_to(memory.path)
    assert mem.Memory(tmp_path / "link.duckdb").forget(problem_id="p3") == 1 and memory.stats()["chains"] == 299
    assert b"Tom has 3 pens" not in bytes_beside(memory.path) and (tmp_path / "link.duckdb").is_symlink()


def test_a_kill_in_mid_write_leaves_whole_chains(tmp_path):
    rng = random.Random(time.time())
    memory, done = a_memory(tmp_path), []
    for first in (1000, 2000):
        [end], said, _ = fork("-c", memory.path, 999, first, rng.uniform(1e-3, 0.3), code=WRITER)
        assert end == -signal.SIGKILL
        done += said.splitlines()
    stored = {row["text"] for row in memory.vectors(positions="questions")[1]}
    assert len(done) > 3
    for i in map(int, done):
        assert (a_chain(i)[1]["question"] in stored) == (i % 5 > 0), "what was said to be stored is, or is forgotten"
    with memory.open() as (connection, _):
        counts = connection.execute("SELECT id, len(steps), (SELECT count(*) FROM latents WHERE chain = id) FROM texts")
        assert all(n == 1 + steps for _, steps, n in counts.fetchall())
        assert connection.execute("SELECT count(*) FROM latents WHERE chain NOT IN (SELECT id FROM texts)"
                                  ).fetchall() == [(0,)]


# what is personal stands in «»; "~" keeps scanners of repositories quiet and is taken out
PERSONAL = {
    "EMAIL": ["Write to «ann.lee@example.com» by noon.",
        "My mail is «o'brien+maths@mail.example.co.uk», 12 + 5 = 17 is the answer",
        "<«J_Smith99@sub-domain.example.org»>", "mailto:«teacher@school.edu»?subject=homework",
        "contact:«x@example.io»;", "Tom («tom-2024@students.uni-berlin.de») has 3 apples",
        "E-Mail «müller@beispiel.de»!", "«CAPS.LOCK@EXAMPLE.COM» says 2+2=4",
        "ask\n«very.long.name.with.dots@very.long.example.museum»\nfor help", "user=«a.b%2bc@example.net»&n=3"],
    "PHONE": ["Call «+1 650-253-0000» after 5", "my number is «(212) 555-0187»", "tel. «+44 20 7946 0958», thanks",
        "Ring «+49 30 901820» now", "WhatsApp «+91 98765 43210»", "phone: «415-555-2671»",
        "Reach me at «+33 6 12 34 56 78».", "mobile «+86 138 0013 8000» or so",
        "She has 4 pens, her cell is «+16502530000»", "fax «1-800-356-9377»",
        "call «617.495.1000» if 3 apples are left", "Rufen Sie «0049 89 636 48018» an", "ring «12 34 56 78» at 9",
        "or call «030 / 12 34 56 78»", "call «650 - 253 - 0000»", "ring «089 - 123 - 4567»"],
    "CARD": ["card «4111 1111 1111 1111»", "I paid with «5555555555554444» for 3 books", "Amex «3782 822463 10005»",
        "number: «6011-1111-1111-1117» exp 12/27", "«378282246310005»", "visa=«4012888888881881»,",
        "my debit card is «5105-1051-0510-5100».", "Diners «30569309025904» please", "JCB «3530 1113 3330 0000»",
        "UnionPay «6200000000000005»", "copied: «4111\u00a01111\u00a01111\u00a01111»"],
    "IBAN": ["pay to «DE89 3704 0044 0532 0130 00»", "IBAN: «GB29NWBK60161331926819».",
        "account «FR14 2004 1010 0505 0001 3M02 606» gets $20", "(«NL91ABNA0417164300»)",
        "Konto «CH93 0076 2011 6238 5295 7», danke", "iban «es9121000418450200051332»",
        "«AT61 1904 3002 3457 3201» is mine", "IBAN=«PL61109010140000071219812874»",
        "send it to «NO93 8601 1117 947» today", "banca: «IT60-X054-2811-1010-0000-0123-456»"],
    "IP": ["server at «192.168.1.17»", "from «203.0.113.9»:8080 came 3 requests", "ping «8.8.8.8»",
        "host [«2001:db8::ff00:42:8329»]", "«10.0.0.1» is down", "IPv6 «fe80::1ff:fe23:4567:890a»",
        "address «2001:0db8:85a3:0000:0000:8a2e:0370:7334».", "(ip=«172.16.254.1»)", "http://«198.51.100.23»/login",
        "«192.0.2.0»/24 is the net"],
    "KEY": ["export AWS_ACCESS_KEY_ID=«AK~IAIOSFODNN7EXAMPLE»",
        "token «gh~p_16C7e42F292c6912E7710c838347Ae178B4a» leaked",
        "OPENAI_API_KEY=«sk~-abcdefghijklmnopqrstT3BlbkFJabcdefghijklmnopqrst»",
        "key: «sk~-proj-Zx8_kQ2mN5vB7wR1tY4uE9oP3aS6dF0gH-jKlMnBvCxZ»",
        "my «sk~-ant-api03-QmFzZTY0RW5jb2RlZFRleHRGb3JUZXN0aW5n-Ab12» does not work",
        "login with «hf~_aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH»", "maps key «AI~zaSyA1bC2dE3fG4hI5jK6lM7nO8pQ9rS0tU1v»",
        "slack «xo~xb-123456789012-1234567890123-abcdefghijklmnopqrstuvwx»",
        "stripe «sk~_live_4eC39HqLyjWDarjtT1zdp7dc» charge 3",
        "Authorization: Bearer "
        "«ey~JhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U»",
        "«-----BEGIN RSA ~PRIVATE KEY-----\nMIIEowIBAAKCAQEAx8n1\nq2w3e4r5t6y7u8i9\n"
        "-----END RSA PRIVATE KEY-----»\nis my key",
        "use «gl~pat-x1Y2z3A4b5C6d7E8f9G0» for CI", 'secret_key = "«wJal~rXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY»"',
        "my password: «7*3kQz!x»", "password is «ab1*23xyz»", "my password is «9^8hunter»"]}
PERSONAL = [(kind, re.sub("[«»~]", "", text), re.search("«(.*)»", text, re.DOTALL)[1].replace("~", ""))
            for kind, texts in PERSONAL.items() for text in texts]  # kind, text, what must go
HARMLESS = [
    "12345678901 apples were sold.", "The population is 7,894,561,230 people.", "She has 4111 stamps and 1111 coins.",
    "48/2 = 24, so 48+24 = 72 clips.", "555-0100 is -99455? No: 555-100 = 455.", "1000 - 200 - 300 = 500",
    "2024-11-22 is a date, 22.11.2024 and 11/22/2024 too", "from 9:30 to 10:45:30 she worked",
    "version 1.2.3 is older than 1.10.0", "Python 3.11.7 with torch 2.13.0 on 2 cores", "3.14159265358979323846",
    "0.333333333333333333", "1/3 + 2/3 = 3/3 = 1", "(3 + 4) * (5 - 2) = 21", "100000000000000 grains of sand",
    "5000000000 * 2 = 10000000000", "$1,234,567.89 - $234,567.89 = $1,000,000", "x = 650 - 253 - 0 = 397",
    "Each of 800 boxes weighs 356 g, 9377 in all?", "10 20 30 40 50 60 70 80 90 100", "1 2 3 4 5 6 7 8 9 10 11 12",
    "2, 3, 5, 7, 11, 13, 17, 19, 23, 29", "1 1 2 3 5 8 13 21 34 55 89 144", "1+2+3+4+5+6+7+8+9+10 = 55",
    "6 022 140 760 000 000 000 000 molecules", "6.02214076e23 particles, 1.6e-19 C", "2^64 = 18446744073709551616",
    "12! = 479001600 and 15! = 1307674368000", "7 * 11 * 13 = 1001", "1234567890 / 10 = 123456789",
    "9876543210 - 123456789 = 9753086421", "the ratio 3:4:5 is Pythagorean", "a::b::c in C++ and std::vector",
    "at 12:34:56 the clock stopped", "section 4.3.2.1 of the rules? no, section 4.3", "ISBN 978-3-16-148410-0",
    "years 1990-1999, 2000-2009 and 2010-2019", "pages 123-456, lines 7890-7900", "Class 5-B, room 212, seat 187",
    "He ran 26.2 miles in 3:59:40", "A@B is not a mail, 5 @ $3 each is $15", "3 apples @ 2.50 = 7.50",
    "f(x) = x@2 and user@ localhost", "#### 4111", "#### 1,234,567", "<<12*12345678=148148136>>148148136",
    "<<2500000000*4=10000000000>>10000000000 dollars", "120-60-30-15 = 15", "200+300-400+500-600 = 0",
    "4.5 x 10.25 = 46.125", "DE is Germany, GB is Britain, 89 + 29 = 118", "AB12 CD34 are seats",
    "the code sk-8 and model sk-ii cream", "let hf_x = 3 and ghp = 2", "key = value, token = 3, secret = 5",
    "The secret is 12; the password has 8 letters.", "AIza is a name? AKIA too", "0101 1100 1111 0000 in binary",
    "0xDEADBEEF = 3735928559", "32 bits: 11110000111100001111000011110000", "It costs 1.299,00 EUR",
    "20% of 50 = 10, 33.33% of 300 = 99.99", "Ann has 3 bags: 12-15-18 marbles.", "1999 2000 2001 2002 were good years",
    "temperatures -3, -5, -10 and +12 degrees", "Divide 1000000000000066 by 2", "4/12 * 100 = 33.33%",
    "latitude 52.5200, longitude 13.4050", "The phone costs 1382 - 202 - 231 - 63 = 886", "小明有3支笔，又买了4支？",
    "The phone costs 1000 - 200 - 150 + 50 = 700", "They began to call on 12/25/2024 3 people",
    "a text of 2024-11-22 10:30", "4-digit passwords=10*10*10*10=10000", "The password is 26*26*26 = 17576",
    "The phone costs 1500 - 1200 dollars", "call on 12.05.2024", "A phone made in 2019 - 2021", "Phone (2020-2021)",
    "The text has 12345678 words", "The phone made 10000000 dollars", "a text to 1000 / 2000 people"]


def test_redaction_of_a_table():
    assert [text for text in HARMLESS if mem.redact(text) != (text, 0)] == []
    found = [(kind, secret, mem.redact(text)[0]) for kind, text, secret in PERSONAL]
    assert [text for kind, secret, text in found if secret in text or f"[{kind}]" not in text] == []
    everything = "\n".join(text for _, text, _ in PERSONAL)
    assert mem.redact(everything)[1] >= len(PERSONAL)
    assert mem.redact(mem.redact(everything)[0])[1] == 0


def test_redaction_takes_a_time_linear_in_the_text():
    start = time.process_time()
    assert mem.redact("-eyJ" * 50_000)[1] == 0 and time.process_time() - start < 20


def test_no_personal_data_reach_the_disk(tmp_path):
    memory = a_memory(tmp_path)
    for name in ("EMAIL", "PHONE", "CARD", "IBAN", "IP", "KEY"):
        texts = [text for kind, text, _ in PERSONAL if kind == name]
        memory.log("demo", texts[0], texts, answer=texts[1], extra={"note": texts[2]})
    raw = bytes_beside(memory.path)
    assert b"[EMAIL]" in raw and b"[KEY]" in raw
    assert [secret for *_, secret in PERSONAL if secret.encode() in raw] == []
    row = memory.interactions()[0]
    assert row["redactions"] == 13 and row["question"] == row["steps"][0] == "Write to [EMAIL] by noon."
    with pytest.raises(ValueError) as caught:
        memory.log("demo", "2+2?", ["2+2 = 4"], truth="ann.lee@example.com")
    assert "ann.lee" not in str(caught.value)


def test_problems_are_not_redacted():
    rows = verify.read_jsonl(shared_data("gsm8k/test.jsonl"))[::8]
    assert [r for r in rows if mem.redact(f"{r['question']}\n{r['answer']}")[1]] == []


def test_a_test_question_is_left_out_as_it_was_logged(tmp_path):
    memory = a_memory(tmp_path)
    questions = ["小明有3支笔，又买了4支，一共几支？", "Ann (call 650-253-0000) has 3 pens, gets 4?"]
    for question in questions:
        memory.log("demo", question, ["3+4 = 7", "#### 7"], truth="7")
    tests = write_jsonl(tmp_path / "test.jsonl", [{"question": q} for q in questions])
    assert memory.export(tmp_path / "out.jsonl", without=(tests,))["left_out"] == 2


def test_logged_and_stored_chains_of_a_problem_share_its_split(tmp_path):
    memory = a_memory(tmp_path, 60)
    for i in range(60):
        problem, chain, _ = a_chain(i)
        memory.log("demo", chain["question"], ["So " + chain["steps"][0], *chain["steps"][1:]], truth=problem["answer"])
    assert memory.export(tmp_path / "out.jsonl", remembered=True)["chains"] == 120
    splits = {}
    for r in latents.chains_of_file(str(tmp_path / "out.jsonl"), "chains"):
        splits.setdefault(r["question"], []).append(r["split"])
    assert all(len(of) == 2 and of[0] == of[1] for of in splits.values())
    assert {of[0] for of in splits.values()} == {"train", "val"}


def test_feedback_becomes_chains(tmp_path):
    memory, steps = a_memory(tmp_path), ["3 + 4 = 7 pens", "#### 7"]
    good = memory.log("demo", "Tom has 3 pens and gets 4?", steps, truth="7", answer="7")
    twice = memory.log("demo", "Tom has 3 pens and gets 4?", steps, truth="7")
    wrong = memory.log("demo", "Ann has 3 pens and gets 5?", steps, truth="8")
    down = memory.log("demo", "Bob has 3 pens and gets 4?", steps, truth="7", rating="down")
    later = memory.log("demo", "Eva has 3 pens and gets 4?", steps)
    slip = memory.log("demo", "Leo has 3 pens and gets 4?", ["3 + 4 = 8", "#### 7"])
    secret = memory.log("demo", "How many?", ["4111111111111111 = 4111111111111111", "#### 4111111111111111"],
                        truth="4111111111111111 or 5")
    verdicts = {row["id"]: (row["is_valid"], row["reason"]) for row in memory.interactions()}
    assert [verdicts[i] for i in (good, twice, wrong, down, later, slip)] == [
        (True, "ok"), (True, "ok"), (False, "wrong_answer"), (True, "ok"), (False, "unverified"), (False, "arithmetic")]
    assert not verdicts[secret][0]

    def exported(**kw):
        result = memory.export(tmp_path / "chains.jsonl", **kw)
        rows = verify.read_jsonl(tmp_path / "chains.jsonl")
        assert result["chains"] == len(rows)
        return [row["question"][:3] for row in rows]

    assert exported() == ["Tom"]
    memory.rate(later, "up", truth="7")
    memory.rate(down, "up")
    assert exported() == ["Tom", "Bob", "Eva"]
    memory.rate(good, "up")
    memory.rate(twice, "down")
    assert exported() == ["Bob", "Eva"] and len(memory.interactions(later)) == 2
    remember(memory, *a_chain(1))
    assert exported(remembered=True) == ["Bob", "Eva", "Tom"]
    records = latents.chains_of_file(str(tmp_path / "chains.jsonl"), "chains")
    assert len(records) == 3 and all(r["is_valid"] and r["split"] in ("train", "val") for r in records)
    assert verify.check_chains(tmp_path / "chains.jsonl")["accepted"] == 3
    test = latents.record(a_chain(9)[1] | {"is_valid": True}, "dev-9", "test")  # with leave, and a test chain for ever
    write_latents(tmp_path / "l", [(test, a_chain(9)[2])], dataset="candidates", split="test", **ORIGIN)
    argv = ["--latents", tmp_path / "l", "--allow_test", "--memory", memory.path]
    assert result_of(mem.main, "remember", *argv)["remembered"] == 1
    assert exported(remembered=True) == ["Bob", "Eva", "Tom", "Tom"]
    records = latents.chains_of_file(str(tmp_path / "chains.jsonl"), "chains")
    assert {r["problem_id"] for r in records if r["split"] == "test"} == {"candidates-test-dev-9"}
    refused(ValueError, "nobody", memory.rate, "nobody", "up")
    refused(ValueError, "sideways", memory.rate, good, "sideways")


def test_memory_command_line(tmp_path, monkeypatch):
    path, folder = tmp_path / "m.duckdb", tmp_path / "latents"

    def use(*argv, memory=path):
        return result_of(mem.main, *argv, "--memory", memory)

    def folder_of(split, wrong=False):
        chains = [a_chain(i) for i in range(4)]
        for _, chain, _ in chains if wrong else ():
            chain["steps"] = [*chain["steps"][:-1], "#### 999"]
        write_latents(folder, [(latents.record(c | {"is_valid": i != 2}, p["id"], split), h)
                               for i, (p, c, h) in enumerate(chains)], dataset="toy", split=split, **ORIGIN)

    refused(SystemExit, "2", use, "recall", "--steps", "a")  # what is wrong, stderr says
    for command in ("stats", "recall --question x", "forget --everything", "export", "rate --id x --rating up",
                    "latents"):
        refused(SystemExit, "no such memory", use, *command.split())
    folder_of("test")
    remember = functools.partial(use, "remember", "--latents", folder)
    refused(SystemExit, "test split", remember)
    assert not path.exists()
    def says_otherwise(chain):
        return chain | {"steps": ["Tom buys pens.", f"So Tom has {chain['answer']}9 pens."]}

    write_latents(folder, [(latents.record(says_otherwise(c) | {"is_valid": True}, p["id"], "train"), h[:3])
                           for p, c, h in map(a_chain, range(3))], dataset="toy", split="train", **ORIGIN)
    assert remember()["refused"] == {"wrong_answer": 3}
    folder_of("train", wrong=True)
    assert remember() == {"memory": str(path), "remembered": 0, "new": 0, "refused": {"wrong_answer": 3}}
    assert not path.exists()
    folder_of("train")
    assert remember() == {"memory": str(path), "remembered": 3, "new": 3, "refused": {}}
    read = SimpleNamespace(name="toy", layer=2, step_latents=lambda question, steps: a_chain(3)[2][: 1 + len(steps)])
    read.origin = lambda: ORIGIN | {"layer": read.layer}
    read.set_prompt = lambda prompt: read
    monkeypatch.setattr("llm.load_llm", lambda name, device, layer, pooling: read)
    for steps in ((), ("--steps", "3+2 = 5")):
        found = use("recall", "--question", "3 pens?", *steps, "--k", 1)["nearest"]
        assert (found[0]["position"], found[0]["question"][:14]) == (len(steps[1:]), "Tom has 3 pens")
    read.layer = 3
    refused(SystemExit, "layer: 2 there, 3 here", use, "recall", "--question", "3 pens?")
    logged = use("log", "--kind", "cli", "--question", "3 + 4? ann@example.com", "--steps", "3+4 = 7",
                 "#### 7", "--truth", 7)
    assert (logged["is_valid"], logged["reason"], logged["redactions"]) == (True, "ok", 1)
    assert use("export", "--out", tmp_path / "f.jsonl")["chains"] == 1
    refused(SystemExit, "rate needs the --id", use, "rate", "--rating", "up", "--truth", 7)
    assert use("rate", "--id", logged["id"], "--rating", "up")["truth"] is None
    assert use("forget", "--domain", "toy") == {"forgotten": 3}
    refused(SystemExit, "nothing forgotten", use, "forget", "--domain", "toys")  # misspelt
    assert use("stats")["interactions"] == {"ok": 1}
    refused(SystemExit, "--truth two: holds no number", use, "log", "--kind", "cli", "--question", "q", "--steps", "2",
            "--truth", "two")
    refused(SystemExit, f"{tmp_path} is a folder", use, "stats", memory=tmp_path)
    assert use("forget", "--everything", memory=shutil.copy(path, tmp_path / "new.duckdb")) == {"forgotten": 1}
    write_jsonl(tmp_path / "no.duckdb", [{"a": 1}] * 999)
    refused(SystemExit, "no.duckdb is no memory", use, "stats", memory=tmp_path / "no.duckdb")
