"""Text from a base with its adapters: transformers' own generation over our frozen linears.

Imported by: chat, the `generate` command, the quickstart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.adapters.inject import per_row
from qlora_kit.base.loader import Base, held_weights
from qlora_kit.console import progress
from qlora_kit.data.tokenize import leading_bos, tokenizer_boundary
from qlora_kit.errors import DataError


def encode_prompts(tokenizer: Any, prompts: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of raw text, or of messages rendered with the chat template and the opening of the answer.

    Raises: DataError: no template, one that refuses, or nothing to continue. ModelError: the tokenizer breaks.
    """
    encoded, bos = [], leading_bos(tokenizer)
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = _ids(tokenizer, prompt, special=True)
        else:
            ids = _ids(tokenizer, _rendered(tokenizer, prompt), special=False)
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        if not ids:
            raise DataError("the prompt holds no token; give some text")
        encoded.append(ids)
    return encoded


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Raises: DataError: no chat template, or one that refuses these messages."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give the prompt as plain text (--raw)")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as problem:  # whatever the template's own code raises
        raise DataError(f"the chat template refuses the prompt: {problem}") from problem


def _ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    with tokenizer_boundary(f"{tokenizer.name_or_path}: the tokenizer breaks on the prompt"):
        return tokenizer(text, add_special_tokens=special)["input_ids"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0: always the most probable token, whatever else is set.
        top_p: only the most probable tokens that together have this probability; 1: all.
        top_k: only the k most probable tokens; 0: all.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """In transformers' words; said in full, so that nothing comes from the folder's generation_config.json."""
        plain = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": 1.0}
        if self.temperature == 0:
            return {**plain, "do_sample": False}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {**plain, "do_sample": True, **chosen}


def generate(
    base: Base,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, str]]],
    sampling: Sampling | None = None,
    *,
    batch: int = 8,
    adapters: Sequence[str | None] | None = None,
) -> Iterator[str]:
    """The answer to each prompt, in order.

    Args:
        prompts: text, or messages with role and content.
        sampling: default: the most probable answer.
        batch: prompts that are decoded side by side, padded on the left.
        adapters: of each prompt, None for the plain base; default: the active ones for all.
    Raises: ModelError: what `per_row` finds.
    """
    chosen, encoded = sampling or Sampling(), encode_prompts(tokenizer, prompts)
    stop = _stop_ids(base, tokenizer)
    torch.manual_seed(chosen.seed)
    with held_weights(base), progress("generating", len(encoded)) as advance:
        for start in range(0, len(encoded), batch):
            together = slice(start, start + batch)
            with contextlib.nullcontext() if adapters is None else per_row(base, adapters[together]):
                continued = _continued(base, encoded[together], stop, chosen)
            for row in continued:
                advance(1, "")
                yield tokenizer.decode(_until_stop(row, stop), skip_special_tokens=True)


def answer(
    base: Base,
    tokenizer: Any,
    prompt: str | list[dict[str, str]],
    sampling: Sampling,
    on_text: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """The answer to one prompt, as `generate` gives it, shown while it is made.

    Args:
        on_text: takes each piece of text as soon as no later token can change it.
        stopped: asked after every token; the answer ends where it says so. Seeding is the caller's.
    """
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    ids, stop = encode_prompts(tokenizer, [prompt]), _stop_ids(base, tokenizer)
    shown = Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
    criteria = [lambda ids, scores, **_: torch.full((len(ids),), stopped(), device=ids.device)]
    (row,) = _continued(base, ids, stop, sampling, streamer=shown, stopping_criteria=criteria)
    return str(tokenizer.decode(_until_stop(row, stop), skip_special_tokens=True))


@torch.no_grad()
def _continued(
    base: Base, rows: list[list[int]], stop: list[int], sampling: Sampling, **options: Any
) -> list[list[int]]:
    """The new ids of each row. Keys and values of earlier tokens are kept: a token costs a passage of its own only."""
    ids, mask = _left_padded(rows, stop[0], base.device)
    marks = {"eos_token_id": stop, "pad_token_id": stop[0]}
    output = base.model.generate(input_ids=ids, attention_mask=mask, **marks, **sampling.options(), **options)
    new: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return new


def _stop_ids(base: Base, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the generation config and the tokenizer's own."""
    configured = base.model.generation_config.eos_token_id
    found = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(found)) or [0]


def _left_padded(rows: list[list[int]], pad_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _until_stop(row: list[int], stop: list[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stop), len(row))
    return row[:end]
