"""Every data set by name: where it lies, its official fields and splits, how it is put to a language model.

A row becomes a problem {"id", "question", "answer", "kind"} with what its kind needs beside it:

    number   a chain of steps that ends in a number               exact match by value (verify.check_answer)
    math     LaTeX, the answer in \\boxed{}                        equivalence (verify.check_math)
    choice   "choices", "label"; one of them is right             log-likelihood: acc, acc_norm
    exact    a short answer as a text                             the same text
    code     "prompt", "test", "entry_point"                      runs in the sandbox: pass@k

Multiple choice is put and scored as in lm-evaluation-harness. The others depart from it: `number` has llm.SHOTS before
it, MATH is put as in its minerva_math but with `--shots` of the training split, BBH is zero-shot without descriptions,
HumanEval is completed as in Chen et al. 2021 and, as a chat, put as in EvalPlus.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from pathlib import Path

import verify

OFFICIAL = {"train": "train", "val": "validation", "test": "test"}
VAL_EVERY = 20  # where there is no validation split, every 20th training problem is held out as one
BBH = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()
MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()


@dataclass(frozen=True)
class Benchmark:
    """A data set: its name and configurations on the hub, and what a row of it becomes."""

    hub: str
    kind: str
    fields: tuple[str, ...]  # the official ones that are read
    problem: Callable[[dict], dict]  # row -> problem, without id and kind
    prompt: str = "{question}"  # put to an LLM; `number` has its own few-shot prompt
    _: KW_ONLY
    stop: tuple[str, ...] = ()  # a written answer ends before any of these
    chat: tuple[str, str, tuple[str, ...]] | None = None  # as a chat, where not as `prompt`: turn, answer's begin, stop
    configs: tuple[str | None, ...] = (None,)
    splits: dict = field(default_factory=lambda: OFFICIAL)  # ours -> theirs; val = train: held out of it
    shots: str = ""  # the official split that few-shot examples come from
    intro: str = ""  # before the examples
    max_new_tokens: int = 256  # of an answer, unless told otherwise
    group: Callable[[str], str] = str  # "subject" of a problem -> what the macro average is over


def choice(question: str, choices: list[str], label, subject: str = "") -> dict:
    """A problem of multiple choice; label: the index of the right one, as a number or a text."""
    label = int(label)
    return {"question": question, "choices": list(choices), "label": label, "answer": "ABCDEFGHIJ"[label],
            "subject": subject}


def arc(row: dict) -> dict:
    labels = list(row["choices"]["label"])  # A to E, or 1 to 5
    return choice(row["question"], row["choices"]["text"], labels.index(row["answerKey"]))


def hellaswag(row: dict) -> dict:
    def clean(text: str) -> str:  # WikiHow's markup
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    if row["label"] == "":
        raise ValueError("field 'label' is empty: the labels of this split are not public, those of --split val are")
    question = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return choice(question, [clean(ending) for ending in row["endings"]], row["label"])


def mmlu(row: dict) -> dict:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
    return choice(row["question"].strip() + options, list("ABCD"), row["answer"], row["subject"])


def math(row: dict) -> dict:
    return {"question": row["problem"], "answer": row["solution"], "subject": row.get("type", "")}


def humaneval(row: dict) -> dict:
    return {"id": row["task_id"], "question": row["prompt"], "answer": row["canonical_solution"]} | {
        name: row[name] for name in ("prompt", "test", "entry_point")}


def three_sizes(task: str) -> str:
    """BBH counts the three sizes of two of its tasks as one: 27 files, 23 tasks."""
    return re.sub("_(three|five|seven)_objects$", "", task)


ONLY_TEST = {"test": "test"}
HELD_OUT = {"train": "train", "val": "train", "test": "test"}
BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "number", ("question", "answer"), dict, configs=("main",), splits=HELD_OUT),
    "svamp": Benchmark("ChilleD/SVAMP", "number", ("Body", "Question", "Answer"), lambda row: {
        "question": f"{row['Body']} {row['Question']}", "answer": str(row["Answer"])}, splits=HELD_OUT),
    "math": Benchmark("EleutherAI/hendrycks_math", "math", ("problem", "solution"), math,
                      "Problem:\n{question}\n\nSolution:", stop=("Problem:",), configs=tuple(MATH), splits=HELD_OUT,
                      shots="train", max_new_tokens=1024),
    "mmlu": Benchmark("cais/mmlu", "choice", ("question", "subject", "choices", "answer"), mmlu,
                      "{question}\nAnswer:", configs=("all",), splits=OFFICIAL | {"train": "auxiliary_train"},
                      shots="dev", intro="The following are multiple choice questions (with answers) about {subject}."),
    # zero-shot: the chain-of-thought examples of the paper are no part of the data
    "bbh": Benchmark("SaylorTwift/bbh", "exact", ("input", "target"), lambda row: {
        "question": row["input"], "answer": row["target"]}, "Q: {question}\nA:", stop=("Q:", "\n\n"),
        configs=tuple(BBH), splits=ONLY_TEST, group=three_sizes),
    "arc_easy": Benchmark("allenai/ai2_arc", "choice", ("question", "choices", "answerKey"), arc,
                          "Question: {question}\nAnswer:", configs=("ARC-Easy",), shots="train"),
    "arc_challenge": Benchmark("allenai/ai2_arc", "choice", ("question", "choices", "answerKey"), arc,
                               "Question: {question}\nAnswer:", configs=("ARC-Challenge",), shots="train"),
    "hellaswag": Benchmark("Rowan/hellaswag", "choice", ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
                           hellaswag, shots="train"),
    "humaneval": Benchmark("openai/openai_humaneval", "code", (
        "task_id", "prompt", "canonical_solution", "test", "entry_point"), humaneval,
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```"), splits=ONLY_TEST, max_new_tokens=1024, chat=(
            "Please provide a self-contained Python script that solves the following problem in a markdown code "
            "block:\n```\n{question}\n```\n",
            "Below is a Python script with a self-contained function that solves the problem and passes corresponding "
            "tests:\n```python\n", ("\n```",))),
}
WITH_NUMBERS = [name for name, bench in BENCHMARKS.items() if bench.kind == "number"]


def load(name: str, split: str, data_dir: str = "") -> list[dict]:
    """Problems of a split (`train`, `val`, `test`, or an official name), in order.

    data_dir: a local folder; without it the hub is asked. The folder holds FILE or NAME/FILE, of a data set of several
    configurations CONFIG/FILE or NAME/CONFIG/FILE. FILE is SPLIT or its official name (train alone where val is held
    out of it), as .jsonl, .jsonl.gz or .parquet, in the official fields or as problems; BBH's own CONFIG.json and
    HumanEval.jsonl.gz are found as well. Raises FileNotFoundError or ValueError that names the file, the row or the
    field.
    """
    bench = BENCHMARKS[name]
    official, several = bench.splits.get(split, split), len(bench.configs) > 1
    if split in OFFICIAL and split not in bench.splits:
        raise ValueError(f"--split {split}: {name} has only {', '.join(bench.splits)}")
    problems, ids = [], set()
    for config in bench.configs:
        if data_dir:
            rows, where = read_local(name, config, official, split, data_dir)
        else:
            rows, where = read_hub(name, config, official), f"{bench.hub} {config or ''} {official}"
        prefix = f"{name}-{config}" if several else name
        for i, row in enumerate(rows):
            problem = as_problem(bench, row, f"{where}, row {i + 1}")
            subject = str(problem.get("subject") or (config if several else ""))
            id = f"{prefix}-{official}-{i}" if problem.get("id") is None else str(problem["id"])
            if id in ids:
                raise ValueError(f"{where}, row {i + 1}: the id {id!r} is there twice")
            ids.add(id)
            problems.append(problem | {"id": id, "kind": bench.kind, "subject": subject})
    if name == "gsm8k" and (n := sum("####" not in p["answer"] for p in problems)):
        print(f"{where}: {n} of {len(problems)} answers have no line '#### 42'; their last number is read",
              file=sys.stderr)
    if bench.splits.get("val") == "train" and split in ("train", "val"):
        problems = [p for i, p in enumerate(problems) if (i % VAL_EVERY == 0) == (split == "val")]
    return problems


def spread(problems: list[dict], n: int) -> list[dict]:
    """n of the problems: the first ones of every subject, as many of each as possible; in the order they had."""
    seen, turns = Counter(), []  # turns: (how many of its subject came before, index)
    for i, p in enumerate(problems):
        turns.append((seen[p["subject"]], i))
        seen[p["subject"]] += 1
    return [problems[i] for i in sorted(i for _, i in sorted(turns)[:n])]


def as_problem(bench: Benchmark, row: dict, where: str) -> dict:
    """A row, in the official fields or as a problem, as a problem. Raises ValueError, beginning with `where`."""
    is_official = set(bench.fields) <= set(row)
    if not is_official and (bench.kind in ("choice", "code") or not {"question", "answer"} <= set(row)):
        missing = next(name for name in bench.fields if name not in row)
        raise ValueError(f"{where}: field '{missing}' is missing; needs {', '.join(bench.fields)}")
    try:
        problem = dict(bench.problem(row)) if is_official else dict(row)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{where}: not a row of {bench.hub}: {type(error).__name__}: {error}") from None
    for key in ("question", "answer"):
        if not isinstance(problem[key], str) or not problem[key].strip():
            raise ValueError(f"{where}: field '{key}' must be a text that is not empty")
    if bench.kind == "choice" and not 0 <= problem["label"] < len(problem["choices"]):
        raise ValueError(f"{where}: the right answer is none of the {len(problem['choices'])} choices")
    return problem


def read_local(name: str, config: str | None, official: str, split: str, data_dir: str) -> tuple[list[dict], str]:
    """The rows of the first file that fits, and where it lies (see `load`)."""
    folder, stems = Path(data_dir), [official] if official == "train" else list(dict.fromkeys((split, official)))
    if folder.is_file():
        raise ValueError(f"--data_dir {data_dir} is a file: name the folder in which it lies")
    several = len(BENCHMARKS[name].configs) > 1
    bases = [folder / config, folder / name / config] if several else [folder, folder / name]
    tried = [base / f"{stem}{ext}" for base in bases for stem in stems for ext in (".jsonl", ".jsonl.gz", ".parquet")]
    tried += [base.with_name(f"{config}.json") for base in bases] if several else []
    tried += [base / "HumanEval.jsonl.gz" for base in bases] if name == "humaneval" else []
    path = next((p for p in tried if p.is_file()), None)
    if path and split == "val" and official == "train" and list(path.parent.glob("val.*")):
        print(f"{path.parent}: val.* is not read, val is every {VAL_EVERY}th problem of train", file=sys.stderr)
    if path is None:
        raise FileNotFoundError(f"--data_dir {data_dir}: none of {', '.join(map(str, tried))} exists")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        try:
            rows = [dict(row) for row in json.loads(path.read_text(encoding="utf-8"))["examples"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: needs a JSON object with a list 'examples' of objects ({error!r})") from None
    else:
        rows = verify.read_jsonl(path)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows, str(path)


def read_hub(name: str, config: str | None, official: str) -> list[dict]:
    import datasets

    hub = BENCHMARKS[name].hub
    try:
        return list(datasets.load_dataset(hub, config, split=official))
    except Exception as error:  # offline, not cached, unknown host: the library raises many kinds for one cause
        raise FileNotFoundError(
            f"{hub} could not be loaded from the Hugging Face hub ({type(error).__name__}: {str(error)[:200]}).\n"
            f"  - online: unset HF_HUB_OFFLINE and run again, it is fetched once and cached\n"
            f"  - offline: --data_dir FOLDER with {official}.jsonl (lines with "
            f"{', '.join(BENCHMARKS[name].fields)})"
            + "\n  - without any data: --dataset synthetic" * (name == "gsm8k")) from None


# ----------------------------------------------------------------------------- as an LLM sees them


def prompt(bench: Benchmark, problem: dict, examples: list[dict] = ()) -> str:
    """The text that a language model goes on from: introduction, examples with their answers, the question."""
    before = bench.intro.format(subject=problem["subject"].replace("_", " ")) + "\n\n" if bench.intro else ""
    solved = "".join(f"{bench.prompt.format(question=e['question'])}{continuations(e)[e.get('label', 0)]}\n\n"
                     for e in examples)
    return before + solved + bench.prompt.format(question=problem["question"])


def continuations(problem: dict) -> list[str]:
    """What may follow the prompt: every choice, or the one answer."""
    return [" " + text for text in problem.get("choices", [problem["answer"]])]


def examples_for(problems: list[dict], pool: list[dict], n: int) -> list[list[dict]]:
    """The first n of a pool with each problem's subject (lm-evaluation-harness's `first_n`), itself left out."""
    by_subject, found = {}, []
    for e in pool:
        by_subject.setdefault(e["subject"], []).append(e)
    for p in problems:
        others = (e for e in by_subject.get(p["subject"], []) if e["question"] != p["question"])
        found.append(list(islice(others, n)))
        if len(found[-1]) < n:
            raise ValueError(f"--shots {n}: only {len(found[-1])} examples with the subject '{p['subject']}'")
    return found
