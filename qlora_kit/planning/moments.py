"""What is on the device at the same time: the ledger at each moment of training and of evaluation that can be the peak.

Why: a peak is the maximum over moments, not the sum of all there ever is. How: what is static, plus what the moment
adds (components, activations). A test holds the highest moment to the peak of a step on the simulated accelerator.
Imports no torch. Imported by planning/phases.
"""

from __future__ import annotations

from qlora_kit.planning import activations, block, components
from qlora_kit.planning.components import COMPONENTS, Ledger
from qlora_kit.planning.quantities import (
    FP32,
    hidden_state,
    recomputed_blocks,
    together,
    tokens,
    value_bytes,
)
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.recipe import Recipe


def static_ledger(shapes: ModelShapes, recipe: Recipe, runtime_bytes: int) -> Ledger:
    """What lies on the device all through training; the moving components are zero."""
    names = ("base_nf4", "quant_constants", "base_unquantized", "adapter", "gradients", "optimizer")
    ledger = dict.fromkeys(COMPONENTS, 0) | {name: getattr(components, name)(shapes, recipe) for name in names}
    reused = components.slots(shapes, recipe) + components.workspace(shapes, recipe)
    return ledger | {"runtime": runtime_bytes, "workspace": reused}


def training_moments(shapes: ModelShapes, recipe: Recipe, runtime_bytes: int) -> dict[str, Ledger]:
    """The ledger at each moment of a step that can be its peak.

    loss: kept activations, what is around the head of each micro-batch that waits, and of one the logits.
    final norm: kept activations, the backward of the final norm.
    kept block backward: the backward of the last block, if it kept its activations.
    block backward: that of the last recomputed block, when the kept ones are gone.
    first block backward: where all micro-batches of a step pass together, and gradients come block by block.
    """
    static = static_ledger(shapes, recipe, runtime_bytes)
    kept, recomputed = activations.kept_activations(shapes, recipe), recomputed_blocks(shapes, recipe)
    gradients = static["gradients"]
    at_once = together(recipe) == recipe.train.grad_accumulation
    before = static | {"gradients": 0 if at_once else gradients}  # of the micro-batches that went before
    if at_once:
        static |= {"gradients": gradients // shapes.layers}
    moments = {
        "loss": before
        | {
            "activations": kept + components.around_head(shapes, recipe) + _waiting(shapes, recipe),
            "logits": components.logits(shapes, recipe),
            "workspace": static["workspace"] + components.head_slots(shapes, recipe),
        },
        "final norm": before | {"activations": kept + _in_final_norm(shapes, recipe)},
    }
    if recomputed < shapes.layers:
        moments["kept block backward"] = static | {"activations": activations.in_kept_backward(shapes, recipe)}
    if recomputed:
        ready = gradients * (shapes.layers - recomputed + 1) // shapes.layers if at_once else gradients
        inputs = activations.in_recomputed_backward(shapes, recipe, recomputed)
        moments["block backward"] = static | {"activations": inputs, "gradients": ready}
    if recomputed and at_once:
        inputs = activations.in_recomputed_backward(shapes, recipe, 1)
        moments["first block backward"] = static | {"activations": inputs, "gradients": gradients}
    return moments


def _waiting(shapes: ModelShapes, recipe: Recipe) -> int:
    """At the loss of the last of several micro-batches, of each other: the norm's fp32 copy, its output, a gradient."""
    return (together(recipe) - 1) * tokens(recipe) * shapes.hidden * (FP32 + 2 * value_bytes(recipe))


def _in_final_norm(shapes: ModelShapes, recipe: Recipe) -> int:
    """The highest point of the final norm's backward, of the first of several micro-batches.

    An RMS norm: its fp32 copy and five fp32 tensors of its own backward. A layer norm: its input and both gradients.
    Of each that waits: the copy, and the gradient of the output.
    """
    rms = shapes.architecture.layer_norm_copies is None
    copy = tokens(recipe) * shapes.hidden * FP32
    here = 6 * copy if rms else 3 * hidden_state(shapes, recipe)
    return here + (together(recipe) - 1) * (copy + hidden_state(shapes, recipe))


def evaluation_moments(shapes: ModelShapes, recipe: Recipe, runtime_bytes: int) -> dict[str, Ledger]:
    """The same without gradients: nothing is kept, one block's forward or one tile of logits is alive.

    Of all micro-batches that pass together there are inputs and outputs of the block.
    """
    static = static_ledger(shapes, recipe, runtime_bytes) | {"gradients": 0}
    hidden = tokens(recipe) * shapes.hidden * (FP32 + value_bytes(recipe))
    arguments, passing = activations.call_arguments(shapes, recipe), activations.block_inputs(shapes, recipe, 1)
    return {
        "loss": static
        | {
            "activations": arguments + passing + hidden,
            "logits": components.logits(shapes, recipe, with_gradient=False),
            "workspace": static["workspace"] + components.head_slots(shapes, recipe),
        },
        "block forward": static | {"activations": arguments + 2 * passing + block.in_forward(shapes, recipe)},
    }


def total(ledger: Ledger) -> int:
    """Sum of the components."""
    return sum(ledger.values())
