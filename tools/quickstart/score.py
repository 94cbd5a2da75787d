"""Is a generated answer the right function call? Parsing, comparing with acceptable values, what to ask.

Why: the quickstart shows what fine-tuning changed by the share of exactly right answers, not by loss alone.
The rule follows BFCL's: calls in any order, each required argument with an acceptable value, no argument that
the answer does not know. Tolerant in three things only: 5 equals 5.0, strings are compared after strip and
casefold (BFCL drops punctuation too), and one call may stand outside a list, or the whole in one code fence.
Called by the quickstart's generation test and by `tools.quickstart.data`, which checks each target with it.

An acceptable call is `{"name": str, "arguments": {argument: [acceptable, ...]}}`; "" among the acceptable
values means that the argument may be left out; dicts inside follow the same rule. Not the BFCL benchmark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_CHARS = 1_400  # about 400 tokens of function definitions and request, at 3.5 characters a token
TARGET_CHARS = 180  # about 60 tokens of JSON call
_FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


@dataclass(frozen=True)
class ScoredRequest:
    """One request of the generation test: the prompt as chat messages, and the acceptable calls."""

    id: str
    messages: list[dict[str, str]]
    acceptable: list[dict[str, Any]]


def parse_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls that `text` consists of, or None if it is anything else: prose, torn JSON, other keys."""
    fenced = _FENCE.fullmatch(text.strip())
    try:
        value = json.loads(fenced.group(1) if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    calls = value if isinstance(value, list) else [value]
    return calls if calls and all(_is_call(call) for call in calls) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _is_call(value: Any) -> bool:
    well_formed = isinstance(value, dict) and set(value) == {"name", "arguments"}
    return well_formed and isinstance(value["name"], str) and isinstance(value["arguments"], dict)


def is_exact(text: str, acceptable: list[dict[str, Any]]) -> bool:
    """True if `text` is exactly the acceptable calls, in any order, each answered once."""
    calls = parse_calls(text)
    return calls is not None and len(calls) == len(acceptable) and _pairs_up(calls, acceptable)


def exact_share(texts: Sequence[str], answers: Sequence[list[dict[str, Any]]]) -> float:
    """Share of `texts` that are exactly right, 0 to 1.

    Raises: ValueError: as many texts as answers are needed, and at least one.
    """
    if not texts or len(texts) != len(answers):
        raise ValueError(f"{len(texts)} texts for {len(answers)} answers; expected the same number, at least one")
    return sum(is_exact(text, answer) for text, answer in zip(texts, answers, strict=True)) / len(texts)


def _pairs_up(calls: list[dict[str, Any]], acceptable: list[dict[str, Any]]) -> bool:
    """True if the calls can be matched one to one; tries each partner of the first, then the rest."""
    if not calls:
        return True
    return any(
        _is_acceptable_call(calls[0], spec) and _pairs_up(calls[1:], acceptable[:i] + acceptable[i + 1 :])
        for i, spec in enumerate(acceptable)
    )


def _is_acceptable_call(call: dict[str, Any], spec: dict[str, Any]) -> bool:
    return call["name"] == spec["name"] and _are_acceptable_arguments(call["arguments"], spec["arguments"])


def _are_acceptable_arguments(arguments: dict[str, Any], spec: dict[str, Any]) -> bool:
    """No argument that the spec does not know; each known one acceptable, or absent where that is allowed."""
    if not set(arguments) <= set(spec):
        return False
    return all(
        any(_is_acceptable(arguments[name], option) for option in options_of(values))
        if name in arguments
        else "" in options_of(values)
        for name, values in spec.items()
    )


def options_of(values: Any) -> list[Any]:
    """The acceptable values of one argument; three published answers give a bare value instead of a list."""
    return values if isinstance(values, list) else [values]


def _is_acceptable(value: Any, option: Any) -> bool:
    """One value against one acceptable value; True is not 1, but 5 is 5.0."""
    if isinstance(option, dict):
        return isinstance(value, dict) and _are_acceptable_arguments(value, option)
    if isinstance(option, list):
        same_length = isinstance(value, list) and len(value) == len(option)
        return same_length and all(map(_is_acceptable, value, option))
    if isinstance(option, str):
        return isinstance(value, str) and value.strip().casefold() == option.strip().casefold()
    return isinstance(value, bool) == isinstance(option, bool) and value == option


def scored_requests(eval_file: Path, answers_file: Path, limit: int = 48) -> list[ScoredRequest]:
    """The generation test: the shortest prompts, no two with the same functions; the same ones each time.

    Args:
        eval_file: `eval.jsonl` of `tools.quickstart.data`.
        answers_file: `eval_answers.jsonl` beside it.
        limit: at most this many; generation on a CPU is slow.
    """
    answers = {answer["id"]: answer["calls"] for answer in _lines(answers_file)}
    chosen: dict[str, ScoredRequest] = {}
    for record in sorted(_lines(eval_file), key=lambda record: (_prompt_chars(record), record["id"])):
        *prompt, target = record["messages"]
        if _prompt_chars(record) <= PROMPT_CHARS and len(target["content"]) <= TARGET_CHARS:
            request = ScoredRequest(record["id"], prompt, answers[record["id"]])
            chosen.setdefault(prompt[0]["content"], request)
    return list(chosen.values())[:limit]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _prompt_chars(record: dict[str, Any]) -> int:
    return sum(len(message["content"]) for message in record["messages"][:-1])
