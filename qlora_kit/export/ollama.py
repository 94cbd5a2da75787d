"""A Modelfile for Ollama, whose TEMPLATE gives the token ids that training gave.

Why: Ollama does not run the tokenizer's (Jinja) chat template but one in Go's language, and a template that is nearly
right makes a tuned model worse without a word. So none is guessed from the model's name.
How: the chat template is asked to render turns with known words, and what it puts between them becomes the Go
template. That covers every template that puts fixed text around each turn (ChatML, Llama 2 and 3, Gemma, Phi-3, older
Mistral). It is then held to the chat template on CONVERSATIONS, token by token; one that differs is not written.
Imported by: the `export gguf` command.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit import files
from qlora_kit.data.templates import chat_template
from qlora_kit.data.tokenize import leading_bos

Messages = Sequence[dict[str, str]]
SYSTEM, FIRST, ANSWER, SECOND = "qkitsystemq", "qkitfirstq", "qkitanswerq", "qkitsecondq"  # words no template contains


def _turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


CONVERSATIONS: tuple[Messages, ...] = (
    _turns("Why is the sky blue?"),
    _turns("Name a prime.", "7", "And the next one?", "11", "Thanks! Is 12 one?"),
    _turns("Zoë said: 東京 🙂", "Привет", "def f(x):\n    return {{ x }} # 100%"),
    _turns("What is 133 + 34?", system="You answer with a number only."),
    _turns("Hi", "Hello.", "Bye", "Goodbye.", 'Wait: "one" more, <b>please</b>', system="Be brief.\nBe kind."),
)


@dataclass(frozen=True)
class TurnTexts:
    """What a chat template puts around the turns.

    Attributes:
        first: before the user's first turn, where no system turn stands before it.
        system: before a system turn; None: the template takes none.
        after_system: between it and the user's first turn.
        answer: between a user's turn and the answer to it, in a conversation that goes on.
        next: between an answer and the user's next turn.
        open: after the last turn of the user: the opening of the answer.
    """

    first: str
    system: str | None
    after_system: str
    answer: str
    next: str
    open: str

    def render(self, messages: Messages) -> str:
        """What `go` renders."""
        before, text = "", ""
        for message in messages:
            role, content = message["role"], message["content"]
            ahead = {"": self.first, "system": self.after_system}.get(before, self.next)
            text += {"system": self.system or "", "assistant": self.answer}.get(role, ahead) + content
            before = role
        return text + (self.open if before == "user" else "")

    def go(self) -> str:
        """The template in Go's language, over Ollama's `.Messages`."""
        system = "" if self.system is None else f'{{{{ if eq .Role "system" }}}}{_literal(self.system)}{{{{ end }}}}'
        user = (
            f'{{{{ if eq $before "" }}}}{_literal(self.first)}'
            f'{{{{ else if eq $before "system" }}}}{_literal(self.after_system)}'
            f"{{{{ else }}}}{_literal(self.next)}{{{{ end }}}}"
        )
        answer = f'{{{{ if eq .Role "assistant" }}}}{_literal(self.answer)}{{{{ end }}}}'
        return (
            '{{ $before := "" }}{{ range .Messages }}'
            f'{system}{{{{ if eq .Role "user" }}}}{user}{{{{ end }}}}{answer}'
            "{{ .Content }}{{ $before = .Role }}{{ end }}"
            f'{{{{ if eq $before "user" }}}}{_literal(self.open)}{{{{ end }}}}'
        )


def _literal(text: str) -> str:
    """Text as it stands, or quoted where Go or the Modelfile would read it as something else."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{{" in text or '"""' in text else text


def turn_texts(tokenizer: Any) -> TurnTexts | None:
    """What the tokenizer's chat template puts around turns; None: no template, or not the same text around every turn.

    Raises: DataError: several templates and none is the default.
    """
    template = chat_template(tokenizer)
    plain = _rendered(tokenizer, template, _turns(FIRST, ANSWER, SECOND))
    parts = _split(plain, FIRST, ANSWER, SECOND)
    if parts is None:
        return None
    bos = tokenizer.bos_token if leading_bos(tokenizer) is not None else ""  # llama.cpp puts it there itself
    asked = _split(_rendered(tokenizer, template, _turns(FIRST, system=SYSTEM)), SYSTEM, FIRST)
    system, after_system = (asked[0].removeprefix(bos), asked[1]) if asked else (None, "")
    found = TurnTexts(parts[0].removeprefix(bos), system, after_system, *parts[1:])
    return found if _holds(found, tokenizer, template) else None


def _rendered(tokenizer: Any, template: str | None, messages: Messages) -> str | None:
    """The prompt that generation sees; None: no template, or it refuses these turns."""
    if template is None:
        return None
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )
    except Exception:  # a downloaded template is code: it may raise anything
        return None


def _split(text: str | None, *words: str) -> list[str] | None:
    """What stands around the words, which must come once each and in order."""
    if text is None or any(text.count(word) != 1 for word in words):
        return None
    parts = []
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]


def _holds(found: TurnTexts, tokenizer: Any, template: str | None) -> bool:
    """Whether CONVERSATIONS get the chat template's token ids; those that it refuses do not count."""
    bos = tokenizer.bos_token if leading_bos(tokenizer) is not None else ""
    for conversation in CONVERSATIONS:
        expected = _rendered(tokenizer, template, conversation)
        if expected is None and (found.system is not None or conversation[0]["role"] != "system"):
            return False
        if expected is not None:
            texts = (found.render(conversation), expected.removeprefix(bos))
            ours, theirs = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
            if ours != theirs:
                return False
    return True


def write_modelfile(path: Path, gguf: Path, tokenizer: Any) -> bool:
    """Write a Modelfile beside a GGUF file; False: there is no template to write, and so no file.

    Raises: DiskError: the disk refuses.
    """
    texts = turn_texts(tokenizer)
    if texts is None:
        return False
    lines = [f"FROM ./{gguf.name}", f'TEMPLATE """{texts.go()}"""']
    lines += [f"PARAMETER stop {json.dumps(tokenizer.eos_token)}"] if tokenizer.eos_token else []
    files.write_text(path, "\n".join(lines) + "\n")
    return True
