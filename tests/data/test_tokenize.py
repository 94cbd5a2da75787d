"""Claims about token ids and targets, on a tokenizer small enough to check by hand.

With QLORA_KIT_TEST_MODEL naming a model folder, the claims that hold for any tokenizer are tried on that one too.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_kit.data.tokenize import (
    ENCODED_CHARACTERS,
    IGNORE_INDEX,
    Example,
    load_examples,
    load_tokenizer,
    split_examples,
)
from qlora_kit.errors import DataError, ModelError
from qlora_kit.recipe import Data

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_BOS = "{{ bos_token }}" + CHATML
UNCLOSED = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
EMOJI = {"messages": [{"role": "user", "content": "é?"}, {"role": "assistant", "content": " né \U0001f600\n "}]}


def byte_tokenizer(
    template: str | None = CHATML, *, adds_bos: bool = False, pad: str = "<|im_end|>", eos: str = "<|im_end|>"
) -> PreTrainedTokenizerFast:
    """Ids 0-255 are the bytes in GPT-2's order of letters, 256 is `he`; then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"he": 256}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<s>", "<|im_start|>", "<|im_end|>", "<|pad|>"]  # 257 to 260
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    trimming = processors.ByteLevel(trim_offsets=True)
    prefixing = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    core.post_processor = processors.Sequence([trimming, prefixing]) if adds_bos else trimming
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token=pad, chat_template=template
    )


@pytest.fixture(params=["byte", *filter(os.path.isdir, [os.environ.get("QLORA_KIT_TEST_MODEL", "")])])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """The synthetic one, always; and that of QLORA_KIT_TEST_MODEL where the folder exists."""
    return byte_tokenizer() if request.param == "byte" else load_tokenizer(Path(request.param))


def load_rows(tmp_path: Path, tokenizer: Any, *rows: Any, **settings: Any) -> tuple[list[Example], Any]:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    examples, report = load_examples(path, Data(train=str(path), **settings), tokenizer)
    return [replace(one, input_ids=list(one.input_ids), targets=list(one.targets)) for one in examples], report


def load_one(tmp_path: Path, tokenizer: Any, row: Any, **settings: Any) -> Example:
    (example,), _ = load_rows(tmp_path, tokenizer, row, **settings)
    return example


def learned_ids(example: Example) -> list[int]:
    return [id for id in example.targets if id != IGNORE_INDEX]


# ---------------------------------------------------------------------------------------------- chat


def test_golden_ids_and_targets_of_a_chat(tmp_path: Path) -> None:
    example = load_one(tmp_path, byte_tokenizer(), CHAT)
    question = [258, 84, 82, 68, 81, 198, 71, 72, 259, 198]  # <|im_start|> user, line, hi <|im_end|>, line
    header = [258, 64, 82, 82, 72, 82, 83, 64, 77, 83, 198]  # <|im_start|> assistant, line
    answer = [88, 78, 259]  # yo <|im_end|>
    assert example.input_ids == [*question, *header, *answer]
    assert example.targets == [IGNORE_INDEX] * (len(question + header) - 1) + [*answer, IGNORE_INDEX]


@pytest.mark.parametrize("row", [CHAT, EMOJI], ids=["plain", "unicode"])
def test_decoded_learned_text_is_exactly_the_answer_and_its_end_token(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any]
) -> None:
    learned = learned_ids(load_one(tmp_path, tokenizer, row))
    text = tokenizer.decode(learned, clean_up_tokenization_spaces=False)
    assert text == row["messages"][-1]["content"] + "<|im_end|>"


def test_ids_are_those_of_the_tokenizers_own_chat_rendering(tmp_path: Path, tokenizer: Any) -> None:
    own = tokenizer.apply_chat_template(CHAT["messages"], tokenize=True, return_dict=False)
    assert load_one(tmp_path, tokenizer, CHAT).input_ids == own[:-1]  # all but the line break at the end


