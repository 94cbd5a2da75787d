"""A model merged into 4 bits again is what its report says, and loads everywhere; what the adapter left, stays."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import load_adapter, save_adapter
from qlora_kit.base.loader import load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.data.tokenize import IGNORE_INDEX
from qlora_kit.errors import ModelError, RecipeError
from qlora_kit.export import choose
from qlora_kit.export.audit import audit
from qlora_kit.export.choose import merge_and_prove
from qlora_kit.export.merge import merge_model, open_merge
from qlora_kit.export.score import plain_model
from qlora_kit.recipe import Adapter, Model
from tests.peft_adapters import added_tokens, kinds, made_by_peft

ROWS = [torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(4)]
ROWS = [(row, [*row[1:], IGNORE_INDEX]) for row in ROWS]


def train(folder, adapter, **changes):
    """An adapter on some linears of a base that is quantized as `changes` say."""
    base = load_base(Model(path=str(folder), **({"quantization": "nf4"} | changes)))
    targets = ["attn.c_attn", "mlp.c_proj"] if base.architecture.transposed else ["q_proj", "down_proj"]
    inject(base, Adapter(rank=4, target_modules=targets), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(branch.index))
    save_adapter(base, adapter)
    return folder, adapter


@pytest.fixture(scope="module", params=["qwen2", "gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def pair(request, tiny_model, tmp_path_factory):
    return train(tiny_model(request.param), tmp_path_factory.mktemp("adapter"))


def proved(folder, adapter, out, scratch):
    """The report of the proved merge."""

    def load(quantization):
        base = load_base(Model(path=str(folder), quantization="nf4"))
        load_adapter(base, adapter)
        return base

    merge = open_merge(folder, adapter, onto="4bit")
    scratch.mkdir(exist_ok=True)
    return merge_and_prove(merge, out, ROWS, scratch, load=load, choose=False)


def test_kit_and_transformers_load_it_and_its_loss_is_shown(pair, tmp_path):
    report = proved(*pair, tmp_path / "m", tmp_path / "s")
    assert (report.onto, report.dtype) == ("4bit", "nf4")
    proof = report.proof
    assert proof["passed"] and proof["choice"] is None
    assert (proof["changed"], proof["changed"] + proof["unchanged"]) == (4, len(audit_names(*pair)))
    assert proof["reloaded"]["kl"] < 1e-3 < proof["distance"]["kl"]  # the same model, and not the live one
    assert abs(proof["base_loss"] - proof["live_loss"]) > 1e-3
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True
    assert report.bytes_written < sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    assert json.loads((tmp_path / "m" / "merge_report.json").read_text()) == report.to_json()


def audit_names(folder, adapter):
    return open_merge(folder, adapter, onto="4bit").requantized.names


def test_a_target_is_quantized_from_the_sum_and_all_else_is_what_training_saw(pair, tmp_path):
    folder, adapter = pair
    merge_model(folder, adapter, tmp_path / "m", onto="4bit")
    trained, again = (load_base(Model(path=str(path), quantization="nf4")) for path in (folder, tmp_path / "m"))
    load_adapter(trained, adapter)
    changed, merge = branches(trained), open_merge(folder, adapter, onto="4bit")
    for name, linear in trained.linears().items():
        weight, found = linear.weight(), again.linears()[name].weight()
        if name in changed:
            update = changed[name].scale * changed[name].lora_B.double() @ changed[name].lora_A.double()
            original = merge.base.stored.read(f"{name}.weight").double()
            original = original.t() if trained.architecture.transposed else original
            assert torch.equal(found, merge.quantization.through((original + update).bfloat16()))
        else:
            assert torch.equal(found, weight)


def test_from_a_4_bit_checkpoint_all_but_the_targets_are_its_own_bytes(pair, tmp_path):
    folder, adapter = pair
    quantize_model(folder, tmp_path / "q")
    merge_model(tmp_path / "q", adapter, tmp_path / "m", onto="4bit")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "m"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = [name for name in audit_names(*pair) if open_merge(*pair).update(name)]
    assert len(targets) == 4
    assert {name.partition(".weight")[0] for name in changed} == {name.removesuffix(".weight") for name in targets}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["dora", "head and norms saved", "LoRA on embedding", "added tokens"])
def test_an_adapter_of_peft_on_a_checkpoint_of_transformers_keeps_the_checkpoints_quantization(
    kind, tiny_model, tmp_path, ids
):
    folder = tiny_model("qwen2")
    quantize_model(folder, tmp_path / "q", quant_type="fp4", double_quant=False)
    if kind == "added tokens":
        added_tokens(folder, "qwen2", tmp_path / "a")
    else:
        made_by_peft(folder, "qwen2", tmp_path / "a", **kinds("qwen2")[kind])
    report = merge_model(tmp_path / "q", tmp_path / "a", tmp_path / "m", onto="4bit")
    assert report.dtype == "fp4"
    assert audit(tmp_path / "m", open_merge(tmp_path / "q", tmp_path / "a", onto="4bit"))["changed"] > 0
    ours = load_base(Model(path=str(tmp_path / "m"), dtype="float32", quantization="fp4", double_quant=False)).model
    theirs = plain_model(tmp_path / "m")
    with torch.no_grad():
        found = [model.eval()(input_ids=ids).logits.float() for model in (ours, theirs)]
    assert found[0].shape[-1] == (132 if kind == "added tokens" else 128)
    torch.testing.assert_close(*found, atol=0.05, rtol=0.05)  # theirs dequantizes to bf16


FAULTS = {
    "a target that was left out": r"q_proj.weight': [0-9.]+% of it is not base \+ 8 B A quantized",
    "an untouched linear": "is not the base's, and the adapter does not name it",
    "a norm": "is not the base's, and the adapter does not name it",
    "a missing weight": "k_proj.weight.absmax' is missing",
    "not a number": "quantized; do not use it",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, tiny_model, tmp_path):
    folder, adapter = train(tiny_model("llama"), tmp_path / "a")
    merge_model(folder, adapter, tmp_path / "m", onto="4bit")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    target, other = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk")
    if fault == "a target that was left out":
        quantize_model(folder, tmp_path / "q")
        base = load_file(tmp_path / "q" / "model.safetensors")
        tensors |= {name: value for name, value in base.items() if name.startswith(target)}
    elif fault == "an untouched linear":
        tensors[other] = tensors[other] ^ 1
    elif fault == "a norm":
        tensors["model.norm.weight"] += 1
    elif fault == "a missing weight":
        del tensors[f"{other}.absmax"]
    else:
        tensors[f"{target}.nested_absmax"].fill_(float("nan"))
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=FAULTS[fault]):
        audit(tmp_path / "m", open_merge(folder, adapter, onto="4bit"))


def test_another_model_than_the_scored_one_is_no_proof(tiny_model, tmp_path, monkeypatch):
    folder, adapter = train(tiny_model("llama"), tmp_path / "a")
    real = choose.prove_requantized

    def other(out, merge, live, base_loss, loaded):
        for linear in loaded.linears().values():
            linear.codes.zero_()
        return real(out, merge, live, base_loss, loaded)

    monkeypatch.setattr(choose, "prove_requantized", other)
    with pytest.raises(ModelError, match="plain transformers give .* this kit .* do not use it"):
        proved(folder, adapter, tmp_path / "m", tmp_path / "s")
    assert not (tmp_path / "m").exists()


def test_what_4_bits_cannot_be_is_refused(tiny_model, tmp_path):
    folder, adapter = train(tiny_model("llama"), tmp_path / "a")
    with pytest.raises(RecipeError, match=r"--dtype: float16: --onto 4bit keeps .* base's bfloat16; drop it"):
        open_merge(folder, adapter, dtype="float16", onto="4bit")
    assert open_merge(folder, adapter, dtype="bfloat16", onto="4bit").dtype == torch.bfloat16
    train(folder, tmp_path / "plain", quantization="none")
    with pytest.raises(
        ModelError, match=r"does not record a 4-bit base.*--onto original --dtype bfloat16, then run `qlora-kit qu"
    ):
        open_merge(folder, tmp_path / "plain", onto="4bit")


def test_a_checkpoint_that_is_quantized_in_part_or_in_other_blocks_is_refused(tiny_model, tmp_path):
    from transformers import BitsAndBytesConfig

    folder, adapter = train(tiny_model("llama"), tmp_path / "a")
    config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "down_proj"])
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path / "part")
    with pytest.raises(ModelError, match=r"down_proj.weight is not quantized \(2 of 14 linears"):
        open_merge(tmp_path / "part", adapter, onto="4bit", any_base=True)
