"""A Modelfile's template gives, in Go's own language, the token ids that the chat template gave in training."""

from __future__ import annotations

import re

import pytest

from qlora_kit.data.tokenize import leading_bos, load_tokenizer
from qlora_kit.export.ollama import CONVERSATIONS, turn_texts, write_modelfile
from tests.conftest import write_model
from tests.export.toy import TEMPLATE, add_tokenizer

# As the models of each family have them, shortened where text is concerned that no conversation here reaches.
TEMPLATES = {
    "chatml": TEMPLATE,
    "chatml with a default system turn": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are Toy<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3": (
        "{% for m in messages %}"
        "{% set content = '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
        "{% else %}{% set role = m['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "gemma 3": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
        "{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
        "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "phi 3": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "braces": (
        "{% for m in messages %}{{ '{' + '{' + m['role'] + '}' + '}' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '{' + '{assistant}' + '}' }}{% endif %}"
    ),
}
NO_SYSTEM = ("gemma", "mistral")


@pytest.fixture(scope="module")
def tokenizer_with(tmp_path_factory):
    def make(template: str, *, bos: bool = False):
        folder = tmp_path_factory.mktemp("m")
        add_tokenizer(write_model(folder, "llama", vocab_size=320), template=template)
        tokenizer = load_tokenizer(folder)
        if bos:
            from tokenizers.processors import TemplateProcessing

            special = [("<|bos|>", tokenizer.bos_token_id)]
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=special)
            assert leading_bos(tokenizer) == tokenizer.bos_token_id
        return tokenizer

    return make


def rendered_by_go(template: str, conversation) -> str:
    go = pytest.importorskip("gotpl")  # Go's text/template, written again in Python
    turns = [{"Role": turn["role"], "Content": turn["content"]} for turn in conversation]
    return go.render(template, {"Messages": turns})


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("family", TEMPLATES)
def test_go_renders_five_conversations_to_trainings_token_ids(family, bos, tokenizer_with, tmp_path):
    tokenizer = tokenizer_with(TEMPLATES[family], bos=bos)
    assert write_modelfile(tmp_path / "Modelfile", tmp_path / "m.gguf", tokenizer)
    modelfile = (tmp_path / "Modelfile").read_text()
    template = re.search(r'TEMPLATE """(.*)"""', modelfile, re.DOTALL)[1]
    seen = 0
    for conversation in CONVERSATIONS:
        if family in NO_SYSTEM and conversation[0]["role"] == "system":
            continue
        prompt = tokenizer.apply_chat_template(list(conversation), tokenize=False, add_generation_prompt=True)
        trained = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if bos and trained[:1] != [tokenizer.bos_token_id]:
            trained = [tokenizer.bos_token_id, *trained]  # as `data.tokenize` and `generation` have it
        assert tokenizer(rendered_by_go(template, conversation))["input_ids"] == trained
        seen += 1
    assert seen == (3 if family in NO_SYSTEM else 5)
    assert modelfile.startswith("FROM ./m.gguf\n") and 'PARAMETER stop "<|eos|>"' in modelfile


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}",  # numbers the turns
        "{{ messages[-1]['content'] }}",  # forgets
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    ],
)
def test_a_template_that_is_not_text_around_turns_is_not_written(template, tokenizer_with, tmp_path):
    assert turn_texts(tokenizer_with(template)) is None
    assert not write_modelfile(tmp_path / "Modelfile", tmp_path / "m.gguf", tokenizer_with(template))
    assert list(tmp_path.iterdir()) == []
