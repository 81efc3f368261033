"""ValidationGate: is the answer right, does the arithmetic of every step hold, does the program pass its tests?

    python verify.py --chains data/chains.jsonl           # a chain, or a problem with a worked "answer", per line
    python verify.py --candidates data/candidates.jsonl   # agreement with the is_correct labels
    python verify.py --expression "2+2=4"                 # write --expression=-2+2=0 where it starts with a minus
    python verify.py --humaneval HumanEval.jsonl.gz       # the canonical solutions in the sandbox; --mutants: must fail

The last line of stdout is one JSON object. The gate sees numbers, not meaning: a step that adds the wrong two
quantities correctly passes. Answers are extracted as lm-evaluation-harness does it for GSM8K. Generated programs run
in bubblewrap (Linux, `apt install bubblewrap`), LaTeX answers are compared by math-verify (`pip install math-verify`).
"""
import ast
import gzip
import importlib.util
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from config import not_negative, plain_errors
from sandbox import Verdict, run_program

MAX_EXPRESSION = 200  # characters
MAX_STEP = 4000  # characters; an honest step of GSM8K is below 700
MAX_DIGITS = 40  # in one run of digits
MAX_DEPTH = 20  # nested parentheses
MAX_EXPONENT = 64
MAX_BITS = 2048  # of a numerator or denominator, also in between
MAX_MATH = 1000  # characters of a LaTeX answer
MATH_SECONDS = 3  # for one comparison of LaTeX answers


class Rejected(ValueError):
    """An expression the gate does not evaluate; `reason` as in Verdict."""
    def __init__(self, reason, detail):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


# ----------------------------------------------------------------------------- answers

