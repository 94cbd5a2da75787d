"""Embedding, head and norms are trained as PEFT trains them: whole, or by LoRA on the two tables; fresh, continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from qlora_kit.adapter_files import WEIGHTS
from qlora_kit.adapters.inject import activate
from qlora_kit.adapters.store import load_adapter, save_adapter
from qlora_kit.base.loader import load_base
from qlora_kit.data.tokenize import IGNORE_INDEX, Example
from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.planning.planner import make_plan
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Recipe
from qlora_kit.training.checkpoint import load_checkpoint, save_checkpoint
from qlora_kit.training.loop import train_step
from qlora_kit.training.run import Run, assemble, placement_of
from qlora_kit.training.signals import StopRequest
from tests.adapters.test_continue import pretrained, step_of_peft
from tests.peft_adapters import NORMS, added_tokens, embedding_of, logits, made_by_peft
from tests.peft_adapters import kinds as peft_kinds

STEPS = 3
MODELS = ("llama", "gemma3_text", "gpt2", "qwen2")  # untied, tied and scaled, layer norms, tied


def prepared(folder: Path, output: Path, device: str = "cpu", **changes: Any) -> Run:
    """A run on random tokens; `changes` are dotted keys with two underscores for the dot."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder), "quantization": "none", "dtype": "float32"},
        "adapter": {"dtype": "float32"},
        "data": {"train": "none", "seq_len": 16, "packing": False},
        "memory": {"mlp_tile_tokens": 5, "loss_chunk_tokens": 3},
        "train": {"steps": STEPS, "grad_accumulation": 2, "optimizer": "adamw", "lr": 2e-3, "max_grad_norm": None},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    recipe = Recipe.model_validate({**values, "output": str(output)})
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 128, (12,), generator=generator).tolist() for _ in range(2 * STEPS)]
    examples = [Example(row, [*row[1:], IGNORE_INDEX], "test") for row in rows]
    return assemble(recipe, load_base(recipe.model, device, placement_of(recipe)), examples, [], StopRequest())


def targets(model_type: str) -> list[str]:
    return ["c_attn"] if model_type == "gpt2" else ["q_proj", "v_proj"]


def kinds(model_type: str) -> dict[str, dict[str, Any]]:
    """What is trained beside some linears, by a name; all of it in PEFT's words."""
    embedding, norms = embedding_of(model_type), NORMS.get(model_type, ["post_attention_layernorm", "norm"])
    linears = targets(model_type)
    return {
        "head and norms": {"target_modules": linears, "modules_to_save": ["lm_head", *norms]},
        "embedding": {"target_modules": linears, "modules_to_save": [embedding]},
        "both tables": {"target_modules": linears, "modules_to_save": [embedding, "lm_head"]},
        "LoRA on both": {"target_modules": [*linears, embedding, "lm_head"]},
        "LoRA on embedding, head whole": {"target_modules": [*linears, embedding], "modules_to_save": ["lm_head"]},
    }


def assert_trains_as_peft(run: Run, folder: Path, adapter: Path, out: Path, ids: torch.Tensor) -> None:
    """Losses of PEFT training `adapter` agree at every step, and the result goes back with equal logits."""
    reference = peft.PeftModel.from_pretrained(pretrained(folder), adapter, is_trainable=True).eval()
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], weight_decay=0.0)
    assert sum(p.numel() for p in run.parameters.values()) == sum(
        p.numel() for p in reference.parameters() if p.requires_grad
    )
    for step in range(STEPS):
        batches = run.batches.step(step)
        line = train_step(run)
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.zero_grad()
        loss = step_of_peft(reference, batches)
        norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    save_adapter(run.base, out)
    run.base.model.eval()
    for linear in run.base.linears().values():
        linear.branches.eval()
    back = peft.PeftModel.from_pretrained(pretrained(folder), out).eval()
    torch.testing.assert_close(logits(back, ids), logits(run.base.model, ids), atol=5e-5, rtol=1e-5)
    ours = load_base(run.recipe.model)
    load_adapter(ours, out)
    torch.testing.assert_close(logits(ours.model, ids), logits(run.base.model, ids), atol=5e-5, rtol=1e-5)
    assert not torch.allclose(logits(back, ids), logits(pretrained(folder).eval(), ids), atol=1e-3)


@pytest.mark.parametrize("kind", kinds("llama"))
@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.filterwarnings("ignore")  # PEFT's, of tied tables
def test_an_adapter_of_pefts_is_trained_on_as_peft_would(model_type, kind, tiny_model, tmp_path, ids):
    folder, adapter = tiny_model(model_type), tmp_path / "a"
    made_by_peft(folder, model_type, adapter, **kinds(model_type)[kind])
    run = prepared(folder, tmp_path / "run", adapter__start_from=str(adapter))
    assert_trains_as_peft(run, folder, adapter, tmp_path / "b", ids)


