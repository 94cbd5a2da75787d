"""From a data file to examples: token ids, shifted targets, and a report of what was cut or left out.

Why masks by position: pad and end token often share an id. A token is learned when its characters lie in a
learned span (offsets of the fast tokenizer), so the end-of-turn token is learned with its answer.
A document is encoded once and whole; BOS and eos are added at most once, where the text lacks them.
Imports transformers only inside functions. Imported by batches, the gate, training and the CLI.
"""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qlora_kit import files
from qlora_kit.data.formats import Record, read_records
from qlora_kit.data.templates import Rendered, chat_template, render
from qlora_kit.errors import DataError, ModelError
from qlora_kit.recipe import Data

IGNORE_INDEX = -100  # target of a position that is not learned: prompt, padding, the end of a document
MAX_DROPPED_FRACTION = 0.05  # of the rows; more than that is a wrong seq_len, not a few outliers
ENCODED_CHARACTERS = 1 << 17  # in one call of the tokenizer, which spreads documents over its threads

_RenderedRow = tuple[Record, Sequence[Rendered]]


@dataclass(frozen=True)
class Example:
    """One document, or one window of a long text.

    Attributes:
        input_ids: T token ids; from a file in an array, 4 bytes each.
        targets: T, the same; targets[i] is the id to be predicted after input_ids[: i + 1], or IGNORE_INDEX; the last
            is ignored.
        source: `train.jsonl:17`.
    """

    input_ids: Sequence[int]
    targets: Sequence[int]
    source: str

    @property
    def learned_tokens(self) -> int:
        """How many targets are not IGNORE_INDEX."""
        return len(self.targets) - self.targets.count(IGNORE_INDEX)


@dataclass(frozen=True)
class DataReport:
    """What became of a file.

    Attributes:
        rows: usable lines read.
        examples: examples made of them; more than rows where texts were split into windows.
        tokens: in all examples.
        learned_tokens: of those, how many are targets.
        truncated: rows cut at seq_len that still teach something.
        dropped: rows left out because no learned token was left.
        longest: tokens of the longest document before any cut.
        fingerprint: sha256 of the file and the number of rows: `9f3c...-5000`.
    """

    rows: int
    examples: int
    tokens: int
    learned_tokens: int
    truncated: int
    dropped: int
    longest: int
    fingerprint: str

    def describe(self, path: Path | str) -> str:
        """One line for people."""
        share = f"{100 * self.learned_tokens / max(1, self.tokens):.0f} %"
        text = f"{path}: {self.rows:,} rows, {self.tokens:,} tokens, {self.learned_tokens:,} of them learned ({share})"
        text += f", {self.truncated:,} rows cut at the end" if self.truncated else ""
        return text + (f", {self.dropped:,} left out, since nothing to learn was left" if self.dropped else "")


# ---------------------------------------------------------------------------------------------- the tokenizer