@pytest.mark.parametrize("pad", ["<|im_end|>", "<|pad|>"], ids=["pad is eos", "pad is its own"])
def test_the_end_of_turn_token_is_learned_whatever_the_pad_token_is(tmp_path: Path, pad: str) -> None:
    assert learned_ids(load_one(tmp_path, byte_tokenizer(pad=pad), CHAT))[-1] == 259


def test_prompt_tokens_are_never_learned(tmp_path: Path, tokenizer: Any) -> None:
    example = load_one(tmp_path, tokenizer, CHAT)
    prompt = tokenizer.apply_chat_template(CHAT["messages"][:1], tokenize=False, add_generation_prompt=True)
    prompt_tokens = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    assert example.targets[: prompt_tokens - 1] == [IGNORE_INDEX] * (prompt_tokens - 1)
    assert example.targets[prompt_tokens - 1 : -1] == example.input_ids[prompt_tokens:]


def test_every_answer_of_a_long_chat_is_learned_with_its_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    example = load_one(tmp_path, tokenizer, {"messages": CHAT["messages"] * 3})
    assert tokenizer.decode(learned_ids(example)) == "yo<|im_end|>" * 3


def test_learn_all_learns_every_token_but_the_first(tmp_path: Path) -> None:
    example = load_one(tmp_path, byte_tokenizer(), CHAT, learn="all")
    assert example.targets == [*example.input_ids[1:], IGNORE_INDEX]


def test_an_answer_that_the_template_does_not_close_is_closed_by_eos(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(UNCLOSED)
    assert tokenizer.decode(learned_ids(load_one(tmp_path, tokenizer, CHAT))) == "yo<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, CHATML_BOS, UNCLOSED], ids=["without", "with bos", "unclosed"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_one_bos_stands_first_if_template_or_tokenizer_wants_it_and_none_else(
    tmp_path: Path, template: str, adds_bos: bool
) -> None:
    example = load_one(tmp_path, byte_tokenizer(template, adds_bos=adds_bos), CHAT)
    wanted = adds_bos or template == CHATML_BOS
    assert example.input_ids.count(257) == wanted
    assert (example.input_ids[0] == 257) == wanted


# ---------------------------------------------------------------------------------------------- raw formats


@pytest.mark.parametrize("adds_bos", [False, True])
def test_completion_is_prompt_completion_and_one_eos(tmp_path: Path, adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    example = load_one(tmp_path, tokenizer, {"prompt": "hi", "completion": "yo"})
    assert example.input_ids == [257] * adds_bos + [71, 72, 88, 78, 259]
    assert example.targets == [IGNORE_INDEX] * (adds_bos + 1) + [88, 78, 259, IGNORE_INDEX]


@pytest.mark.parametrize("row", [{"prompt": "hi", "completion": "yo<|im_end|>"}, {"text": "hiyo<|im_end|>"}])
def test_an_eos_that_the_author_wrote_is_not_doubled(tmp_path: Path, row: dict[str, str]) -> None:
    assert load_one(tmp_path, byte_tokenizer(), row).input_ids == [71, 72, 88, 78, 259]


def test_a_bos_that_the_author_wrote_is_not_doubled(tmp_path: Path) -> None:
    example = load_one(tmp_path, byte_tokenizer(adds_bos=True), {"text": "<s>hi"})
    assert example.input_ids == [257, 71, 72, 259]


def test_a_token_across_the_border_of_prompt_and_completion_is_context(tmp_path: Path) -> None:
    example = load_one(tmp_path, byte_tokenizer(), {"prompt": "h", "completion": "ey"})
    assert example.input_ids == [256, 88, 259]  # he, y, end
    assert learned_ids(example) == [88, 259]


def test_spaces_at_the_end_of_a_prompt_are_not_learned(tmp_path: Path) -> None:
    example = load_one(tmp_path, byte_tokenizer(), {"prompt": "hi  ", "completion": "\nyo"})
    assert len(example.input_ids) == 8
    assert len(learned_ids(example)) == 4  # line break, y, o, end


def test_a_text_is_learned_whole_and_ends_with_eos(tmp_path: Path) -> None:
    example = load_one(tmp_path, byte_tokenizer(), {"text": "hey"})
    assert (example.input_ids, example.targets) == ([256, 88, 259], [88, 259, IGNORE_INDEX])


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 22, 100])
def test_windows_of_a_long_text_learn_every_token_but_the_first_once(tmp_path: Path, length: int) -> None:
    text = "abcdefghijklmnopqrstuvw" * 5
    examples, report = load_rows(tmp_path, byte_tokenizer(), {"text": text[:length]}, seq_len=8)
    learned = [id for example in examples for id in learned_ids(example)]
    assert byte_tokenizer().decode(learned) == text[1:length] + "<|im_end|>"
    assert max(len(example.input_ids) for example in examples) <= 8
    assert (report.rows, report.examples, report.truncated) == (1, len(examples), 0)


