"""The demo: handlers, the running app through its API, and in Chromium.

    pytest test_demo.py
    python test_demo.py      # the pictures of README: every tab into assets/demo-*.png

What needs the models of pretrained/, gradio_client or Chromium is skipped where they are missing.
"""

import contextlib
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
import torch

import infer
import llm as llms
import main
import pictures
from memory import Memory
from runs import is_run
from test_core import refused

HERE = Path(__file__).parent
WORLD = "pretrained/rjepa-student"
FOLDERS = ["pretrained/student", WORLD, f"{WORLD}-guide", f"{WORLD}-speak", "pretrained/nanojepa-small",
           "pretrained/tjepa-small"]  # fmt: skip
EVIL = ["<script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>",
        "<b><i></b></i <svg/onload=alert(1)>", "${window.hacked=1}", "{{window.hacked=1}}",
        "<a href='javascript:alert(1)'>x</a>"]  # fmt: skip


@pytest.fixture(scope="session")
def models():
    if not all(is_run(HERE / folder) for folder in FOLDERS):
        pytest.skip("the models of pretrained/ are not all here")


@pytest.fixture(scope="module")
def demo(models, tmp_path_factory):
    with contextlib.chdir(HERE):
        yield main.Demo(main.Args(memory=str(tmp_path_factory.mktemp("demo") / "memory.duckdb"), device="cpu"))


def last(generator):
    """(picture, line, result) that a handler ends with."""
    return list(generator)[-1]


# ----------------------------------------------------------------------------- without models


def test_every_text_is_escaped():
    for evil in EVIL:
        whole = "".join((pictures.listed([evil]), pictures.bars([(evil, 0.5)]), pictures.chip(evil, evil),
                         pictures.figures(x=evil),
                         pictures.scatter([(0, 0, "good", evil), (1, 1, "bad", evil)]), pictures.changed([], [evil]),
                         pictures.mask_picture([evil], torch.ones(1, 1, dtype=torch.bool))))  # fmt: skip
        kinds = set("ol li span div b p svg circle polygon title text rect mark".split())
        assert set(re.findall(r"<(\w+)", whole)) <= kinds and (evil not in whole or "<" not in evil)
    assert pictures.tag("p", pictures.tag("b", "<"), "&") == "<p><b>&lt;</b>&amp;</p>"
    assert pictures.tag("p", class_='"><script>') == '<p class="&quot;&gt;&lt;script&gt;"></p>'


@pytest.mark.parametrize("bad", [None, "", "  \n", "a" * 2001, 7, ["a"], {"a": 1}, "half \ud800"])
def test_questions_are_checked(bad):
    refused(ValueError, "question", main.text_of, "question", bad, main.LIMITS["question"])


def test_steps_and_numbers_are_checked():
    assert main.CHECKED["steps"](" a \n\n b\r\nc") == ["a", "b", "c"]
    for bad in ("\n".join("a" * 13), "a" * 501, 3, ["a"]):
        refused(ValueError, "step", main.CHECKED["steps"], bad)
    assert main.number("k", 8) == 8 and main.number("top_p", 1, False) == 1.0
    for bad in (0, 9, 2.5, float("nan"), float("inf"), -1, "3", None, True, [1], 10**400):
        refused(ValueError, "k: must be", main.number, "k", bad)


def test_marked_are_the_words_that_the_other_chain_has_not():
    assert pictures.changed(["a b", "c"], ["a x", "c d"]).count("<mark>") == 2
    assert "<mark>x</mark>" in pictures.changed(["a b", "c"], ["a x", "c d"])
    assert "<mark>" not in pictures.changed(["a b", "c"], ["a b", "c"])


def test_other_hosts_ask_for_a_password(capsys):
    for given, message in (({"host": "0.0.0.0"}, "--auth"), ({"host": "::"}, "--auth"), ({"port": 99999}, "port"),
                           ({"auth": "ann"}, "USER:PASSWORD"), ({"auth": ":x", "host": "0.0.0.0"}, "USER:PASSWORD")):
        refused(ValueError, message, main.Args, **given)
    refused(SystemExit, None, main.main, ["--host", "0.0.0.0"])
    assert "add --auth" in capsys.readouterr().err and main.Args(host="0.0.0.0", auth="ann:secret").auth
    refused(SystemExit, "no-such-run", main.main, ["--run", "no-such-run"])


