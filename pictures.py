"""The demo's HTML and inline SVG, readable in light and dark; what differs does so in shape as well as in colour.

All of it is made by `tag`, which escapes every part that is not its own work.
"""

import difflib
import html
import itertools

import numpy as np
import torch

import verify

CSS = """
.gradio-container { max-width: 1200px !important; }
.picture { --blue: #0072B2; --orange: #D55E00; --pale-blue: #0072B228; --pale-orange: #D55E0033; }
.dark .picture { --blue: #56B4E9; --orange: #E98A3A; --pale-blue: #56B4E92d; --pale-orange: #E98A3A38; }
.picture ol { padding-left: 1.6em; list-style: decimal; }
.picture h4 { margin: .8em 0 .3em; font-weight: 600; }
.picture pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; padding: .6em; }
.picture mark { background: var(--pale-orange); color: inherit; text-decoration: underline 2px; }
.strip, .barrow { display: flex; flex-wrap: wrap; gap: .5em; align-items: center; padding: .35em .6em; }
.strip { border-left: .5em solid; border-radius: 4px; margin: .25em 0; }
.strip.high { border-color: var(--blue); background: var(--pale-blue); }
.strip.middle { border-color: #888; background: #8883; border-left-style: double; }
.strip.low { border-color: var(--orange); background: var(--pale-orange); border-left-style: dashed; }
.grow { flex: 1 1 12em; overflow-wrap: anywhere; }
.chip { border: 1px solid; border-radius: 1em; padding: 0 .6em; font-size: .85em; display: inline-block; }
.chip.high { border-color: var(--blue); }
.chip.pick { border: 2px solid var(--blue); font-weight: 600; }
.chip.low, .chip.wrong, .chip.suspect { border: 2px solid var(--orange); }
.cards, .side { display: grid; grid-template-columns: repeat(auto-fit, minmax(15em, 1fr)); gap: .7em; }
.card { border: 1px solid #8886; border-radius: 6px; padding: .6em; overflow-wrap: anywhere; }
.card.chosen { border: 2px solid var(--blue); }
.legend { font-size: .85em; margin: .4em 0; }
.key { margin-right: 1.1em; display: inline-block; }
.label { flex: 2 1 14em; font-size: .9em; overflow-wrap: anywhere; }
.axis { flex: 1 1 8em; border: 1px solid #8886; background: linear-gradient(#888, #888) center / 1px 100% no-repeat; }
.bar { height: 1em; background: var(--blue); fill: var(--blue); }
.best { background: repeating-linear-gradient(45deg, var(--orange) 0 5px, var(--pale-orange) 5px 9px);
  fill: var(--pale-orange); stroke: var(--orange); stroke-width: 3px; }
.good, .cell { fill: var(--blue); }
.bad { fill: var(--orange); }
.after { fill: none; stroke: #888; stroke-width: 2px; }
.empty { fill: #8883; }
.band { fill: var(--pale-blue); }
.line { fill: none; stroke: currentColor; }
.threshold { stroke: var(--orange); stroke-width: 2px; stroke-dasharray: 7 3; fill: var(--pale-orange); }
.missing { border: 2px dashed #D55E00; padding: .6em; }
.line-about { font-size: .85em; opacity: .8; }
"""


class Safe(str):
    """HTML of which every part has been escaped."""


def tag(kind: str, *parts, **attributes) -> Safe:
    """<kind attributes>parts</kind>; a part is HTML if it is Safe, else text."""
    inside = "".join(part if isinstance(part, Safe) else html.escape(str(part)) for part in parts)
    given = "".join(f' {k.strip("_").replace("_", "-")}="{html.escape(str(v))}"' for k, v in attributes.items())
    return Safe(f"<{kind}{given}>{inside}</{kind}>")


def svg(width: int, height: int, *parts, label: str) -> Safe:
    return tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label,
               style=f"width:100%;max-width:{width * 1.3:.0f}px", font_size=12.5, fill="currentColor")


def text(x, y, *parts, **attributes) -> Safe:
    return tag("text", *parts, x=f"{x:.1f}", y=f"{y:.1f}", **attributes)


def mark(shape: str, x: float, y: float, hover: str = "", r: float = 5) -> Safe:
    """A point: `good` a blue disc, `bad` an orange triangle, `after` a hollow square."""
    about = [tag("title", hover)] if hover else []
    if shape == "good":
        return tag("circle", *about, cx=f"{x:.1f}", cy=f"{y:.1f}", r=r, class_="good")
    if shape == "bad":
        points = f"{x:.1f},{y - r * 1.3:.1f} {x - r * 1.2:.1f},{y + r:.1f} {x + r * 1.2:.1f},{y + r:.1f}"
        return tag("polygon", *about, points=points, class_="bad")
    return tag("rect", *about, x=f"{x - r:.1f}", y=f"{y - r:.1f}", width=2 * r, height=2 * r, class_="after")


def legend(*entries: tuple[str, str]) -> Safe:
    """(shape of `mark` or a CSS class of a patch, its meaning) pairs."""
    def key(shape):
        found = mark(shape, 8, 8) if shape in ("good", "bad", "after") else tag(
            "rect", x=1, y=2, width=14, height=12, class_=shape)
        return tag("svg", found, width=16, height=16,
                   style="display:inline-block;vertical-align:-3px;margin-right:.3em")

    return tag("p", *(tag("span", key(shape), meaning, class_="key") for shape, meaning in entries), class_="legend")


