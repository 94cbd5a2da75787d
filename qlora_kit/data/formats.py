"""DATASET_FORMATS: which JSONL records can be trained on, and how each becomes a `Record`.

Why: many a run is lost because a row was read differently from what its author meant. So a line is either
understood whole or refused with file, line, field, what was found and the way out; none is skipped silently.
A row of the table is facts (field names, one line of description) and a function; `auto` and the errors read
the same facts, so a new format is one row. Imports no torch, no transformers. Imported by templates and
tokenize.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import DataError, nearest

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]  # {"role": ..., "content": ...}

# The plain form of an alpaca record, for tokenizers without a chat template. Source: Stanford Alpaca
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Record:
    """One usable line.

    Attributes:
        source: `train.jsonl:17`.
        messages: turns for the tokenizer's chat template; empty: the record is raw text.
        prompt: raw text before what is learned; used when there are no turns, or no template.
        completion: raw text to be learned; None: the record exists only as turns.
        continues: what is longer than seq_len goes on in further windows instead of being cut off.
    """

    source: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str | None = None
    continues: bool = False


@dataclass(frozen=True)
class DatasetFormat:
    """One row of the table.

    Attributes:
        description: what a record is, in one line.
        required: fields that a record must have; `auto` takes the first row of which all are there.
        optional: fields that are read when they are there.
        refused: fields that would change the meaning of the record and that this format cannot carry.
        read: (values, source) -> Record; raises DataError.
    """

    description: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    refused: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Record]


def _shown(value: Any) -> str:
    """A found value, short enough for one line of an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(source: str, field: str, found: Any, expected: str) -> DataError:
    return DataError(f"{source}: {field}: found {_shown(found)}; expected {expected}")


