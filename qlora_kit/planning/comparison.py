"""Planned beside measured, component by component: lines for people.

Imports no torch. Imported by training.memory (the end of a run), and by the commands that measure.
"""

from __future__ import annotations

from collections.abc import Mapping

from qlora_kit.planning.components import COMPONENTS
from qlora_kit.units import format_bytes

OTHER = "other"  # measured, and nobody's


def comparison(planned: Mapping[str, int], measured: Mapping[str, int], second: str = "measured") -> list[str]:
    """A table of two ledgers, bytes, with their totals where both are whole.

    Args:
        measured: of some components, or of all and OTHER; what is lacking is shown as a dash.
        second: heading of its column.
    """
    rows: list[tuple[str, ...]] = [("component", "planned", second, "")]
    for name in (*COMPONENTS, OTHER):
        here = (planned.get(name), measured.get(name))
        if any(here):
            rows.append((name, *map(_size, here), _share(*here)))
    if measured.keys() >= set(COMPONENTS):
        totals = (sum(planned.values()), sum(measured.values()))
        rows.append(("total", *map(_size, totals), _share(*totals)))
    return [f"  {name:<16} {first:>10} {last:>10} {share:>8}".rstrip() for name, first, last, share in rows]


def _size(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)


def _share(planned: int | None, measured: int | None) -> str:
    """How much more was planned than measured, in percent; nothing where it is equal, or one is lacking."""
    if not planned or not measured or planned == measured:
        return ""
    return f"{100 * (planned / measured - 1):+.1f} %"
