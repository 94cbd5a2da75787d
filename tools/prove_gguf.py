"""`python -m tools.prove_gguf FOLDER FILE DATA [--lora L]`: GGUF files held to the folder that they are, by llama.cpp.

Why: the file's users run llama.cpp, not transformers; what counts is what llama.cpp computes from it.
How: records of held-out data go through plain transformers (fp32, the merged folder) and through llama.cpp: token ids,
the chat template in the file, the distribution of every learned token (loss, KL divergence, same first choice), and
greedy answers. Needs the extra `llamacpp`. Exit 1 where ids or templates differ, or the loss is off by more than
TOLERANCE_NATS. Figures: `docs/export.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_kit import files
from qlora_kit.data.formats import Record, read_records
from qlora_kit.data.tokenize import IGNORE_INDEX, Example, load_examples, load_tokenizer
from qlora_kit.generation import encode_prompts
from qlora_kit.recipe import Data
from tools.llama_cpp import LlamaCpp

TOLERANCE_NATS = 0.02
ANSWER_TOKENS = 48


@dataclass
class Comparison:
    """What was found; counts are (equal, of all)."""

    same_ids: tuple[int, int]
    same_prompts: tuple[int, int]
    same_answers: tuple[int, int]
    learned_tokens: int
    loss: float
    llama_cpp_loss: float
    mean_kl: float
    max_kl: float
    same_first_choice: float

    @property
    def passed(self) -> bool:
        """Whether it is the same model to whoever runs it."""
        whole = all(equal == total for equal, total in (self.same_ids, self.same_prompts))
        return whole and abs(self.loss - self.llama_cpp_loss) <= TOLERANCE_NATS


def compare(
    folder: Path, file: Path, data: Path, records: int, *, lora: Path | None = None, threads: int = 1
) -> Comparison:
    """Score the first `records` of `data` with both; `lora`: an adapter's file, which llama.cpp adds to `file`."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    settings = Data(train=str(data), seq_len=2048)
    chosen = [record for record, _ in zip(read_records(data, "auto"), range(records))]
    examples = load_examples(data, settings, tokenizer)[0][:records]
    judge = LlamaCpp(file, lora, context=2048, threads=threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [_before_answer(record) for record in chosen]
    encoded = encode_prompts(tokenizer, prompts)
    theirs = [judge.encode(judge.rendered(prompt), special=True) for prompt in prompts]
    texts = [tokenizer.decode(example.input_ids) for example in examples]
    ids = [judge.encode(text) == tokenizer.encode(text, add_special_tokens=False) for text in texts]
    answers = [_answer(model, tokenizer, row) == judge.answer(row, ANSWER_TOKENS) for row in encoded]
    pairs = [pair for example in examples for pair in _distributions(model, judge, example)]
    return Comparison(
        same_ids=(sum(ids), len(ids)),
        same_prompts=(sum(ours == row for ours, row in zip(encoded, theirs, strict=True)), len(encoded)),
        same_answers=(sum(answers), len(answers)),
        **_figures(pairs),
    )


def _before_answer(record: Record) -> list[dict[str, str]]:
    """The turns up to the last answer."""
    return list(record.messages[:-1])


def _answer(model: Any, tokenizer: Any, row: Sequence[int]) -> list[int]:
    """transformers' most probable continuation, without what ends it."""
    import torch

    asked = torch.tensor([row])
    found = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0, len(row) :].tolist()
    return [token for token in found if token != tokenizer.eos_token_id]


def _distributions(model: Any, judge: LlamaCpp, example: Example) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """(transformers' log-probabilities, llama.cpp's, target) at every learned position."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
    learned = [index for index, target in enumerate(example.targets) if target != IGNORE_INDEX]
    return [
        (
            _normalised(logits[index].numpy()),
            _normalised(judge.log_probabilities(example.input_ids[: index + 1], logits.shape[-1])),
            example.targets[index],
        )
        for index in learned
    ]


def _normalised(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities in fp64, whose sum is 1 to the last digit: the divergences are smaller than fp32's rounding."""
    exact = scores.astype(np.float64)
    peak = exact.max()
    normalised: np.ndarray = exact - peak - np.log(np.exp(exact - peak).sum())
    return normalised


def _figures(pairs: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> dict[str, Any]:
    """Loss of both, KL(transformers || llama.cpp) per token, and how often the first choice is the same."""
    divergences = [float((np.exp(ours) * (ours - theirs)).sum()) for ours, theirs, _ in pairs]
    return {
        "learned_tokens": len(pairs),
        "loss": -float(np.mean([ours[target] for ours, _, target in pairs])),
        "llama_cpp_loss": -float(np.mean([theirs[target] for _, theirs, target in pairs])),
        "mean_kl": float(np.mean(divergences)),
        "max_kl": max(divergences),
        "same_first_choice": float(np.mean([ours.argmax() == theirs.argmax() for ours, theirs, _ in pairs])),
    }


def main() -> None:
    """Print the comparison, and write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="merged folder, for plain transformers")
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("data", type=Path, help="held-out chats, jsonl")
    parser.add_argument("--lora", type=Path, help="an adapter's GGUF file beside the base's")
    parser.add_argument("--records", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    asked = parser.parse_args()
    found = compare(asked.folder, asked.file, asked.data, asked.records, lora=asked.lora, threads=asked.threads)
    figures = asdict(found) | {"passed": found.passed}
    for name, value in figures.items():
        print(f"{name:<18} {value}")
    if asked.json is not None:
        files.write_text(asked.json, json.dumps(figures, indent=2) + "\n")
    sys.exit(not found.passed)


if __name__ == "__main__":
    main()
