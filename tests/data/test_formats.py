"""Claims about reading: what is a record, what is refused, and how exactly the refusal is worded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.data.formats import DATASET_FORMATS, Record, read_records
from qlora_kit.errors import DataError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
SAMPLES: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "alpaca": {"instruction": "add", "input": "1 2", "output": "3"},
    "completion": {"prompt": "1+1=", "completion": "2"},
    "text": {"text": "In the beginning"},
}


def read_bytes(tmp_path: Path, data: bytes, format: str = "auto") -> list[Record]:
    path = tmp_path / "train.jsonl"
    path.write_bytes(data)
    return list(read_records(path, format))


def read_rows(tmp_path: Path, *rows: Any, format: str = "auto") -> list[Record]:
    return read_bytes(tmp_path, b"".join(json.dumps(row).encode() + b"\n" for row in rows), format)


@pytest.mark.parametrize("name", DATASET_FORMATS)
def test_every_format_has_a_sample_that_auto_detects_and_reads(tmp_path: Path, name: str) -> None:
    (record,) = read_rows(tmp_path, SAMPLES[name])
    assert [record] == read_rows(tmp_path, SAMPLES[name], format=name)
    assert record.source == f"{tmp_path / 'train.jsonl'}:1"
    assert record.messages or record.completion is not None


@pytest.mark.parametrize("name", DATASET_FORMATS)
def test_every_required_field_is_named_when_it_is_missing(tmp_path: Path, name: str) -> None:
    for field in DATASET_FORMATS[name].required:
        row = {key: value for key, value in SAMPLES[name].items() if key != field} | {"id": 1}
        with pytest.raises(DataError, match=rf"train.jsonl:1: {field}: missing"):
            read_rows(tmp_path, row, format=name)


@pytest.mark.parametrize("name", DATASET_FORMATS)
def test_a_field_of_the_wrong_type_is_named_with_what_was_found(tmp_path: Path, name: str) -> None:
    for field in (*DATASET_FORMATS[name].required, *DATASET_FORMATS[name].optional):
        with pytest.raises(DataError, match=rf"train.jsonl:1: {field}: found 7; expected"):
            read_rows(tmp_path, SAMPLES[name] | {field: 7}, format=name)


@pytest.mark.parametrize("name", DATASET_FORMATS)
def test_a_field_that_would_be_lost_silently_is_refused(tmp_path: Path, name: str) -> None:
    for field in DATASET_FORMATS[name].refused:
        with pytest.raises(DataError, match=rf"train.jsonl:1: {field}: found 'x'; expected no such field"):
            read_rows(tmp_path, SAMPLES[name] | {field: "x"})


def test_wrong_role_in_line_4817_is_named_with_file_line_and_field(tmp_path: Path) -> None:
    wrong = {"messages": [*CHAT["messages"], {"role": "asistant", "content": "x"}]}
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path, *[CHAT] * 4816, wrong)
    assert str(caught.value) == (
        f"{tmp_path / 'train.jsonl'}:4817: messages[2].role: found 'asistant'; "
        "expected one of system, user, assistant, tool; did you mean 'assistant'?"
    )


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([], r"messages: found \[\]"),
        (["hi"], r"messages\[0\]: found 'hi'"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role: found \['user'\]"),
        ([{"role": "user"}], r"messages\[0\].content: found None; expected a string"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content: found \['x'\]"),
        ([{"role": "assistant", "content": "x"}], r"messages\[0\].role: .*before the first answer"),
        ([*CHAT["messages"], {"role": "system", "content": "x"}], r"messages\[2\].role: .*only as the first"),
        ([{"role": "user", "content": "x", "weight": 0}], r"messages\[0\].weight: found 0"),
        ([{"role": "user", "content": "x" * 5, "tool_calls": [{}]}], r"messages\[0\].tool_calls"),
    ],
)
def test_turns_that_would_be_misread_are_refused(tmp_path: Path, turns: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"train.jsonl:1: {complaint}"):
        read_rows(tmp_path, {"messages": turns})


def test_empty_fields_of_exporters_are_no_reason_to_refuse(tmp_path: Path) -> None:
    message = {"role": "user", "content": "hi", "name": None, "tool_calls": None}
    (record,) = read_rows(tmp_path, {"messages": [message], "tools": [], "id": 7})
    assert record.messages == ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'\n  \n{"text": "a"}\n\n{"text": "b"}',
    ],
    ids=["bom", "crlf", "blank lines, no last line end"],
)
def test_harmless_differences_between_files_are_accepted(tmp_path: Path, data: bytes) -> None:
    assert [record.completion for record in read_bytes(tmp_path, data)] == ["a", "b"]


def test_blank_lines_count_so_that_line_numbers_are_those_of_an_editor(tmp_path: Path) -> None:
    (record,) = read_bytes(tmp_path, b'\n\n{"text": "a"}\n')
    assert record.source.endswith("train.jsonl:3")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "train.jsonl: holds no record"),
        (b"\n \n", "train.jsonl: holds no record"),
        ('{"text": "a"}\n'.encode("utf-16"), "train.jsonl:1: the file is UTF-16"),
        (b"\x1f\x8b\x08rest", "train.jsonl:1: the file is gzip"),
        (b"PAR1....", "train.jsonl:1: the file is parquet"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "train.jsonl:2: byte 11 of the line, 0xff, is not UTF-8"),
        (b'{"text": "a",}\n', "train.jsonl:1: not valid JSON: .* at column"),
        (b'{"text": "a"} {"text": "b"}\n', "train.jsonl:1: not valid JSON: Extra data at column 15"),
        (b'[{"text": "a"}]\n', "train.jsonl:1: found .* expected a JSON object"),
        (b"[\n", r"train.jsonl:1: not valid JSON: .*jq -c"),
        (b'{"text": "a", "score": NaN}\n', "train.jsonl:1: not usable JSON: NaN is no JSON value"),
        (b'{"text": "a", "text": "b"}\n', "train.jsonl:1: not usable JSON: the key 'text' stands twice"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n", "train.jsonl:1: not usable JSON"),
        (b'{"text": ' + b"[" * 200_000 + b"\n", "train.jsonl:1: JSON nested too deeply"),
        (rb'{"text": "a\ud800b"}', r"train.jsonl:1: text: found '\\ud800'; expected a whole character"),
        (b'{"conversations": []}\n', r"train.jsonl:1: no known format .*'conversations'.*chat: messages"),
    ],
)
def test_files_that_cannot_be_used_say_where_and_why(tmp_path: Path, data: bytes, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        read_bytes(tmp_path, data)


@pytest.mark.parametrize("format", ["auto", *DATASET_FORMATS])
def test_an_empty_file_is_refused_whatever_the_format(tmp_path: Path, format: str) -> None:
    with pytest.raises(DataError, match="holds no record"):
        read_bytes(tmp_path, b"\n", format)


def test_missing_file_and_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such data file"):
        list(read_records(tmp_path / "nowhere.jsonl", "auto"))
    with pytest.raises(DataError, match="is a folder"):
        list(read_records(tmp_path, "auto"))


def test_surrogate_pairs_nul_and_long_lines_are_text(tmp_path: Path) -> None:
    (record,) = read_bytes(tmp_path, rb'{"text": "\ud83d\ude00 \u0000' + b"a" * 2_000_000 + b'"}')
    assert record.completion is not None
    assert record.completion.startswith("\U0001f600 \0aaa")


def test_reading_is_lazy_so_the_first_record_comes_before_a_later_error(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\nbroken\n')
    records = read_records(path, "text")
    assert next(records).completion == "a"
    with pytest.raises(DataError, match="train.jsonl:2"):
        next(records)


def test_braces_in_an_alpaca_record_are_only_text(tmp_path: Path) -> None:
    (record,) = read_rows(tmp_path, {"instruction": "{input} {0}", "output": "{}"})
    assert "### Instruction:\n{input} {0}\n\n### Response:\n" in record.prompt
    assert record.messages[0]["content"] == "{input} {0}"


def test_an_empty_input_is_no_input(tmp_path: Path) -> None:
    with_empty, without = read_rows(
        tmp_path, {"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": "b"}
    )
    assert (with_empty.messages, with_empty.prompt) == (without.messages, without.prompt)


def test_formats_templates_tokenize_and_packing_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, qlora_kit.data.formats, qlora_kit.data.templates, qlora_kit.data.tokenize, "
        "qlora_kit.data.packing; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
