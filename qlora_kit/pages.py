"""What the kit's html pages share: the skeleton, the styles, a colour for each component, tables, bars and curves.

Why: a plan, a step's memory and a run are looked at side by side, so a component has one colour everywhere.
How: bars are boxes whose widths are percentages, curves are SVG; no script, no font, no picture, nothing is fetched, so
that a page can be kept or sent anywhere. Colours follow the reader's light or dark setting. Headings and cells are
escaped here; content is given as html. Imports no torch. Imported by: planning.html_report, profiling.timeline,
training.report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from qlora_kit.units import format_bytes

# From the bottom of a stack: what stays, then what comes and goes. They stand out on white and on black.
COLOURS = {
    "runtime": "#8c8c8c",
    "base_nf4": "#4e79a7",
    "quant_constants": "#86b4d9",
    "base_unquantized": "#4fa3a0",
    "adapter": "#4d9a45",
    "optimizer": "#c9a227",
    "workspace": "#a977a0",
    "gradients": "#86c26f",
    "activations": "#e15759",
    "logits": "#f28e2b",
    "other": "#5f6b7a",
}
STYLE = """
:root { color-scheme: light dark; --text: #1c2126; --dim: #5d666f; --page: #fbfbfa; --box: #ffffff; --line: #d9dde1;
  --good: #1b7a43; --bad: #b3261e; --track: #eceef0; --curve: #2f6fb3; --mark: #d0572b; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --dim: #9aa4ad; --page: #15181b; --box: #1d2125;
  --line: #343a40; --good: #63c98d; --bad: #f08a80; --track: #2a2f34; --curve: #6fa8e0; --mark: #f0905f; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem 1rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 62rem; margin: 0 auto; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .8rem; }
section { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 1.1rem 1.2rem;
  margin-top: 1.1rem; }
p { margin: .3rem 0; }
.dim { color: var(--dim); }
.verdict { font-size: 1.1rem; font-weight: 600; margin: .5rem 0 0; }
.fits { color: var(--good); }
.over { color: var(--bad); }
.stack { position: relative; display: flex; height: 2rem; background: var(--track); border-radius: 4px; }
.stack i { display: block; height: 100%; }
.limit { position: absolute; top: -.3rem; bottom: -.3rem; border-left: 2px solid var(--text); }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--dim); }
th, td { padding: .15rem .6rem .15rem 0; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.bar { width: 38%; }
.track { background: var(--track); border-radius: 3px; }
.track i { display: block; height: .85rem; border-radius: 3px; }
.track + .track { margin-top: 2px; }
.track.planned i { opacity: .45; }
.pair .track i { height: .5rem; }
tr.sum td { border-top: 1px solid var(--line); font-weight: 600; }
.swatch { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .45rem; }
.steps { display: flex; gap: 1rem; align-items: flex-end; position: relative; height: 15rem;
  border-bottom: 1px solid var(--line); }
.steps > div { flex: 1; display: flex; flex-direction: column-reverse; height: 100%; }
.steps i { display: block; width: 100%; }
.steps .limit { left: 0; right: 0; top: auto; border-left: 0; border-top: 2px dashed var(--text); }
.names { display: flex; gap: 1rem; }
.names div { flex: 1; font-size: .85rem; padding-top: .35rem; text-align: center; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1.1rem 1.6rem; }
figure { margin: 0; }
figcaption { color: var(--dim); font-size: .9rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font: 12px system-ui, sans-serif; }
svg text.strong { fill: var(--text); }
svg .grid { stroke: var(--line); }
svg .peak { stroke: var(--text); stroke-dasharray: 3 3; }
svg .part { fill: var(--line); }
svg .block { stroke: var(--dim); stroke-width: .5; }
svg .curve { fill: none; stroke: var(--curve); stroke-width: 1.8; }
svg .dot { fill: var(--mark); }
svg .bound { stroke: var(--mark); stroke-dasharray: 6 4; }
code, pre { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 34rem) { td.what { display: none; } }
"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 190, 66, 8, 10, 22  # of a curve, in units of its SVG
POINTS = 400  # of a curve: more cannot be told apart


def page(title: str, head: str, sections: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: plain words.
        head: html below the title.
        sections: of `section`.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><main>\n<h1>{escape(title)}</h1>{head}\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def section(heading: str, content: str) -> str:
    """A box with a heading."""
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def paragraphs(lines: Iterable[str]) -> str:
    """Lines of plain words."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def commands(lines: Iterable[str]) -> str:
    """Lines to paste."""
    return "".join(f"<p><code>{escape(line)}</code></p>" for line in lines)


def folded(summary: str, text: str) -> str:
    """A box that opens on a click, with text as it is."""
    return f"<section><details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details></section>"


def verdict(good: bool, words: str) -> str:
    """The answer, in green or red."""
    return f'<p class="verdict {"fits" if good else "over"}">{escape(words)}</p>'


# ----------------------------------------------------------------------------------------------------- components


def percent(part: float, whole: float) -> str:
    """A length of CSS."""
    return f"{100 * part / whole:.3f}%" if whole else "0%"


def swatch(name: str) -> str:
    """A component's name after its colour."""
    return f'<span class="swatch" style="background:{COLOURS[name]}"></span>{name}'


def bar(part: float, whole: float, colour: str, kind: str = "") -> str:
    """A bar on its track."""
    style = f"width:{percent(part, whole)};background:{colour}"
    return f'<div class="{f"track {kind}".strip()}"><i style="{style}"></i></div>'


def pieces(ledger: Mapping[str, int], whole: int, side: str) -> str:
    """A coloured box for each component that takes something; `side` is what its size is: width or height."""
    return "".join(
        f'<i style="{side}:{percent(ledger[name], whole)};background:{colour}" '
        f'title="{name}: {format_bytes(ledger[name])}"></i>'
        for name, colour in COLOURS.items()
        if ledger.get(name)
    )


def compared(planned: Mapping[str, int], measured: Mapping[str, int]) -> str:
    """A table of two ledgers, bytes: planned above measured in each row's bars; with totals."""
    names = [name for name in reversed(COLOURS) if planned.get(name) or measured.get(name)]
    most = max(max(ledger.get(name, 0) for name in names) for ledger in (planned, measured))
    rows = [
        '<tr><th>component</th><th class="n">planned</th><th class="n">measured</th><th class="n"></th><th></th></tr>'
    ]
    for name in names:
        first, second = planned.get(name, 0), measured.get(name, 0)
        bars = bar(first, most, COLOURS[name], "planned") + bar(second, most, COLOURS[name])
        rows.append(f'<tr><td>{swatch(name)}</td>{_sizes(first, second)}<td class="bar pair">{bars}</td></tr>')
    totals = _sizes(sum(planned.values()), sum(measured.values()))
    rows.append(f'<tr class="sum"><td>total</td>{totals}<td class="bar"></td></tr>')
    return f"<table>{''.join(rows)}</table>"


def _sizes(planned: int, measured: int) -> str:
    ratio = f"{100 * (planned / measured - 1):+.1f} %" if planned and measured and planned != measured else ""
    return "".join(f'<td class="n">{cell}</td>' for cell in (format_bytes(planned), format_bytes(measured), ratio))


# --------------------------------------------------------------------------------------------------------- curves

Points = Sequence[tuple[float, float]]


def curve(caption: str, points: Points, *, dots: Points = (), bound: float | None = None, unit: str = "") -> str:
    """A figure: values over steps.

    Args:
        points: (step, value), joined by a line; of many the mean of neighbours.
        dots: single values of the same kind, with their figures.
        bound: a value that is marked by a dashed line.
        unit: "bytes", or words behind the figures at the axis.
    """
    drawn = _thinned(points)
    highest = max([value for _, value in (*drawn, *dots)] + ([] if bound is None else [bound])) * 1.06 or 1.0
    first, last = min(step for step, _ in (*points, *dots)), max(step for step, _ in (*points, *dots))

    def place(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / ((last - first) or 1)
        return round(across, 1), round(TOP + HEIGHT * (1 - value / highest), 1)

    shapes = [*_axis(highest, unit), *_ends(first, last)]
    if bound is not None:
        y = place(first, bound)[1]
        shapes.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    shapes.append(f'<polyline class="curve" points="{" ".join(f"{x},{y}" for x, y in map(place, *zip(*drawn)))}"/>')
    for step, value in dots:
        x, y = place(step, value)
        shapes.append(f'<circle class="dot" cx="{x}" cy="{y}" r="4"><title>step {step:g}: {value:.4f}</title></circle>')
    box = f'viewBox="0 0 {WIDTH} {TOP + HEIGHT + BOTTOM}" role="img"'
    return f"<figure><figcaption>{escape(caption)}</figcaption><svg {box}>{''.join(shapes)}</svg></figure>"


def _thinned(points: Points) -> Points:
    """At most POINTS: each the mean of as many neighbours."""
    count = -(-len(points) // POINTS)
    groups = [points[start : start + count] for start in range(0, len(points), count)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _axis(highest: float, unit: str) -> Iterator[str]:
    """Four lines, from zero."""
    for part in range(4):
        value = highest / 1.06 * part / 3
        y = round(TOP + HEIGHT * (1 - value / highest), 1)
        words = format_bytes(int(value)) if unit == "bytes" else f"{value:.3g}{unit}"
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{words}</text>'


def _ends(first: float, last: float) -> Iterator[str]:
    y = TOP + HEIGHT + 16
    yield f'<text x="{LEFT}" y="{y}">step {first:g}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{y}" text-anchor="end">{last:g}</text>'
