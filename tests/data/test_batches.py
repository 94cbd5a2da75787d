"""Claims about batches: packed documents do not see each other, and the order is a function of seed and step."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
)

from qlora_kit.data.batches import Batches, MicroBatch, eval_batches, permutation, split
from qlora_kit.data.tokenize import IGNORE_INDEX, Example

VOCABULARY = 61
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
HEADS = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "mistral": MistralConfig(**SIZES, **HEADS, sliding_window=4),
    "gemma2": Gemma2Config(**SIZES, **HEADS, sliding_window=4),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, bos_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
}


def random_examples(*lengths: int, prompt: int = 1) -> list[Example]:
    """Documents of random ids whose first `prompt` tokens are not learned."""
    rng = torch.Generator().manual_seed(0)
    examples = []
    for number, length in enumerate(lengths, start=1):
        ids = torch.randint(0, VOCABULARY, (length,), generator=rng).tolist()
        masked = min(prompt, length) - 1
        targets = [IGNORE_INDEX] * masked + ids[masked + 1 :] + [IGNORE_INDEX]
        examples.append(Example(ids, targets, f"train.jsonl:{number}"))
    return examples


def numbered_batches(count: int, **changes: Any) -> Batches:
    """Examples whose every token is their own number, so that a batch shows which it holds."""
    examples = [Example([number, number], [number, IGNORE_INDEX], f"f:{number}") for number in range(count)]
    settings: dict[str, Any] = {
        "micro_batch": 2,
        "grad_accumulation": 3,
        "seq_len": 4,
        "packing": False,
        "seed": 0,
        "pad_id": 0,
    }
    return Batches(examples, **settings | changes)


def sequence_of(batches: Batches, steps: range) -> list[list[int]]:
    """For each step the numbers of its examples, in order."""
    return [
        [number for batch in batches.step(step) for number in batch.targets.flatten().tolist() if number >= 0]
        for step in steps
    ]


def tiny_model(name: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def loss_sum(model: Any, batch: MicroBatch) -> torch.Tensor:
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")


# ---------------------------------------------------------------------------------------------- what the model sees


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_batch_has_the_loss_and_gradient_of_its_documents_alone(name: str, attention: str) -> None:
    if name == "gemma2":
        attention = "eager"  # its soft cap has no sdpa kernel; transformers refuses
    model = tiny_model(name, attention)
    examples = random_examples(9, 7, 5, 3, 2, 11, prompt=2)
    (packed,) = eval_batches(examples, micro_batch=9, seq_len=16, packing=True, pad_id=0)
    assert packed.input_ids.shape == (3, 16)
    assert packed.tokens < packed.input_ids.numel()  # so padding is there too
    alone = eval_batches(examples, micro_batch=1, seq_len=16, packing=False, pad_id=0)
    expected = torch.stack([loss_sum(model, batch) for batch in alone]).sum()
    loss = loss_sum(model, packed)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    weight = model.get_input_embeddings().weight
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_without_restarting_positions_the_documents_would_see_each_other(name: str) -> None:
    model = tiny_model(name, "eager")
    (packed,) = eval_batches(random_examples(9, 7), micro_batch=1, seq_len=16, packing=True, pad_id=0)
    leaking = MicroBatch(**vars(packed) | {"position_ids": torch.arange(16)[None]})
    assert (loss_sum(model, packed) - loss_sum(model, leaking)).abs() > 1e-3


def test_targets_are_shifted_and_positions_restart_for_each_document() -> None:
    examples = random_examples(3, 2, prompt=2)
    (batch,) = eval_batches(examples, micro_batch=1, seq_len=5, packing=True, pad_id=9)
    first, second = (example.input_ids for example in examples)
    assert batch.input_ids.tolist() == [first + second]
    assert batch.targets.tolist() == [[IGNORE_INDEX, first[2], IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert (batch.learned_tokens, batch.tokens, batch.documents) == (1, 5, [[3, 2]])


def test_padding_stands_right_is_not_learned_and_goes_on_counting() -> None:
    (batch,) = eval_batches(random_examples(4, 2), micro_batch=2, seq_len=6, packing=False, pad_id=7)
    assert batch.input_ids[1, 2:].tolist() == [7] * 4
    assert batch.targets[1, 1:].tolist() == [IGNORE_INDEX] * 5
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert (batch.tokens, batch.documents) == (6, [[4], [2]])


@pytest.mark.parametrize(("longest", "width"), [(20, 32), (33, 64), (90, 96), (97, 99)])
def test_rows_are_padded_to_few_widths_but_never_beyond_seq_len(longest: int, width: int) -> None:
    (batch,) = eval_batches(random_examples(longest), micro_batch=1, seq_len=99, packing=False, pad_id=7)
    assert batch.input_ids.shape == (1, width)


def test_packed_rows_are_all_as_wide_as_the_longest_of_them() -> None:
    examples = random_examples(70, 66, 20, 3)
    batches = eval_batches(examples, micro_batch=1, seq_len=99, packing=True, pad_id=7)
    assert [batch.tokens for batch in batches] == [93, 66]
    assert [batch.input_ids.shape[1] for batch in batches] == [96, 96]
    assert [part.input_ids.shape[1] for part in split(batches, 1)] == [96, 96]


def test_counts_agree_with_the_examples() -> None:
    examples = random_examples(5, 9, 2, 7, 3, 8, 4, prompt=2)
    for packing in (False, True):
        batches = eval_batches(examples, micro_batch=2, seq_len=12, packing=packing, pad_id=0)
        assert sum(batch.tokens for batch in batches) == 38
        assert sum(batch.learned_tokens for batch in batches) == sum(e.learned_tokens for e in examples)
        assert all(batch.tokens == sum(map(sum, batch.documents)) for batch in batches)


# ---------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("count", [1, 5, 6, 7, 40])
def test_every_example_comes_exactly_once_in_every_epoch(count: int, packing: bool) -> None:
    batches = numbered_batches(count, packing=packing)
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        assert sorted(chain.from_iterable(sequence_of(batches, steps))) == list(range(count))


def test_the_last_partial_window_is_a_step_of_its_own() -> None:
    batches = numbered_batches(15)  # 2 x 3 rows a step
    assert batches.steps_per_epoch == 3
    assert [len(step) for step in sequence_of(batches, range(6))] == [6, 6, 3, 6, 6, 3]
    assert [len(batch.input_ids) for batch in batches.step(2)] == [2, 1]


def test_order_after_resume_is_the_order_without() -> None:
    whole = sequence_of(numbered_batches(23), range(40))
    for resumed_at in (1, 3, 4, 17, 39):
        assert sequence_of(numbered_batches(23), range(resumed_at, 40)) == whole[resumed_at:]


def test_steps_may_be_asked_for_in_any_order() -> None:
    batches = numbered_batches(23)
    forward = sequence_of(batches, range(12))
    assert [sequence_of(batches, range(step, step + 1))[0] for step in reversed(range(12))] == forward[::-1]


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [tuple(permutation(50, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    assert permutation(8, seed=0, epoch=0) == [4, 1, 5, 0, 2, 7, 3, 6]


def test_micro_batch_size_does_not_change_which_examples_a_step_sees() -> None:
    wide = sequence_of(numbered_batches(20, micro_batch=6, grad_accumulation=1), range(8))
    narrow = sequence_of(numbered_batches(20, micro_batch=1, grad_accumulation=6), range(8))
    assert wide == narrow


# ---------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3, 50])
def test_no_step_is_larger_than_the_longest_batch(packing: bool, micro_batch: int) -> None:
    examples = random_examples(*[2 + 5 * number % 13 for number in range(29)])
    batches = Batches(
        examples, micro_batch=micro_batch, grad_accumulation=2, seq_len=16, packing=packing, seed=1, pad_id=0
    )
    worst = batches.longest().input_ids.shape
    shapes = [b.input_ids.shape for step in range(3 * batches.steps_per_epoch) for b in batches.step(step)]
    assert max(shape[0] for shape in shapes) == worst[0]
    assert max(shape[1] for shape in shapes) == worst[1] <= 16


def test_evaluation_holds_every_example_once_longest_rows_first_and_never_changes() -> None:
    examples = random_examples(5, 9, 2, 7, 3)
    batches = eval_batches(examples, micro_batch=2, seq_len=10, packing=False, pad_id=0)
    assert [batch.documents for batch in batches] == [[[9], [7]], [[5], [3]], [[2]]]
    again = eval_batches(examples, micro_batch=2, seq_len=10, packing=False, pad_id=0)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_examples_that_no_row_can_hold_are_a_bug_of_the_caller(packing: bool) -> None:
    with pytest.raises(ValueError, match=r"train.jsonl:2: 9 tokens, more than seq_len 8"):
        eval_batches(random_examples(8, 9), micro_batch=1, seq_len=8, packing=packing, pad_id=0)
    with pytest.raises(ValueError, match="no examples"):
        eval_batches([], micro_batch=1, seq_len=8, packing=packing, pad_id=0)


def test_the_worst_step_is_made_of_the_longest_rows() -> None:
    examples = [Example([1] * length, [1] * length, "") for length in (3, 9, 5, 7, 8)]
    shape: dict[str, Any] = {"micro_batch": 2, "grad_accumulation": 2, "seq_len": 16, "packing": False}
    batches = Batches(examples, **shape, seed=0, pad_id=0)
    assert [batch.documents for batch in batches.worst()] == [[[9], [8]], [[7], [5]]]
    assert torch.equal(batches.worst()[0].input_ids, batches.longest().input_ids)


def test_a_split_batch_is_what_smaller_batches_of_the_same_rows_would_have_been() -> None:
    examples = random_examples(70, 40, 33, 5, 5, 3)
    shape: dict[str, Any] = {"seq_len": 80, "packing": False, "pad_id": 0}
    parts = split(eval_batches(examples, micro_batch=4, **shape), 2)
    expected = eval_batches(examples, micro_batch=2, **shape)
    assert [part.input_ids.shape[1] for part in parts] == [80, 64, 32]
    for part, same in zip(parts, expected, strict=True):
        for name, value in vars(same).items():
            found = getattr(part, name)
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
