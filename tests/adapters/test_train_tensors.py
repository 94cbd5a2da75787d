"""Embedding, head and norms are trained as PEFT trains them: whole, or by LoRA on the two tables; fresh and continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.loader import load_base
from qlora_kit.base.streaming import Placement
from qlora_kit.data.tokenize import IGNORE_INDEX, Example
from qlora_kit.recipe import Recipe
from qlora_kit.training.loop import train_step
from qlora_kit.training.run import Run, assemble
from qlora_kit.training.signals import StopRequest
from tests.adapters.test_continue import pretrained, step_of_peft
from tests.peft_adapters import NORMS, embedding_of, logits, made_by_peft

STEPS = 3
MODELS = ("llama", "gemma3_text", "gpt2", "qwen2")  # untied, tied and scaled, layer norms, tied


def prepared(folder: Path, output: Path, placement: Placement | None = None, **changes: Any) -> Run:
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
    return assemble(recipe, load_base(recipe.model, placement=placement), examples, [], StopRequest())


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
@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.filterwarnings("ignore")
def test_a_fresh_adapter_is_trained_as_peft_would(model_type, kind, tiny_model, tmp_path, ids):
    folder = tiny_model(model_type)
    settings = {f"adapter__{key}": value for key, value in kinds(model_type)[kind].items()}
    run = prepared(folder, tmp_path / "run", **settings)
    torch.testing.assert_close(logits(run.base.model, ids), logits(pretrained(folder).eval(), ids))
    save_adapter(run.base, tmp_path / "a")
    assert_trains_as_peft(run, folder, tmp_path / "a", tmp_path / "b", ids)
