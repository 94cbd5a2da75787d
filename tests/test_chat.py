"""A conversation keeps its history; commands are no turns; Ctrl-C ends the answer and nothing else."""

from __future__ import annotations

import io
import os
import signal
import sys

import pytest

from qlora_kit import chat as chat_module
from qlora_kit.base.loader import load_base
from qlora_kit.chat import chat, typed_lines
from qlora_kit.data.tokenize import load_tokenizer
from qlora_kit.generation import Sampling, generate
from qlora_kit.recipe import Model
from tests.export.toy import add_tokenizer

SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def talker(tiny_model):
    folder = add_tokenizer(tiny_model("llama", vocab_size=320))
    return load_base(Model(path=str(folder), quantization="none", dtype="float32")), load_tokenizer(folder)


def test_each_answer_is_to_the_whole_conversation(talker):
    base, tokenizer = talker
    said: list[str] = []
    history = chat(base, tokenizer, ["Hello\n", "\n", "And now?\n"], said.append, SAMPLING, system="Be brief.")
    assert [turn["role"] for turn in history] == ["system", "user", "assistant", "user", "assistant"]
    for index in (2, 4):
        assert [history[index]["content"]] == list(generate(base, tokenizer, [history[:index]], SAMPLING))
    assert "".join(said) == "".join(history[index]["content"] + "\n" for index in (2, 4))


def test_reset_forgets_and_exit_ends(talker):
    lines = ["Hello", "/reset", "Again", "/exit", "never read"]
    history = chat(*talker, lines, lambda text: None, SAMPLING, system="Be brief.")
    assert [turn["content"] for turn in history if turn["role"] != "assistant"] == ["Be brief.", "Again"]


def test_ctrl_c_ends_the_answer_and_the_conversation_goes_on(talker):
    shown: list[str] = []

    def interrupt(text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    history = chat(*talker, ["Hello", "Again"], interrupt, Sampling(max_new_tokens=200))
    assert signal.getsignal(signal.SIGINT) is before
    first, second = (history[index]["content"] for index in (1, 3))
    assert 0 < len(first) < len(second)


def test_a_pipe_gives_one_turn_a_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    assert list(typed_lines()) == ["one\n", "two"]


def test_on_a_terminal_lines_are_asked_for_until_ctrl_d(monkeypatch, capsys):
    answers = iter(["one"])

    def ask(prompt: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(chat_module.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert list(typed_lines()) == ["one"]
    assert "/reset" in capsys.readouterr().err