@contextlib.contextmanager
def tokenizer_boundary(what: str) -> Iterator[None]:
    """Turn whatever the tokenizers library throws into a ModelError.

    A bad pattern in tokenizer.json panics in Rust; the PanicException that arrives is no `Exception`.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{what}: {reason}; is its tokenizer.json whole? Download it again") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local model folder; downloads nothing and never runs code of the folder.

    Raises: ModelError: the folder or its tokenizer is missing or damaged, or gives no character offsets.
    """
    if not Path(folder).is_dir():
        raise ModelError(f"{folder}: no such model folder")
    from transformers import AutoTokenizer

    with tokenizer_boundary(f"{folder}: cannot load the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        found = type(tokenizer).__name__
        raise ModelError(f"{folder}: {found} gives no character offsets; a tokenizer.json is needed")
    return tokenizer


@dataclass(frozen=True)
class _Encoder:
    """A tokenizer and the facts about it that every document needs."""

    tokenizer: Any
    template: str | None
    bos: int | None  # only where the tokenizer puts it before a text by itself
    eos: int | None
    special: frozenset[int]

    def encode(self, documents: Sequence[Rendered]) -> list[tuple[list[int], list[bool]]]:
        """For each document its ids and, for each id, whether it is learned.

        Raises: ModelError: the tokenizer breaks, or has no eos where one is needed.
        """
        with tokenizer_boundary(f"{self.tokenizer.name_or_path}: the tokenizer breaks on a text"):
            encoded = self.tokenizer(
                [document.text for document in documents],
                add_special_tokens=False,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_offsets_mapping=True,
                verbose=False,
            )
        rows = zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._close(document, ids, offsets) for document, ids, offsets in rows]

    def _close(
        self, document: Rendered, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[int], list[bool]]:
        learned = _learned(document.learned, offsets)
        if self.bos is not None and ids[:1] != [self.bos]:
            ids, learned = [self.bos, *ids], [False, *learned]
        closed = ids[-1:] == [self.eos] or (document.templated and ids and ids[-1] in self.special)
        if not closed:
            if self.eos is None:
                raise ModelError(
                    f"{self.tokenizer.name_or_path}: the tokenizer has no eos token, so no answer could end; "
                    "set eos_token in tokenizer_config.json"
                )
            ids, learned = [*ids, self.eos], [*learned, True]
        return ids, learned