def test_a_missing_model_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(main, "WORLDS", {"nowhere/world": "python train.py rjepa-small"})
    monkeypatch.setattr(main, "OTHERS", {k: ("nowhere/" + k, f"python train.py {k}") for k in ("nano", "tjepa")})
    empty = main.Demo(main.Args(memory=str(tmp_path / "m"), device="cpu"))
    page = str(main.build(empty).get_config_file())
    for part in ("nowhere/world is missing", "python train.py nano", "python train.py tjepa"):
        assert part in page
    for call in (empty.score("nowhere/world", "q", "s"), empty.nano("q", "", 8), empty.speak("q", 0, 1, 8)):
        refused(gr.Error, "is missing. This makes it: python train.py", last, call)


def test_stop_ends_the_writing(monkeypatch):
    steps, state = ["a", "b"], SimpleNamespace(tokens=0)

    def slow(llm, questions, k, nudge=None, **options):
        nudge.begin([SimpleNamespace(ids=[0], llm=llm)] * k)
        for state.tokens in range(1000):  # noqa: B007
            nudge.move(None, None, [])
            time.sleep(0.01)

    watch = main.Watch()
    monkeypatch.setattr(main, "generate", slow)
    shown = watch.run(SimpleNamespace(decode=lambda ids: "\n".join(steps), end_of_turn=None), "q", 2)
    assert next(shown) in ([], [steps, steps]) and next(shown) == [steps, steps]
    shown.close()
    assert state.tokens < 900 and watch.chains is None


# ----------------------------------------------------------------------------- handlers, with the models


def test_plan_does_without_a_memory_that_holds_ratings_alone(models, tmp_path):
    kept = tmp_path / "memory.duckdb"
    Memory(kept).log("demo", "How many?", ["1+1 = 2"], rating="up")
    with contextlib.chdir(HERE):
        h, texts = main.Demo(main.Args(memory=str(kept), device="cpu")).verified(WORLD)
    assert len(h) == len(texts) > 0


def test_score_is_infers(demo):
    question, steps, _, known = demo.examples["1b · wrong from step 4 on"]
    picture, line, result = last(demo.score(WORLD, question, steps))
    model, llm, _ = demo.world(WORLD)
    assert infer.score(model, llm, question, steps.split("\n")).items() <= result.items()
    assert result["known_wrong_step"] == known == 4 and "known to be wrong" in picture and line.startswith("cpu")
    assert result["arithmetic"] == [""] * len(result["steps"])
    assert "✗ arithmetic" in last(demo.score(WORLD, question, "2+2 = 5"))[0]


def test_rerank_streams_and_ranks(demo, monkeypatch):
    monkeypatch.setattr(main, "wait", lambda jobs, seconds: wait(jobs, 0.01))  # it looks often while they are written
    question = demo.examples["1a · right, 5 steps"][0]
    *early, (picture, _, result) = demo.rerank(WORLD, question, 3, 0.8, 0.95, 1, 64, 2, 3)
    model, llm, _ = demo.world(WORLD)
    chains = llms.generate(llm, [question], 3, 0.8, 0.95, 1, 64)[0]
    expected = infer.rerank(model, chains, 2, 3)
    assert [c["steps"] for c in result["candidates"]] == [c["steps"] for c in expected]
    assert [c["score"] for c in result["candidates"]] == pytest.approx([c["score"] for c in expected], abs=1e-4)
    assert result["picks"]["logprob"] == 1 + max(range(3), key=lambda i: chains[i]["logprob"])
    assert set(result["picks"]) == {"majority", "logprob", "JEPA", "score", "gate"}
    assert all(r is None for _, _, r in early) and "candidate 3 · writing" in early[-1][0]
    assert picture.count("’s pick") == 5
    monkeypatch.setattr(infer, "rerank", lambda *args, **options: [{"steps": []}])
    refused(gr.Error, "no candidate has a step", last, demo.rerank(WORLD, question, 1, 0.8, 0.95, 1, 8, 2, 3))


