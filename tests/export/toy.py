"""Tokenizers of every kind that GGUF knows, small enough for the tests' models."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qlora_kit.export.gguf_tokenizer import PRE_TOKENIZERS, SPACE

MARKS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog; it doesn't mind, we'll see.",
    "In 2024 prices rose 12345 times: 3.14159 or more!  Two  spaces\n\nand\tlines",
    "naïve café — 東京 Привет мир, 🙂 and so on and on and on",
] * 4
TEXTS = [
    "The quick brown foxes don't DON'T we'll",
    "123 1234567 3.14,  x  y\n\n z\t\tend ",
    " leading, naïve Zoë — 東京, Привет, 🙂👩‍👧 e\u0301",
    "<|im_start|>user\nsum of 12 and 3?<|im_end|>\n<|im_start|>assistant\n",
    "a",
    "   ",
    "\n",
]
SENTENCE_PIECE = ("llama", "mistral", "gemma")  # Llama 2's, Mistral 0.3's, Gemma's way with the first space
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def add_tokenizer(folder: Path, kind: str = "gpt-2", size: int = 320, template: str | None = TEMPLATE) -> Path:
    """Write a tokenizer of `kind` (a name of PRE_TOKENIZERS or SENTENCE_PIECE) into a model's folder."""
    made = _sentence_piece(kind, size) if kind in SENTENCE_PIECE else _byte_level(kind, size)
    made.save(str(folder / "tokenizer.json"))
    marks = dict(zip(("pad_token", "bos_token", "eos_token"), MARKS))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def _marked(made: Tokenizer) -> Tokenizer:
    made.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return made


def _byte_level(kind: str, size: int) -> Tokenizer:
    cuts, whole_words = next(rules for rules, name in PRE_TOKENIZERS.items() if name == kind)
    steps: list = [pre_tokenizers.Digits(individual_digits=True)] if "digits" in cuts else []
    steps += [pre_tokenizers.Split(Regex(cuts[0]), "isolated")] if cuts[0] not in ("digits", "words") else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="words" in cuts))
    made = Tokenizer(models.BPE(ignore_merges=whole_words))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 4, initial_alphabet=alphabet, special_tokens=MARKS, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return _marked(made)


def _sentence_piece(kind: str, size: int) -> Tokenizer:
    """Pieces as a trainer finds them; merges as transformers makes them of SentencePiece's: every split of each."""
    spaces = [normalizers.Replace(" ", SPACE)]
    spaces = [normalizers.Prepend(SPACE), *spaces] if kind == "llama" else spaces
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(spaces)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    found = trained.get_vocab()
    pieces = sorted(found, key=found.__getitem__)
    first = [*MARKS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: number for number, piece in enumerate([*first, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in found and piece[cut:] in found
    ]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "mistral":
        made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence(spaces)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return _marked(made)
