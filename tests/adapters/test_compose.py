"""Composed adapters: PEFT's own results where PEFT has the method, the weighted sum where it is exact."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from peft.utils import merge_utils
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.compose import Composition, compose, cosines, dare, ratio, together
from qlora_kit.adapters.factors import open_adapter
from qlora_kit.adapters.inject import activate, branches, inject
from qlora_kit.adapters.store import load_adapter, provenance, save_adapter
from qlora_kit.base.loader import load_base
from qlora_kit.errors import DiskError, ModelError
from qlora_kit.recipe import Adapter, Model
from tests.peft_adapters import logits, made_by_peft

WEIGHTS = (0.7, -0.4)
PEFTS = {"linear": {}, "cat": {}, "svd": {}, "ties": {"density": 0.3}}


def update(branch) -> torch.Tensor:
    return branch.scale * branch.lora_B.double() @ branch.lora_A.double()


def two_of_peft(tiny_model, tmp_path: Path, model_type: str = "llama", **second) -> tuple[Path, Path, Path]:
    """Base and two adapters with different scales; the second on fewer linears if told."""
    folder = tiny_model(model_type)
    made_by_peft(folder, model_type, tmp_path / "a", target_modules="all-linear")
    made_by_peft(
        folder, model_type, tmp_path / "b", seed=4, **{"target_modules": "all-linear", "lora_alpha": 3, **second}
    )
    return folder, tmp_path / "a", tmp_path / "b"


def plain_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("method", PEFTS)
def test_composed_is_what_peft_composes_and_peft_loads_it(method, model_type, tiny_model, tmp_path, ids):
    folder, a, b = two_of_peft(tiny_model, tmp_path, model_type)
    theirs = peft.PeftModel.from_pretrained(plain_of(folder), a, "a")
    theirs.load_adapter(b, "b")
    theirs.add_weighted_adapter(["a", "b"], list(WEIGHTS), "both", method, **PEFTS[method])
    theirs.set_adapter("both")
    compose([a, b], Composition(method, WEIGHTS, **PEFTS[method]), tmp_path / "out")
    ours = peft.PeftModel.from_pretrained(plain_of(folder), tmp_path / "out").eval()
    expected = logits(theirs.eval(), ids)
    torch.testing.assert_close(logits(ours, ids), expected, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(logits(plain_of(folder), ids), expected, atol=1e-2)


def test_dare_is_pefts_with_the_same_draws():
    values = [torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    torch.manual_seed(3)
    theirs = merge_utils.dare_linear(values, torch.tensor(WEIGHTS), 0.4)
    ours = dare(values, list(WEIGHTS), 0.4, torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours, theirs)
    assert (theirs == 0).any()


def test_dare_is_the_same_again_with_its_seed_and_another_with_another(tiny_model, tmp_path):
    _, a, b = two_of_peft(tiny_model, tmp_path)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        compose([a, b], Composition("dare", WEIGHTS, seed=seed), tmp_path / name)
    one, again, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "again", "two"))
    assert one == again
    assert one != two


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "float32"), ("nf4", "bfloat16")])
def test_cat_runs_as_both_adapters_at_once(quantization, dtype, tiny_model, tmp_path, ids):
    def base_of():
        return load_base(Model(path=str(tiny_model("llama")), quantization=quantization, dtype=dtype))

    base = base_of()
    for seed, name in enumerate(("a", "b")):
        inject(base, Adapter(rank=4 + 4 * seed, alpha=8, dtype=dtype), seed, name)
        for branch in branches(base, name).values():
            branch.lora_B.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        save_adapter(base, tmp_path / name, name)
    activate(base, ["a", "b"])
    expected = logits(base.model.eval(), ids).float()
    found = compose([tmp_path / "a", tmp_path / "b"], Composition("cat", (1.0, 1.0)), tmp_path / "out")
    composed = base_of()
    load_adapter(composed, tmp_path / "out")
    difference = (logits(composed.model.eval(), ids).float() - expected).norm() / expected.norm()
    assert difference < (1e-6 if dtype == "float32" else 2**-7)
    assert ratio(together(found, "all")) < 1e-6  # scales 2 and 1: their quotient is a power of two, so no bit is lost
    assert {one.rank for one in found} == {12}
    assert provenance(tmp_path / "out")["base_fingerprint"] == base.fingerprint
    assert open_adapter(tmp_path / "out").dtype == getattr(torch, dtype)


def test_interference_is_that_of_the_updates_themselves(tiny_model, tmp_path):
    _, a, b = two_of_peft(tiny_model, tmp_path, target_modules=["q_proj", "v_proj"])
    found = compose([a, b], Composition("svd", WEIGHTS, rank=3), tmp_path / "out")
    first, second, out = (open_adapter(folder) for folder in (a, b, tmp_path / "out"))
    assert {one.linear for one in found} == set(first.shapes)
    for one in found:
        u = update(first.branch(one.linear))
        v = update(second.branch(one.linear)) if one.linear in second.shapes else torch.zeros_like(u)
        wanted = WEIGHTS[0] * u + WEIGHTS[1] * v
        assert one.norms == pytest.approx((float(u.norm()), float(v.norm())))
        assert one.error == pytest.approx(float((update(out.branch(one.linear)) - wanted).norm()), rel=1e-6)
        assert one.error == pytest.approx(float(torch.linalg.svdvals(wanted)[3:].norm()), rel=1e-3)
        expected = float((u * v).sum() / u.norm() / v.norm()) if v.any() else None
        assert cosines(one.norms, one.inner) == [pytest.approx(expected)]


def test_svd_of_enough_rank_is_the_weighted_sum(tiny_model, tmp_path):
    _, a, b = two_of_peft(tiny_model, tmp_path, r=2)
    found = compose([a, b], Composition("svd", WEIGHTS, rank=6), tmp_path / "out")
    assert max(map(ratio, found)) < 1e-6


@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_factors_of_different_ranks_are_not_added(method, tiny_model, tmp_path):
    _, a, b = two_of_peft(tiny_model, tmp_path, r=2)
    with pytest.raises(ModelError, match=rf"_proj: ranks \[4, 2\]; {method} .*--method cat"):
        compose([a, b], Composition(method, WEIGHTS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "lm_head.weight: .*modules_to_save")],
)
def test_more_than_lora_is_refused(kind, message, tiny_model, tmp_path):
    _, a, b = two_of_peft(tiny_model, tmp_path, **kind)
    with pytest.raises(ModelError, match=message):
        compose([a, b], Composition("cat", WEIGHTS), tmp_path / "out")


def test_adapters_of_different_bases_are_refused(tiny_model, tmp_path):
    _, a, b = two_of_peft(tiny_model, tmp_path)
    for folder, fingerprint in ((a, "one"), (b, "two")):
        (folder / "qlora_kit.json").write_text(json.dumps({"base_fingerprint": fingerprint}))
    with pytest.raises(ModelError, match="trained on base two, .*on base one; .*one base"):
        compose([a, b], Composition("cat", WEIGHTS), tmp_path / "out")
    made_by_peft(tiny_model("llama", hidden_size=32), "llama", tmp_path / "c", target_modules="all-linear")
    with pytest.raises(ModelError, match="different bases"):
        compose([a, tmp_path / "c"], Composition("cat", WEIGHTS), tmp_path / "out")


def test_a_folder_that_is_there_is_not_overwritten(tiny_model, tmp_path):
    _, a, b = two_of_peft(tiny_model, tmp_path)
    with pytest.raises(DiskError, match="already exists"):
        compose([a, b], Composition("cat", WEIGHTS), b)
