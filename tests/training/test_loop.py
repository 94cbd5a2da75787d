"""The loop against peft, and its invariants: accumulation, resumption, determinism."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_kit.adapters.inject import trainable_parameters
from qlora_kit.adapters.store import save_adapter
from qlora_kit.base.quantize_model import is_quantized
from qlora_kit.data.tokenize import IGNORE_INDEX
from qlora_kit.errors import CheckpointError, DataError, ModelError, NonFiniteError, RecipeError
from qlora_kit.planning.decide import RESIDENT_SHARE
from qlora_kit.planning.hardware import CPU_RUNTIME_BYTES
from qlora_kit.planning.planner import make_plan
from qlora_kit.recipe import Recipe
from qlora_kit.training import loop
from qlora_kit.training.loop import train, train_step
from qlora_kit.training.run import prepare
from qlora_kit.training.signals import StopRequest

WORDS = [f"w{index}" for index in range(120)]


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """A tiny llama with a tokenizer of 124 words."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(tiny_model("llama"), folder)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """22 prompts and completions of different lengths."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for index in range(22):
        prompt = " ".join(WORDS[(index * 7 + k) % 120] for k in range(3 + index % 5))
        answer = " ".join(WORDS[(index * 11 + k * 3) % 120] for k in range(2 + index % 7))
        rows.append(json.dumps({"prompt": prompt + " ", "completion": answer}))
    path.write_text("\n".join(rows) + "\n")
    return path


def recipe(folder: Path, corpus: Path, output: Path, **changes: dict) -> Recipe:
    values = {
        "model": {"path": str(folder), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8, "dtype": "float32"},
        "data": {"train": str(corpus), "seq_len": 32},
        "train": {"steps": 6, "grad_accumulation": 2, "optimizer": "adamw", "lr": 1e-2, "max_grad_norm": None},
        "output": str(output),
    }
    for section, part in changes.items():
        values[section] = {**values.get(section, {}), **part}
    return Recipe.model_validate(values)


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(output / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(first: Path, second: Path) -> None:
    one, two = adapter(first), adapter(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_twenty_steps_of_a_toy_give_pefts_losses(model, corpus, tmp_path):
    asked = recipe(model, corpus, tmp_path / "run", data={"packing": False}, train={"steps": 20, "lr": 2e-3})
    run = prepare(asked, StopRequest())
    save_adapter(run.base, tmp_path / "start")
    reference = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path / "start", is_trainable=True
    )
    reference.eval()
    optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    for step in range(20):
        batches = run.batches.step(step)
        line = train_step(run)
        total = torch.zeros(())
        for batch in batches:
            logits = reference(input_ids=batch.input_ids).logits.flatten(0, 1)
            total = total + F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        loss = total / sum(batch.learned_tokens for batch in batches)
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)


def first_gradients(asked: Recipe) -> dict[str, torch.Tensor]:
    """Gradients of step 1, taken where the optimizer would use them."""
    run = prepare(asked, StopRequest())
    caught = {}

    def catch() -> None:
        caught.update({name: p.grad.clone() for name, p in trainable_parameters(run.base) if p.grad is not None})

    run.optimizer.step = catch  # type: ignore[method-assign]
    for _, parameter in trainable_parameters(run.base):
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    train_step(run)
    return caught


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_over_micro_batches_equals_one_batch(accumulation, packing, model, corpus, tmp_path):
    def gradients(micro_batch: int, grad_accumulation: int) -> dict[str, torch.Tensor]:
        shape = {"micro_batch": micro_batch, "grad_accumulation": grad_accumulation}
        return first_gradients(recipe(model, corpus, tmp_path / "r", data={"packing": packing}, train=shape))

    whole, parts = gradients(8, 1), gradients(8 // accumulation, accumulation)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_last_partial_window_is_a_step_and_normalised_by_its_own_tokens(model, corpus, tmp_path):
    shape = {"micro_batch": 1, "grad_accumulation": 16, "epochs": 1, "steps": None}
    run = prepare(recipe(model, corpus, tmp_path / "r", data={"packing": False}, train=shape), StopRequest())
    assert run.total_steps == 2
    windows = [run.batches.step(step) for step in range(2)]
    assert [len(window) for window in windows] == [16, 6]
    lines = [train_step(run) for _ in range(2)]
    assert [line["learned_tokens"] for line in lines] == [sum(b.learned_tokens for b in w) for w in windows]


def test_gradients_reach_every_B_in_step_1_and_every_A_in_step_2(model, corpus, tmp_path):
    run = prepare(recipe(model, corpus, tmp_path / "r", model={"quantization": "nf4"}), StopRequest())
    moved: list[set[str]] = []
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in trainable_parameters(run.base)}
        train_step(run)
        moved.append({name for name, p in trainable_parameters(run.base) if not torch.equal(p, before[name])})
    names = {name for name, _ in trainable_parameters(run.base)}
    assert {name for name in names if name.endswith("lora_B")} <= moved[0]
    assert {name for name in names if name.endswith("lora_A")} <= moved[1]


