"""Claims about rendering, over families of chat templates: what is learned is the answer and its end, no more."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qlora_kit.data.formats import Message, Record
from qlora_kit.data.templates import Learn, Rendered, chat_template, render
from qlora_kit.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start|>' + m.role + '<|end|>\n\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (  # no generation prompt, no system turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PHI3 = (  # eos behind the last turn only
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (  # the reasoning of earlier answers is dropped
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHIFTY = "{% for m in messages %}{{ messages | length ~ m.content }}{% endfor %}"  # prefixes do not hold
TURNS = ("user: one?", "assistant: 1", "user: two?", "assistant: 2")


def make_tokenizer(template: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", chat_template=template)


def make_chat(*turns: str) -> Record:
    messages: list[Message] = []
    for turn in turns:
        role, _, content = turn.partition(": ")
        messages.append({"role": role, "content": content})
    return Record("train.jsonl:3", messages=tuple(messages))


def rendered(template: Any, record: Record, learn: Learn = "completion") -> list[Rendered]:
    tokenizer = make_tokenizer(template)
    return render(record, tokenizer, chat_template(tokenizer), learn)


def learned_texts(document: Rendered) -> list[str]:
    return [document.text[start:end] for start, end in document.learned]


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (CHATML, ["1<|im_end|>", "2<|im_end|>"]),
        (LLAMA3, ["1<|eot|>", "2<|eot|>"]),
        (MISTRAL, [" 1</s>", " 2</s>"]),
        (PHI3, ["1<|end|>", "2<|end|>\n</s>"]),
    ],
    ids=["chatml", "llama3", "mistral", "phi3"],
)
def test_learned_text_is_each_answer_with_its_end_token(template: str, learned: list[str]) -> None:
    (document,) = rendered(template, make_chat(*TURNS))
    assert learned_texts(document) == learned


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, PHI3])
def test_the_document_is_what_the_template_renders_for_the_whole_chat(template: str) -> None:
    record = make_chat(*TURNS)
    (document,) = rendered(template, record)
    whole = make_tokenizer(template).apply_chat_template(list(record.messages), tokenize=False)
    assert document.text == whole.rstrip()


def test_a_template_that_rewrites_earlier_answers_gives_one_document_for_each() -> None:
    first, second = rendered(QWEN3, make_chat(*TURNS))
    assert learned_texts(first) == ["<think>\n\n</think>\n\n1<|im_end|>"]
    assert learned_texts(second) == ["<think>\n\n</think>\n\n2<|im_end|>"]
    assert "<|im_start|>assistant\n1<|im_end|>" in second.text  # as generation will see it


def test_a_template_whose_prompt_changes_with_the_answer_is_refused_with_the_first_difference() -> None:
    with pytest.raises(DataError) as caught:
        rendered(SHIFTY, make_chat("user: x", "assistant: y"))
    assert "train.jsonl:3: messages[1]: " in str(caught.value)
    assert "character 0: '1x' before, '2x2y' with it" in str(caught.value)


def test_learn_all_needs_no_answer_and_no_prefix() -> None:
    (document,) = rendered(SHIFTY, make_chat("user: x"), learn="all")
    assert learned_texts(document) == [document.text] == ["1x"]


def test_a_chat_without_an_answer_is_refused_when_only_answers_are_learned() -> None:
    with pytest.raises(DataError, match=r"train.jsonl:3: messages: no assistant turn; .* data.learn=all"):
        rendered(CHATML, make_chat("system: be brief", "user: x"))


def test_turns_after_the_last_answer_are_left_out() -> None:
    (document,) = rendered(CHATML, make_chat(*TURNS, "user: bye"))
    assert document.text.endswith("2<|im_end|>")


def test_a_system_turn_and_a_tool_turn_are_context() -> None:
    (document,) = rendered(CHATML, make_chat("system: s", "user: u", "assistant: a", "tool: t", "assistant: b"))
    assert learned_texts(document) == ["a<|im_end|>", "b<|im_end|>"]


def test_an_answer_that_repeats_the_prompt_is_found_at_its_own_place() -> None:
    (document,) = rendered(CHATML, make_chat("user: a<|im_end|>\nb", "assistant: a"))
    assert learned_texts(document) == ["a<|im_end|>"]
    assert document.learned[0][1] == len(document.text)


def test_an_empty_answer_still_teaches_to_end() -> None:
    (document,) = rendered(CHATML, make_chat("user: x", "assistant: "))
    assert learned_texts(document) == ["<|im_end|>"]


def test_an_empty_answer_without_end_token_keeps_the_prompt_whole() -> None:
    template = "{% for m in messages %}{{ m.role + ':\n' + m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    (document,) = rendered(template, make_chat("user: x", "assistant: "))
    assert (document.text, learned_texts(document)) == ("user:\nxassistant:\n", [""])


def test_a_template_that_refuses_the_turns_is_quoted() -> None:
    with pytest.raises(DataError, match=r"train.jsonl:3: .*\(system, user\): Only user and assistant roles"):
        rendered(MISTRAL, make_chat("system: s", "user: u", "assistant: a"))


@pytest.mark.parametrize("template", ["{{ messages[9].content }}", "{{ 1 // 0 }}", "{% for %}", "{{ ''.x.y }}"])
def test_a_broken_template_is_an_error_of_the_data_not_a_crash(template: str) -> None:
    with pytest.raises(DataError, match=r"train.jsonl:3: the chat template refuses"):
        rendered(template, make_chat("user: x", "assistant: y"))


def test_without_a_template_chat_is_refused_and_says_the_way_out() -> None:
    with pytest.raises(DataError, match=r"train.jsonl:3: the tokenizer has no chat template; put a chat_templ"):
        rendered(None, make_chat(*TURNS))


def test_alpaca_uses_the_template_where_there_is_one_and_the_plain_prompt_where_not() -> None:
    turns = make_chat("user: add", "assistant: 3").messages
    record = Record("f:1", messages=turns, prompt="### Response:\n", completion="3")
    (with_template,) = rendered(CHATML, record)
    (without,) = rendered(None, record)
    assert learned_texts(with_template) == ["3<|im_end|>"]
    assert (without.text, learned_texts(without)) == ("### Response:\n3", ["3"])


@pytest.mark.parametrize("template", [None, CHATML])
def test_completion_stays_raw_with_and_without_a_template(template: str | None) -> None:
    record = Record("f:1", prompt="1+1=", completion="2")
    assert rendered(template, record) == [Rendered("1+1=2", ((4, 5),), templated=False)]
    assert rendered(template, record, learn="all") == [Rendered("1+1=2", ((0, 5),), templated=False)]


def test_of_several_templates_the_default_is_taken() -> None:
    (document,) = rendered({"default": CHATML, "tool_use": SHIFTY}, make_chat(*TURNS))
    assert learned_texts(document) == ["1<|im_end|>", "2<|im_end|>"]
    with pytest.raises(DataError, match="chat template of the tokenizer"):
        chat_template(make_tokenizer({"rag": CHATML, "tool_use": CHATML}))


@pytest.mark.parametrize(
    ("call", "expected"),
    [('"%d %b %Y"', "26 Jul 2024"), ('"%d %B %Y"', "26 July 2024"), ("'%Y-%m-%d'", "2024-07-26")],
)
def test_a_template_that_prints_the_date_prints_the_same_one_for_ever(call: str, expected: str) -> None:
    macro = f"{{% macro today() %}}{{{{ strftime_now({call}) }}}}{{% endmacro %}}"
    template = f"{macro}{{% if messages %}}{{{{ today() + '|' }}}}{{% endif %}}{CHATML}"
    (document,) = rendered(template, make_chat("user: x", "assistant: y"))
    assert document.text.startswith(f"{expected}|<|im_start|>user\nx")