# ---------------------------------------------------------------------------------------------- cutting, dropping


@pytest.mark.parametrize(("seq_len", "learned"), [(6, [88, 78, 79, 259]), (5, [88, 78, 79]), (3, [88])])
def test_what_is_longer_than_seq_len_is_cut_on_the_right(tmp_path: Path, seq_len: int, learned: list[int]) -> None:
    row = {"prompt": "hi", "completion": "yop"}
    (example,), report = load_rows(tmp_path, byte_tokenizer(), row, seq_len=seq_len)
    assert learned_ids(example) == learned
    assert len(example.input_ids) == len(example.targets) == seq_len
    assert (report.truncated, report.longest) == (int(seq_len < 6), 6)


def test_rows_that_lose_every_learned_token_are_dropped_and_counted(tmp_path: Path) -> None:
    short, long = {"prompt": "hi", "completion": "yo"}, {"prompt": "h" * 30, "completion": "yo"}
    examples, report = load_rows(tmp_path, byte_tokenizer(), *[short] * 19, long, seq_len=10)
    assert (report.rows, report.examples, report.dropped, report.truncated) == (20, 19, 1, 0)
    assert all(example.learned_tokens == 3 for example in examples)


def test_more_than_five_percent_dropped_stops_the_run_and_names_the_seq_len_that_would_do(
    tmp_path: Path,
) -> None:
    short, long = {"prompt": "hi", "completion": "yo"}, {"prompt": "h" * 30, "completion": "yo"}
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, byte_tokenizer(), *[short] * 18, long, short, long, seq_len=10)
    path = tmp_path / "train.jsonl"
    assert str(caught.value) == (
        f"{path}: 2 of 21 rows have no token left to learn at data.seq_len 10 (first: {path}:19, "
        "prompt 30 tokens); raise data.seq_len to 33 (all of them fit then), or shorten the prompts"
    )
    assert load_rows(tmp_path, byte_tokenizer(), *[short] * 18, long, short, long, seq_len=33)[1].dropped == 0


def test_empty_texts_are_not_blamed_on_seq_len(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 of 1 rows .*their texts are empty; remove these rows"):
        load_rows(tmp_path, byte_tokenizer(), {"text": ""})


def test_the_report_counts_tokens_and_knows_the_file(tmp_path: Path) -> None:
    examples, report = load_rows(tmp_path, byte_tokenizer(), {"text": "hi"}, {"text": "hey you"})
    assert report.tokens == sum(len(example.input_ids) for example in examples) == 3 + 7
    assert report.learned_tokens == sum(example.learned_tokens for example in examples) == 2 + 6
    again = load_rows(tmp_path, byte_tokenizer(), {"text": "hi"}, {"text": "hey you"})[1]
    other = load_rows(tmp_path, byte_tokenizer(), {"text": "hi"}, {"text": "hey yoU"})[1]
    assert again.fingerprint == report.fingerprint != other.fingerprint


def test_rows_are_encoded_some_at_a_time_and_keep_their_order_and_source(tmp_path: Path) -> None:
    encoded: list[int] = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **settings: Any) -> Any:
            encoded.append(sum(map(len, text)))
            return super().__call__(text, **settings)

    tokenizer = byte_tokenizer()
    tokenizer.__class__ = Counting
    length = ENCODED_CHARACTERS // 4
    rows = [{"text": f"row {number} ".ljust(length, "x")} for number in range(1, 11)]
    examples, _ = load_rows(tmp_path, tokenizer, *rows, seq_len=length + 1)
    assert encoded[-3:] == [4 * length, 4 * length, 2 * length]
    decoded = [tokenizer.decode(example.input_ids) for example in examples]
    assert decoded == [f"{row['text']}<|im_end|>" for row in rows]
    assert [example.source for example in examples] == [f"{tmp_path}/train.jsonl:{n}" for n in range(1, 11)]


