"""What is on the device at the same time: the ledger at each moment of training and of evaluation that can be the peak.

Why: a peak is the maximum over moments, not the sum of all there ever is. How: what is static, plus what the moment
adds (components, activations). A test holds the highest moment to the peak of a step on the simulated accelerator.
Imports no torch. Imported by planning/phases.
"""

from __future__ import annotations

from qlora_kit.planning import activations, block, components
from qlora_kit.planning.components import COMPONENTS, LOSS_CHUNK_VOCABULARY, Ledger
from qlora_kit.planning.quantities import (
    FP32,
    hidden_state,
    recomputed_blocks,
    together,
    tokens,
    value_bytes,
)
from qlora_kit.planning.shapes import ModelShapes
from qlora_kit.planning.trained import TABLE_ROWS, trained_whole, trained_whole_table
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
    head backward: of a head that is trained: the same with the logits made again, and its gradient.
    final norm: kept activations, the backward of the final norm.
    kept block backward: the backward of the last block, if it kept its activations.
    block backward: that of the last recomputed block, when the kept ones are gone.
    first block backward: where all micro-batches of a step pass together, and gradients come block by block.
    embedding backward: there, of an embedding that is trained.
    optimizer step: where one of the two is trained whole: what the step takes for a piece of it.
    """
    static = static_ledger(shapes, recipe, runtime_bytes)
    kept, recomputed = activations.kept_activations(shapes, recipe), recomputed_blocks(shapes, recipe)
    gradients = static["gradients"]
    of_head, of_embedding = (
        components.gradients_of(shapes, recipe, module)
        for module in (shapes.architecture.head, shapes.architecture.embedding)
    )
    of_blocks = gradients - of_head - of_embedding
    at_once = together(recipe) == recipe.train.grad_accumulation
    before = static | {"gradients": 0 if at_once else gradients}  # of the micro-batches that went before
    after_head = static | {"gradients": of_head if at_once else gradients}
    if at_once:
        static |= {"gradients": of_head + of_blocks // shapes.layers}
    normed = _kept_by_final_norm(shapes, recipe)
    moments = {
        "loss": before
        | {
            "activations": kept
            + components.around_head(shapes, recipe)
            + _waiting(shapes, recipe)
            + together(recipe) * normed,
            "logits": components.logits(shapes, recipe),
            "workspace": static["workspace"] + components.head_slots(shapes, recipe),
        },
    }
    if of_head:
        moments["head backward"] = after_head | {
            "activations": kept + _in_head_backward(shapes, recipe),
            "logits": components.logits_made_again(shapes, recipe),
            "workspace": static["workspace"] + components.head_slots(shapes, recipe),
        }
    in_norm = _in_final_norm(shapes, recipe) + (together(recipe) - 1) * normed
    moments["final norm"] = after_head | {"activations": kept + in_norm}
    if recomputed < shapes.layers:
        moments["kept block backward"] = static | {"activations": activations.in_kept_backward(shapes, recipe)}
    if recomputed:
        ready = of_head + of_blocks * (shapes.layers - recomputed + 1) // shapes.layers if at_once else gradients
        inputs = activations.in_recomputed_backward(shapes, recipe, recomputed)
        moments["block backward"] = static | {"activations": inputs, "gradients": ready}
    if recomputed and at_once:
        inputs = activations.in_recomputed_backward(shapes, recipe, 1)
        moments["first block backward"] = static | {"activations": inputs, "gradients": of_head + of_blocks}
    if of_embedding and at_once:
        passing = activations.block_inputs(shapes, recipe, 1) + 2 * hidden_state(shapes, recipe)
        rows = activations.call_arguments(shapes, recipe) + passing
        moments["embedding backward"] = static | {"activations": rows, "gradients": gradients}
    if trained_whole_table(shapes, recipe.adapter):
        moments["optimizer step"] = static | {
            "gradients": gradients,
            "optimizer": static["optimizer"] + components.in_optimizer_step(shapes, recipe),
        }
    return moments


def _in_head_backward(shapes: ModelShapes, recipe: Recipe) -> int:
    """Of each micro-batch the norm's fp32 copy, its output and the gradient of that; of the first its learned rows."""
    each = tokens(recipe) * shapes.hidden * (FP32 + 2 * value_bytes(recipe))
    each += _kept_by_final_norm(shapes, recipe) + components.widened(shapes, recipe, tokens(recipe))
    rows = components.widened(shapes, recipe, min(TABLE_ROWS, shapes.vocabulary))
    return together(recipe) * each + hidden_state(shapes, recipe) + rows


def _kept_by_final_norm(shapes: ModelShapes, recipe: Recipe) -> int:
    """Of one micro-batch: what an RMS norm that is trained normed, in `model.dtype`."""
    if shapes.architecture.layer_norm_copies is not None:
        return 0
    trained = trained_whole(shapes, recipe.adapter.modules_to_save)
    is_trained = any(name in trained for name, _ in shapes.outer_tensors if name.endswith("norm.weight"))
    return is_trained * hidden_state(shapes, recipe)


def _waiting(shapes: ModelShapes, recipe: Recipe) -> int:
    """At the loss of the last of several micro-batches, of each other: the norm's fp32 copy, its output, a gradient."""
    each = tokens(recipe) * shapes.hidden * (FP32 + 2 * value_bytes(recipe))
    return (together(recipe) - 1) * (each + components.widened(shapes, recipe, tokens(recipe)))


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
    hidden += components.widened(shapes, recipe, tokens(recipe) + min(LOSS_CHUNK_VOCABULARY, shapes.vocabulary))
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