def test_nudge_is_infers_and_alpha_0_is_the_llm(demo):
    question = demo.examples["2a · right, 4 steps"][0]
    _, _, none = last(demo.nudge(WORLD, question, 0, "bias", 0, 0.95, 1, 64))
    assert none["own"] == none["nudged"]
    _, _, some = last(demo.nudge(WORLD, question, 10, "bias", 0, 0.95, 1, 64))
    model, llm, _ = demo.world(WORLD)
    guide = infer.load_beside(WORLD, "", "guide", "cpu")[0]
    expected = infer.nudge(model, llm, question, 10, guide, max_new_tokens=64)
    assert all(some[k]["steps"] == expected[k]["steps"] for k in ("own", "nudged"))
    assert len(some["own"]["energies"]) == len(some["own"]["steps"])


def test_plan_fills_the_place_it_is_given(demo):
    question, steps, _, _ = demo.examples["1c · step 2 left out"]
    for decode in ("speaker", "llm"):
        picture, _, result = last(demo.plan(WORLD, question, steps, decode, 2, 48))
        assert len(result["steps"]) == 1 + len(steps.split("\n")) and result["filled"][0]["step"] == 2
        assert len(result["filled"][0]["nearest"]) == 3 and "put into words" in picture


def test_nano_tjepa_and_map(demo):
    question = demo.examples["1a · right, 5 steps"][0]
    _, _, result = last(demo.nano(question, demo.candidates(), 48))
    assert len(result["alignment"]) in (3, 4) and all(-1 <= a["cos"] <= 1 for a in result["alignment"])
    _, _, result = last(demo.think(question, 3))
    assert len(result["nearest"]) == 3
    *early, (_, _, result) = demo.speak(question, 0, 1, 60)
    run, model, _, tokenizer = demo.other("tjepa")
    assert result["response"] == tokenizer.decode(model.generate([tokenizer.encode(question)], 60)[0])
    picture, _, result = last(demo.latent_map(WORLD, 5))
    assert {p["kind"] for p in result["points"]} == {"verified", "wrong", "after"} and picture.count("<title>") > 20


def test_feedback_is_opt_in_and_redacted(demo):
    question, steps, answer, _ = demo.examples["1a · right, 5 steps"]
    _, _, result = last(demo.score(WORLD, question + " Ask ann@example.com.", steps))
    refused(gr.Error, "agree", demo.feedback, "up", result, False, answer)
    assert not Path(demo.args.memory).exists()
    assert "1 redaction" in demo.feedback("up", result, True, answer)
    assert "(unverified)" in demo.feedback("up", result | {"question": question}, True, answer)  # its own test problem
    wrong = last(demo.score(WORLD, question, "2+2 = 5\n#### 5"))[2]
    assert "does not pass" in demo.feedback("down", wrong, True, "")
    first, _, second = Memory(demo.args.memory).interactions()
    assert "ann@" not in first["question"] and (first["rating"], first["is_valid"]) == ("up", True)
    assert (second["rating"], second["is_valid"]) == ("down", False)
    for bad in (None, [], {"steps": 3}, {"steps": [1], "question": "q", "kind": "x"}, {"steps": ["a"], "question": 3}):
        refused(gr.Error, None, demo.feedback, "up", bad, True, "")


# ----------------------------------------------------------------------------- the running app


