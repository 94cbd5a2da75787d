"""The memory of one step over time: a page (report.html) that opens anywhere, and a picture (timeline.png).

How: the page (`pages`) holds an SVG of stacked areas; the picture is matplotlib's, imported only to draw it (the extra
`plots`). Both draw the same layers: of a step's many
changes the highest of each of POINTS spans, so that no peak is lost.
Imports no torch with the module. Imported by: commands (`profile`).
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qlora_kit import pages
from qlora_kit.errors import RecipeError
from qlora_kit.pages import COLOURS, compared, paragraphs, section
from qlora_kit.planning.comparison import OTHER
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.units import format_bytes

if TYPE_CHECKING:
    from qlora_kit.profiling.profiler import Profile
    from qlora_kit.profiling.tracker import Series

NAMES = (*COMPONENTS, OTHER)
POINTS = 1500
WIDTH, HEIGHT, LEFT, RIGHT, TOP, STRIP = 1000, 380, 78, 8, 18, 34
LABEL_WIDTH = 7  # of a letter, about


@dataclass(frozen=True)
class Layers:
    """A step's memory, ready to be drawn.

    Attributes:
        x: of each point, seconds or operators; `bytes`: of each component that there is, from the bottom, at each.
        parts: (start, end, name, starts of its blocks) of each part of the step, in the unit of x.
        peak: (x, bytes, name of the part) where the total is highest.
    """

    x: list[float]
    bytes: dict[str, list[int]]
    parts: list[tuple[float, float, str, list[float]]]
    peak: tuple[float, int, str]


def layers(series: Series, over: str = "seconds") -> Layers:
    """What to draw of a tracker's series.

    Args:
        over: `seconds`, or `operators` where time means nothing.
    """
    x = [float(value) for value in getattr(series, over)]
    totals = [sum(entry) for entry in series.bytes]
    chosen = list(_highest(x, totals))
    found = {name: [series.bytes[index][NAMES.index(name)] for index in chosen] for name in COLOURS}
    highest = max(range(len(totals)), key=totals.__getitem__)
    places = [place for start, place in series.marks if start < highest]
    peak = (x[highest], totals[highest], str(places[-1]) if places else "")
    stacked = {name: values for name, values in found.items() if any(values)}
    return Layers([x[index] for index in chosen], stacked, list(_parts(series, x)), peak)


def _highest(x: Sequence[float], totals: Sequence[int]) -> Iterator[int]:
    """Of each of POINTS equal spans of x, the index with the highest total; the first and the last too."""
    width = (x[-1] - x[0]) / POINTS or 1.0
    spans = [list(group) for _, group in groupby(range(len(x)), key=lambda index: int((x[index] - x[0]) / width))]
    yield from sorted({0, len(x) - 1} | {max(span, key=totals.__getitem__) for span in spans})


def _parts(series: Series, x: Sequence[float]) -> Iterator[tuple[float, float, str, list[float]]]:
    """Marks that follow one another with the same name are one part; its blocks' marks stand in it."""
    groups = [list(group) for _, group in groupby(series.marks, key=lambda mark: mark[1].part)]
    ends = [x[group[0][0]] for group in groups[1:]] + [x[-1]]
    for group, end in zip(groups, ends):
        blocks = [x[index] for index, place in group if place.block is not None]
        yield x[group[0][0]], end, group[0][1].part, blocks


# ------------------------------------------------------------------------------------------------------------ page


def page(title: str, profile: Profile, drawn: str) -> str:
    """The report: what was run, the drawing of `svg`, and planned beside measured."""
    sections = [
        section("What was run", paragraphs(profile.facts())),
        section("Over the step", drawn),
        section("At the peak", compared(profile.planned, profile.measured)),
    ]
    return pages.page(title, "", sections)


def svg(drawn: Layers, over: str = "seconds") -> str:
    """Stacked areas above a strip with the parts of the step and their blocks."""
    highest = 1.06 * drawn.peak[1]
    shapes = [*_grid(highest), *_areas(drawn, highest), *_strip(drawn), *_peak(drawn, highest)]
    bottom = TOP + HEIGHT + STRIP + 16
    ends = [(LEFT, "start", f"{drawn.x[0]:.4g}"), (WIDTH - RIGHT, "end", f"{drawn.x[-1]:.4g} {over}")]
    shapes += [f'<text x="{at}" y="{bottom}" text-anchor="{anchor}">{text}</text>' for at, anchor, text in ends]
    size = f'viewBox="0 0 {WIDTH} {bottom + 6}" role="img" aria-label="memory of one step over time"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(shapes) + "\n</svg>"