def test_a_token_of_a_file_takes_eight_bytes(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "hey you"}))
    ((example,), _) = load_examples(path, Data(train=str(path)), byte_tokenizer())
    assert memoryview(example.input_ids).nbytes + memoryview(example.targets).nbytes == 8 * len(example.input_ids)


def test_a_tokenizer_without_eos_is_refused_where_an_answer_could_not_end(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    load_rows(tmp_path, tokenizer, CHAT)  # its template closes the turn
    with pytest.raises(ModelError, match="no eos token"):
        load_rows(tmp_path, tokenizer, {"text": "hi"})


# ---------------------------------------------------------------------------------------------- splitting


def numbered_examples(count: int) -> list[Example]:
    return [Example([number, 1], [1, IGNORE_INDEX], f"f:{number}") for number in range(count)]


def test_a_split_is_a_partition_repeatable_and_different_for_another_seed() -> None:
    examples = numbered_examples(200)
    train, held_out = split_examples(examples, 0.1, seed=3)
    assert (train, held_out) == split_examples(examples, 0.1, seed=3)
    assert held_out != split_examples(examples, 0.1, seed=4)[1]
    assert len(held_out) == 20
    assert sorted(train + held_out, key=lambda example: example.input_ids) == examples


def test_copies_of_a_row_fall_on_the_same_side() -> None:
    train, held_out = split_examples(numbered_examples(40) * 3, 0.5, seed=0)
    assert not {example.source for example in train} & {example.source for example in held_out}
    assert len(held_out) == 60


def test_a_split_does_not_depend_on_the_order_of_the_rows() -> None:
    examples = numbered_examples(50)
    held_out = split_examples(examples, 0.2, seed=0)[1]
    assert split_examples(examples[::-1], 0.2, seed=0)[1] == held_out[::-1]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_both_sides_of_a_split_have_at_least_one_example(fraction: float) -> None:
    train, held_out = split_examples(numbered_examples(2), fraction, seed=0)
    assert len(train) == len(held_out) == 1


def test_one_distinct_example_cannot_be_split() -> None:
    with pytest.raises(DataError, match=r"data.eval: 0.5: found 1 distinct"):
        split_examples(numbered_examples(1) * 5, 0.5, seed=0)


# ---------------------------------------------------------------------------------------------- loading


def saved_tokenizer(folder: Path) -> Path:
    byte_tokenizer().save_pretrained(str(folder))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_saved_tokenizer_loads_and_gives_the_same_examples(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved_tokenizer(tmp_path / "model"))
    assert load_one(tmp_path, tokenizer, CHAT) == load_one(tmp_path, byte_tokenizer(), CHAT)


def test_a_missing_folder_and_a_folder_without_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no such model folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"cannot load the tokenizer: .*Download it again"):
        load_tokenizer(tmp_path)


def test_a_truncated_tokenizer_is_an_error_of_the_model(tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path / "model")
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(folder)


def test_code_in_the_model_folder_is_never_run(tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path / "model")
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    edit_json(folder / "tokenizer_config.json", **evil)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pattern_that_panics_in_rust_is_an_error_of_the_model(tmp_path: Path) -> None:
    folder = saved_tokenizer(tmp_path / "model")
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit_json(folder / "tokenizer.json", pre_tokenizer=split)
    with pytest.raises(ModelError, match="the tokenizer breaks on a text"):
        load_rows(tmp_path, load_tokenizer(folder), {"text": "a" * 40 + "!"})