@contextlib.contextmanager
def serving(memory):
    """A running demo: its address. It must be alive at the end, and nothing in this folder may have crashed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "main.py", "--port", str(port), "--memory", str(memory)], cwd=HERE,
                                   stderr=log, stdout=log)  # fmt: skip
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/").status_code == 200:
                        break
                assert process.poll() is None, log.seek(0) or log.read()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
            assert process.poll() is None, "the server has ended"
        finally:
            process.terminate()
            process.wait(20)
        log.seek(0)
        assert f'File "{HERE}' not in (said := log.read()), said


@pytest.fixture(scope="module")
def url(models, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server") / "memory.duckdb") as address:
        yield address


def test_api(url, demo):
    client = pytest.importorskip("gradio_client").Client(url, verbose=False)
    readme = (HERE / "README.md").read_text()
    example = re.search(r'demo\.predict\("(.*?)", "(.*?)",\s*"(.*?)", api_name="/score"\)', readme, re.DOTALL)
    picture, line, result = client.predict(*(part.replace("\\n", "\n") for part in example.groups()), api_name="/score")
    assert len(result["steps"]) == 2 and "✗ arithmetic" in picture and line.endswith(" s")
    json.dumps(result, allow_nan=False)
    question = demo.examples["1a · right, 5 steps"][0]
    job = client.submit(WORLD, question, 2, 0.8, 0.95, 1, 48, 0, 0, api_name="/rerank")
    assert len(job.result(60)[2]["candidates"]) == 2
    for bad, api, message in (
        ((WORLD, "x" * 2001, "s"), "score", "at most 2,000"), ((["/etc"], "q", "s"), "score", "none of"),
        ((WORLD, {"a": 1}, "s"), "score", "expected a text"), ((WORLD, "", "s"), "score", "empty"),
        ((WORLD, "q", 99, 1, 1, 1, 9, 1, 1), "rerank", "k: must be a number from 1 to 8"),
    ):
        refused(Exception, message, client.predict, *bad, api_name=f"/{api}")
    assert client.predict(WORLD, question, "2+2 = 4", api_name="/score")[2]["suspect"] == 1


def call(url, api, values, raw=None) -> str:
    """Everything that a request to the API is answered with."""
    with httpx.Client(timeout=120) as http:
        address = f"{url}/gradio_api/call/{api}"
        body = json.dumps({"data": values}).encode() if raw is None else raw
        sent = http.post(address, content=body, headers={"content-type": "application/json"})
        if sent.status_code != 200:
            return f"{sent.status_code} {sent.text}"
        return http.get(f"{address}/{sent.json()['event_id']}").text


def test_random_requests_16_at_a_time(url):
    rng = random.Random(0)
    question = "Mia has 3 red apples. Tom has twice as many. How many?"
    good = {"score": [WORLD, question, "2+2 = 4"], "rerank": [WORLD, question, 2, 1, 1, 1, 16, 1, 1],
            "nudge": [WORLD, question, 1, "bias", 0, 1, 1, 16], "plan": [WORLD, question, "a\nb", "speaker", 1, 8],
            "nano": [question, "4\n\n5", 8], "think": [question, 2], "speak": [question, 0, 1, 8],
            "latent_map": [WORLD, 5], "load": [WORLD]}  # fmt: skip
    odd = [None, "", "q", *EVIL, "x" * 3000, "é" * 400, "\ud800", "\x00", 0, -1, 1.5, 1e308, 10**30, True, [], [[1]],
           {}, {"path": "/etc/passwd"}, "12", "bias", "speaker", "2+2 = 4\n#### 4", "\n" * 50]  # fmt: skip

    def one(_):
        api = rng.choice(list(good))
        values = [rng.choice(odd) if rng.random() < 0.3 else v for v in good[api]]
        return api, values, rng.choice([None] * 12 + [b"", b"{", b"[]", b'{"data": 3}', b"\xff" * 99])

    requests = [one(i) for i in range(200)]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda r: call(url, *r), requests))
    assert all(replies) and not any("Traceback" in r or "File \"" in r for r in replies)
    assert sum("event: complete" in r for r in replies) > 30 and sum("event: error" in r for r in replies) > 30
    assert "suspect" in call(url, "score", good["score"])


# ----------------------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TABS = {"Score": ["score"], "Rerank": ["rerank"], "Nudge": ["nudge"], "Plan": ["plan"], "nanoJEPA": ["nano"],
        "T-JEPA": ["think", "speak"], "Latent map": ["latent_map"]}  # fmt: skip


@contextlib.contextmanager
def browser(url, width=1100, dark=False):
    """A page of the demo, and what went wrong in it: errors, requests to other machines, dialogs."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        if CHROMIUM is None and not Path(p.chromium.executable_path).exists():
            pytest.skip("no Chromium here")
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, wrong = chromium.new_page(viewport={"width": width, "height": 800}), []
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("dialog", lambda d: (wrong.append(f"dialog {d.message}"), d.dismiss()))

        def route(route):
            if route.request.url.startswith((url, "data:", "blob:")):
                return route.continue_()
            wrong.append(route.request.url)
            route.abort()

        page.route("**/*", route)
        page.goto(f"{url}/?__theme={'dark' if dark else 'light'}")
        page.wait_for_selector("#run-score")
        yield page, wrong
        chromium.close()


def open_tab(page, name):
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        return tab.first.click()
    page.locator(".overflow-menu > button").click()  # what a narrow page has no room for
    page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()