STRICT = re.compile(r"#### (\-?[0-9\.\,]+(?: ?/ ?[0-9]+)?|-[ $]+[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
DECLARED = re.compile(r"^[ \t]*A:(.+)$|\\boxed\{([^{}]*)\}", re.M)
NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
BARE = re.compile(rf"(-?)\s*[$€£]?\s*(-?)({NUMBER})(?:\.(?!\d))?(?:\s*/\s*({NUMBER}))?"  # sign, value, divisor
                  r"\s*[%$€£]?\s*(?:[a-zA-Z][a-zA-Z ]*)?\.?")  # unit


def _clean(text):
    return re.sub(r"[,$]", "", text).removesuffix(".")


def extract_answer(text, mode=None):
    """The final answer in a solution, as a cleaned string, or None.

    mode "strict": the first `#### n`; "flexible": an `A: n` line or \\boxed{n}, else the last number; None: strict,
    else flexible. Source: lm-evaluation-harness, gsm8k.yaml (filters strict-match and flexible-extract). Deviations:
    `A:` and \\boxed, fractions (`#### 1/2`, which it reads as 1), U+2212 is read as a minus, and a match without a
    digit ("...") is passed over.
    """
    if mode not in (None, "strict", "flexible"):
        raise ValueError(f"mode {mode!r}: use 'strict', 'flexible' or None (strict first)")
    text = text.replace("\u2212", "-")
    if mode != "flexible" and (match := STRICT.search(text)):
        return _clean(match[1])
    if mode == "strict":
        return None
    declared = [a or b for a, b in DECLARED.findall(text) if parse_number(a or b) is not None]
    found = declared or [a or b for a, b in FLEXIBLE.findall(text) if re.search(r"\d", a + b)]
    return _clean(found[-1]).strip() if found else None


def parse_number(text):
    """The exact value of a written number as a Fraction, or None.

    18 = 18.00 = $18 = "18 apples."; 1,800 = 1800; 1/2 = 0.5. "50%" is 50: GSM8K's answers are bare numbers, the
    percent sign is a unit there. More than 64 characters, or anything else than one number, is None.
    """
    text = text.strip()
    match = BARE.fullmatch(re.sub("[\u2212\u2013]", "-", text)) if len(text) <= 64 and text.isprintable() else None
    if match is None:
        return None
    minus, inner_minus, number, divisor = match.groups()
    value, divisor = Fraction(number.replace(",", "")), Fraction((divisor or "1").replace(",", ""))
    if divisor == 0 or (minus and inner_minus):
        return None
    return (-value if minus or inner_minus else value) / divisor


def answer_value(text):
    """Value of a bare answer or of a text that ends in one. `####` wins over everything else."""
    value = None if "####" in text else parse_number(text)
    if value is None and (found := extract_answer(text)) is not None:
        value = parse_number(found)
    return value


def check_answer(prediction, truth):
    """True where both (a bare answer, or a text that states one) are the same number. Unparseable is wrong."""
    value = answer_value(prediction)
    return value is not None and value == answer_value(truth)


# ----------------------------------------------------------------------------- arithmetic

def evaluate(expression):
    """The exact value of an arithmetic expression, as a sympy.Rational.

    Numbers, + - * / // % **, signs and parentheses; decimals are read from their digits, never through a float.
    Raises Rejected: "too_long", "too_deep", "not_whitelisted", "syntax", "division_by_zero", "too_large".
    Nothing in the text is ever executed (no eval, no sympify), and length, depth, exponents and every intermediate
    result are capped before the work is done. So time is bounded without a timer, on any thread.
    """
    from sympy import Rational
    if len(expression) > MAX_EXPRESSION:
        raise Rejected("too_long", f"{len(expression)} characters, more than {MAX_EXPRESSION}: {expression[:40]!r}...")
    if alien := re.search(r"[^\d\s.+\-*/%()]", expression, re.A):
        raise Rejected("not_whitelisted", f"{alien[0]!r} in {expression!r}")
    if re.search(rf"\d{{{MAX_DIGITS + 1}}}", expression):
        raise Rejected("too_large", f"more than {MAX_DIGITS} digits in a row: {expression!r}")
    if max(itertools.accumulate((char == "(") - (char == ")") for char in expression), default=0) > MAX_DEPTH:
        raise Rejected("too_deep", f"more than {MAX_DEPTH} open parentheses: {expression!r}")
    source = " ".join(expression.split())
    try:
        tree = ast.parse(source, mode="eval")
    except SyntaxError:
        raise Rejected("syntax", f"no arithmetic: {expression!r}") from None

    def value(node):
        if isinstance(node, ast.Constant) and node.value is not ...:
            return Rational(ast.get_source_segment(source, node).rstrip("."))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
            operand = value(node.operand)
            return -operand if isinstance(node.op, ast.USub) else operand
        if not isinstance(node, ast.BinOp):
            raise Rejected("not_whitelisted", f"{type(node).__name__} in {expression!r}")
        a, b, op = value(node.left), value(node.right), type(node.op)
        if b == 0 and op in (ast.Div, ast.FloorDiv, ast.Mod) or a == 0 and b < 0 and op is ast.Pow:
            raise Rejected("division_by_zero", f"division by zero in {expression!r}")
        if op is ast.Pow and not (b.is_integer and abs(b) <= MAX_EXPONENT):
            raise Rejected("too_large", f"exponent is no integer up to {MAX_EXPONENT} in {expression!r}")
        result = {ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b, ast.Div: lambda: a / b,
                  ast.FloorDiv: lambda: Rational(a // b), ast.Mod: lambda: a % b, ast.Pow: lambda: a**b}[op]()
        if max(abs(result.p), result.q).bit_length() > MAX_BITS:
            raise Rejected("too_large", f"a result above {MAX_BITS} bits in {expression!r}")
        return result

    return value(tree.body)


def _holds(left, right, written):
    """left = right as written? Exactly, or rounded or cut off to the decimals that are written (2/3 = 0.67 or 0.66).

    An integer must be exact: 10/3 = 3 is a slip, or a remainder that the step has to name.
    """
    decimals = re.fullmatch(r"[-+ ]*\d*\.(\d+)\s*", written)
    scale = 10 ** len(decimals[1]) if decimals else 0
    return left == right or bool(scale) and (2 * abs(left - right) * scale <= 1 or int(left * scale) == right * scale)


def check_expression(text):
    """Verdict on one bare expression ("2+2", may it be evaluated?) or equation ("2+2=4", does it hold?)."""
    if len(text) > MAX_STEP:
        return Verdict(False, "too_long", f"{len(text)} characters, more than {MAX_STEP}")
    sides = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.translate(ASCII).replace("==", "=")).split("=")
    try:
        values = [evaluate(side) for side in sides]
    except Rejected as e:
        return Verdict(False, e.reason, e.detail)
    ok = all(_holds(values[0], value, side.strip()) for value, side in zip(values[1:], sides[1:], strict=True))
    return Verdict(ok, "ok" if ok else "arithmetic", text)


# One step is prose: "$5/hour * 3 hours = $15". It is cut into tokens; the longest arithmetic phrase that ends at an
# equals sign is compared with the phrase that follows it. What is not plainly arithmetic is left unjudged.
TOKEN = re.compile(rf"""
    (?P<odd>\d+:\d+|0\d+|\d+,(?!\d{{3}}(?!\d))\d+)|(?P<num>{NUMBER})
    |(?P<relation>[<>!]=+|=>|≠)|(?P<eq>={{1,2}}|≈)
    |(?P<op>\*\*|//|[-+*/^]|\b(?:times|plus|minus|divided\ by)\b(?=[\s$]*\.?[\d(]))|(?P<paren>[()])|(?P<percent>%)
    |(?P<word>[^\W\d_]+(?:[&'’-][^\W\d_]+)*)|(?P<skip>[\s$€£¢]+)|(?P<other>.)""", re.X)
OPERATOR = {"^": "**", "times": "*", "plus": "+", "minus": "-", "divided by": "/", "x": "*", "X": "*"}
SENTENCE = set("and or so is are was were then if because but that which equals total answer he she they it".split())
SCALE = set("dozen dozens hundred thousand million billion trillion k cents cent am pm remainder".split())
SPELLINGS = [(r"(?<![\w)])\*\*(?! )([^*]+)(?<! )\*\*(?![\w(-]|\.\d)", r"\1"),  # Markdown, LaTeX
             (r"\\times\b|\\cdot\b", "*"), (r"\\div\b", "/"),
             (r"\\(?!text)[a-zA-Z]+|_\{?\d+\}?", " 0:0 "), (r"\\[()$\[\]]?", ""),  # \pi, a_1: left unjudged
             (r"(?<=[a-z]{2})\^\d\b", ""),  # cm^2
             (r"^\s*[-*]\s+", ""), (r"(?<=\d)\.\.+", ""),  # a bullet; 8.333...
             (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,]|\.\d)", lambda match: match[0].replace(" ", "")),  # 18 000
             (r"\ban? (?=[a-z])|\bthe (?=[a-z$\d])", ""),
             (r"(\d) and [ (]*(\d+/\d+)\)?", r"\1 \2"),  # 5 and 2/3
             (r"/\s+(\d+/\d+)(?!\d|/\d)", r"/ (\1)")]  # 60 / 3/4 divides by three quarters
ASCII = str.maketrans("×·∗÷−–\u00a0$€£", "***/--    ")


def _operator(tokens, i, out):
    """The operator that token i is behind the operand out[-1], or None.

    "of" multiplies after a share alone (1/2 of 20), "x" before a number; "/hour" is part of a unit.
    """
    (kind, text), (next_kind, next_text) = tokens[i], tokens[i + 1]
    if kind == "op" and (text != "/" or next_kind != "word"):
        return OPERATOR.get(text, text)
    if kind == "word" and (next_kind == "num" or next_text == "("):
        is_share = tokens[i - 1][0] != "word" and ("%" in out[-1] or "/" in out)
        return "*" if text in ("x", "X") else "of" if text == "of" and is_share else None
    return "*" if text == "(" and tokens[i - 1][0] != "word" else None  # 2(180+30)


def _phrase(tokens, i):
    """Parse `number [unit] (op number [unit])*` from token i: (expression, its operator count, end index) or None.

    Units vanish; a single letter is a variable, not a unit, and makes the phrase None.
    """
    tokens = tokens + [("end", "")] * 4
    out, n_ops, depth, best = [], 0, 0, None
    while True:
        while tokens[i][1] in ("(", "-", "+"):
            depth += tokens[i][1] == "("
            out, i = out + [tokens[i][1]], i + 1
        if tokens[i][0] != "num":
            return best
        (a, b), (_, slash), (c, d) = tokens[i + 1:i + 4]
        is_mixed = a == c == "num" and slash == "/" and len(b) < 3 and "." not in tokens[i][1]  # 1 1/2
        out.append(f"({tokens[i][1]}+{b}/{d})" if is_mixed else tokens[i][1])
        i += 4 if is_mixed else 1
        if tokens[i][0] == "percent":
            out[-1], i = out[-1] + "%", i + 1
        while True:  # units, closing parentheses and their units
            for _ in range(6):
                kind, text = tokens[i]
                is_unit = kind == "word" and text.lower() not in SENTENCE or text == "/"
                if not is_unit or _operator(tokens, i, out):
                    break
                if kind == "word" and len(text) == 1:
                    return None
                i += 1
            if tokens[i][1] != ")" or depth == 0:
                break
            out, depth, i = out + [")"], depth - 1, i + 1
        if depth == 0:
            best = " ".join(out), n_ops, i
        operator = _operator(tokens, i, out)
        if operator is None:
            return best
        out, n_ops, i = out + [operator], n_ops + 1, i + (tokens[i][1] != "(")


def _equations(text):
    """Yield (left, right) for every equation in a step that can be judged; in a = b = c both are held against a."""
    text = text.translate(ASCII)
    for pattern, plain in SPELLINGS:
        text = re.sub(pattern, plain, text)
    sides = [[]]
    for match in TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        if kind == "eq":
            sides.append([])
        elif kind != "skip":
            sides[-1].append((kind, token.replace(",", "") if kind == "num" else token))

    def is_vague(side):  # 2 dozen, 3 million: their value is not the number's
        return any(token.lower() in SCALE for _, token in side)

    first = None
    for left, right in zip(sides, sides[1:], strict=False):
        goal = _phrase(right, 0)
        has_unit = any(kind == "word" for kind, _ in left)
        for i in range(max(0, len(left) - 60), len(left)):  # the longest phrase that ends at the equals sign
            phrase = _phrase(left, i)
            if phrase and phrase[2] == len(left):
                break
        else:
            i, phrase = 0, None
        if not (first and phrase and i == 0):
            before = [token for _, token in left[max(0, i - 4):i]]
            is_cut = i and (left[i - 1][0] in ("op", "percent", "odd") or left[i][1] in "+-"  # x - 5 + 3
                            or before[-1] in ("of", "in") and re.search(r"\d", " ".join(before)))  # 8 packs of 5 * 4
            is_claim = phrase and (phrase[1] or i == 0 and not has_unit) and not is_cut and not is_vague(left[i:])
            first = phrase[0] if is_claim else None
        elif has_unit and not phrase[1] and goal and not goal[1]:
            continue  # 2 hours = 120 minutes
        is_whole = goal and (right + [("end", "")])[goal[2]][0] != "op"  # not so in 16 + x
        if first and is_whole and not is_vague(right[:goal[2] + 2]):
            yield first, goal[0]


def _readings(expression):
    """Its values with a percentage as a hundredth ("20% of 50") and as a unit ("4/12 * 100 = 33.33%")."""
    return {evaluate(re.sub(r"(\S+)%", percent, expression)) for percent in (r"\1", r"(\1/100)")}


def check_step(text):
    """Verdict on the arithmetic written in one step of prose; "ok" where it states no equation.

    Read are `a op b = c`, chains `a = b = c`, GSM8K's `<<48/2=24>>`, units, currency signs, x × ÷ – and "20% of 50".
    """
    if len(text) > MAX_STEP:
        return Verdict(False, "too_long", f"{len(text)} characters, more than {MAX_STEP}")
    if code := re.search(r"__[a-z]+__\(|\.__[a-z]+__", text):
        return Verdict(False, "not_whitelisted", f"code in a step: {code[0]}")
    for part in re.findall(r"<<([^<>]*)>>", text) + [re.sub(r"<<[^<>]*>>", "", text)]:
        for left, right in _equations(part):
            try:
                lefts = _readings(left.replace(" of ", " * "))
                if right.endswith("%"):
                    lefts, right = lefts | {100 * a for a in lefts}, right.removesuffix("%")
                rights = _readings(right.replace(" of ", " * ")) | _readings(right.split(" of ")[0])
            except Rejected as e:
                return Verdict(False, e.reason, e.detail)
            if not any(_holds(a, b, right) for a in lefts for b in rights):
                return Verdict(False, "arithmetic", f"{left} = {right}")
    return Verdict(True, "ok")


def check_steps(steps):
    """Verdict on the arithmetic of a chain: of its first step that is not "ok"; the detail begins with its number."""
    for number, step in enumerate(steps, 1):
        if not (verdict := check_step(step)).is_valid:
            return Verdict(False, verdict.reason, f"step {number}: {verdict.detail}")
    return Verdict(True, "ok")


# ----------------------------------------------------------------------------- LaTeX answers

def _math_worker():
    """Answer each line [seconds, prediction, truth] on stdin with true or false.

    math-verify parses LaTeX with a grammar; no text reaches sympify or parse_expr by that road (its other one, plain
    expressions, gives digits and operators to parse_expr, and is not used). What is left is work without bound: hence
    a process of its own, which may write no file, with limits on memory and on the seconds of each line.
    """
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    from math_verify import LatexExtractionConfig, parse
    from math_verify import verify as equal
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, *texts = json.loads(line)
        signal.alarm(seconds)  # no handler: it kills, whatever C code is running
        prediction, truth = (parse(text, [LatexExtractionConfig()], parsing_timeout=None) for text in texts)
        is_equal = equal(truth, prediction, timeout_seconds=None)
        signal.alarm(0)
        print(json.dumps(bool(is_equal)), flush=True)


_math_lock, _math_process = threading.Lock(), None


def check_math(prediction, truth):
    r"""True where both (LaTeX, alone or in the last \boxed{} of a text) are the same number, set, interval, matrix, …

    Equality is math-verify's: \dfrac{1}{2} = 1/2 = 0.5, units, \text{} and degrees are dropped, 50\% is both 50 and
    1/2, (1,2) is ordered and {1,2} is not. Too long, too slow or unparseable is False. Safe on any thread; one worker
    process serves all calls and is replaced when a comparison kills it.
    """
    global _math_process
    if importlib.util.find_spec("math_verify") is None:  # the worker imports it, this process need not
        raise ValueError("LaTeX answers are compared by math-verify: pip install math-verify")
    texts = [_boxed(text).strip() for text in (prediction, truth)]
    if not all(0 < len(text) <= MAX_MATH for text in texts):
        return False
    texts = [re.sub(r"(?<!\\)(?:\$|\\[()\[\]])|\s+", " ", text) for text in texts]
    if texts[0] == texts[1]:
        return True
    said, true = ([base for base in re.findall(r"\d_\{?(\d+)", text) if base != "10"] for text in texts)
    if said and said != true:  # 12 in base 8 is not 12
        return False
    with _math_lock:
        if _math_process is None or _math_process.poll() is not None:
            _math_process = subprocess.Popen(
                [sys.executable, "-c", "import verify; verify._math_worker()"], cwd=Path(__file__).resolve().parent,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            if _math_process.stdout.readline() != "ready\n":
                raise ValueError(f"the worker that compares LaTeX does not start; {sys.executable} -c "
                                 "'import math_verify' may say why")
        print(json.dumps([MATH_SECONDS, *(f"${text}$" for text in texts)]), file=_math_process.stdin, flush=True)
        answer = _math_process.stdout.readline()
        if not answer:  # killed by its alarm, or out of memory
            _math_process.communicate()
            _math_process = None
    return answer == "true\n"


def _boxed(text):
    r"""The content of the last \boxed{} with balanced braces; else the last $formula$, else the text itself."""
    text = re.sub(r"\\boxed ([^{\s$]+)", r"\\boxed{\1}", text)
    start = text.rfind("\\boxed{") + len("\\boxed{")
    if start < len("\\boxed{"):
        inline = re.findall(r"(?<!\\)\$([^$]+)\$", text)
        return inline[-1] if inline else text
    depth = 1
    for end in range(start, min(len(text), start + 2 * MAX_MATH)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return ""


# ----------------------------------------------------------------------------- programs

def check_program(problem, completion, timeout_s=10, allow_unsafe=False):
    """Does prompt + completion pass the tests? problem {"prompt", "test", "entry_point"}, as in HumanEval.

    Reasons as run_program's, and "tests_not_run" where the program ended well before its tests did (sys.exit). That
    they ran is shown by a random word printed after them; a completion that reads its own source for the word can
    still forge it. Source: HumanEval (Chen et al. 2021), evaluation.py.
    """
    prompt, test, entry_point = (field(problem, "problem", name, str) for name in ("prompt", "test", "entry_point"))
    word = secrets.token_hex(16)
    source = f"{prompt}{completion}\n{test}\ncheck({entry_point})\n__import__('sys').stdout.write('\\n{word}\\n')\n"
    verdict = run_program(source, timeout_s, allow_unsafe=allow_unsafe)
    output, found, rest = verdict.stdout.partition(f"\n{word}\n")  # the rest: what is printed at exit
    if verdict.is_valid and not found:
        return Verdict(False, "tests_not_run", "the program ended before its tests did", verdict.stdout)
    return Verdict(verdict.is_valid, verdict.reason, verdict.detail, output + rest)


# ----------------------------------------------------------------------------- problems and chains

def field(record, where, name, types):
    """record[name]. Raises ValueError, beginning with `where`, for one that is missing, empty or of another type."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, types) or value == "":
        expected = {str: "a non-empty string", list: "a list", bool: "true or false"}[types]
        found = "missing" if value is None else f"{value!r:.60}"
        raise ValueError(f"{where}: field {name!r} is {found}, expected {expected}")
    return value


def validate(problem, chain, allow_unsafe=False):
    r"""Verdict on a chain of steps, by the problem's "kind".

    chain {"steps": [str], "answer": optional}. Where both chain["answer"] and the steps declare an answer, both must be
    right. Reasons common to all: "ok", "no_steps", "no_answer", "wrong_answer".
    - "number" (also where there is no kind): {"answer": bare or with ####}; the answer is declared in the last step by
      #### n, A: n or \boxed; where neither declares one, it is what follows that step's last "=", or the whole step.
      The arithmetic of every step must hold, else the reason is that of the first bad step (check_step); the detail has
      its number, from 1.
    - "math": {"answer": LaTeX}; declared by the last \boxed, or the last step as it is. Steps are not judged.
    - "exact": {"answer": text}; the last step is that text, but for blanks around it and a full stop.
    - "choice": {"choices": [str], "answer": its letter, or "label": its index}; a letter or the choice's text, declared
      as a number is or by "answer is". Steps are not judged.
    - "code": check_program's fields and reasons; the steps, joined by newlines, are the completion.
    Raises ValueError naming the field that is missing, empty or of the wrong type.
    """
    kind, name = problem.get("kind", "number"), f"chain {chain.get('id', '')!r}"
    where = f"problem {problem.get('id', '')!r}"
    if kind not in ("number", "math", "choice", "exact", "code"):
        raise ValueError(f"{where}: kind {kind!r}: use number, math, choice, exact or code")
    steps = field(chain, name, "steps", list)
    if any(not isinstance(step, str) or not step.strip() for step in steps):
        raise ValueError(f"{name}: field 'steps' holds something else than non-empty strings")
    if not steps:
        return Verdict(False, "no_steps", "the chain has no steps")
    if kind == "code":
        return check_program(problem, "\n".join(steps), allow_unsafe=allow_unsafe)
    stated = [] if chain.get("answer") is None else [field(chain, name, "answer", str)]
    by_kind = {"number": _validate_number, "math": _validate_math, "choice": _validate_choice, "exact": _validate_exact}
    return by_kind[kind](problem, where, steps, stated)


def _validate_number(problem, where, steps, stated):
    truth = field(problem, where, "answer", str)
    if answer_value(truth) is None:
        raise ValueError(f"{where}: field 'answer' holds no number: {truth!r:.60}")
    last = steps[-1]
    declared = extract_answer(last) if STRICT.search(last) or DECLARED.search(last) else None
    right = truth if parse_number(truth) is not None else extract_answer(truth)
    for answer in [*stated, *([] if declared is None else [declared])] or [last.rpartition("=")[2]]:
        if answer_value(answer) is None:
            return Verdict(False, "no_answer", f"no number in {answer!r:.60}")
        if not check_answer(answer, truth):
            return Verdict(False, "wrong_answer", f"{answer.strip():.60} instead of {right}")
    return check_steps(steps)


def _validate_math(problem, where, steps, stated):
    truth = field(problem, where, "answer", str)
    text = "\n".join(steps)
    for answer in [*stated, *([text] if "\\boxed" in text else [])] or [steps[-1]]:
        if not _boxed(answer).strip():
            return Verdict(False, "no_answer", f"nothing in {answer!r:.60}")
        if not check_math(answer, truth):
            return Verdict(False, "wrong_answer", f"{_boxed(answer):.60} instead of {_boxed(truth):.60}")
    return Verdict(True, "ok")


def _validate_exact(problem, where, steps, stated):
    truth = field(problem, where, "answer", str).strip().removesuffix(".")
    for answer in [*stated, steps[-1]]:
        if answer.strip().removesuffix(".") != truth:
            return Verdict(False, "wrong_answer", f"{answer:.60} instead of {truth:.60}")
    return Verdict(True, "ok")


CHOICE = re.compile(r"####\s*(.+)|^[ \t]*A:(.+)$|\\boxed\{(.+)\}|\banswer(?: is)?:?\s*(\([A-Z]\)|.+)", re.M | re.I)


def _choice(text, choices):
    """The index of the choice that a letter ("B", "(b)", "B. Rome") or its own text names, or None."""
    text = re.sub(r"\\(?:text|boxed)\{([^{}]*)\}|[*$]", r"\1", text).strip().removesuffix(".")
    text = re.sub(r"^\(?([A-Z])\)?(?:,|\s+because\b).*", r"\1", text)  # B, since Rome lies there
    texts = [choice.strip().removesuffix(".").casefold() for choice in choices]
    if match := re.fullmatch(r"\(?([a-z])\)?|\(?([a-z])[).:]\s*(.+)", text, re.I | re.S):
        index, rest = ord((match[1] or match[2]).upper()) - ord("A"), match[3]
        if index < len(choices) and (rest is None or rest.strip().casefold() == texts[index]):
            return index
    return texts.index(text.casefold()) if texts.count(text.casefold()) == 1 else None


def _validate_choice(problem, where, steps, stated):
    choices, label = [str(choice) for choice in field(problem, where, "choices", list)], problem.get("label")
    truth = _choice(field(problem, where, "answer", str), choices) if label is None else label
    if not isinstance(truth, int) or not 0 <= truth < len(choices):
        raise ValueError(f"{where}: neither field 'answer' nor 'label' names one of the {len(choices)} choices")
    declared = ["".join(match) for match in CHOICE.findall(steps[-1])]
    for answer in [*stated, *declared[-1:]] or [steps[-1]]:
        if (index := _choice(answer, choices)) is None:
            return Verdict(False, "no_answer", f"no choice in {answer!r:.60}")
        if index != truth:
            return Verdict(False, "wrong_answer", f"{choices[index]:.60} instead of {choices[truth]:.60}")
    return Verdict(True, "ok")


def check_file(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is a folder: name a file in it" if Path(path).is_dir() else
                                f"{path}: no such file")


def read_jsonl(path, fields=(), limit=0):
    """The objects of a .jsonl or .jsonl.gz file as dicts, each with all `fields`; blank lines are passed over.

    Raises FileNotFoundError, or ValueError naming file, line and field.
    """
    check_file(path)
    rows = []
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                if limit and len(rows) >= limit:
                    break
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise ValueError(f"{path}, line {number}: no JSON: {getattr(e, 'msg', e)}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
                if missing := [name for name in fields if name not in row]:
                    raise ValueError(f"{path}, line {number}: field {missing[0]!r} is missing, there are "
                                     f"{', '.join(map(str, row))[:120] or 'none'}")
                rows.append(row)
        except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f"{path}: damaged, or no UTF-8 text: {e}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def check_chains(path, limit=0):
    """{"n", "accepted", "reasons"} over chains, or over problems whose "answer" is a worked solution with ####."""
    reasons = Counter()
    for number, row in enumerate(read_jsonl(path, ["answer"], limit), 1):
        steps = row.get("steps")
        if steps is None and "####" in field(row, str(path), "answer", str):
            steps = [line for line in row["answer"].splitlines() if line.strip()]
        try:
            verdict = validate(row, {"id": row.get("id", ""), "steps": steps})
            reasons[verdict.reason] += 1
            if not verdict.is_valid and reasons.total() - reasons["ok"] <= 20:
                print(f"row {number}{', ' * ('id' in row)}{row.get('id', '')}: {verdict.reason} {verdict.detail[:200]}")
        except ValueError as e:
            raise ValueError(f"{path}, row {number}: {e}") from None
    return {"n": reasons.total(), "accepted": reasons["ok"], "reasons": dict(reasons.most_common())}


def check_candidates(path, limit=0):
    """{"n", "agree": share whose is_correct label equals check_answer, "disagree": the first few ids}."""
    n, disagree = 0, []
    for row in read_jsonl(path, ["answer", "candidates"], limit):
        where = f"{path}, row {row.get('id')!r}"
        for candidate in field(row, where, "candidates", list):
            steps, label = field(candidate, where, "steps", list), field(candidate, where, "is_correct", bool)
            n += 1
            if (bool(steps) and check_answer(str(steps[-1]), field(row, where, "answer", str))) != label:
                disagree.append(row.get("id"))
    return {"n": n, "agree": (n - len(disagree)) / max(1, n), "disagree": disagree[:5]}


def check_humaneval(path, mutants=False, limit=0, allow_unsafe=False):
    """{"n", "passed", "reasons", "seconds"} over the canonical solutions, or over mutants with `pass` for a body."""
    rows = read_jsonl(path, ["prompt", "test", "entry_point", "canonical_solution"], limit)
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(lambda row: check_program(
            row, "    pass\n" if mutants else row["canonical_solution"], allow_unsafe=allow_unsafe), rows))
    for row, verdict in zip(rows, verdicts, strict=True):
        if verdict.is_valid == mutants:
            print(f"{row.get('task_id')}: {verdict.reason} {verdict.detail}")
    reasons = Counter(verdict.reason for verdict in verdicts)
    return {"n": len(rows), "passed": reasons["ok"], "reasons": dict(reasons.most_common()),
            "seconds": round(time.monotonic() - start, 2)}


@dataclass
class Args:
    """Check chains, candidates, one expression or HumanEval's solutions; exactly one of the four."""

    chains: str | None = None  # jsonl of chains, or of problems with worked answers
    candidates: str | None = None  # jsonl of labelled candidates
    expression: str | None = None  # arithmetic, with or without an equals sign
    humaneval: str | None = None  # jsonl or jsonl.gz of HumanEval's problems
    mutants: bool = False  # with --humaneval: `pass` for every body, which must fail
    allow_unsafe_code: bool = False  # where bubblewrap cannot run: run the programs with your rights
    limit: int = 0  # read this many rows only; 0: all

    def __post_init__(self):
        not_negative(self, "limit")


@plain_errors()
def main(argv=None):
    import tyro

    args = tyro.cli(Args, args=argv)
    if [args.chains, args.candidates, args.expression, args.humaneval].count(None) != 3:
        raise ValueError("give exactly one of --chains, --candidates, --humaneval FILE, --expression TEXT")
    if args.expression is not None:
        verdict = check_expression(args.expression)
        print(verdict.detail[:200])
        result = {"valid": verdict.is_valid, "reason": verdict.reason}
    elif args.humaneval is not None:
        result = check_humaneval(args.humaneval, args.mutants, args.limit, args.allow_unsafe_code)
    elif args.chains is not None:
        result = check_chains(args.chains, args.limit)
    else:
        result = check_candidates(args.candidates, args.limit)
    print(json.dumps(result))
    if args.humaneval is not None and result["passed"] != (0 if args.mutants else result["n"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