def _learned(spans: Iterable[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens begin in a learned span and do not lie wholly before it.

    Byte-level tokenizers trim spaces off the offsets: a token of spaces is (end, end), so both ends count.
    """
    flags = [False] * len(offsets)
    remaining = iter(spans)
    span = next(remaining, None)
    for index, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1] and not start == end == span[1]:
            span = next(remaining, None)
        if span is None:
            break
        flags[index] = start >= span[0] and end > span[0]
    return flags


def leading_bos(tokenizer: Any) -> int | None:
    """The id that the tokenizer puts before every text by itself, if it does: training and generation both want it.

    Raises: ModelError: the tokenizer breaks.
    """
    with tokenizer_boundary(f"{tokenizer.name_or_path}: the tokenizer breaks"):
        first = tokenizer("a")["input_ids"][:1]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and first == [bos] else None


def _encoder(tokenizer: Any) -> _Encoder:
    return _Encoder(
        tokenizer,
        chat_template(tokenizer),
        leading_bos(tokenizer),
        tokenizer.eos_token_id,
        frozenset(tokenizer.added_tokens_decoder),
    )


# ---------------------------------------------------------------------------------------------- examples


def _example(ids: list[int], learned: list[bool], source: str) -> Example:
    """Shift: position i learns token i + 1."""
    targets = [id if flag else IGNORE_INDEX for id, flag in zip(ids[1:], learned[1:], strict=True)]
    return Example(array("i", ids), array("i", [*targets, IGNORE_INDEX]), source)


def _windows(ids: list[int], learned: list[bool], seq_len: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Pieces of at most seq_len; neighbours share one token, so that every token but the first is a target."""
    stride = max(1, seq_len - 1)
    for start in range(0, max(1, len(ids) - 1), stride):
        yield ids[start : start + seq_len], learned[start : start + seq_len]


@dataclass
class _Loading:
    """Counts while a file is read."""

    data: Data
    examples: list[Example] = field(default_factory=list)
    rows: int = 0
    truncated: int = 0
    longest: int = 0
    dropped: list[tuple[str, int, int]] = field(default_factory=list)  # source, prompt tokens, all tokens

    def add(self, record: Record, documents: Sequence[tuple[list[int], list[bool]]]) -> None:
        """Take in the encoded documents of one row."""
        seq_len = self.data.seq_len
        pieces: Iterable[tuple[list[int], list[bool]]]
        pieces = ((ids[:seq_len], learned[:seq_len]) for ids, learned in documents)
        if record.continues:
            pieces = chain.from_iterable(_windows(ids, learned, seq_len) for ids, learned in documents)
        made = [_example(ids, learned, record.source) for ids, learned in pieces]
        kept = [example for example in made if example.learned_tokens]
        longest = max(len(ids) for ids, _ in documents)
        self.rows += 1
        self.longest = max(self.longest, longest)
        self.examples += kept
        if not kept:
            ids, learned = documents[0]
            prompt_tokens = learned.index(True) if True in learned else len(ids)
            self.dropped.append((record.source, prompt_tokens, longest))
        elif longest > seq_len and not record.continues:
            self.truncated += 1

    def require_enough(self, path: Path) -> None:
        """Raises: DataError: nothing is left, or too many rows lost everything."""
        if self.examples and len(self.dropped) <= MAX_DROPPED_FRACTION * self.rows:
            return
        source, prompt_tokens, _ = self.dropped[0]
        needed = max(tokens for _, _, tokens in self.dropped)
        remedy = (
            f"raise data.seq_len to {needed} (all of them fit then), or shorten the prompts"
            if needed > self.data.seq_len
            else "their texts are empty; remove these rows"
        )
        raise DataError(
            f"{path}: {len(self.dropped):,} of {self.rows:,} rows have no token left to learn at "
            f"data.seq_len {self.data.seq_len:,} (first: {source}, prompt {prompt_tokens:,} tokens); {remedy}"
        )


def _encoded_together(rendered: Iterable[_RenderedRow]) -> Iterator[list[_RenderedRow]]:
    """In turn as many rows as have ENCODED_CHARACTERS together: while it encodes, a token takes some 300 bytes."""
    rows, characters = list[_RenderedRow](), 0
    for record, documents in rendered:
        rows.append((record, documents))
        characters += sum(len(document.text) for document in documents)
        if characters >= ENCODED_CHARACTERS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


def load_examples(path: Path, data: Data, tokenizer: Any) -> tuple[list[Example], DataReport]:
    """Every example of a JSONL file, in the file's order.

    Args:
        path: the file; `data.train` or `data.eval`, resolved.
        data: format, seq_len and learn are read from it.
        tokenizer: from `load_tokenizer`.
    Returns: examples of 2..seq_len tokens, each with a learned one; and the report.
    Raises:
        DataError: a line cannot be used, or more than 5 % of the rows keep nothing to learn at this seq_len.
        ModelError: the tokenizer breaks on a text, or has no eos.
    """
    encoder, loading = _encoder(tokenizer), _Loading(data)
    records = read_records(Path(path), data.format)
    rendered = ((record, render(record, tokenizer, encoder.template, data.learn)) for record in records)
    for rows in _encoded_together(rendered):
        encoded = iter(encoder.encode([document for _, documents in rows for document in documents]))
        for record, documents in rows:
            loading.add(record, list(islice(encoded, len(documents))))
    loading.require_enough(Path(path))
    examples = loading.examples
    return examples, DataReport(
        rows=loading.rows,
        examples=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        learned_tokens=sum(example.learned_tokens for example in examples),
        truncated=loading.truncated,
        dropped=len(loading.dropped),
        longest=loading.longest,
        fingerprint=f"{files.sha256(Path(path))}-{loading.rows}",
    )


def split_examples(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, eval): equal token ids fall on the same side, so no copy of a row leaks into the evaluation.

    Args:
        examples: from `load_examples`; their order is kept on both sides.
        fraction: of the distinct examples that go to eval, 0 < fraction < 1; at least one does.
        seed: another seed, another split.
    Raises: DataError: fewer than two distinct examples.
    """
    keys = [_key(example, seed) for example in examples]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise DataError(
            f"data.eval: {fraction}: found {len(distinct)} distinct example to split, expected at least 2; "
            "give data.eval a file of its own"
        )
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    held_out = set(distinct[:count])
    train = [example for example, key in zip(examples, keys, strict=True) if key not in held_out]
    return train, [example for example, key in zip(examples, keys, strict=True) if key in held_out]


def _key(example: Example, seed: int) -> bytes:
    text = f"{seed}:{','.join(map(str, example.input_ids))}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
