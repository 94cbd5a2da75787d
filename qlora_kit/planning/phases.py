"""What each phase of a run takes at its peak: on the device, in host memory beside it, and on disk.

Why: a run must fit from loading to merging, and what leaves the device lands somewhere. How: the highest moment of each
phase (planning/moments), and the places of what streaming and offload keep away. On a CPU the host is the device, so
there nothing is counted beside it but what passes through. The interpreter, its libraries and the tokenized data are
counted nowhere. Imports no torch. Imported by planning/decide and planning/planner.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kit.planning import activations, components
from qlora_kit.planning.components import Ledger
from qlora_kit.planning.hardware import Device
from qlora_kit.planning.moments import evaluation_moments, static_ledger, total, training_moments
from qlora_kit.planning.quantities import (
    host_blocks,
    is_quantized,
    resident_blocks,
    value_bytes,
)
from qlora_kit.planning.runtime import runtime_bytes
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe

MERGED_DTYPE_BYTES = 2  # merge writes float16 unless told otherwise
MERGE_TILES = 80 << 20  # 8 threads' tiles, those that wait to be written, and two buffers of 8 MiB for the disk


@dataclass(frozen=True)
class Phase:
    """Peak bytes of one phase: on the device, in host memory beside it, and written to disk."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int


def peak_bytes(shapes: ModelShapes, recipe: Recipe, device: Device) -> int:
    """Most that any phase needs on the device."""
    return max(phase.device_bytes for phase in phases(shapes, recipe, device).values())


def peak_moment(shapes: ModelShapes, recipe: Recipe, device: Device) -> tuple[str, Ledger]:
    """The highest moment of a training step, and what is on the device then."""
    moments = training_moments(shapes, recipe, runtime_bytes(shapes, recipe, device))
    name = max(moments, key=lambda moment: total(moments[moment]))
    return name, moments[name]


def phases(shapes: ModelShapes, recipe: Recipe, device: Device) -> dict[str, Phase]:
    """Each phase's peak.

    load: the base as it will lie, and on the device one tensor on its way, the largest linear before it is quantized,
        or else the slots; on the host the largest tensor as read, and what will stay there, of which one block twice.
        Adapter and optimizer come later.
    train: the highest moment of a step; on the host what `away_bytes` says; the file of offloaded block inputs.
    eval: as training without gradients, between two steps, so the optimizer's state is there.
    save: the static part; adapter and optimizer state pass through host memory; disk holds the kept checkpoints, one
        more while it is written, and the adapter on its own.
    merge: a command of its own, on the host: the adapter, and tiles. Beside 4 bits the largest linear is also held as
        read, in 4 bits and dequantized, while tiles of the one before it wait; writes the whole model in 16 bits.
    """
    runtime = runtime_bytes(shapes, recipe, device)
    static = static_ledger(shapes, recipe, runtime)
    evaluation = evaluation_moments(shapes, recipe, runtime)
    largest_linear = components.largest_linear(shapes)
    away, offloaded = away_bytes(shapes, recipe, device), activations.offloaded_inputs(shapes, recipe, "disk")
    state = static["adapter"] + static["optimizer"]
    kept = (recipe.train.keep_checkpoints + 1) * state + static["adapter"]
    whole = largest_linear * (3 * value_bytes(recipe) + 1) if is_quantized(recipe) else 0
    training = total(peak_moment(shapes, recipe, device)[1])
    return {
        "load": _load(shapes, recipe, device, static),
        "train": Phase(training, away + offloaded_bytes(shapes, recipe, device), offloaded),
        "eval": Phase(max(map(total, evaluation.values())), away, 0),
        "save": Phase(total(static), away + state, kept),
        "merge": Phase(0, static["adapter"] + whole + MERGE_TILES, shapes.total_parameters * MERGED_DTYPE_BYTES),
    }


def _load(shapes: ModelShapes, recipe: Recipe, device: Device, static: Ledger) -> Phase:
    base = sum(static[name] for name in ("base_nf4", "quant_constants", "base_unquantized", "runtime"))
    base += components.given_up(shapes, recipe) * value_bytes(recipe)  # when its training begins
    arriving = components.largest_linear(shapes) * value_bytes(recipe) if is_quantized(recipe) else 0
    read = components.largest_tensor(shapes) * value_bytes(recipe)
    away = away_bytes(shapes, recipe, device)
    twice = components.block_weights(shapes, recipe) if away and host_blocks(shapes, recipe) else 0
    return Phase(base + max(arriving, components.slots(shapes, recipe)), away + twice + read, 0)


def away_bytes(shapes: ModelShapes, recipe: Recipe, device: Device) -> int:
    """Pinned host memory beside an accelerator for weights: blocks, embedding and head, and what comes from files.

    Blocks and chunks of the head that are read from files pass through a pinned buffer for each of their slots.
    """
    if device.kind == "cpu":
        return 0
    on_host = host_blocks(shapes, recipe)
    on_disk = shapes.layers - resident_blocks(shapes, recipe) - on_host
    slots = min(components.SLOTS, shapes.layers - resident_blocks(shapes, recipe)) if on_disk else 0
    tables = 1 if shapes.tied else 2
    table = shapes.vocabulary * shapes.hidden * value_bytes(recipe)
    chunks = components.SLOTS * components.pinned(components.head_slots(shapes, recipe) // components.SLOTS)
    vocabulary = {"host": tables * components.pinned(table), "disk": chunks}
    return (
        components.pinned_blocks(shapes, recipe, on_host)
        + slots * components.pinned(components.slot_bytes(shapes, recipe))
        + vocabulary.get(recipe.memory.embeddings, 0)
    )


def offloaded_bytes(shapes: ModelShapes, recipe: Recipe, device: Device) -> int:
    """Host memory beside an accelerator that block inputs take, or pass through on their way to a file."""
    if device.kind == "cpu":
        return 0
    staging = activations.offload_staging(shapes, recipe)
    return activations.offloaded_inputs(shapes, recipe, "host") + staging
