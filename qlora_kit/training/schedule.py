"""The learning rate as a pure function of the step, so that a resumed run cannot differ. Imported by: training.loop."""

from __future__ import annotations

import math


def learning_rate(step: int, *, total: int, peak: float, warmup: float, kind: str) -> float:
    """Learning rate of optimizer step `step` (0-based) of `total`.

    Linear warm-up over the first `warmup` fraction of the steps (the first step already learns), then `cosine` to
    zero (Loshchilov & Hutter 2017, arXiv:1608.03983, without restarts), `linear` to zero, or `constant`.
    """
    warmup_steps = round(warmup * total)
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if kind == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total - warmup_steps)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done)
