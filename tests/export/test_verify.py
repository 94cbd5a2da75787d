"""A merged folder that is not the model that was trained does not pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.loader import Base, load_base
from qlora_kit.data.tokenize import IGNORE_INDEX
from qlora_kit.errors import ModelError
from qlora_kit.export import score as scoring
from qlora_kit.export.audit import audit
from qlora_kit.export.merge import merge_model, open_merge
from qlora_kit.export.score import Distance
from qlora_kit.export.verify import TOLERANCE_NATS, Live, Proof, live_model, prove, reloaded
from qlora_kit.recipe import Adapter, Model


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> tuple[Base, Path, Live]:
    """A base with an adapter that matters, its saved folder, and its scores."""
    base = load_base(Model(path=str(tiny_model("llama")), quantization="nf4"))
    inject(base, Adapter(rank=4), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(branch.index))
    adapter = tmp_path_factory.mktemp("adapter")
    save_adapter(base, adapter)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 128, (20,), generator=generator).tolist() for _ in range(12)]
    rows = [(row, [*row[1:], IGNORE_INDEX]) for row in rows]
    return base, adapter, live_model(base, rows, tmp_path_factory.mktemp("live") / "logits")


def test_merged_model_passes_in_a_fresh_process(trained, tmp_path):
    base, adapter, live = trained
    merge_model(base.folder, adapter, tmp_path / "m")
    proof = prove(tmp_path / "m", open_merge(base.folder, adapter), live)
    assert proof.passed
    assert (proof.tokens, proof.distance.tokens) == (12 * 19, 12 * 19)
    assert (proof.changed, proof.unchanged) == (14, 7)
    assert proof.distance.top1 > 0.9  # the live model computes in bf16


FAULTS = ("scale ignored", "wrong base", "tied head re-tied", "one layer skipped", "adapter empty")


def plant(fault: str, folder: Path, base: Base) -> None:
    """Make a merged folder what a known failure leaves."""
    path, config = folder / "model.safetensors", folder / "config.json"
    tensors = safetensors.torch.load_file(path)
    if fault == "wrong base":
        for name in tensors:
            tensors[name] += 0.05 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(3))
    if fault == "tied head re-tied":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
        del tensors["lm_head.weight"]
    for name, branch in branches(base).items():
        update = (branch.scale * (branch.lora_B.float() @ branch.lora_A.float())).detach()
        if fault == "scale ignored":
            tensors[f"{name}.weight"] -= update * (1 - 1 / branch.scale)
        elif fault == "adapter empty" or (fault == "one layer skipped" and "layers.0." in name):
            tensors[f"{name}.weight"] -= update
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_by_the_bits_and_by_what_the_model_says(fault, trained, tmp_path):
    base, adapter, live = trained
    merge_model(base.folder, adapter, tmp_path / "m", dtype="float32")
    plant(fault, tmp_path / "m", base)
    with pytest.raises(ModelError):
        audit(tmp_path / "m", open_merge(base.folder, adapter, dtype="float32"))
    scores = reloaded(tmp_path / "m", live)
    assert scores.distance.kl > TOLERANCE_NATS


def test_an_update_that_rounding_takes_away_is_named(trained, tmp_path):
    base, _, live = trained
    small = load_base(Model(path=str(base.folder), quantization="none"))
    inject(small, Adapter(rank=4), seed=0)
    for branch in branches(small).values():
        branch.lora_B.data.fill_(1e-12)
    save_adapter(small, tmp_path / "a")
    merge_model(base.folder, tmp_path / "a", tmp_path / "m")
    with pytest.raises(ModelError, match="smaller than half a step of torch.float16"):
        prove(tmp_path / "m", open_merge(base.folder, tmp_path / "a"), live)


def test_folder_that_transformers_cannot_load_is_reported(trained, tmp_path):
    with pytest.raises(ModelError, match="plain transformers cannot load"):
        reloaded(tmp_path, trained[2])


@pytest.mark.parametrize("tokens", [5, 25])
def test_logits_are_kept_up_to_a_limit_and_losses_of_all(tokens, trained, tmp_path, monkeypatch):
    base, _, live = trained
    monkeypatch.setattr(scoring, "PROBE_BYTES", tokens * 128 * 4)
    again = live_model(base, live.rows, tmp_path / "logits")
    assert (tmp_path / "logits").stat().st_size == tokens * 128 * 4
    same = scoring.score(base.model, live.rows, reference=again.logits)
    assert same.losses == live.scores.losses
    assert same.distance == scoring.Distance(tokens, 0.0, 1.0, 0.0)


def test_fp32_arithmetic_on_16_bit_weights_is_that_of_fp32_weights(trained, tmp_path):
    base, adapter, live = trained
    merge_model(base.folder, adapter, tmp_path / "m")
    wide = scoring.score(scoring.plain_model(tmp_path / "m", torch.float32), live.rows)
    model = scoring.plain_model(tmp_path / "m")
    assert scoring.score(model, live.rows) == wide
    assert model.get_parameter("model.layers.1.mlp.up_proj.weight").dtype == torch.float16


@pytest.mark.parametrize(("loss", "kl"), [(1.0, float("nan")), (float("nan"), 0.0), (1.0 + 2 * TOLERANCE_NATS, 0.0)])
def test_a_loss_or_divergence_that_is_not_a_number_or_too_far_is_no_proof(loss, kl):
    assert Proof(1.0, 1.0, 8, Distance(8, 0.0, 1.0, 0.0), 1, 1).passed
    assert not Proof(1.0, loss, 8, Distance(8, kl, 1.0, 0.0), 1, 1).passed
