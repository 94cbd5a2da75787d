"""An adapter of PEFT's is trained on here as PEFT would, and goes back to PEFT; what cannot be is said first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.inject import branches
from qlora_kit.adapters.store import save_adapter
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import load_base
from qlora_kit.data.tokenize import IGNORE_INDEX, Example
from qlora_kit.errors import CheckpointError, ModelError
from qlora_kit.recipe import Adapter, Recipe
from qlora_kit.training.checkpoint import load_checkpoint, save_checkpoint
from qlora_kit.training.loop import train_step
from qlora_kit.training.run import Run, assemble
from qlora_kit.training.signals import StopRequest
from tests.peft_adapters import logits, made_by_peft


def pretrained(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def plain_lora(folder: Path, model_type: str, adapter: Path, **settings: Any) -> Path:
    made_by_peft(folder, model_type, adapter, **settings)
    return adapter


def continued(folder: Path, adapter: Path, output: Path, steps: int = 3) -> Run:
    """A run that starts from an adapter, on random tokens."""
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(folder), "quantization": "none", "dtype": "float32"},
            "adapter": {"start_from": str(adapter), "dtype": "float32"},
            "data": {"train": "none", "seq_len": 16, "packing": False},
            "train": {"steps": steps, "grad_accumulation": 2, "optimizer": "adamw", "lr": 2e-3, "max_grad_norm": None},
            "output": str(output),
        }
    )
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 128, (12,), generator=generator).tolist() for _ in range(2 * steps)]
    examples = [Example(row, [*row[1:], IGNORE_INDEX], "test") for row in rows]
    return assemble(recipe, load_base(recipe.model), examples, [], StopRequest())


def step_of_peft(reference: Any, batches: Any) -> torch.Tensor:
    """The mean loss over all learned tokens of a step, gradients made."""
    total = torch.zeros(())
    for batch in batches:
        found = reference(input_ids=batch.input_ids).logits.flatten(0, 1)
        total = total + F.cross_entropy(found, batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss = total / sum(batch.learned_tokens for batch in batches)
    loss.backward()
    return loss


def settings_of(model_type: str) -> dict[str, Any]:
    """rsLoRA with patterns of ranks and alphas, in one block of two."""
    linears = [name.rpartition(".")[2] for name in ARCHITECTURES[model_type].attention_linears]
    patterns = {"rank_pattern": {linears[0]: 2}, "alpha_pattern": {linears[-1]: 3}}
    return {"target_modules": linears, "use_rslora": True, "layers_to_transform": [1], **patterns}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_training_on_gives_pefts_losses_and_the_result_goes_back(model_type, tiny_model, tmp_path, ids):
    folder = tiny_model(model_type)
    adapter = plain_lora(folder, model_type, tmp_path / "a", **settings_of(model_type))
    run = continued(folder, adapter, tmp_path / "run")
    reference = peft.PeftModel.from_pretrained(pretrained(folder), adapter, is_trainable=True).eval()
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], weight_decay=0.0)
    for step in range(3):
        batches = run.batches.step(step)
        line = train_step(run)
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.zero_grad()
        loss = step_of_peft(reference, batches)
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    start = logits(peft.PeftModel.from_pretrained(pretrained(folder), adapter), ids)
    save_adapter(run.base, tmp_path / "b")
    run.base.model.eval()
    back = peft.PeftModel.from_pretrained(pretrained(folder), tmp_path / "b").eval()
    torch.testing.assert_close(logits(back, ids), logits(run.base.model, ids), atol=3e-5, rtol=1e-5)
    assert not torch.allclose(logits(back, ids), start, atol=1e-3)


def test_only_the_linears_of_the_adapter_are_trained_with_its_ranks(tiny_model, tmp_path):
    folder = tiny_model("llama")
    adapter = plain_lora(folder, "llama", tmp_path / "a", **settings_of("llama"))
    run = continued(folder, adapter, tmp_path / "run")
    ranks = {name: branch.lora_A.shape[0] for name, branch in branches(run.base).items()}
    assert ranks == {f"model.layers.1.self_attn.{leaf}_proj": 2 if leaf == "q" else 4 for leaf in ("q", "k", "v", "o")}


def test_the_recipe_takes_over_what_the_adapter_has(tiny_model, tmp_path):
    settings = {"target_modules": ["v_proj", "down_proj"], "rank_pattern": {"v_proj": 7}, "lora_dropout": 0.25}
    adapter = plain_lora(tiny_model("llama"), "llama", tmp_path / "a", **settings)
    found = Adapter(start_from=str(adapter))
    assert (found.rank, found.alpha, found.dropout) == (7, 6, 0.25)
    assert found.target_modules == ["mlp.down_proj", "self_attn.v_proj"]
    assert Adapter(start_from=str(adapter), dropout=0.0).dropout == 0.0
    assert Adapter.model_validate(found.model_dump()) == found  # a recipe as it ran is read again
    with pytest.raises(ValidationError, match=r"rank: found 16, the adapter in .* has 7; leave it out"):
        Adapter(start_from=str(adapter), rank=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "a DoRA adapter cannot be trained here"),
        ({"modules_to_save": ["up_proj"]}, r"tensor 'base_model.model.model.layers.0.mlp.up_proj.weight' cannot be"),
        ({"target_modules": ["lm_head"]}, "holds no lora_A of a linear of the decoder blocks"),
        ({"trainable_token_indices": [4]}, "trainable_tokens_delta' cannot be trained here"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_trained_is_said_when_the_recipe_is_read(settings, message, tiny_model, tmp_path):
    adapter = plain_lora(tiny_model("llama"), "llama", tmp_path / "a", **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(ModelError, match=message):
        Adapter(start_from=str(adapter))


def test_dora_as_a_method_is_refused_with_what_there_is():
    with pytest.raises(ValidationError, match="DoRA adapters run and merge here, but are not trained"):
        Adapter(method="dora")


def test_an_output_that_holds_the_start_is_refused(tiny_model, tmp_path):
    adapter = plain_lora(tiny_model("llama"), "llama", tmp_path / "run" / "adapter", target_modules=["q_proj"])
    with pytest.raises(ValidationError, match="lies in output"):
        continued(tiny_model("llama"), adapter, tmp_path / "run")


def test_a_run_is_not_resumed_from_another_start(tiny_model, tmp_path):
    folder, adapters = tiny_model("llama"), []
    for seed in (1, 2):
        adapters.append(plain_lora(folder, "llama", tmp_path / f"{seed}", seed=seed, target_modules=["q_proj"]))
    run = continued(folder, adapters[0], tmp_path / "run")
    save_checkpoint(tmp_path / "c", run.progress, run.parameters, run.optimizer, run.identity)
    moved = adapters[0].rename(tmp_path / "moved")
    same, other = (continued(folder, adapter, tmp_path / "run") for adapter in (moved, adapters[1]))
    load_checkpoint(tmp_path / "c", same.parameters, same.optimizer, same.identity)
    with pytest.raises(CheckpointError, match="adapter.start_from"):
        load_checkpoint(tmp_path / "c", other.parameters, other.optimizer, other.identity)


def test_an_adapter_that_changed_since_the_recipe_was_read_is_refused(tiny_model, tmp_path):
    folder = tiny_model("llama")
    adapter = plain_lora(folder, "llama", tmp_path / "a", target_modules=["q_proj"])
    settings = Adapter(start_from=str(adapter))
    plain_lora(folder, "llama", adapter, target_modules=["q_proj"], r=8)
    recipe = {
        "model": {"path": str(folder), "quantization": "none"},
        "data": {"train": "none"},
        "output": str(tmp_path),
    }
    asked = Recipe.model_validate({**recipe, "output": str(tmp_path / "run")}).model_copy(update={"adapter": settings})
    with pytest.raises(ModelError, match="of rank 8 is not what the recipe was read with"):
        assemble(asked, load_base(asked.model), [], [], StopRequest())


def test_broken_files_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not one")
    with pytest.raises(ModelError, match="not a safetensors file"):
        Adapter(start_from=str(tmp_path))
