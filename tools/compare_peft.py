"""Same mathematics as the reference: logits of this kit beside peft + transformers + bitsandbytes, on one NF4 base.

`python -m tools.compare_peft MODEL [--tokens 64]` puts the same random A and B on both, dropout off, and prints how far
the logits are apart, beside how far bf16 itself is from fp32 with the same adapter. Numbers for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_kit.adapters.inject import branches, inject
from qlora_kit.adapters.store import load_adapter, save_adapter
from qlora_kit.base.loader import Base, load_base
from qlora_kit.recipe import Adapter, Model


def random_adapter(base: Base) -> None:
    """A rank-16 adapter on all linears whose update is about a percent of the weights."""
    inject(base, Adapter(rank=16), seed=0)
    for branch in branches(base).values():
        branch.lora_B.data.normal_(0, 0.01, generator=torch.Generator().manual_seed(branch.index))
    base.model.eval()


def reference_model(model: str, adapter: Path) -> Any:
    """peft's model on bitsandbytes' own Linear4bit, kept off its repacking CPU kernel (see docs/architecture.md)."""
    import bitsandbytes
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=quantization)
    for module in plain.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(plain, adapter, autocast_adapter_dtype=False).eval()


@torch.no_grad()
def compare(model: str, tokens: int) -> dict[str, float]:
    """Largest and mean distances of logits, and how often the most probable token agrees."""
    base = load_base(Model(path=model))
    random_adapter(base)
    vocabulary = base.model.config.vocab_size
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(base, Path(folder))
        ours = base.model(input_ids=ids).logits.float()
        theirs = reference_model(model, Path(folder))(input_ids=ids).logits.float()
        exact = load_base(Model(path=model, dtype="float32"))
        load_adapter(exact, Path(folder))
        fp32 = exact.model(input_ids=ids).logits
    apart = (ours - theirs).abs()
    return {
        "largest_logit": ours.abs().max().item(),
        "ours_to_peft_max": apart.max().item(),
        "ours_to_peft_mean": apart.mean().item(),
        "ours_to_fp32_mean": (ours - fp32).abs().mean().item(),
        "peft_to_fp32_mean": (theirs - fp32).abs().mean().item(),
        "same_top_token": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of a supported model")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    print(json.dumps(compare(arguments.model, arguments.tokens), indent=2))
