"""The scorer counts an answer only if it is exactly the right call; mirrors tools/quickstart/score.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.quickstart.score import PROMPT_CHARS, exact_share, is_exact, parse_calls, scored_requests

SUM: dict[str, Any] = {"name": "sum", "arguments": {"a": [2], "b": [3, 3.5], "unit": ["", "km"]}}
WEATHER: dict[str, Any] = {"name": "weather", "arguments": {"city": ["Oslo", "Oslo, Norway"]}}
NESTED: dict[str, Any] = {
    "name": "f",
    "arguments": {"x": [{"k": ["v", "w"], "n": ["", 1]}], "y": [[1, True]]},
}


def answer(*calls: tuple[str, dict[str, Any]]) -> str:
    return json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


def test_any_acceptable_value_is_exact() -> None:
    for b in (3, 3.0, 3.5):
        assert is_exact(answer(("sum", {"a": 2, "b": b})), [SUM])


def test_an_optional_argument_may_be_given_or_left_out() -> None:
    assert is_exact(answer(("sum", {"a": 2, "b": 3})), [SUM])
    assert is_exact(answer(("sum", {"a": 2, "b": 3, "unit": " KM"})), [SUM])


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"a": 2, "b": 4}, id="wrong value"),
        pytest.param({"a": 2}, id="missing argument"),
        pytest.param({"a": 2, "b": 3, "c": 1}, id="extra argument"),
        pytest.param({"a": "2", "b": 3}, id="number as string"),
        pytest.param({"a": 2, "b": 3, "unit": "miles"}, id="wrong optional value"),
    ],
)
def test_a_wrong_argument_is_not_exact(arguments: dict[str, Any]) -> None:
    assert not is_exact(answer(("sum", arguments)), [SUM])


def test_another_function_is_not_exact() -> None:
    assert not is_exact(answer(("add", {"a": 2, "b": 3})), [SUM])


def test_true_is_not_one() -> None:
    assert not is_exact(answer(("f", {"a": True})), [{"name": "f", "arguments": {"a": [1]}}])
    assert not is_exact(answer(("f", {"a": 1})), [{"name": "f", "arguments": {"a": [True]}}])


def test_calls_match_in_any_order_but_each_only_once() -> None:
    right: list[tuple[str, dict[str, Any]]] = [("weather", {"city": "oslo"}), ("sum", {"a": 2, "b": 3})]
    assert is_exact(answer(*right), [SUM, WEATHER])
    assert not is_exact(answer(right[0], right[0]), [SUM, WEATHER])
    assert not is_exact(answer(*right, right[0]), [SUM, WEATHER])


def test_a_greedy_partner_does_not_hide_the_right_pairing() -> None:
    wide, narrow = ({"name": "f", "arguments": {"a": values}} for values in ([1, 2], [1]))
    assert is_exact(answer(("f", {"a": 1}), ("f", {"a": 2})), [wide, narrow])


def test_dicts_and_lists_inside_follow_the_same_rule() -> None:
    assert is_exact(answer(("f", {"x": {"k": "w"}, "y": [1, True]})), [NESTED])
    assert not is_exact(answer(("f", {"x": {"k": "u"}, "y": [1, True]})), [NESTED])
    assert not is_exact(answer(("f", {"x": {"k": "w"}, "y": [1]})), [NESTED])


def test_one_call_may_stand_alone_or_in_a_fence() -> None:
    call = '{"name": "f", "arguments": {}}'
    assert parse_calls(call) == parse_calls(f"```json\n[{call}]\n```") == [{"name": "f", "arguments": {}}]


@pytest.mark.parametrize(
    "text",
    [
        "Sure! I would call f.",
        "",
        "[]",
        "3",
        '[{"name": "f", "arguments": {}}] is the call',
        '[{"name": "f", "arguments": {"a": 1',
        '{"name": "f", "arguments": {}, "why": 1}',
        '{"name": "f", "arguments": "a"}',
        '{"name": "f", "arguments": {"a": NaN}}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_what_is_not_only_calls_is_no_call(text: str) -> None:
    assert parse_calls(text) is None


def test_the_share_counts_exact_answers() -> None:
    texts = [answer(("weather", {"city": "Oslo"})), "prose"]
    assert exact_share(texts, [[WEATHER], [WEATHER]]) == 0.5
    with pytest.raises(ValueError, match="2 texts for 1 answers"):
        exact_share(texts, [[WEATHER]])


def test_scored_requests_are_short_distinct_and_always_the_same(tmp_path: Path) -> None:
    prompts = {"long": "f" * (PROMPT_CHARS + 1), "b": "f1", "a": "f1", "c": "f12"}
    messages = {name: [{"content": prompt}, {"content": ""}, {"content": "[]"}] for name, prompt in prompts.items()}
    records = [json.dumps({"id": name, "messages": messages[name]}) for name in prompts]
    (tmp_path / "eval.jsonl").write_text("\n".join(records))
    (tmp_path / "answers.jsonl").write_text("\n".join(json.dumps({"id": name, "calls": []}) for name in prompts))
    chosen = scored_requests(tmp_path / "eval.jsonl", tmp_path / "answers.jsonl")
    assert [request.id for request in chosen] == ["a", "c"]
    assert chosen[0].messages == messages["a"][:2]
