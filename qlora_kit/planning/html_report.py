"""A plan as one html file: what takes the memory, when in a step and in which phase, the limit, the next step.

Why: to be kept beside a run, or sent to whoever decides on the card. How: bars are boxes whose widths are percentages;
no script, no font, no picture, nothing is fetched, so it can be opened anywhere. Colours follow the reader's light or
dark setting. Every word that comes from outside is escaped. Figures come from the plan alone.
Imports no torch. Imported by the command `plan`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from qlora_kit.planning.components import COMPONENTS, Ledger
from qlora_kit.planning.planner import Plan
from qlora_kit.planning.report import MEANINGS, MOMENTS, run_lines, stack_line, verdict
from qlora_kit.units import format_bytes

# One for each component, in their order; told apart in both schemes, and never alone: bars carry names and bytes.
COLOURS = (
    *("#3b6fb6", "#7aa6d9", "#2f8f83", "#d08a2e", "#e0b354"),
    *("#a5662a", "#8a5fb0", "#c05a86", "#6f8a3a", "#8b9098"),
)
STYLE = """
:root { color-scheme: light dark; --text: #1c2126; --dim: #5d666f; --page: #fbfbfa; --box: #ffffff; --line: #d9dde1;
  --good: #1b7a43; --bad: #b3261e; --track: #eceef0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --dim: #9aa4ad; --page: #15181b; --box: #1d2125;
  --line: #343a40; --good: #63c98d; --bad: #f08a80; --track: #2a2f34; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem 1rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 60rem; margin: 0 auto; }
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
tr.sum td { border-top: 1px solid var(--line); font-weight: 600; }
.swatch { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .45rem; }
.steps { display: flex; gap: 1rem; align-items: flex-end; position: relative; height: 15rem;
  border-bottom: 1px solid var(--line); }
.steps > div { flex: 1; display: flex; flex-direction: column-reverse; height: 100%; }
.steps i { display: block; width: 100%; }
.steps .limit { left: 0; right: 0; top: auto; border-left: 0; border-top: 2px dashed var(--text); }
.names { display: flex; gap: 1rem; }
.names div { flex: 1; font-size: .85rem; padding-top: .35rem; text-align: center; }
code, pre { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (max-width: 34rem) { td.what { display: none; } }
"""


def html_report(plan: Plan, next_step: str, notes: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        next_step: the command to go on with when it fits.
        notes: further lines, such as those of the data.
    """
    settings = plan.settings
    tokens = f"{settings['train']['micro_batch']} x {settings['data']['seq_len']} tokens a forward"
    title = escape(f"{settings['model']['path']}, {settings['model']['quantization']}")
    sections = [
        _components(plan),
        _moments(plan),
        _phases(plan),
        _section("How it runs", _lines(plan, notes)),
        _section("Next", _next(plan, next_step)),
        f"<section><details><summary>the recipe as it would run</summary><pre>"
        f"{escape(json.dumps(settings, indent=2))}</pre></details></section>",
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>plan: {title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body><main>'
        f'<h1>{title}</h1><p class="dim">{tokens}, on {escape(plan.device.name)}</p>'
        f'<p class="verdict {"fits" if plan.fits else "over"}">{escape(verdict(plan))}</p>\n'
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.3f}%" if whole else "0%"


def _pieces(ledger: Ledger, whole: int, side: str) -> str:
    """A coloured box for each component that takes something; `side` is what its size is: width or height."""
    return "".join(
        f'<i style="{side}:{_percent(ledger[name], whole)};background:{colour}" '
        f'title="{name}: {format_bytes(ledger[name])}"></i>'
        for name, colour in zip(COMPONENTS, COLOURS)
        if ledger[name]
    )


def _components(plan: Plan) -> str:
    """One stacked bar against the limit, and a row for each component."""
    total, limit = sum(plan.components.values()), plan.budget_bytes
    whole = max(total, limit)
    stack = f'<div class="stack">{_pieces(plan.components, whole, "width")}'
    stack += f'<span class="limit" style="left:{_percent(limit, whole)}" title="limit"></span></div>'
    rows = [
        f'<tr><td><span class="swatch" style="background:{colour}"></span>{name}</td>'
        f'<td class="n">{format_bytes(plan.components[name])}</td>'
        f'<td class="bar"><div class="track"><i style="width:{_percent(plan.components[name], whole)};'
        f'background:{colour}"></i></div></td><td class="what dim">{escape(MEANINGS[name])}</td></tr>'
        for name, colour in zip(COMPONENTS, COLOURS)
        if plan.components[name]
    ]
    rows += [_sum_row("total", total, whole), _sum_row("limit", limit, whole)]
    heading = f"On the device at the training peak, at {MOMENTS[plan.peak_moment]}"
    return _section(heading, f"{stack}<p></p><table>{''.join(rows)}</table>")


def _sum_row(name: str, count: int, whole: int) -> str:
    bar = f'<div class="track"><i style="width:{_percent(count, whole)};background:var(--dim)"></i></div>'
    return (
        f'<tr class="sum"><td>{name}</td><td class="n">{format_bytes(count)}</td><td class="bar">{bar}</td>'
        f'<td class="what"></td></tr>'
    )


def _moments(plan: Plan) -> str:
    """A column for each moment of a step that can be its peak, in the order in which they come."""
    totals = {name: sum(ledger.values()) for name, ledger in plan.moments.items()}
    whole = max(*totals.values(), plan.budget_bytes)
    columns = "".join(f"<div>{_pieces(ledger, whole, 'height')}</div>" for ledger in plan.moments.values())
    limit = f'<span class="limit" style="bottom:{_percent(plan.budget_bytes, whole)}" title="limit"></span>'
    names = "".join(
        f"<div>{escape(MOMENTS[name])}<br><b>{format_bytes(count)}</b></div>" for name, count in totals.items()
    )
    said = '<p class="dim">From left to right as they come; the dashed line is the limit.</p>'
    return _section(
        "A training step, moment by moment",
        f'{said}<div class="steps">{columns}{limit}</div><div class="names">{names}</div>',
    )


def _phases(plan: Plan) -> str:
    whole = max(plan.peak_bytes, plan.budget_bytes)
    rows = ['<tr><th>phase</th><th class="n">device</th><th></th><th class="n">host</th><th class="n">disk</th></tr>']
    for name, phase in plan.phases.items():
        device, *others = (format_bytes(count) if count else "-" for count in vars(phase).values())
        colour = "var(--good)" if phase.device_bytes <= plan.budget_bytes else "var(--bad)"
        rows.append(
            f'<tr><td>{name}</td><td class="n">{device}</td><td class="bar"><div class="track">'
            f'<i style="width:{_percent(phase.device_bytes, whole)};background:{colour}"></i></div></td>'
            + "".join(f'<td class="n">{cell}</td>' for cell in others)
            + "</tr>"
        )
    return _section("The phases of a run, peak of each", f"<table>{''.join(rows)}</table>")


def _lines(plan: Plan, notes: Iterable[str]) -> str:
    text = "".join(f"<p>{escape(line)}</p>" for line in run_lines(plan))
    given = "\n".join(notes)
    return text + (f"<pre>{escape(given)}</pre>" if given else "")


def _next(plan: Plan, next_step: str) -> str:
    if plan.stack != "kit":
        return f"<p>{escape(stack_line(plan))}</p>"
    if plan.fits:
        return f"<p><code>{escape(next_step)}</code></p>"
    return "".join(f"<p><code>{escape(suggestion)}</code></p>" for suggestion in plan.suggestions)
