"""The ledger at its moments: held to the peak of a step of the real code on a simulated device, switch by switch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from qlora_kit.planning import moments as ledger
from qlora_kit.planning.components import COMPONENTS
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config
from qlora_kit.profiling.simulate import measure
from qlora_kit.recipe import Recipe, recipe_for_model
from tools.prove_simulated import STEP

CONFIG = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3}
CONFIG |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": False}
SMALL = ("data.seq_len=512", "adapter.rank=8", "memory.loss_chunk_tokens=64", "memory.embeddings=device")
PLACEMENTS = {
    "device": ("device", 3, 0),
    "all three": ("disk", 1, 1),
}
GRID = list(itertools.product(["device"], [True, False, 1], [1, 2], [True, False]))
GRID += itertools.product(["all three"], [True, False, 1], [1, 2], [False])


def shapes_of(name: str) -> ModelShapes:
    return model_shapes(*read_config(name))


def recipe_with(*overrides: str) -> Recipe:
    return recipe_for_model("llama-7b", overrides)


def placed(where: str) -> list[str]:
    keys = ("placement", "resident_blocks", "host_blocks")
    return [f"memory.{key}={value}" for key, value in zip(keys, PLACEMENTS[where])]


def switches_of(recomputed: object, together: int, keep: bool) -> list[str]:
    values = {"gradient_checkpointing": recomputed, "micro_batches_together": together, "keep_dequantized": keep}
    return [f"memory.{key}={str(value).lower()}" for key, value in values.items()]


def peaks(folder: Path, *overrides: str) -> tuple[int, int]:
    """Planned and measured bytes of a step."""
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    recipe = recipe_for_model(str(config), [*STEP, *SMALL, f"output={folder / 'run'}", *overrides])
    planned = ledger.training_moments(shapes_of(str(config)), recipe, 0)
    return max(map(ledger.total, planned.values())), measure(recipe).device_bytes


def assert_close(planned: int, measured: int) -> None:
    """At most 3 % too much, 1 % too little."""
    assert 0.99 * measured <= planned <= 1.03 * measured, f"{planned / measured:.4f}"


@pytest.mark.parametrize(("where", "recomputed", "together", "keep"), GRID)
def test_a_step_takes_what_is_planned(
    where: str, recomputed: object, together: int, keep: bool, tmp_path: Path
) -> None:
    assert_close(*peaks(tmp_path, *placed(where), *switches_of(recomputed, together, keep)))


@pytest.mark.parametrize(
    "changes",
    [
        ("data.packing=false",),
        ("train.micro_batch=2", "data.seq_len=256"),
        ("memory.mlp_tile_tokens=128", "memory.gradient_checkpointing=true"),
        ("memory.mlp_tile_tokens=128", "memory.gradient_checkpointing=false"),
        ("memory.activation_offload=host", "memory.gradient_checkpointing=true"),
        ("memory.activation_offload=disk", "memory.gradient_checkpointing=true", "memory.micro_batches_together=2"),
        ("memory.embeddings=host", "memory.gradient_checkpointing=true"),
        ("memory.embeddings=disk", "memory.gradient_checkpointing=false", "memory.micro_batches_together=2"),
    ],
    ids=" ".join,
)
def test_a_step_takes_what_is_planned_when_one_thing_changes(changes: tuple[str, ...], tmp_path: Path) -> None:
    assert_close(*peaks(tmp_path, *placed("device"), *switches_of(2, 1, False), *changes))


TRAINED = {
    "embedding and head": "adapter.modules_to_save=[embed_tokens, lm_head]",
    "norms": "adapter.modules_to_save=[norm]",
    "branches": "adapter.target_modules=[q_proj, v_proj, down_proj, embed_tokens, lm_head]",
}


@pytest.mark.parametrize("switches", [(True, 1, False), (False, 2, False)], ids=str)
@pytest.mark.parametrize("what", TRAINED)
def test_a_step_takes_what_is_planned_when_more_than_linears_is_trained(
    what: str, switches: tuple[bool, int, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIG, "vocab_size", 5000)
    assert_close(*peaks(tmp_path, *placed("device"), *switches_of(*switches), TRAINED[what]))


# ------------------------------------------------------------------------------------------------- closed forms


def test_every_ledger_has_exactly_the_components_of_the_contract() -> None:
    shapes, recipe = shapes_of("llama-7b"), recipe_with()
    for moments in (ledger.training_moments, ledger.evaluation_moments):
        for entries in moments(shapes, recipe, 5).values():
            assert tuple(entries) == COMPONENTS
            assert entries["runtime"] == 5


def test_logits_are_counted_at_the_loss_only_and_dequantized_weights_always() -> None:
    moments = ledger.training_moments(shapes_of("llama-7b"), recipe_with("memory.gradient_checkpointing=9"), 0)
    assert [name for name, entries in moments.items() if entries["logits"]] == ["loss"]
    assert {entries["workspace"] for entries in moments.values()} == {4096 * 11008 * 2}


def test_weights_kept_dequantized_take_a_block() -> None:
    moments = ledger.training_moments(shapes_of("llama-7b"), recipe_with("memory.keep_dequantized=true"), 0)
    assert {entries["workspace"] for entries in moments.values()} == {4096 * (4 * 4096 + 3 * 11008) * 2}


@pytest.mark.parametrize(("setting", "absent"), [("true", "kept block backward"), ("false", "block backward")])
def test_there_is_no_moment_of_blocks_that_there_are_not(setting: str, absent: str) -> None:
    recipe = recipe_with(f"memory.gradient_checkpointing={setting}")
    assert absent not in ledger.training_moments(shapes_of("llama-7b"), recipe, 0)


def test_embedding_and_head_elsewhere_leave_two_chunks_of_the_head_at_the_loss() -> None:
    shapes, sizes = shapes_of("llama-7b"), {}
    for where in ("device", "host"):
        moments = ledger.training_moments(shapes, recipe_with(f"memory.embeddings={where}"), 0)
        sizes[where] = {name: ledger.total(entries) for name, entries in moments.items()}
    tables, chunks = 2 * 32000 * 4096 * 2, 2 * 16384 * 4096 * 2
    of_all_tokens = (1024 - 512) * 4096 * (4 + 2)  # the sum and the target's row, which are of a chunk otherwise
    assert sizes["device"]["block backward"] - sizes["host"]["block backward"] == tables
    assert sizes["device"]["loss"] - sizes["host"]["loss"] == tables - chunks - of_all_tokens


def test_evaluation_needs_less_than_training() -> None:
    shapes, recipe = shapes_of("llama-7b"), recipe_with()
    training = ledger.training_moments(shapes, recipe, 0).values()
    evaluation = ledger.evaluation_moments(shapes, recipe, 0).values()
    assert max(map(ledger.total, evaluation)) < max(map(ledger.total, training))
