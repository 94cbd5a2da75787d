"""Text from a base with its active adapters: transformers' own generation over our frozen linears.

Imported by: the `generate` command, the quickstart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

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


@torch.no_grad()
def generate(
    base: Base,
    tokenizer: Any,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 8,
) -> Iterator[str]:
    """The answer to each prompt, in order, the most probable one at temperature 0.

    Args:
        prompts: text, or messages with role and content.
        batch: prompts that are decoded side by side, padded on the left.
    """
    encoded = encode_prompts(tokenizer, prompts)
    stop = _stop_ids(base, tokenizer)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    torch.manual_seed(seed)
    with held_weights(base), progress("generating", len(encoded)) as advance:
        for start in range(0, len(encoded), batch):
            rows = encoded[start : start + batch]
            ids, mask = _left_padded(rows, stop[0], base.device)
            output = base.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop,
                pad_token_id=stop[0],
                **sampling,
            )
            for row in output[:, ids.shape[1] :].tolist():
                advance(1, "")
                yield tokenizer.decode(_until_stop(row, stop), skip_special_tokens=True)


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
