"""The page and the picture of a step's memory: nothing of the peak is lost, nothing from elsewhere is needed."""

from __future__ import annotations

import re
import sys
from xml.etree import ElementTree

import pytest

from qlora_kit.errors import RecipeError
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.profiling import timeline
from qlora_kit.profiling.profiler import Profile
from qlora_kit.profiling.tracker import NAMES, Place, Series

MIB = 1 << 20


def entry(**counts: int) -> tuple[int, ...]:
    return tuple(counts.get(name, 0) for name in NAMES)


def step(changes: int = 6000, highest: int = 4321) -> Series:
    """Activations that go up and down, once higher than ever."""
    counts = [MIB * (5 + number % 7) for number in range(changes)]
    counts[highest] = 40 * MIB
    bytes_ = [entry(base_nf4=9 * MIB, activations=count) for count in counts]
    marks = [(0, Place("embedding")), *((1000 * block, Place("forward", block)) for block in (1, 2, 3))]
    marks += [(highest - 1, Place("loss")), (5000, Place("backward", 3)), (5500, Place("backward", 2))]
    return Series([number / 100 for number in range(changes)], list(range(changes)), bytes_, marks)


def profile_of(series: Series) -> Profile:
    planned = dict.fromkeys(COMPONENTS, 0) | {"base_nf4": 9 * MIB, "activations": 41 * MIB}
    measured = dict.fromkeys(NAMES, 0) | {"base_nf4": 9 * MIB, "activations": 40 * MIB}
    return Profile(
        device="cpu",
        planned=planned,
        planned_moment="the loss",
        measured=measured,
        measured_place="loss",
        process_bytes=None,
        shape=(1, 512),
        micro_batches=2,
        tokens=1000,
        learned_tokens=600,
        steps=3,
        step_s=0.5,
        series=series,
    )


def test_the_highest_point_is_drawn_however_many_there_are() -> None:
    drawn = timeline.layers(step())
    assert drawn.peak == (43.21, 49 * MIB, "loss")
    assert len(drawn.x) <= timeline.POINTS + 2
    assert max(map(sum, zip(*drawn.bytes.values()))) == 49 * MIB
    assert list(drawn.bytes) == ["base_nf4", "activations"]


def test_parts_follow_one_another_with_their_blocks_in_them() -> None:
    parts = timeline.layers(step(), "operators").parts
    assert [part[2] for part in parts] == ["embedding", "forward", "loss", "backward"]
    assert [len(part[3]) for part in parts] == [0, 3, 0, 2]
    assert [part[1] for part in parts] == [part[0] for part in parts[1:]] + [5999]


def test_the_drawing_is_well_formed_and_stacks_every_component() -> None:
    root = ElementTree.fromstring(timeline.svg(timeline.layers(step())))
    space = "{http://www.w3.org/2000/svg}"
    assert [area.findtext(f"{space}title") for area in root.iter(f"{space}polygon")] == ["base_nf4", "activations"]
    assert "peak 49.0 MiB, loss" in [text.text for text in root.iter(f"{space}text")]
    for area in root.iter(f"{space}polygon"):
        for point in area.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert timeline.LEFT <= x <= timeline.WIDTH
            assert 0 <= y <= timeline.TOP + timeline.HEIGHT


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_is_given() -> None:
    page = timeline.page("<m> & co", profile_of(step()), timeline.svg(timeline.layers(step())))
    assert not re.search(r"(src|href)=|url\(|@import|<script|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "<h1>&lt;m&gt; &amp; co</h1>" in page
    assert re.search(r'activations</td><td class="n">41.0 MiB</td><td class="n">40.0 MiB', page)


def test_the_picture_is_a_png() -> None:
    assert timeline.png(timeline.layers(step()), "a step").startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RecipeError, match=r"qlora_kit\[plots\]"):
        timeline.png(timeline.layers(step()), "a step")


def test_a_step_of_one_entry_can_be_drawn() -> None:
    drawn = timeline.layers(Series([0.0], [0], [entry(adapter=5)], [(0, Place("loss"))]))
    ElementTree.fromstring(timeline.svg(drawn))
    assert drawn.peak[1] == 5
