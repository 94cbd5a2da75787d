"""A user's walk: from an adapter that PEFT trained elsewhere, by commands alone, to a folder that transformers load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.export.toy import TEMPLATE, TEXTS, add_tokenizer

pytestmark = pytest.mark.slow  # each command is a process
ASKED = [{"role": "user", "content": "sum of 12 and 3?"}]


def train_with_peft(model: Path, adapter: Path) -> None:
    """PEFT's defaults, and what its users do: a few steps, `save_pretrained`, the tokenizer beside."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tuned: Any = AutoModelForCausalLM.from_pretrained(model)
    tuned = peft.get_peft_model(tuned, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(10):
        ids = tokenizer(TEXTS[3], return_tensors="pt").input_ids
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)


@pytest.fixture(scope="module")
def walk(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `adapter`, and `held-out.jsonl`."""
    folder = tmp_path_factory.mktemp("walk")
    shutil.copytree(tiny_model("llama", vocab_size=320), folder / "model")
    add_tokenizer(folder / "model", template=TEMPLATE)
    train_with_peft(folder / "model", folder / "adapter")
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in TEXTS]
    (folder / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    return folder


def qlora_kit(folder: Path, *arguments: str) -> str:
    """What `qlora-kit ...`, typed in the folder, prints."""
    command = [sys.executable, "-m", "qlora_kit", *arguments]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # where the kit is not installed
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder, env=here)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_from_a_peft_adapter_to_a_merged_fp16_folder(walk: Path) -> None:
    shown = json.loads(qlora_kit(walk, "adapter", "show", "adapter", "--json"))
    assert [row["rank"] for row in shown["updates"]] == [8] * 4
    both = ["--model", "model", "--adapter", "adapter"]
    merged = json.loads(qlora_kit(walk, "merge", *both, "--out", "merged", "--verify", "held-out.jsonl", "--json"))
    assert (merged["onto"], merged["dtype"], merged["merged_tensors"]) == ("original", "float16", 4)
    assert merged["proof"]["passed"]
    ask = ["--prompt", ASKED[0]["content"], "--max-new-tokens", "8"]
    answers = [qlora_kit(walk, "generate", *of, *ask) for of in (both, ["--model", "merged"])]
    assert answers[0] == answers[1] != qlora_kit(walk, "generate", "--model", "model", *ask)

    model: Any = AutoModelForCausalLM.from_pretrained(walk / "merged")
    tokenizer: Any = AutoTokenizer.from_pretrained(walk / "merged")
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(walk / "model"), walk / "adapter")
        assert model.dtype == torch.float16
        torch.testing.assert_close(model.float()(ids).logits, theirs(ids).logits, atol=2e-3, rtol=1e-3)


def test_for_an_adapter_of_a_4_bit_base_that_base_is_given(walk: Path) -> None:
    qlora_kit(walk, "quantize", "--model", "model", "--out", "model-nf4")
    both = ["--model", "model-nf4", "--adapter", "adapter"]
    merged = json.loads(qlora_kit(walk, "merge", *both, "--out", "onto-nf4", "--json"))
    assert (merged["onto"], merged["dtype"]) == ("dequantized", "float16")