@pytest.mark.parametrize("kind", kinds("llama"))
@pytest.mark.filterwarnings("ignore")
def test_a_fresh_adapter_is_trained_as_peft_would(kind, tiny_model, tmp_path, ids):
    model_type = "qwen2"
    folder = tiny_model(model_type)
    settings = {f"adapter__{key}": value for key, value in kinds(model_type)[kind].items()}
    run = prepared(folder, tmp_path / "run", **settings)
    torch.testing.assert_close(logits(run.base.model, ids), logits(pretrained(folder).eval(), ids))
    save_adapter(run.base, tmp_path / "a")
    assert_trains_as_peft(run, folder, tmp_path / "a", tmp_path / "b", ids)


# ------------------------------------------------------------------------------------------------ bits


WHOLE = {"adapter__modules_to_save": ["embed_tokens", "lm_head", "norm"]}
BRANCHES = {"adapter__target_modules": ["q_proj", "embed_tokens", "lm_head"], "adapter__dropout": 0.2}
SWITCHES = [
    {"memory__gradient_checkpointing": False},
    {"memory__gradient_checkpointing": 1, "memory__micro_batches_together": 2},
    {"memory__micro_batches_together": 3, "memory__activation_offload": "disk"},
    {"memory__placement": "disk"},
]


def trained(folder: Path, output: Path, steps: int = 2, **changes: Any) -> dict[str, torch.Tensor]:
    """Losses and trained values after some steps in bf16, of three micro-batches each."""
    bf16 = {"model__dtype": "bfloat16", "adapter__dtype": "bfloat16", "train__grad_accumulation": 3}
    run = prepared(folder, output, **bf16, **changes)
    losses = {f"loss {step}": torch.tensor(train_step(run)["loss"]) for step in range(steps)}
    return losses | {name: parameter.detach().cpu().clone() for name, parameter in run.parameters.items()}


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]