def use(page, name):
    """Presses a button and waits for its result."""
    page.locator(f"#run-{name}").click()
    page.wait_for_function(r"""name => { const line = document.querySelector(`#line-${name} :is(input, textarea)`);
        return line && / \d+\.\d\d s$/.test(line.value) && !line.value.includes('…') }""", arg=name, timeout=60_000)


def choose(page, example):
    was = page.locator("#steps textarea").input_value()
    page.locator("#example input").click()
    page.get_by_role("option", name=example).click()
    page.wait_for_function("was => document.querySelector('#steps textarea').value != was", arg=was)


def test_every_tab_in_a_browser(url):
    with browser(url) as (page, wrong):
        for tab, names in TABS.items():
            open_tab(page, tab)
            for name in names:
                use(page, name)
                assert page.locator(f"#picture-{name}").inner_text().strip()
        open_tab(page, "Score")
        page.get_by_text("Result as JSON").locator("visible=true").first.click()
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save as a file").locator("visible=true").click()
        assert json.loads(Path(saved.value.path()).read_text())["kind"] == "score"
        page.get_by_role("button", name="👍 up").locator("visible=true").click()
        page.get_by_text("agree to it first").wait_for()
        assert not wrong


def test_html_is_shown_as_text(url):
    with browser(url) as (page, wrong):
        page.locator("#question textarea").fill(" ".join(EVIL))
        page.locator("#steps textarea").fill("\n".join(EVIL))
        use(page, "score")
        assert all(evil in page.locator("#picture-score").inner_text() for evil in EVIL)
        page.get_by_text("Result as JSON").locator("visible=true").click()
        page.get_by_text("known_wrong_step").locator("visible=true").wait_for()
        open_tab(page, "nanoJEPA")
        page.locator("#candidates textarea").fill("\n\n".join(EVIL))
        page.locator("#candidates textarea").press("Tab")  # the field has been left: what is in it counts
        use(page, "nano")
        assert EVIL[0] in page.locator("#picture-nano").inner_text()
        open_tab(page, "Score")
        page.locator("#question textarea").fill(EVIL[1] * 40)  # too many tokens: the message quotes it
        page.locator("#run-score").click()
        page.get_by_text("more than the context").wait_for()
        page.locator("#steps textarea").fill("a\n" * 13)
        page.locator("#run-score").click()
        page.get_by_text("at most 12 are read").wait_for()
        page.wait_for_timeout(300)
        assert page.evaluate("window.hacked === undefined")
        assert page.locator("img[src=x], svg[onload], a[href^=javascript]").count() == 0 and not wrong


def test_a_full_queue_says_so(url):
    """The last test: the server is ended with what waits."""
    values = [WORLD, "Mia has 3 red apples. Tom has twice as many. How many?", 8, 1, 1, 1, 256, 0, 0]
    replies = [httpx.post(f"{url}/gradio_api/call/rerank", json={"data": values}) for _ in range(48)]
    assert {r.status_code for r in replies} == {200, 503} and all(r.status_code == 200 for r in replies[:16])
    assert "Queue is full" in next(r.text for r in replies if r.status_code == 503)


# ----------------------------------------------------------------------------- pictures for README


def shoot(folder="assets"):
    from PIL import Image

    def save(page, name):
        path = Path(folder) / f"demo-{name}.png"
        page.mouse.move(0, 0)
        page.wait_for_timeout(900)
        page.screenshot(path=path, full_page=True)
        Image.open(path).convert("RGB").quantize(160).save(path, optimize=True)
        print(path, path.stat().st_size)

    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary) / "memory.duckdb") as url:
        for width, dark, suffix in ((1100, False, ""), (1100, True, "-dark"), (390, False, "-phone")):
            with browser(url, width, dark) as (page, wrong):
                choose(page, "1b")
                for tab, names in TABS.items() if not suffix else [("Score", ["score"])]:
                    if tab == "Plan":
                        choose(page, "1c")
                    open_tab(page, tab)
                    if tab == "Nudge":
                        page.get_by_label("number input for α").fill("4")
                    if tab == "Plan":
                        page.get_by_label("before which step").fill("2")
                    for name in names:
                        use(page, name)
                    save(page, tab.lower().replace(" ", "-") + suffix)
                assert not wrong, wrong


if __name__ == "__main__":
    shoot(*sys.argv[1:])