def curve(title: str, values: list[float], quantiles: list[float], threshold: float | None = None) -> Safe:
    """Energies of steps 1 … S before a band, the range of 90 % of verified steps; above it they are triangles.

    quantiles: the 101 of verified steps' energies. threshold: drawn as a line, and what triangles are above instead.
    """
    low, middle, high = (quantiles[i] for i in (5, 50, 95))
    above = high if threshold is None else threshold
    bottom, top = min(low, *values) * 0.9, max(high, above, *values) * 1.06
    left, right, upper, lower = 42, 352, 22, 150

    def x(i):
        return left + (right - left) * (i + 0.5) / len(values)

    def y(v):
        return lower - (lower - upper) * (v - bottom) / (top - bottom)

    parts = [text(left, 13, title, font_weight="bold"),
             tag("rect", x=left, width=right - left, y=y(high), height=y(low) - y(high), class_="band"),
             tag("line", x1=left, x2=right, y1=y(middle), y2=y(middle), class_="line", stroke_dasharray="4 3")]
    if threshold is not None:
        parts.append(tag("line", x1=left, x2=right, y1=y(threshold), y2=y(threshold), class_="threshold"))
    for v in np.linspace(bottom, top, 4)[1:-1].tolist() + [bottom]:
        parts.append(text(left - 5, y(v) + 4, f"{v:.2f}", text_anchor="end"))
    points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
    parts.append(tag("polyline", points=points, class_="line"))
    for i, v in enumerate(values):
        parts += [mark("bad" if v > above else "good", x(i), y(v), f"step {i + 1}: {v:.3f}"),
                  text(x(i), lower + 16, i + 1, text_anchor="middle")]
    parts.append(text((left + right) / 2, lower + 32, "step", text_anchor="middle"))
    return svg(360, 188, *parts, label=f"{title} of {len(values)} steps")


RANGE = [("band", "5 to 95 % of verified steps (dashed: their middle)"), ("good", "within"), ("bad", "above")]


def bars(rows: list[tuple[str, float]]) -> Safe:
    """Cosines with their texts; the highest is hatched."""
    found, best = [], max(value for _, value in rows)
    for label, value in rows:
        width, start = 50 * abs(value), 50 if value >= 0 else 50 - 50 * abs(value)
        place = f"margin-left:{start:.1f}%;width:{width:.1f}%"
        bar = tag("div", class_="bar best" if value == best else "bar", style=place)
        name = tag("div", label if len(label) <= 240 else f"{label[:240]} …", class_="label")
        found.append(tag("div", name, tag("div", bar, class_="axis"), tag("b", f"{value:+.3f}"), class_="barrow"))
    return tag("div", *found, legend(("bar", "cosine, from −1 to 1"), ("best", "the highest")))


def mask_picture(names: list[str], allowed: torch.Tensor) -> Safe:
    """An attention mask, allowed bool [T, T]: a filled square where the row may see the column."""
    side, left, top, parts = 18, 76, 66, []
    for i, name in enumerate(names):
        parts += [text(left - 4, top + side * i + 13, name, text_anchor="end"),
                  text(0, 0, name, transform=f"translate({left + side * i + 13},{top - 5}) rotate(-60)")]
        for j in range(len(names)):
            parts.append(tag("rect", x=left + side * j, y=top + side * i, width=side - 1, height=side - 1,
                             class_="cell" if allowed[i, j] else "empty"))
    return svg(left + side * len(names) + 40, top + side * len(names), *parts, label="isolation mask")


def scatter(points: list[tuple[float, float, str, str]]) -> Safe:
    """(x, y, shape, text) -> a picture; the text is shown when pointed at."""
    at = np.array([p[:2] for p in points])
    low, span = at.min(0), np.maximum(np.ptp(at, axis=0), 1e-9)
    at = 15 + (at - low) / span * np.array([530, 330])
    order = sorted(range(len(points)), key=lambda i: points[i][2] == "bad")
    found = [mark(points[i][2], *at[i], points[i][3], 4) for i in order]
    return svg(560, 360, *found, label=f"map of {len(points)} steps")


def listed(steps: list[str], about: list | None = None) -> Safe:
    """An ordered list of steps; `about`: for each a Safe or "" that follows it."""
    about = about or [""] * len(steps)
    return tag("ol", *(tag("li", tag("span", s), *([" ", a] if a else [])) for s, a in zip(steps, about, strict=True)))


def chip(words: str, kind: str = "") -> Safe:
    return tag("span", words, class_=f"chip {kind}")


def arithmetic(step: str) -> Safe:
    verdict = verify.check_step(step)
    return chip("✓ arithmetic") if verdict.is_valid else chip(f"✗ {verdict.reason}: {verdict.detail}", "wrong")


def changed(own: list[str], nudged: list[str]) -> Safe:
    """The nudged steps as a list, with the words marked that the LLM's own chain does not have."""
    old, new = (" ".join(steps).split() for steps in (own, nudged))
    blocks = difflib.SequenceMatcher(None, old, new, False).get_matching_blocks()
    same, at, lines = {b.b + j for b in blocks for j in range(b.size)}, itertools.count(), []
    for step in nudged:
        words = (word if next(at) in same else tag("mark", word) for word in step.split())
        lines.append(tag("li", *(part for word in words for part in (word, " "))))
    return tag("ol", *lines)


def figures(**values) -> Safe:
    shown = {k.replace("_", " "): f"{v:.3f}" if isinstance(v, float) else v for k, v in values.items() if v is not None}
    return tag("p", *(tag("span", f"{k} ", tag("b", v), class_="key") for k, v in shown.items()), class_="legend")