def _text(value: Any, source: str, field: str) -> str:
    """`value` itself. Raises: DataError: no string, or one that UTF-8 cannot write."""
    if not isinstance(value, str):
        raise _wrong(source, field, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = value[error.start : error.start + 1]
        raise _wrong(source, field, found, "a whole character, not one half of a surrogate pair") from None
    return value


# ---------------------------------------------------------------------------------------------- the formats


def _message(turn: Any, index: int, source: str) -> Message:
    where = f"messages[{index}]"
    if not isinstance(turn, dict):
        raise _wrong(source, where, turn, 'an object {"role": ..., "content": ...}')
    role = turn.get("role")
    if role not in ROLES:
        hint = nearest(role, list(ROLES)) if isinstance(role, str) else ""
        raise _wrong(source, f"{where}.role", role, f"one of {', '.join(ROLES)}{hint}")
    for field, value in turn.items():
        if field not in ("role", "content") and value is not None:
            expected = "only role and content; what matters goes into content"
            raise _wrong(source, f"{where}.{field}", value, expected)
    return {"role": role, "content": _text(turn.get("content"), source, f"{where}.content")}


def _read_chat(values: dict[str, Any], source: str) -> Record:
    turns = values["messages"]
    if not isinstance(turns, list) or not turns:
        raise _wrong(source, "messages", turns, "a list of at least one turn")
    messages = tuple(_message(turn, index, source) for index, turn in enumerate(turns))
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        index = roles.index("system", 1)
        raise _wrong(source, f"messages[{index}].role", "system", "a system turn only as the first")
    first = 1 if roles[0] == "system" else 0
    if roles[first : first + 1] == ["assistant"]:
        raise _wrong(source, f"messages[{first}].role", "assistant", "a user turn before the first answer")
    return Record(source, messages=messages)


def _read_alpaca(values: dict[str, Any], source: str) -> Record:
    instruction = _text(values["instruction"], source, "instruction")
    output = _text(values["output"], source, "output")
    context = values.get("input")
    context = "" if context is None else _text(context, source, "input")
    plain = ALPACA_PROMPT_WITH_INPUT if context else ALPACA_PROMPT
    question = f"{instruction}\n\n{context}" if context else instruction
    return Record(
        source,
        messages=({"role": "user", "content": question}, {"role": "assistant", "content": output}),
        prompt=plain.format(instruction=instruction, input=context),
        completion=output,
    )


def _read_completion(values: dict[str, Any], source: str) -> Record:
    prompt = _text(values["prompt"], source, "prompt")
    return Record(source, prompt=prompt, completion=_text(values["completion"], source, "completion"))


def _read_text(values: dict[str, Any], source: str) -> Record:
    return Record(source, completion=_text(values["text"], source, "text"), continues=True)


DATASET_FORMATS: dict[str, DatasetFormat] = {
    "chat": DatasetFormat(
        description="turns for the tokenizer's chat template; the assistant's are learned",
        required=("messages",),
        optional=(),
        refused=("tools", "functions", "system"),
        read=_read_chat,
    ),
    "alpaca": DatasetFormat(
        description="an instruction, perhaps with an input, and the output to be learned",
        required=("instruction", "output"),
        optional=("input",),
        refused=("system", "history"),
        read=_read_alpaca,
    ),
    "completion": DatasetFormat(
        description="a raw prompt and the completion to be learned; no chat template",
        required=("prompt", "completion"),
        optional=(),
        refused=("system", "history"),
        read=_read_completion,
    ),
    "text": DatasetFormat(
        description="plain text, all of it learned; long texts go on in further windows",
        required=("text",),
        optional=(),
        refused=(),
        read=_read_text,
    ),
}

# ---------------------------------------------------------------------------------------------- reading

_FOREIGN = {
    b"\xff\xfe": "UTF-16 (or UTF-32); convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "gzip; unpack it: gunzip",
    b"PK": "a zip archive; unpack it: unzip",
    b"PAR1": "parquet; write JSONL: pandas.read_parquet(f).to_json(out, orient='records', lines=True)",
}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return values


def _parse(raw: bytes, source: str) -> dict[str, Any]:
    """The JSON object of one line. Raises: DataError: it is none; says where it breaks."""
    try:
        values = json.loads(raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the line, {raw[error.start]:#04x},"
        raise DataError(f"{source}: {where} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        hint = "; a line is one whole JSON object (from a JSON array: jq -c '.[]' in.json > out.jsonl)"
        raise DataError(f"{source}: not valid JSON: {error.msg} at column {error.colno}{hint}") from None
    except RecursionError:
        raise DataError(f"{source}: JSON nested too deeply; a record is a flat object") from None
    except ValueError as error:
        raise DataError(f"{source}: not usable JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(
            f"{source}: found {_shown(values)}; expected a JSON object in every line "
            "(from a JSON array: jq -c '.[]' in.json > out.jsonl)"
        )
    return values


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(file:line, bytes) of every line that is not blank. Raises: DataError: the file cannot be read."""
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                    for magic, what in _FOREIGN.items():
                        if raw.startswith(magic):
                            raise DataError(f"{path}:1: the file is {what}")
                if raw.strip():
                    yield f"{path}:{number}", raw.strip()
    except FileNotFoundError:
        raise DataError(f"{path}: no such data file; see data.train and data.eval in the recipe") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; expected one JSONL file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error


def detect(values: dict[str, Any], source: str) -> str:
    """The name of the first format whose required fields `values` has.

    Raises: DataError: none; lists the fields found and those that each format needs.
    """
    for name, row in DATASET_FORMATS.items():
        if all(field in values for field in row.required):
            return name
    known = "; ".join(f"{name}: {', '.join(row.required)}" for name, row in DATASET_FORMATS.items())
    found = _shown(list(values))
    raise DataError(f"{source}: no known format has the fields {found}; rename them to one's ({known})")


def _record(values: dict[str, Any], source: str, name: str) -> Record:
    row = DATASET_FORMATS[name]
    for field in row.required:
        if field not in values:
            needs = ", ".join(row.required)
            raise DataError(
                f"{source}: {field}: missing; format {name} needs {needs}, found {_shown(list(values))}"
                f"{nearest(field, list(values))}"
            )
    for field in row.refused:
        if values.get(field):
            expected = f"no such field; format {name} would leave it out silently"
            raise _wrong(source, field, values[field], expected)
    return row.read(values, source)


def read_records(path: Path, format: str) -> Iterator[Record]:
    """The records of a JSONL file, one at a time.

    Args:
        path: UTF-8, with or without a BOM; LF or CRLF; blank lines are skipped but counted.
        format: a key of DATASET_FORMATS, or `auto`: by the fields of the first record, then that for all.
    Raises: DataError: file missing, empty or no JSONL, or a line of no use; names file:line:field.
    """
    name, empty = format, True
    for source, raw in _lines(path):
        values, empty = _parse(raw, source), False
        if name == "auto":
            name = detect(values, source)
        yield _record(values, source, name)
    if empty:
        raise DataError(f"{path}: holds no record; expected one JSON object in every line")