def _across(drawn: Layers, x: float) -> float:
    span = drawn.x[-1] - drawn.x[0] or 1.0
    return round(LEFT + (WIDTH - LEFT - RIGHT) * (x - drawn.x[0]) / span, 1)


def _up(count: float, highest: float) -> float:
    return round(TOP + HEIGHT * (1 - count / highest), 1)


def _grid(highest: float) -> Iterator[str]:
    """Lines at round numbers of bytes, about five."""
    step = 1 << max(0, int(highest / 5).bit_length() - 1)
    step *= 2 if highest / step > 8 else 1
    for count in range(0, int(highest) + 1, step):
        y = _up(count, highest)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{format_bytes(count)}</text>'


def _areas(drawn: Layers, highest: float) -> Iterator[str]:
    """A polygon for each component, between the sum of those below it and that with it."""
    below = [0] * len(drawn.x)
    for name, counts in drawn.bytes.items():
        above = [low + count for low, count in zip(below, counts)]
        points = [*_steps(drawn, above, highest), *reversed(list(_steps(drawn, below, highest)))]
        path = " ".join(f"{x},{y}" for x, y in points)
        yield f'<polygon fill="{COLOURS[name]}" points="{path}"><title>{name}</title></polygon>'
        below = above


def _steps(drawn: Layers, counts: Sequence[int], highest: float) -> Iterator[tuple[float, float]]:
    """A value holds until the next one."""
    before = None
    for x, count in zip(drawn.x, counts):
        if before is not None and before != count:
            yield _across(drawn, x), _up(before, highest)
        if before != count or x in (drawn.x[0], drawn.x[-1]):
            yield _across(drawn, x), _up(count, highest)
        before = count


def _strip(drawn: Layers) -> Iterator[str]:
    top = TOP + HEIGHT + 6
    for start, end, part, blocks in drawn.parts:
        left, right = _across(drawn, start), _across(drawn, end)
        width = max(right - left - 1, 0.5)
        yield f'<rect class="part" x="{left}" y="{top}" width="{width:.1f}" height="22"><title>{part}</title></rect>'
        for block in blocks:
            x = _across(drawn, block)
            yield f'<line class="block" x1="{x}" x2="{x}" y1="{top + 16}" y2="{top + 22}"/>'
        if width > LABEL_WIDTH * len(part):
            yield f'<text class="strong" x="{left + 4}" y="{top + 14}">{part}</text>'


def _peak(drawn: Layers, highest: float) -> Iterator[str]:
    x, count, part = drawn.peak
    across, up = _across(drawn, x), _up(count, highest)
    anchor, aside = ("start", 6) if across < WIDTH / 2 else ("end", -6)
    yield f'<line class="peak" x1="{across}" x2="{across}" y1="{up}" y2="{TOP + HEIGHT}"/>'
    said = html.escape(f"peak {format_bytes(count)}, {part}")
    yield f'<text class="strong" x="{across + aside}" y="{up - 4}" text-anchor="{anchor}">{said}</text>'


# --------------------------------------------------------------------------------------------------------- picture


def png(drawn: Layers, title: str, over: str = "seconds") -> bytes:
    """The same as a picture.

    Raises: RecipeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError("timeline.png needs matplotlib: python -m pip install 'qlora_kit[plots]'") from None
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes, mebi = figure.add_subplot(), 2**20
    heights = [[count / mebi for count in counts] for counts in drawn.bytes.values()]
    colours = [COLOURS[name] for name in drawn.bytes]
    axes.stackplot(drawn.x, heights, labels=list(drawn.bytes), colors=colours, step="post", linewidth=0)
    for start, *_ in drawn.parts:
        axes.axvline(start, color="0.6", linewidth=0.3)
    axes.annotate(f"peak {format_bytes(drawn.peak[1])}, {drawn.peak[2]}", (drawn.peak[0], drawn.peak[1] / mebi))
    axes.set(
        title=title, xlabel=over, ylabel="MiB", xlim=(drawn.x[0], drawn.x[-1]), ylim=(0, 1.06 * drawn.peak[1] / mebi)
    )
    axes.legend(reverse=True, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    written = io.BytesIO()
    FigureCanvasAgg(figure).print_png(written)
    return written.getvalue()
