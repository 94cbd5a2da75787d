"""A record as text, and which characters of it are learned.

How: chat turns go through the tokenizer's own chat template. What a turn adds is found by prefix: the text
before the answer, as generation will see it, must begin the text with the answer; the rest, up to and with
the end-of-turn token, is learned. No token id is ever searched for, so nothing is masked because pad == eos.

Choices: `alpaca` becomes a user and an assistant turn where there is a template, else the plain Alpaca
prompt. `completion` and `text` stay raw: whoever writes prompts out has chosen their form. A template that
rewrites earlier answers (Qwen3 drops their reasoning) gets one document per answer, the very texts that
generation sees.
Works on any tokenizer with a chat template; imports no transformers itself. Imported by tokenize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from qlora_kit.data.formats import Message, Record
from qlora_kit.errors import DataError

# Templates that print today's date would give other token ids tomorrow, and a resumed run other data.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ '2024-07-26' if '%m' in format else '26 July 2024' if '%B' in format else '26 Jul 2024' }}"
    "{%- endmacro -%}"
)

Learn = Literal["completion", "all"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """One document before tokenization.

    Attributes:
        text: what is encoded, without adding special tokens.
        learned: [start, end) characters of `text` that are learned, in order.
        templated: it comes from a template, which as a rule closes the answer itself; raw text gets eos.
    """

    text: str
    learned: tuple[Span, ...]
    templated: bool


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's template, its date held still; None where there is none.

    Raises: DataError: several templates and none is the default.
    """
    if not tokenizer.chat_template:
        return None
    try:
        template = str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(f"chat template of the tokenizer: {error}") from None
    return _FIXED_DATE + template if "strftime_now" in template else template


def render(record: Record, tokenizer: Any, template: str | None, learn: Learn) -> list[Rendered]:
    """The documents of a record; more than one only where the template rewrites earlier answers.

    Args:
        record: from `read_records`.
        tokenizer: its `apply_chat_template` renders, its `eos_token` is known.
        template: from `chat_template`.
        learn: `completion`: answers with their end; `all`: everything.
    Raises: DataError: a chat without template or without answer, or a template that refuses the turns.
    """
    if template is not None and record.messages:
        return _render_chat(record, tokenizer, template, learn)
    if record.completion is None:
        raise DataError(
            f"{record.source}: the tokenizer has no chat template; put a chat_template.jinja into the "
            "model's folder (the instruct model's will do), or use format alpaca or completion"
        )
    text = record.prompt + record.completion
    start = 0 if learn == "all" else len(record.prompt)
    return [Rendered(text, ((start, len(text)),), templated=False)]


def _render_chat(record: Record, tokenizer: Any, template: str, learn: Learn) -> list[Rendered]:
    def text_of(count: int, add_generation_prompt: bool = False) -> str:
        turns = record.messages[:count]
        return _apply(tokenizer, template, turns, add_generation_prompt, record.source)

    if learn == "all":
        text = text_of(len(record.messages)).rstrip()
        return [Rendered(text, ((0, len(text)),), templated=True)]
    answers = [index for index, message in enumerate(record.messages) if message["role"] == "assistant"]
    if not answers:
        raise DataError(f"{record.source}: messages: no assistant turn; add one, or set data.learn=all")
    prompts = [text_of(index, add_generation_prompt=True) for index in answers]
    turns = [text_of(index + 1) for index in answers]
    for index, prompt, turn in zip(answers, prompts, turns, strict=True):
        _require_prefix(prompt, turn, f"{record.source}: messages[{index}]")
    starts = [len(prompt) for prompt in prompts]
    ends = [_end_within(turn, turns[-1], tokenizer.eos_token) for turn in turns]
    spans = [(start, end) for start, end in zip(starts, ends, strict=True) if end is not None]
    if len(spans) == len(answers):
        return [_document(turns[-1], spans)]
    return [_document(turn, [(start, len(turn))]) for start, turn in zip(starts, turns, strict=True)]


def _document(text: str, learned: Sequence[Span]) -> Rendered:
    """`text` up to the end of its last turn; a line break after it teaches nothing."""
    text = text[: max(len(text.rstrip()), learned[-1][0])]
    return Rendered(text, tuple((start, min(end, len(text))) for start, end in learned), templated=True)


def _end_within(turn: str, whole: str, eos: str | None) -> int | None:
    """Where a turn ends within the whole conversation; None: the whole does not begin with it.

    Some templates (Phi-3) put eos behind the last turn only, so a turn is tried with and without it.
    """
    turn = turn.rstrip()
    for end_of_turn in (turn, turn.removesuffix(eos).rstrip() if eos else turn):
        if whole.startswith(end_of_turn):
            return len(end_of_turn)
    return None


def _apply(tokenizer: Any, template: str, turns: Sequence[Message], add_generation_prompt: bool, source: str) -> str:
    try:
        text = tokenizer.apply_chat_template(
            list(turns), chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a downloaded template is code: it may raise anything
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"{source}: the chat template refuses the turns ({roles}): {error}") from error
    return str(text)


def _require_prefix(prompt: str, turn: str, where: str) -> None:
    """Raises: DataError: `turn` does not begin with `prompt`; shows where they part."""
    if turn.startswith(prompt):
        return
    pairs = zip_longest(prompt, turn)
    at = next(index for index, (before, after) in enumerate(pairs) if before != after)
    raise DataError(
        f"{where}: the chat template renders what stands before this answer differently once the answer "
        f"follows: character {at}: {prompt[at : at + 40]!r} before, {turn[at : at + 40]!r} with it. Its "
        "answers cannot be told from its prompts; set data.learn=all, or use another chat template"
    )