@pytest.mark.parametrize("what", [WHOLE, BRANCHES], ids=["whole", "branches"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_no_memory_switch_changes_a_bit(switches, what, tiny_model, tmp_path):
    folder = tiny_model("llama", torch.bfloat16)
    expected = trained(folder, tmp_path / "a", **what)
    found = trained(folder, tmp_path / "b", **what, **switches)
    assert differing(found, expected) == []


def test_lora_on_tables_that_live_elsewhere_is_the_same_bit_for_bit(tiny_model, tmp_path):
    folder = tiny_model("llama", torch.bfloat16)
    # All tokens pass a head that is fetched together, and by chunks one that is there: as many rows, one chunk.
    one_chunk = {"memory__loss_chunk_tokens": "full"}
    expected = trained(folder, tmp_path / "a", **BRANCHES, **one_chunk)
    found = trained(folder, tmp_path / "b", **BRANCHES, **one_chunk, memory__embeddings="disk")
    assert differing(found, expected) == []


@pytest.mark.parametrize("what", [WHOLE, BRANCHES], ids=["whole", "branches"])
def test_an_accelerator_learns_what_a_cpu_does(what, tiny_model, tmp_path):
    folder = tiny_model("llama", torch.bfloat16)
    with simulated_device():
        found = trained(folder, tmp_path / "a", device="simgpu", **what)
    assert differing(found, trained(folder, tmp_path / "b", **what)) == []


@pytest.mark.parametrize("what", [WHOLE, BRANCHES], ids=["whole", "branches"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(what, tiny_model, tmp_path):
    settings = {**what, "model__dtype": "bfloat16", "adapter__dtype": "bfloat16", "train__optimizer": "adamw_8bit"}
    run = prepared(tiny_model("llama"), tmp_path / "run", **settings)
    train_step(run)
    save_checkpoint(tmp_path / "c", run.progress, run.parameters, run.optimizer, run.identity)
    line = train_step(run)
    again = prepared(tiny_model("llama"), tmp_path / "run", **settings)
    again.progress = load_checkpoint(tmp_path / "c", again.parameters, again.optimizer, again.identity)
    assert train_step(again)["loss"] == line["loss"]
    assert differing(dict(again.parameters), dict(run.parameters)) == []


def test_a_table_is_trained_in_pieces_that_share_its_memory(tiny_model, tmp_path, monkeypatch):
    expected = trained(tiny_model("llama"), tmp_path / "a", **WHOLE)
    monkeypatch.setattr("qlora_kit.adapters.tables.TABLE_ROWS", 48)
    monkeypatch.setattr("qlora_kit.training.loss.TABLE_ROWS", 48)
    found = trained(tiny_model("llama"), tmp_path / "b", **WHOLE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        pieces = [found[f"{name}.{index}"] for index in range(3)]
        assert [len(piece) for piece in pieces] == [48, 48, 32]
        torch.testing.assert_close(torch.cat(pieces), expected[f"{name}.0"], atol=1e-4, rtol=1e-2)


def test_the_plain_base_comes_back_and_goes_again_unless_a_table_was_given_up(tiny_model, tmp_path, ids):
    run = prepared(tiny_model("qwen2"), tmp_path / "run", **BRANCHES | {"adapter__modules_to_save": ["norm"]})
    before = load_base(run.recipe.model).model.state_dict().keys()
    train_step(run)
    changed = logits(run.base.model, ids)
    activate(run.base, [])
    assert run.base.model.state_dict().keys() - {*before} == {k for k in run.base.model.state_dict() if "branches" in k}
    torch.testing.assert_close(logits(run.base.model, ids), logits(pretrained(tiny_model("qwen2")).eval(), ids))
    activate(run.base, ["default"])
    assert torch.equal(logits(run.base.model, ids), changed)
    run = prepared(tiny_model("qwen2"), tmp_path / "run", **WHOLE)
    activate(run.base, ["default"])
    with pytest.raises(ModelError, match="weight: is being trained, and the base's own was given up"):
        activate(run.base, [])
    save_adapter(run.base, tmp_path / "a")
    with pytest.raises(ModelError, match="weight: is being trained, and the base's own was given up"):
        load_adapter(run.base, tmp_path / "a", "other")


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter__modules_to_save": ["lm_had"]}, "'lm_had' selects nothing; did you mean 'lm_head'"),
        ({"adapter__modules_to_save": ["up_proj"]}, "is a linear of the decoder blocks.*target_modules"),
        ({"adapter__modules_to_save": ["lm_head"], "adapter__dtype": "bfloat16"}, "it is model.dtype, float32"),
        ({"adapter__target_modules": ["lm_head"]}, "selects no linear of the decoder blocks"),
        (
            {"adapter__target_modules": ["q_proj", "lm_head"], "adapter__modules_to_save": ["lm_head"]},
            "is in adapter.target_modules too",
        ),
        ({"adapter__modules_to_save": ["lm_head"], "memory__embeddings": "disk"}, "which takes the device"),
    ],
)
def test_what_is_not_trained_is_refused_by_the_plan(changes, message, tiny_model, tmp_path):
    sections = {"model": {"path": str(tiny_model("llama")), "dtype": "float32"}, "adapter": {"dtype": "float32"}}
    values: dict[str, dict[str, Any]] = {**sections, "memory": {}, "data": {"train": "none"}}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    with pytest.raises((ValidationError, RecipeError), match=message):
        make_plan(Recipe.model_validate({**values, "output": str(tmp_path)}))


@pytest.mark.filterwarnings("ignore")
def test_added_tokens_tied_tables_and_biases_are_not_trained_on(tiny_model, tmp_path):
    added_tokens(tiny_model("llama"), "llama", tmp_path / "a")
    with pytest.raises(ModelError, match="cannot be trained here|added tokens"):
        prepared(tiny_model("llama"), tmp_path / "run", adapter__start_from=str(tmp_path / "a"))
    made_by_peft(tiny_model("qwen2"), "qwen2", tmp_path / "b", **peft_kinds("qwen2")["both saved, tied"])
    with pytest.raises(ModelError, match="ensure_weight_tying"):
        prepared(tiny_model("qwen2"), tmp_path / "run", adapter__start_from=str(tmp_path / "b"))
    made_by_peft(tiny_model("qwen2"), "qwen2", tmp_path / "c", target_modules=["q_proj"], bias="all")
    with pytest.raises(ModelError, match="bias' cannot be trained here"):
        prepared(tiny_model("qwen2"), tmp_path / "run", adapter__start_from=str(tmp_path / "c"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("embeddings", ["device", "disk"])
def test_lora_on_a_table_is_not_trained_on_beside_another_one(embeddings, tiny_model, tmp_path):
    made_by_peft(tiny_model("llama"), "llama", tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    settings = {"adapter__start_from": str(tmp_path / "a"), "memory__embeddings": embeddings}
    prepared(tiny_model("llama"), tmp_path / "run", **settings)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][100, 7] += 0.1
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ModelError, match="model.embed_tokens.weight: this adapter was trained on other values"):
        prepared(tiny_model("llama"), tmp_path / "run", **settings)
