"""The same NF4 base, A and B in peft + bitsandbytes and here: apart by bf16's rounding and no more."""

from __future__ import annotations

import pytest
import torch

from tools.compare_peft import compare


@pytest.mark.filterwarnings("ignore")  # transformers', peft's and bitsandbytes' own
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox", "olmo2"])
def test_logits_equal_pefts_within_bf16_rounding(model_type, tiny_model):
    found = compare(str(tiny_model(model_type, torch.bfloat16)), 32)
    assert found["ours_to_peft_mean"] <= found["ours_to_fp32_mean"] + found["peft_to_fp32_mean"]
    assert found["ours_to_fp32_mean"] <= 1.5 * found["peft_to_fp32_mean"]
    assert found["ours_to_fp32_mean"] <= 0.01 * found["largest_logit"]
