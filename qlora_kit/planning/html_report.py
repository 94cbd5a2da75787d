"""A plan as one html file: what takes the memory, when in a step and in which phase, the limit, the next step.

Why: to be kept beside a run, or sent to whoever decides on the card. How: figures come from the plan alone; skeleton,
bars and colours are those of every page of the kit (`pages`).
Imports no torch. Imported by the command `plan`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape

from qlora_kit import pages
from qlora_kit.pages import COLOURS, bar, commands, folded, page, paragraphs, percent, pieces, section, swatch
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.planning.planner import Plan
from qlora_kit.planning.report import MOMENTS, meaning, run_lines, stack_line, verdict
from qlora_kit.units import format_bytes


def html_report(plan: Plan, next_step: str, notes: Sequence[str] = ()) -> str:
    """The whole page.

    Args:
        next_step: the command to go on with when it fits.
        notes: further lines, such as those of the data.
    """
    settings = plan.settings
    tokens = f"{settings['train']['micro_batch']} x {settings['data']['seq_len']} tokens a forward"
    title = f"plan: {settings['model']['path']}, {settings['model']['quantization']}"
    sections = [
        _components(plan),
        _moments(plan),
        _phases(plan),
        section("How it runs", _lines(plan, notes)),
        section("Next", _next(plan, next_step)),
        folded("the recipe as it would run", json.dumps(settings, indent=2)),
    ]
    where = f'<p class="dim">{tokens}, on {escape(plan.device.name)}</p>'
    return page(title, where + pages.verdict(plan.fits, verdict(plan)), sections)


def _components(plan: Plan) -> str:
    """One stacked bar against the limit, and a row for each component."""
    total, limit = sum(plan.components.values()), plan.budget_bytes
    whole = max(total, limit)
    stack = f'<div class="stack">{pieces(plan.components, whole, "width")}'
    stack += f'<span class="limit" style="left:{percent(limit, whole)}" title="limit"></span></div>'
    rows = [
        f'<tr><td>{swatch(name)}</td><td class="n">{format_bytes(plan.components[name])}</td>'
        f'<td class="bar">{bar(plan.components[name], whole, COLOURS[name])}</td>'
        f'<td class="what dim">{escape(meaning(plan, name))}</td></tr>'
        for name in COMPONENTS
        if plan.components[name]
    ]
    rows += [_sum_row("total", total, whole), _sum_row("limit", limit, whole)]
    heading = f"On the device at the training peak, at {MOMENTS[plan.peak_moment]}"
    return section(heading, f"{stack}<p></p><table>{''.join(rows)}</table>")


def _sum_row(name: str, count: int, whole: int) -> str:
    return (
        f'<tr class="sum"><td>{name}</td><td class="n">{format_bytes(count)}</td>'
        f'<td class="bar">{bar(count, whole, "var(--dim)")}</td><td class="what"></td></tr>'
    )


def _moments(plan: Plan) -> str:
    """A column for each moment of a step that can be its peak, in the order in which they come."""
    totals = {name: sum(ledger.values()) for name, ledger in plan.moments.items()}
    whole = max(*totals.values(), plan.budget_bytes)
    columns = "".join(f"<div>{pieces(ledger, whole, 'height')}</div>" for ledger in plan.moments.values())
    limit = f'<span class="limit" style="bottom:{percent(plan.budget_bytes, whole)}" title="limit"></span>'
    names = "".join(
        f"<div>{escape(MOMENTS[name])}<br><b>{format_bytes(count)}</b></div>" for name, count in totals.items()
    )
    said = '<p class="dim">From left to right as they come; the dashed line is the limit.</p>'
    return section(
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
            f'<tr><td>{name}</td><td class="n">{device}</td>'
            f'<td class="bar">{bar(phase.device_bytes, whole, colour)}</td>'
            + "".join(f'<td class="n">{cell}</td>' for cell in others)
            + "</tr>"
        )
    return section("The phases of a run, peak of each", f"<table>{''.join(rows)}</table>")


def _lines(plan: Plan, notes: Iterable[str]) -> str:
    given = "\n".join(notes)
    return paragraphs(run_lines(plan)) + (f"<pre>{escape(given)}</pre>" if given else "")


def _next(plan: Plan, next_step: str) -> str:
    if plan.stack != "kit":
        return paragraphs([stack_line(plan)])
    return commands([next_step] if plan.fits else plan.suggestions)