LINEARS: dict = {}
TABLES = {"target_modules": ["q_proj", "up_proj", "embed_tokens"], "modules_to_save": ["lm_head", "norm"]}
LIKE_OTHERS = [pytest.param(name, LINEARS, marks=pytest.mark.slow) for name in ("adamw_8bit", "paged_adamw_32bit")]


@pytest.mark.parametrize(
    ("optimizer", "trained"),
    [("adamw", LINEARS), ("paged_adamw_8bit", LINEARS), ("paged_adamw_8bit", TABLES), *LIKE_OTHERS],
)
def test_resumed_run_equals_uninterrupted_run(optimizer, trained, model, corpus, tmp_path, monkeypatch):
    changes = {
        "adapter": {"dropout": 0.1, "rank": 64, "dtype": "bfloat16", **trained},
        "model": {"quantization": "nf4", "dtype": "bfloat16"},
    }
    train_keys = {"optimizer": optimizer, "save_every": 1, "max_grad_norm": 0.5, "eval_every": 2}
    whole = recipe(model, corpus, tmp_path / "whole", train=train_keys, data={"eval": 0.2}, **changes)
    train(whole)
    parts = recipe(model, corpus, tmp_path / "parts", train=train_keys, data={"eval": 0.2}, **changes)
    real, done = loop.train_step, []

    def dies_at_step_4(run):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(run.progress.step)
        return real(run)

    monkeypatch.setattr(loop, "train_step", dies_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        train(parts)
    monkeypatch.setattr(loop, "train_step", real)
    train(parts, resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_same_adapter(tmp_path / "parts", tmp_path / "whole")


def test_killed_process_resumes_bit_exactly(model, corpus, tmp_path):
    keys = {"steps": 40, "save_every": 1, "keep_checkpoints": 2}
    train(recipe(model, corpus, tmp_path / "whole", train=keys))
    killed = recipe(model, corpus, tmp_path / "killed", train=keys)
    (tmp_path / "r.yaml").write_text(killed.to_yaml())
    command = [sys.executable, "-m", "qlora_kit", "train", str(tmp_path / "r.yaml")]
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "killed" / "checkpoints").glob("step-*")) and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    train(killed, resume=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_same_adapter(tmp_path / "killed", tmp_path / "whole")


def test_two_runs_are_bit_identical_and_another_seed_is_not(model, corpus, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(recipe(model, corpus, tmp_path / name, train={"seed": seed}))
    assert_same_adapter(tmp_path / "a", tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_best_evaluation_is_kept_beside_the_last(model, corpus, tmp_path):
    asked = recipe(model, corpus, tmp_path / "r", data={"eval": 0.2}, train={"lr": 0.5, "eval_every": 1})
    result = train(asked)
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert result.best_step == min(evaluations, key=lambda step: evaluations[step])
    assert (tmp_path / "r" / "best").exists() == (result.best_step > 0)


def test_a_second_run_in_the_same_folder_is_refused(model, corpus, tmp_path):
    asked = recipe(model, corpus, tmp_path / "r", train={"steps": 1})
    train(asked)
    with pytest.raises(RecipeError, match="already holds a run; continue it with --resume"):
        train(asked)
    train(asked, restart=True)


@pytest.mark.parametrize("change", [{"adapter": {"alpha": 9}}, {"train": {"seed": 5}}, {"data": {"seq_len": 31}}])
def test_resuming_another_run_is_refused_by_field(change, model, corpus, tmp_path):
    train(recipe(model, corpus, tmp_path / "r", train={"steps": 2}))
    changed = {**change, "train": {"steps": 2, **change.get("train", {})}}
    section, part = next(iter(change.items()))
    with pytest.raises(CheckpointError, match=f"{section}.{next(iter(part))} was"):
        train(recipe(model, corpus, tmp_path / "r", **changed), resume=True)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(model, corpus, tmp_path):
    asked = recipe(model, corpus, tmp_path / "r", train={"steps": 4, "save_every": 1})
    train(asked)
    expected = adapter(tmp_path / "r")
    newest = tmp_path / "r" / "checkpoints" / "step-000004" / "adapter.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    train(asked, resume=True)
    assert all(torch.equal(value, expected[name]) for name, value in adapter(tmp_path / "r").items())


def test_steps_without_finite_loss_are_skipped_and_then_stop_the_run(model, corpus, tmp_path, monkeypatch):
    real = loop.batch_losses
    monkeypatch.setattr(loop, "batch_losses", lambda *given: [loss * float("nan") for loss in real(*given)])
    with pytest.raises(NonFiniteError, match="not finite 5 steps in a row"):
        train(recipe(model, corpus, tmp_path / "r"))


def test_tensorboard_gets_the_losses(model, corpus, tmp_path):
    train(recipe(model, corpus, tmp_path / "r", train={"trackers": ["tensorboard"], "steps": 2}))
    assert list((tmp_path / "r").rglob("events.out.tfevents*"))


def test_sequences_longer_than_learned_positions_are_refused(model, corpus, tmp_path, tiny_model):
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_model("gpt2"), folder)
    for path in model.glob("tokenizer*"):
        shutil.copy(path, folder)
    with pytest.raises(ModelError, match=r"made for 256 positions, data.seq_len is 300; lower it"):
        prepare(recipe(folder, corpus, tmp_path / "r", data={"seq_len": 300}), StopRequest())
    prepare(recipe(model, corpus, tmp_path / "r", data={"seq_len": 300}), StopRequest())  # rotary: a warning


def test_restart_keeps_the_old_run_until_the_new_one_can_begin(model, corpus, tmp_path):
    asked = recipe(model, corpus, tmp_path / "r", train={"steps": 1})
    train(asked)
    with pytest.raises(DataError):
        train(recipe(model, tmp_path / "none.jsonl", tmp_path / "r"), restart=True)
    assert (tmp_path / "r" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "memory",
    [
        {"placement": "host", "resident_blocks": 0},
        {"placement": "disk", "resident_blocks": 0, "embeddings": "disk"},
        {"embeddings": "disk"},
    ],
)
def test_where_the_base_lives_does_not_change_one_bit(memory, model, corpus, tmp_path):
    keys = {"model": {"quantization": "nf4"}, "adapter": {"dropout": 0.1}, "data": {"eval": 0.2}}
    train(recipe(model, corpus, tmp_path / "device", **keys))
    train(recipe(model, corpus, tmp_path / "away", memory=memory, **keys))
    assert losses(tmp_path / "away") == losses(tmp_path / "device")
    assert_same_adapter(tmp_path / "away", tmp_path / "device")


def test_whatever_a_plan_decides_for_a_budget_does_not_change_one_bit(model, corpus, tmp_path):
    keys = {"model": {"quantization": "nf4"}, "adapter": {"dropout": 0.1}, "memory": {"gradient_checkpointing": "auto"}}
    train(recipe(model, corpus, tmp_path / "plain", **(keys | {"memory": {}})))
    decided = set()
    plan = make_plan(recipe(model, corpus, tmp_path, **keys), budget_bytes=1 << 30)
    tensors = plan.peak_bytes - plan.components["runtime"]
    full = CPU_RUNTIME_BYTES + tensors
    roomy = [int((full + share * tensors) / RESIDENT_SHARE) for share in (0.1, -0.1, -0.4, -0.5)]
    for budget in (*roomy, int(full - 0.5 * tensors)):
        asked = recipe(model, corpus, tmp_path / str(budget), **keys)
        runs = make_plan(asked, budget_bytes=budget).placed(asked)
        train(runs)
        decided.add(tuple(runs.memory.model_dump().values()))
        assert_same_adapter(tmp_path / str(budget), tmp_path / "plain")
    assert len(decided) >= 4


def test_a_base_kept_for_streaming_is_not_taken_for_another_model(model, corpus, tmp_path, tiny_model):
    asked = recipe(model, corpus, tmp_path / "r", model={"quantization": "nf4"}, memory={"placement": "disk"})
    prepare(asked, StopRequest())
    other = shutil.copytree(model, tmp_path / "other")
    shutil.copy(tiny_model("llama", initializer_range=0.05) / "model.safetensors", other)
    changed = asked.model_copy(update={"model": asked.model.model_copy(update={"path": str(other)})})
    with pytest.raises(ModelError, match="made from another model"):
        prepare(changed, StopRequest())


def test_a_quantized_base_that_is_kept_is_made_once_and_gives_the_same_adapter(model, corpus, tmp_path, capsys):
    kept = tmp_path / "kept-nf4"
    train(recipe(model, corpus, tmp_path / "plain", model={"quantization": "nf4"}))
    for name in ("first", "second"):
        train(recipe(model, corpus, tmp_path / name, model={"quantization": "nf4", "keep_quantized": str(kept)}))
        assert_same_adapter(tmp_path / name, tmp_path / "plain")
    assert capsys.readouterr().err.count("quantizing the base once") == 1
    assert is_quantized(kept)
