"""Proof that a merged folder is the model that was trained: its bits, and what it says when it is loaded anew.

How: `audit` compares base, adapter and folder tensor by tensor; then a fresh process loads the folder by plain
transformers, and its loss and logits on held-out text must be those of the live model: base and adapter side by side,
on the same weights that were merged onto. Imported by: choose, the commands.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.data.tokenize import Example
from qlora_kit.errors import ModelError
from qlora_kit.export.audit import audit
from qlora_kit.export.score import Distance, Rows, Scores, score

if TYPE_CHECKING:
    from qlora_kit.base.loader import Base
    from qlora_kit.export.merge import Merge

TOLERANCE_NATS = 0.01  # of the loss, and of the mean KL divergence
# The live model computes in its own dtype: bf16 rounds each block's output, and logits of 16 in steps of 1/8.


@dataclass(frozen=True)
class Live:
    """The live adapter model: its scores, and the file that holds its logits."""

    scores: Scores
    logits: Path
    rows: Rows


@dataclass(frozen=True)
class Proof:
    """A merged folder beside the live model; losses in nats per learned token, `distance` from the live logits."""

    live_loss: float
    merged_loss: float
    tokens: int
    distance: Distance
    changed: int
    unchanged: int

    @property
    def passed(self) -> bool:
        """Whether the two agree."""
        return abs(self.live_loss - self.merged_loss) <= TOLERANCE_NATS and self.distance.kl <= TOLERANCE_NATS

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed, "tolerance_nats": TOLERANCE_NATS}


def rows_of(examples: Sequence[Example]) -> Rows:
    """What of held-out documents goes to a scoring process: those with something to learn."""
    return [(example.input_ids, example.targets) for example in examples if example.learned_tokens]


def live_model(base: Base, rows: Rows, logits: Path) -> Live:
    """Score `base` with its active adapters; its logits go to the file `logits`."""
    base.model.eval()
    return Live(score(base.model, rows, save=logits), logits, rows)


def prove(folder: Path, merge: Merge, live: Live) -> Proof:
    """Compare a merged folder with its base and adapter, then reload it and compare it with the live model.

    Raises: ModelError: what is wrong with a tensor; plain transformers cannot load the folder; or loss or logits differ
        by more than TOLERANCE_NATS.
    """
    counts = audit(folder, merge)
    scores = reloaded(folder, live)
    assert scores.distance is not None
    proof = Proof(live.scores.loss, scores.loss, scores.tokens, scores.distance, **counts)
    if not proof.passed:
        raise ModelError(
            f"{folder}: the merged model scores {proof.merged_loss:.4f} nats, the live adapter model "
            f"{proof.live_loss:.4f}, KL {proof.distance.kl:.4f} per token: more than {TOLERANCE_NATS} apart; "
            "do not use it"
        )
    return proof


def reloaded(folder: Path, live: Live) -> Scores:
    """Scores of a folder in a fresh process. Raises: ModelError: plain transformers cannot load it."""
    question = json.dumps({"rows": live.rows, "reference": str(live.logits)})
    command = [sys.executable, "-m", "qlora_kit.export.score", str(folder)]
    run = subprocess.run(command, input=question, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        reason = run.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ModelError(f"{folder}: plain transformers cannot load and score it: {reason[0]}")
    found = json.loads(run.stdout.splitlines()[-1])
    return Scores(found["losses"], found["counts"], Distance(**found["distance"]))
