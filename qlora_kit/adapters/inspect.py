"""What the update of each linear is: norm, singular values, effective rank; as a table, as JSON and as a picture.

Why: the LoRA paper (Hu et al. 2021, arXiv:2106.09685, section 7.2) asks which rank an update needs. An update whose
effective rank is far below its rank can be resized; layers whose update is small may not need an adapter at all.
How: the singular values of s B A are those of the small matrix between the orthonormal factors of B and A.
Imported by: adapter_command.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_kit.adapters.factors import AdapterFile, open_adapter, place, scaled, singular_values
from qlora_kit.adapters.store import provenance
from qlora_kit.errors import RecipeError

ENERGY = 0.9


@dataclass(frozen=True)
class Update:
    """The update s B A of one linear.

    Attributes:
        alpha: s times the rank.
        norm: Frobenius norm.
        effective_rank: exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007); 0 of a zero update.
        energy_rank: how many singular values hold ENERGY of the sum of squares.
        singular_values: descending, as many as the rank.
    """

    linear: str
    rank: int
    alpha: float
    norm: float
    effective_rank: float
    energy_rank: int
    singular_values: list[float]


@dataclass(frozen=True)
class Portrait:
    """An adapter, looked at.

    Attributes:
        others: tensors that are not pairs (DoRA's magnitudes, saved modules, biases); not looked into.
        record: what this kit recorded of the base; empty for an adapter made elsewhere.
    """

    adapter: AdapterFile
    updates: list[Update]
    record: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "adapter": str(self.adapter.folder),
            "size_bytes": self.adapter.size_bytes,
            "dtype": str(self.adapter.dtype).removeprefix("torch."),
            "parameters": sum(rank * (out + into) for rank, out, into in self.adapter.shapes.values()),
            "base_model": self.adapter.config.get("base_model_name_or_path"),
            "base_fingerprint": self.record.get("base_fingerprint"),
            "use_dora": bool(self.adapter.config.get("use_dora")),
            "other_tensors": self.adapter.others,
            "updates": [asdict(update) for update in self.updates],
        }


def look(folder: Path) -> Portrait:
    """Read an adapter pair by pair. Raises: ModelError: no LoRA adapter there, or one of its values is not finite."""
    adapter = open_adapter(folder)
    record = provenance(folder)
    return Portrait(adapter, [update_of(adapter, linear) for linear in adapter.shapes], record)


def update_of(adapter: AdapterFile, linear: str) -> Update:
    """The update of one linear. Of a DoRA adapter s B A alone, without its magnitudes."""
    branch = adapter.branch(linear)
    rank = branch.lora_A.shape[0]
    sigma = singular_values(scaled(branch))
    norm = float(torch.linalg.vector_norm(sigma))
    return Update(
        linear, rank, branch.scale * rank, norm, effective_rank(sigma), energy_rank(sigma, ENERGY), sigma.tolist()
    )


def effective_rank(sigma: torch.Tensor) -> float:
    """exp of the entropy of the singular values over their sum: k for k equal ones."""
    total = float(sigma.sum())
    if total == 0.0:
        return 0.0
    return math.exp(-float(torch.xlogy(share := sigma / total, share).sum()))


def energy_rank(sigma: torch.Tensor, energy: float) -> int:
    """How many of the singular values hold `energy` of the sum of squares; 0 of none."""
    held = sigma.square().cumsum(0)
    return 0 if not held[-1] else min(len(sigma), int((held < energy * held[-1]).sum()) + 1)


def table(updates: list[Update]) -> list[str]:
    """One line for each module of the blocks, over its layers."""
    kinds: dict[str, list[Update]] = {}
    for update in updates:
        kinds.setdefault(place(update.linear)[1], []).append(update)
    width = max(map(len, kinds))
    lines = [f"{'module':<{width}}  layers  rank      alpha     norm (largest)       effective rank  90 % energy"]
    for kind, found in kinds.items():
        biggest = max(found, key=lambda update: update.norm)
        norms = f"{_span([update.norm for update in found], '.3g')} (layer {place(biggest.linear)[0]})"
        lines.append(
            f"{kind:<{width}}  {len(found):>6}  {_span([update.rank for update in found]):<8}"
            f"  {_span([update.alpha for update in found], 'g'):<8}  {norms:<20}"
            f" {_span([update.effective_rank for update in found], '.1f'):<14}"
            f"  {_span([update.energy_rank for update in found])}"
        )
    return lines


def _span(values: list[float] | list[int], form: str = "") -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low}..{high}"


# ------------------------------------------------------------------------------------------------ picture

PANELS: dict[str, Callable[[Update], float]] = {
    "norm of the update": lambda update: update.norm,
    "effective rank": lambda update: update.effective_rank,
    f"singular values for {ENERGY:.0%} of the energy": lambda update: update.energy_rank,
}


def grid(updates: list[Update], value: Callable[[Update], float]) -> tuple[list[str], list[str], list[list[float]]]:
    """Layers, modules, and the value of each; NaN where there is no update."""
    places = {place(update.linear): value(update) for update in updates}
    rows, columns = (list(dict.fromkeys(key[axis] for key in places)) for axis in (0, 1))
    return rows, columns, [[places.get((row, column), math.nan) for column in columns] for row in rows]


def png(portrait: Portrait) -> bytes:
    """Heat maps of layers by modules. Raises: RecipeError: matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError("--png needs matplotlib: python -m pip install 'qlora_kit[plots]'") from None
    height = 2.5 + 0.18 * len({place(update.linear)[0] for update in portrait.updates})
    figure = Figure(figsize=(13, height), layout="constrained")
    figure.suptitle(portrait.adapter.name)
    for axes, (title, value) in zip(figure.subplots(1, len(PANELS), sharey=True), PANELS.items()):
        rows, columns, values = grid(portrait.updates, value)
        image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] for name in columns], rotation=60, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set(title=title, ylabel="layer" if axes.get_subplotspec().is_first_col() else "")
        figure.colorbar(image, ax=axes)
    written = io.BytesIO()
    FigureCanvasAgg(figure).print_png(written)
    return written.getvalue()
