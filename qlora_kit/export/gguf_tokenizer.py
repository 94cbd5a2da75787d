"""A tokenizer as a GGUF file holds it: tokens, kinds, merges or scores, marks and the chat template.

Why: llama.cpp encodes with rules of its own, chosen by a name in the file; a wrong name gives other token ids than
training saw and a model that merely seems worse. So the rules are recognised here by what they do, from the tokenizer
that training used, and one that llama.cpp does not have is refused by name.
How: byte-level BPE is told by its pre-tokenizer (PRE_TOKENIZERS); BPE of SentencePiece kind gets scores from the order
of its merges. Ids are compared with llama.cpp's own by `python -m tools.prove_gguf`. Imported by: export.gguf.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from qlora_kit.data.tokenize import leading_bos, tokenizer_boundary
from qlora_kit.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's kinds of token
SPACE = "\u2581"  # SentencePiece's sign for a space
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# (how text is cut before the merges, whole words pass by the merges) -> llama.cpp's name of the rules.
PRE_TOKENIZERS = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((_CONTRACTIONS + _WORDS + "{1,3}" + _REST,), True): "llama-bpe",  # Llama 3
    ((_CONTRACTIONS + _WORDS + "{1,3}" + _REST,), False): "dbrx",  # GPT-4, OLMo 2, Phi-4
    ((_CONTRACTIONS + _WORDS + _REST,), False): "qwen2",  # Qwen 2, 2.5, 3
    ((_TEKKEN,), True): "tekken",  # Mistral NeMo
}


def tokenizer_fields(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """GGUF's `tokenizer.*` fields.

    Args:
        tokenizer: from `load_tokenizer`.
        vocabulary: rows of the embedding; ids that the tokenizer does not have become unused tokens.
    Raises: ModelError: llama.cpp has no such tokenizer, or it has more tokens than the model.
    """
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if rules["model"]["type"] != "BPE":
        raise _refusal(tokenizer, f"a {rules['model']['type']} tokenizer; GGUF's are BPE here")
    tokens, kinds = _tokens(tokenizer, vocabulary)
    fields = {"ggml.tokens": tokens, "ggml.token_type": kinds}
    parts = _parts(rules["pre_tokenizer"], "pretokenizers")
    if any(part["type"] == "ByteLevel" for part in parts):
        fields |= _byte_level(tokenizer, rules, parts)
    else:
        fields |= _sentence_piece(tokenizer, rules, parts, tokens)
        _mark_bytes(tokens, kinds, rules["model"])
    return {**fields, **_marks(tokenizer), **_template(tokenizer)}


def _refusal(tokenizer: Any, found: str) -> ModelError:
    return ModelError(f"{tokenizer.name_or_path}: tokenizer.json: {found}")


def _tokens(tokenizer: Any, vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token by id, and its kind. Raises: ModelError: more tokens than the model has rows."""
    added = tokenizer.added_tokens_decoder
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if (highest := max(by_id)) >= vocabulary:
        raise _refusal(tokenizer, f"has token {by_id[highest]!r} with id {highest}, the model {vocabulary} tokens")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    kinds = [NORMAL if number in by_id else UNUSED for number in range(vocabulary)]
    for number, token in added.items():
        kinds[number] = CONTROL if token.special else USER_DEFINED
        tokens[number] = token.content if token.special else token.content.replace(SPACE, " ")
    return tokens, kinds


