"""Held-out loss and logits of a model, one document at a time, and how far they are from those of another.

`python -m qlora_kit.export.score FOLDER`, with rows and the reference as JSON on stdin, prints the scores as JSON. It
loads the folder by plain transformers: no code of the kit's base, adapters or training takes part. Arithmetic is fp32,
so that only the weights' rounding counts; a block's weights are fp32 while it computes, so memory is that of the 16-bit
model and one block. Logits of the first learned tokens, up to PROBE_BYTES, are what is compared.
Imported by: verify, choose.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from qlora_kit import files
from qlora_kit.data.tokenize import IGNORE_INDEX

PROBE_BYTES = 256 << 20  # of fp32 logits

Rows = Sequence[tuple[list[int], list[int]]]  # ids and targets of each document


@dataclass(frozen=True)
class Distance:
    """Of a model's logits from the reference's, over `tokens` learned tokens.

    Attributes:
        kl: mean KL divergence from the reference, nats per token.
        top1: share of tokens with the same most probable next token.
        max_logit: largest difference of one logit.
    """

    tokens: int
    kl: float
    top1: float
    max_logit: float


@dataclass(frozen=True)
class Scores:
    """Of one model.

    Attributes:
        losses: sum over the learned tokens of each document, nats.
        counts: learned tokens of each document.
        distance: from the reference, if there was one.
    """

    losses: list[float]
    counts: list[int]
    distance: Distance | None

    @property
    def loss(self) -> float:
        """Mean over learned tokens, nats."""
        return sum(self.losses) / max(1, self.tokens)

    @property
    def tokens(self) -> int:
        return sum(self.counts)


@torch.no_grad()
def score(model: Any, rows: Rows, *, reference: Path | None = None, save: Path | None = None) -> Scores:
    """Score a model of transformers' interface, in evaluation mode.

    Args:
        reference: logits that another call wrote to `save`, to be compared with.
    """
    losses, counts, distances = [], [], _Distances(reference)
    with contextlib.nullcontext() if save is None else files.atomic_file(save) as sink:
        for input_ids, targets in rows:
            logits_NV, wanted_N = _learned(model, input_ids, targets)
            losses.append(nn.functional.cross_entropy(logits_NV, wanted_N, reduction="sum").item())
            counts.append(len(wanted_N))
            distances.add(logits_NV)
            if sink is not None:
                _save(sink, logits_NV)
    return Scores(losses, counts, distances.result())


def _learned(model: Any, input_ids: list[int], targets: list[int]) -> tuple[Tensor, Tensor]:
    """Logits [N, V] in fp32 and targets [N] of the learned positions of a document, on the host."""
    wanted = torch.tensor(targets)
    (positions,) = (wanted != IGNORE_INDEX).nonzero(as_tuple=True)
    device = model.get_input_embeddings().weight.device
    out = model(input_ids=torch.tensor([input_ids], device=device), logits_to_keep=positions.to(device))
    return out.logits[0].float().cpu(), wanted[positions]


def _save(sink: IO[bytes], logits_NV: Tensor) -> None:
    """Append rows of logits as long as there is room."""
    row_bytes = 4 * logits_NV.shape[1]
    room = (PROBE_BYTES - sink.tell()) // row_bytes
    sink.write(logits_NV[: max(0, room)].numpy().tobytes())


class _Distances:
    """Sums over the tokens that the reference holds."""

    def __init__(self, reference: Path | None) -> None:
        self._values = None if reference is None else np.memmap(reference, np.float32, "r")
        self._position, self._tokens = 0, 0
        self._kl, self._same, self._max = 0.0, 0, 0.0

    def add(self, logits_NV: Tensor) -> None:
        """The next learned tokens."""
        if self._values is None:
            return
        found = self._values[self._position : self._position + logits_NV.numel()]
        theirs = torch.tensor(np.array(found)).view(-1, logits_NV.shape[1])
        ours = logits_NV[: len(theirs)]
        p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
        self._kl += (p.exp() * (p - q)).sum().item()
        self._same += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
        self._max = max(self._max, (theirs - ours).abs().max().item() if len(theirs) else 0.0)
        self._position += found.size
        self._tokens += len(theirs)

    def result(self) -> Distance | None:
        if self._values is None:
            return None
        tokens = max(1, self._tokens)
        return Distance(self._tokens, self._kl / tokens, self._same / tokens, self._max)


# ------------------------------------------------------------------------------------------------ plain transformers


def plain_model(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """A folder's model by plain transformers, weights in `dtype`, arithmetic in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    blocks = max((part for part in model.modules() if isinstance(part, nn.ModuleList)), key=len)
    in_blocks = {id(parameter) for parameter in blocks.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in in_blocks and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for block in blocks:
        _compute_in_fp32(block)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' Linear4bit: what it dequantizes is multiplied in fp32
            module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False
    return model


def _compute_in_fp32(block: nn.Module) -> None:
    """Make a block's weights fp32 whenever it is called, and what they were after it."""
    stored: dict[nn.Parameter, Tensor] = {}

    def widen(module: nn.Module, inputs: Any) -> None:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                stored[parameter], parameter.data = parameter.data, parameter.data.float()

    def narrow(module: nn.Module, inputs: Any, output: Any) -> None:
        while stored:
            parameter, data = stored.popitem()
            parameter.data = data

    block.register_forward_pre_hook(widen)
    block.register_forward_hook(narrow)


def main(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    """Scores of a folder as JSON; `question` has `rows` and `reference`, a path."""
    reference = question["reference"]
    scores = score(plain_model(folder), question["rows"], reference=Path(reference) if reference else None)
    return asdict(scores)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.load(sys.stdin))))
