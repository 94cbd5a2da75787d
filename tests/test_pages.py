"""What html pages share: one colour a component, curves that hold every point, tables that say both figures."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from qlora_kit import pages
from qlora_kit.planning.comparison import OTHER
from qlora_kit.planning.components import COMPONENTS

MIB = 1 << 20


def test_every_component_has_a_colour_of_its_own_and_both_schemes_are_styled() -> None:
    assert pages.COLOURS.keys() == {*COMPONENTS, OTHER}
    assert len({*pages.COLOURS.values()}) == len(pages.COLOURS)
    assert "color-scheme: light dark" in pages.STYLE and "prefers-color-scheme: dark" in pages.STYLE


def test_two_ledgers_stand_side_by_side_with_their_ratio_and_totals() -> None:
    table = pages.compared(
        {"base_nf4": 9 * MIB, "activations": 41 * MIB}, {"base_nf4": 9 * MIB, "activations": 40 * MIB}
    )
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?</td>", table)]
    assert cells[:5] == ["activations", "41.0 MiB", "40.0 MiB", "+2.5 %", ""]
    assert cells[5:9] == ["base_nf4", "9.0 MiB", "9.0 MiB", ""]
    assert cells[10:14] == ["total", "50.0 MiB", "49.0 MiB", "+2.0 %"]
    assert "width:100.000%" in table and "logits" not in table


def test_a_curve_stays_in_its_box_however_many_points_there_are() -> None:
    points = [(float(step), 1.0 + step % 7) for step in range(1, 5000)]
    figure = ElementTree.fromstring(pages.curve("loss", points, dots=[(2500.0, 9.0)], bound=3.0))
    line = next(figure.iter("polyline")).attrib["points"].split()
    assert 100 < len(line) <= pages.POINTS
    places = [tuple(map(float, place.split(","))) for place in line]
    assert all(pages.LEFT <= x <= pages.WIDTH and 0 <= y <= pages.TOP + pages.HEIGHT for x, y in places)
    assert len(list(figure.iter("circle"))) == 1 and figure.find(".//line[@class='bound']") is not None


def test_a_curve_of_one_point_or_of_zeros_can_be_drawn() -> None:
    for points in ([(3.0, 0.5)], [(1.0, 0.0), (2.0, 0.0)]):
        ElementTree.fromstring(pages.curve("x", points))


def test_words_are_escaped() -> None:
    said = pages.page("<a>", "", [pages.section("<b>", pages.commands(["<c>"]) + pages.paragraphs(["<d>"]))])
    assert not re.search("<[abcd]>", said)