def _parts(rule: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, a sequence taken apart."""
    if rule is None:
        return []
    return [part for inner in rule[members] for part in _parts(inner, members)] if members in rule else [rule]


# ------------------------------------------------------------------------------------------------ byte-level BPE


def _byte_level(tokenizer: Any, rules: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Raises: ModelError: text is cut or changed in a way that llama.cpp does not know."""
    normalizers = [part["type"] for part in _parts(rules["normalizer"], "normalizers")]
    if set(normalizers) - {"NFC"}:  # llama.cpp normalizes nothing: text that is NFC already, as most is, is the same
        raise _refusal(tokenizer, f"normalizer {', '.join(normalizers)}: llama.cpp has none for byte-level BPE")
    cuts = tuple(cut for part in parts for cut in _cut(part))
    whole_words = bool(rules["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((cuts, whole_words))
    if name is None or parts[-1]["add_prefix_space"]:
        known = ", ".join(sorted(set(PRE_TOKENIZERS.values())))
        raise _refusal(
            tokenizer, f"cuts text by {' then '.join(cuts)!r:.200}, which llama.cpp does not; it has {known}"
        )
    return {"ggml.model": "gpt2", "ggml.pre": name, "ggml.merges": [" ".join(pair) for pair in _merges(rules)]}


def _cut(part: dict[str, Any]) -> Iterable[str]:
    """A step as the keys of PRE_TOKENIZERS name it; nothing for a step that cuts nothing."""
    if part["type"] == "Digits" and part["individual_digits"]:
        return ["digits"]
    if part["type"] == "ByteLevel":
        return ["words"] if part["use_regex"] else []
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return [part["pattern"].get("Regex") or part["pattern"].get("String", "")]
    return [part["type"]]


def _merges(rules: dict[str, Any]) -> list[tuple[str, str]]:
    """Older files have "a b", newer ones ["a", "b"]."""
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in rules["model"]["merges"])
    return [(left, right) for left, right in pairs]


# ------------------------------------------------------------------------------------------------ SentencePiece's BPE


def _sentence_piece(
    tokenizer: Any, rules: dict[str, Any], parts: list[dict[str, Any]], tokens: list[str]
) -> dict[str, Any]:
    """Scores stand for the order of the merges: llama.cpp joins the pair whose token has the highest.

    Raises: ModelError: spaces are not written as SentencePiece writes them, or unknown bytes have no token.
    """
    normalizers = _parts(rules["normalizer"], "normalizers")
    steps = {part["type"]: part for part in (*normalizers, *parts)}
    if not rules["model"].get("byte_fallback") or not _writes_spaces(steps):
        raise _refusal(tokenizer, f"steps {', '.join(steps) or 'none'}: neither byte-level nor SentencePiece's BPE")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(rules)):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": scores,
        "ggml.add_space_prefix": _prefix(tokenizer, steps),
    }


def _writes_spaces(steps: dict[str, Any]) -> bool:
    """Spaces become SPACE, and nothing else is changed or cut: a cut at spaces is none once there are none left."""
    replaces = steps.get("Replace", {}).get("content") == SPACE
    metaspace = steps.get("Metaspace", {}).get("split") is False
    cuts = "Split" in steps and not (replaces and steps["Split"]["pattern"] == {"String": " "})
    return (replaces or metaspace) and not cuts and set(steps) <= {"Prepend", "Replace", "Metaspace", "Split"}


def _prefix(tokenizer: Any, steps: dict[str, Any]) -> bool:
    """Whether a space is put before a text, and after every mark in it, which to llama.cpp is one question.

    Metaspace's "first" says yes and no; then what a chat needs is written, in which all text stands behind marks.
    """
    scheme = steps.get("Metaspace", {}).get("prepend_scheme")
    return "Prepend" in steps or scheme == "always" or (scheme == "first" and not tokenizer.chat_template)


def _mark_bytes(tokens: list[str], kinds: list[int], model: dict[str, Any]) -> None:
    """`<0x0A>` stands for a byte; the unknown token is known by name."""
    for number, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[number] = BYTE
        elif token == model.get("unk_token"):
            kinds[number] = UNKNOWN


# ------------------------------------------------------------------------------------------------ marks and template


def _marks(tokenizer: Any) -> dict[str, Any]:
    """Special ids, and what the tokenizer puts around a text by itself: found by letting it encode one."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: getattr(tokenizer, f"{mark}_token_id") for mark, name in names.items()}
    with tokenizer_boundary(f"{tokenizer.name_or_path}: the tokenizer breaks"):
        closes = tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    added = {"ggml.add_bos_token": leading_bos(tokenizer) is not None, "ggml.add_eos_token": closes}
    return {f"ggml.{name}_token_id": number for name, number in ids.items() if number is not None} | added


def _template(tokenizer: Any) -> dict[str, Any]:
    return {"chat_template": tokenizer.get_chat_template()} if tokenizer.chat_template else {}
