"""An answer is the chain of most probable tokens, with kept keys and values as without, wherever the blocks live."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_kit.adapters.inject import activate, branches, inject
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.loader import Base, load_base
from qlora_kit.base.streaming import Placement
from qlora_kit.data.tokenize import load_tokenizer
from qlora_kit.errors import DataError
from qlora_kit.export.merge import merge_model
from qlora_kit.generation import Sampling, answer, encode_prompts, generate
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.recipe import Adapter, Model
from qlora_kit.training.blocks import attach
from tests.export.test_merge import adapted
from tests.export.toy import add_tokenizer

NEW = 12
PROMPT = [{"role": "user", "content": "The quick brown fox"}]


@pytest.fixture(scope="module")
def toy(tiny_model):
    """`toy("llama")` -> a model's folder with a tokenizer."""
    return lambda model_type: add_tokenizer(tiny_model(model_type, vocab_size=320))


def with_adapter(
    folder: Path, placement: Placement | None = None, quantization: str = "nf4", device: str = "cpu"
) -> Base:
    """A base whose adapter changes what it says."""
    base = load_base(Model(path=str(folder), quantization=quantization, dtype="float32"), device, placement)
    inject(base, Adapter(rank=4, dtype="float32"), seed=0)
    for branch in branches(base).values():
        values = torch.empty(branch.lora_B.shape)
        branch.lora_B.data.copy_(values.normal_(0, 0.2, generator=torch.Generator().manual_seed(branch.index)))
    if base.streamer is not None:
        attach(base)
    base.model.eval()
    return base


def said(base: Base, tokenizer, sampling: Sampling, **options) -> tuple[str, list[str]]:
    """The answer, and the pieces in which it was shown."""
    pieces: list[str] = []
    return answer(base, tokenizer, PROMPT, sampling, pieces.append, **options), pieces


@torch.no_grad()
def chain(base: Base, row: list[int]) -> list[int]:
    """The most probable tokens one after the other, each from a whole passage that keeps nothing."""
    start = len(row)
    while len(row) < start + NEW:
        logits = base.model(input_ids=torch.tensor([row]), use_cache=False).logits
        row = [*row, int(logits[0, -1].argmax())]
        if row[-1] == 2:
            return row[start:-1]
    return row[start:]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_kept_keys_and_values_change_no_token(model_type, toy):
    base, tokenizer = with_adapter(toy(model_type)), load_tokenizer(toy(model_type))
    (row,) = encode_prompts(tokenizer, [PROMPT])
    expected = tokenizer.decode(chain(base, row), skip_special_tokens=True)
    assert len(expected) > 3
    assert said(base, tokenizer, Sampling(NEW))[0] == expected
    assert list(generate(base, tokenizer, [PROMPT], Sampling(NEW))) == [expected]


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_streamed_blocks_say_the_same(model_type, tier, toy):
    tokenizer = load_tokenizer(toy(model_type))
    resident = said(with_adapter(toy(model_type), quantization="none"), tokenizer, Sampling(NEW))
    streamed = with_adapter(toy(model_type), Placement(tier), quantization="none")
    assert streamed.streamer is not None
    assert said(streamed, tokenizer, Sampling(NEW)) == resident


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_streamed_blocks_say_the_same_on_a_device_with_late_copies(tier, toy):
    tokenizer = load_tokenizer(toy("llama"))
    expected = said(with_adapter(toy("llama"), quantization="none"), tokenizer, Sampling(NEW))
    with simulated_device() as device:
        found = said(with_adapter(toy("llama"), Placement(tier), "none", "simgpu"), tokenizer, Sampling(NEW))
        assert device.peak_bytes > 0
    assert found == expected


def test_the_merged_model_says_the_same(toy, tmp_path):
    base, tokenizer = adapted(toy("llama"), tmp_path / "a"), load_tokenizer(toy("llama"))
    merge_model(base.folder, tmp_path / "a", tmp_path / "m", dtype="float32")
    merged = load_base(Model(path=str(tmp_path / "m"), quantization="none", dtype="float32"))
    assert said(merged, tokenizer, Sampling(NEW)) == said(base, tokenizer, Sampling(NEW))


def test_the_pieces_shown_are_the_answer(toy):
    text, pieces = said(with_adapter(toy("llama")), load_tokenizer(toy("llama")), Sampling(40))
    assert "".join(pieces) == text
    assert len(list(filter(None, pieces))) > 2


def test_an_answer_ends_where_it_is_told_to(toy):
    base, tokenizer, asked = with_adapter(toy("llama")), load_tokenizer(toy("llama")), []
    whole = said(base, tokenizer, Sampling(40))[0]
    cut = said(base, tokenizer, Sampling(40), stopped=lambda: asked.append(1) or len(asked) == 5)[0]
    assert len(asked) == 5 and 0 < len(cut) < len(whole) and whole.startswith(cut.rstrip("\ufffd"))


def test_answers_side_by_side_are_those_alone(toy):
    base, tokenizer = with_adapter(toy("llama")), load_tokenizer(toy("llama"))
    prompts = [PROMPT, [{"role": "user", "content": "naïve, and much longer than the other one"}]]
    together = list(generate(base, tokenizer, prompts, Sampling(NEW), batch=2))
    assert together == [*generate(base, tokenizer, prompts, Sampling(NEW), batch=1)]


@pytest.mark.parametrize(("batch", "tier"), [(1, "device"), (2, "device"), (8, "device"), (8, "host"), (8, "disk")])
def test_adapters_side_by_side_say_what_they_say_alone(batch, tier, toy):
    base, tokenizer = with_adapter(toy("llama"), Placement(tier), "none"), load_tokenizer(toy("llama"))
    assert (base.streamer is None) == (tier == "device")
    inject(base, Adapter(rank=2, dtype="float32"), 1, "second")
    for branch in branches(base, "second").values():
        branch.lora_B.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(branch.index))
    names, expected = ["default", "second", None], []
    for name in names:
        activate(base, [name] if name else [])
        expected += generate(base, tokenizer, [PROMPT], Sampling(NEW))
    found = list(generate(base, tokenizer, [PROMPT] * 3, Sampling(NEW), batch=batch, adapters=names))
    assert found == expected
    assert len({*found}) == 3


def test_a_seed_repeats_an_answer_and_another_gives_another(toy):
    base, tokenizer = with_adapter(toy("llama")), load_tokenizer(toy("llama"))
    drawn = [Sampling(NEW, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    texts = [list(generate(base, tokenizer, [PROMPT], sampling)) for sampling in drawn]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_one_token_that_is_left_is_the_most_probable_one(limit, toy):
    base, tokenizer = with_adapter(toy("llama")), load_tokenizer(toy("llama"))
    assert said(base, tokenizer, Sampling(NEW, temperature=5.0, **limit)) == said(base, tokenizer, Sampling(NEW))


def test_without_limits_none_of_transformers_own_applies():
    options = Sampling(temperature=1.0).options()
    assert (options["top_k"], options["top_p"]) == (0, 1.0)  # its defaults: 50 and 1


def test_the_folders_generation_settings_do_not_bend_the_answer(toy):
    base, tokenizer = with_adapter(toy("llama")), load_tokenizer(toy("llama"))
    plain = said(base, tokenizer, Sampling(NEW))
    base.model.generation_config.repetition_penalty = 5.0
    assert said(base, tokenizer, Sampling(NEW)) == plain


def test_a_prompt_without_template_is_refused_with_the_way_out(toy):
    base, tokenizer = with_adapter(toy("llama")), load_tokenizer(toy("llama"))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="--raw"):
        said(base, tokenizer, Sampling(NEW))
