"""The html report stands alone, says what the plan says, and escapes what comes from outside."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from qlora_kit.planning.html_report import html_report
from qlora_kit.planning.planner import Plan, make_plan
from qlora_kit.planning.report import MOMENTS, run_lines, stack_line, verdict
from qlora_kit.planning.stack_plan import plan_in_stack
from qlora_kit.recipe import recipe_for_model
from qlora_kit.units import format_bytes

VOID = {"meta", "br"}


def plan(model: str = "llama-3.1-8b", *overrides: str, gpu: str = "rtx-4090") -> Plan:
    return make_plan(recipe_for_model(model, overrides), gpu=gpu)


class Page(HTMLParser):
    """Its text, what its elements refer to, and whether they are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.attributes = "", [], []  # type: tuple[str, list[str], list[tuple[str, str | None]]]
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("made", [plan(), plan("llama-3.1-70b", "memory.placement=device")], ids=["fits", "over"])
def test_the_page_needs_nothing_from_outside(made: Plan) -> None:
    html = html_report(made, "qlora-kit train r.yaml")
    assert re.search(r"https?:|//|url\(|@import|<script|<link|<img|<iframe", html) is None
    assert {name for name, _ in Page(html).attributes} <= {
        *("lang", "charset", "name", "content", "class", "style", "title")
    }


def test_the_page_says_what_the_plan_says() -> None:
    made = plan("llama-3.1-70b")
    text = Page(html_report(made, "qlora-kit train r.yaml", ["data: 7 documents"])).text
    said = [verdict(made), *run_lines(made), "qlora-kit train r.yaml", "data: 7 documents", made.device.name]
    said += [name for name, count in made.components.items() if count] + [*made.phases]
    said += [MOMENTS[name] for name in made.moments]
    said += [format_bytes(sum(ledger.values())) for ledger in made.moments.values()]
    assert [words for words in said if words not in text] == []


def test_a_plan_that_does_not_fit_is_followed_by_what_would() -> None:
    made = plan("llama-3.1-70b", "memory.placement=device")
    text = Page(html_report(made, "never")).text
    assert all(line in text for line in made.suggestions)
    assert "never" not in text


def test_another_stack_is_shown_with_its_moments_and_this_kits_peak() -> None:
    made = plan_in_stack(recipe_for_model("llama-3.1-8b"), "peft", gpu="rtx-4090")
    text = Page(html_report(made, "never")).text
    assert stack_line(made) in text and "never" not in text
    assert all(MOMENTS[name] in text for name in made.moments)


def test_words_from_outside_are_escaped() -> None:
    made = plan()
    made.settings["model"]["path"] = "<script>alert(1)</script>"
    html = html_report(made, "a <b>", ["</pre><b>"])
    assert "<script" not in html and "<b>" not in html.replace("<br><b>", "")
    assert "<script>alert(1)</script>" in Page(html).text


def test_bars_are_shares_of_the_larger_of_total_and_limit() -> None:
    made = plan()
    total, limit = sum(made.components.values()), made.budget_bytes
    assert total < limit
    html = html_report(made, "")
    assert f"width:{100 * made.components['base_nf4'] / limit:.3f}%" in html
    assert 'class="limit" style="left:100.000%"' in html
    over = replace(made, device=replace(made.device, memory_bytes=total // 2))
    assert 'class="limit" style="left:50.000%"' in html_report(over, "")
