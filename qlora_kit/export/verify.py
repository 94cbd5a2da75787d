"""Proof that a merged folder is the model that was trained: its bits, and what it says when it is loaded anew.

How: `audit` compares base, adapter and folder tensor by tensor; then a fresh process loads the folder by plain
transformers, and its loss and logits on held-out text must be those of the live model: base and adapter side by side,
on the same weights that were merged onto. A model that was quantized again cannot be: there this kit loads the folder,
its loss and logits are reported beside the live model's, and the fresh process must give what was scored here.
Imported by: choose, the commands.
"""

from __future__ import annotations

import hashlib
import json
import math
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


@dataclass(frozen=True)
class RequantizedProof(Proof):
    """Of a folder that was quantized again; `merged_loss` and `distance` are those of the folder loaded by this kit.

    Attributes:
        base_loss: of the base without the adapter: what nothing of the update would give.
        reloaded_loss: by plain transformers in a fresh process; `reloaded`: its distance from what this kit loaded.
    """

    base_loss: float
    reloaded_loss: float
    reloaded: Distance

    @property
    def passed(self) -> bool:
        """Whether the folder, loaded anew, is the model that was scored, however far that is from the live one."""
        apart = (abs(self.merged_loss - self.reloaded_loss), self.reloaded.kl)
        return math.isfinite(self.distance.kl) and all(value <= TOLERANCE_NATS for value in apart)


def rows_of(examples: Sequence[Example]) -> Rows:
    """What of held-out documents goes to a scoring process: those with something to learn."""
    return [(list(example.input_ids), list(example.targets)) for example in examples if example.learned_tokens]


def digest_of(rows: Rows) -> str:
    """Of held-out documents, as the proof records them."""
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def live_model(base: Base, rows: Rows, logits: Path, reference: Path | None = None) -> Live:
    """Score `base` with its active adapters, beside `reference` if given; its logits go to the file `logits`."""
    base.model.eval()
    return Live(score(base.model, rows, save=logits, reference=reference), logits, rows)


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


def prove_requantized(folder: Path, merge: Merge, live: Live, base_loss: float, loaded: Base) -> RequantizedProof:
    """Compare a folder that was quantized again with base and adapter, and by its words with the live model.

    Args:
        live: base and adapter side by side.
        loaded: the folder, loaded by this kit in the arithmetic of the live model.
    Raises: ModelError: what is wrong with a tensor; a loss or divergence that is no number; plain transformers cannot
        load the folder, or give a loss or logits that are not those of `loaded`. Being far from `live` is no fault.
    """
    counts = audit(folder, merge)
    again = live_model(loaded, live.rows, live.logits.with_name("requantized"), reference=live.logits)
    scores, found = reloaded(folder, again), again.scores
    assert scores.distance is not None
    assert found.distance is not None
    beside = Proof(live.scores.loss, found.loss, found.tokens, found.distance, **counts)
    proof = RequantizedProof(**vars(beside), base_loss=base_loss, reloaded_loss=scores.loss, reloaded=scores.distance)
    if not proof.passed:
        raise ModelError(
            f"{folder}: plain transformers give {proof.reloaded_loss:.4f} nats, this kit {proof.merged_loss:.4f}, KL "
            f"{proof.reloaded.kl:.4f} per token: more than {TOLERANCE_NATS} apart, or no number; do not use it"
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
