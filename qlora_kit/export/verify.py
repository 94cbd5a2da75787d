"""Proof that a merged folder is the model that was trained: reloaded from disk by plain transformers, in a new process.

`python -m qlora_kit.export.verify FOLDER`, with token ids and targets as JSON on stdin, prints the loss as JSON; no
code of the kit's base, adapters or training takes part in it. Imported by: the `merge` command, the quickstart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.data.tokenize import IGNORE_INDEX, Example, load_examples
from qlora_kit.errors import ModelError

if TYPE_CHECKING:
    from qlora_kit.base.loader import Base

TOLERANCE_NATS = 0.01


@dataclass(frozen=True)
class Proof:
    """Held-out loss of the live adapter model and of the merged folder, in nats per learned token."""

    live_loss: float
    merged_loss: float
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether the two agree."""
        return abs(self.live_loss - self.merged_loss) <= TOLERANCE_NATS

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "tolerance_nats": TOLERANCE_NATS}


def prove(folder: Path, live_loss: float, examples: Sequence[Example]) -> Proof:
    """Score the merged folder in a fresh process and compare.

    Raises: ModelError: plain transformers cannot load it, or the losses differ by more than TOLERANCE_NATS.
    """
    rows = json.dumps([(example.input_ids, example.targets) for example in examples])
    command = [sys.executable, "-m", "qlora_kit.export.verify", str(folder)]
    run = subprocess.run(command, input=rows, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        reason = run.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ModelError(f"{folder}: plain transformers cannot load and score it: {reason[0]}")
    scored = json.loads(run.stdout.splitlines()[-1])
    proof = Proof(live_loss, scored["loss"], scored["tokens"])
    if not proof.passed:
        raise ModelError(
            f"{folder}: the merged model scores {proof.merged_loss:.4f} nats, the adapter model {live_loss:.4f}: "
            f"they differ by more than {TOLERANCE_NATS}; do not use it"
        )
    return proof


def prove_merge(base: Base, tokenizer: Any, folder: Path, data: Path, *, seq_len: int = 2048) -> Proof:
    """Score `base` with its active adapter on held-out `data`, then the merged `folder`; see `prove`."""
    from qlora_kit.data.batches import eval_batches
    from qlora_kit.planning.components import AUTO_LOSS_CHUNK_TOKENS
    from qlora_kit.recipe import Data
    from qlora_kit.training.evaluate import evaluate

    examples, _ = load_examples(data, Data(train=str(data), seq_len=seq_len), tokenizer)
    batches = eval_batches(examples, micro_batch=1, seq_len=seq_len, packing=False, pad_id=0)
    return prove(folder, evaluate(base, batches, AUTO_LOSS_CHUNK_TOKENS).loss, examples)


def plain_loss(folder: Path, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """Mean loss of a folder under `AutoModelForCausalLM`, one document at a time, and the tokens it is over."""
    import torch
    from transformers import AutoModelForCausalLM

    # Arithmetic in fp32, so that only the weights' rounding counts: fp16 arithmetic on a CPU is another experiment.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for input_ids, targets in rows:
            logits = model(input_ids=torch.tensor([input_ids])).logits[0]
            wanted = torch.tensor(targets)
            total += torch.nn.functional.cross_entropy(
                logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum"
            ).item()
            tokens += int((wanted != IGNORE_INDEX).sum())
    return total / max(1, tokens), tokens


if __name__ == "__main__":
    loss, token_count = plain_loss(Path(sys.argv[1]), json.load(sys.stdin))
    print(json.dumps({"loss": loss, "tokens": token_count}))
