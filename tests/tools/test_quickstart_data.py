"""The quickstart's data: no leak, right targets, whole files; and the wheels that it comes from.

Mirrors tools/quickstart/data.py and packages.py. A small zip stands in for the wheel: no network.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.files import sha256
from tools.quickstart import data, packages
from tools.quickstart.data import Record, first_choice, prepare_data, read_records, split, write_records
from tools.quickstart.packages import SetupError, extract, fetch_wheel, find_wheel
from tools.quickstart.score import is_exact


def function(name: str, required: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    properties = {argument: {"type": "integer"} for argument in ("a", "b")}
    return {
        "name": name,
        "parameters": {"type": "dict", "properties": properties, "required": list(required)},
    }


def record(number: int, *names: str) -> Record:
    return Record(f"r{number}", f"request {number}", [function(name) for name in names], [], "[]")


def make_wheel(folder: Path, rows: list[tuple[dict[str, Any], Any]], stem: str = "bfcl_eval-2026.3.23") -> Path:
    """A wheel with one category; each row is what differs from a plain question, and its ground truth."""
    plain = {"question": [[{"role": "user", "content": "Do it."}]], "function": [function("f")]}
    questions = [{"id": f"q{number}", **plain, **row} for number, (row, _) in enumerate(rows)]
    answers = [{"id": f"q{number}", "ground_truth": truth} for number, (_, truth) in enumerate(rows)]
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, lines in (("", questions), ("possible_answer/", answers)):
            text = "\n".join(map(json.dumps, lines))
            archive.writestr(f"bfcl_eval/data/{path}BFCL_v4_multiple.json", text)
    return wheel


@pytest.fixture
def small_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds a wheel of 60 groups, pinned as if it were the published one."""
    rows = [({"function": [function(f"f{number}")]}, [{f"f{number}": {"a": [number]}}]) for number in range(60)]
    wheel = make_wheel(tmp_path / "cache", rows)
    monkeypatch.setattr(data, "DATA_WHEEL_SHA256", sha256(wheel))
    monkeypatch.setattr(data, "CATEGORIES", ("multiple",))
    return wheel


def test_no_function_name_is_on_both_sides_of_the_split() -> None:
    records = [record(number, f"f{number % 200}", f"f{number % 90}") for number in range(0, 400, 7)]
    train, held_out = split(records)
    names = [{function["name"] for record in part for function in record.functions} for part in (train, held_out)]
    assert train and held_out and not names[0] & names[1]


def test_no_request_is_on_both_sides_of_the_split() -> None:
    records = [Record(f"r{n}", f"request {n % 50}", [function(f"f{n}")], [], "[]") for n in range(100)]
    train, held_out = split(records)
    requests = [{record.request for record in part} for part in (train, held_out)]
    assert train and held_out and not requests[0] & requests[1]


def test_a_chain_of_shared_functions_is_one_group() -> None:
    chain = [record(number, f"f{number}", f"f{number + 1}") for number in range(30)]
    assert 0 in {len(part) for part in split(chain)}


def test_a_very_large_group_is_trained_on() -> None:
    for name in map(str, range(20)):
        assert not split([record(number, name) for number in range(data.LARGEST_EVAL_GROUP + 1)])[1]


def test_the_split_does_not_depend_on_other_groups() -> None:
    records = [record(number, f"f{number}") for number in range(100)]
    held_out = {record.id for record in split(records)[1]}
    assert {record.id for record in split(records[50:])[1]} == {name for name in held_out if int(name[1:]) >= 50}


def test_the_target_is_the_first_choice_without_defaults() -> None:
    spec = {"a": [5, 6], "b": ["", 1], "c": [{"k": ["v"], "d": ["", 2]}], "e": [[{"x": [1, 2]}]]}
    assert first_choice(spec) == {"a": 5, "c": {"k": "v"}, "e": [{"x": 1}]}


def test_each_target_is_exact_by_its_own_answer(tmp_path: Path) -> None:
    wheel = make_wheel(
        tmp_path,
        [({}, [{"f": {"a": [1, 2], "b": ["", 3]}}]), ({"function": [function("f", ())]}, [{"f": {}}])],
    )
    records, _ = read_records(wheel, ["multiple"])
    assert [record.target for record in records] == [
        '[{"name":"f","arguments":{"a":1}}]',
        '[{"name":"f","arguments":{}}]',
    ]
    assert all(is_exact(record.target, record.calls) for record in records)


def test_a_required_argument_is_learned_even_if_the_answer_calls_it_optional(tmp_path: Path) -> None:
    records, _ = read_records(make_wheel(tmp_path, [({}, [{"f": {"a": ["", 1]}}])]), ["multiple"])
    assert records[0].calls == [{"name": "f", "arguments": {"a": [1]}}]
    assert json.loads(records[0].target) == [{"name": "f", "arguments": {"a": 1}}]


def test_unusable_records_are_left_out_and_counted(tmp_path: Path) -> None:
    two_messages = {"question": [[{"role": "system", "content": ""}, {"role": "user", "content": ""}]]}
    long = {"question": [[{"role": "user", "content": "x" * data.MAX_CHARS}]]}
    good = [{"f": {"a": [1]}}]
    rows = [
        ({}, good),
        ({}, good),
        (two_messages, good),
        (long, good),
        ({}, [{"g": {}}]),
        ({}, [{"f": {"b": [1]}}]),
    ]
    records, left_out = read_records(make_wheel(tmp_path, rows), ["multiple"])
    assert len(records) == 1 and sorted(left_out.values()) == [1, 1, 1, 2]


def test_records_are_chats_and_eval_has_its_answers(small_wheel: Path, tmp_path: Path) -> None:
    summary = prepare_data(tmp_path / "bfcl", small_wheel.parent)
    lines = {name: (tmp_path / "bfcl" / name).read_text().splitlines() for name in data.OUTPUTS}
    assert (len(lines["train.jsonl"]), len(lines["eval.jsonl"])) == (
        summary.train_records,
        summary.eval_records,
    )
    assert [message["role"] for message in json.loads(lines["train.jsonl"][0])["messages"]] == [
        "system",
        "user",
        "assistant",
    ]
    assert [json.loads(line)["id"] for line in lines["eval.jsonl"]] == [
        json.loads(line)["id"] for line in lines["eval_answers.jsonl"]
    ]


def test_the_same_bytes_every_time(small_wheel: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        prepare_data(tmp_path / name, small_wheel.parent)
    assert (tmp_path / "one/summary.json").read_bytes() == (tmp_path / "two/summary.json").read_bytes()


def test_whole_data_is_kept_and_torn_data_is_made_again(small_wheel: Path, tmp_path: Path) -> None:
    first = prepare_data(tmp_path / "bfcl", small_wheel.parent)
    whole = (tmp_path / "bfcl/train.jsonl").read_bytes()
    (tmp_path / "bfcl/train.jsonl").write_bytes(whole[:-10])
    assert prepare_data(tmp_path / "bfcl", small_wheel.parent) == first
    assert (tmp_path / "bfcl/train.jsonl").read_bytes() == whole
    small_wheel.unlink()
    assert prepare_data(tmp_path / "bfcl", tmp_path / "nowhere") == first


def test_no_records_are_no_crash(tmp_path: Path) -> None:
    assert write_records(tmp_path, [], Counter()).train_records == 0


def test_a_wheel_that_is_there_is_used(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, [])
    assert fetch_wheel("bfcl-eval==2026.3.23", sha256(wheel), tmp_path) == wheel


def test_a_wheel_of_another_version_is_not_taken(tmp_path: Path) -> None:
    make_wheel(tmp_path, [], stem="bfcl_eval-2026.3.230")
    assert find_wheel("bfcl-eval==2026.3.23", tmp_path) is None


def test_a_wheel_with_another_sha256_is_refused_with_its_name(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, [])
    with pytest.raises(SetupError, match=rf"{wheel.name}: sha256 is {sha256(wheel)}, expected 0000"):
        fetch_wheel("bfcl-eval==2026.3.23", "0" * 64, tmp_path)


def test_a_downloaded_wheel_with_another_sha256_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_pip_download", lambda requirement, folder: make_wheel(folder, []))
    with pytest.raises(SetupError, match="bfcl_eval-2026"):
        fetch_wheel("bfcl-eval==2026.3.23", "0" * 64, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_pip_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SetupError, match=r"bfcl-eval==2026.3.23: pip download failed: ERROR: .* by hand"):
        fetch_wheel("bfcl-eval==2026.3.23", "0" * 64, tmp_path)


def test_a_requirement_without_exact_version_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name==version"):
        find_wheel("bfcl-eval>=1", tmp_path)


def test_extract_writes_the_target_and_nothing_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("../../evil", b"content")
    extract(tmp_path / "a.whl", "../../evil", tmp_path / "out" / "file")
    assert hashlib.sha256((tmp_path / "out/file").read_bytes()).hexdigest() == hashlib.sha256(b"content").hexdigest()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.whl", "file", "out"]


def test_a_missing_member_and_a_damaged_wheel_are_told(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, [])
    with pytest.raises(SetupError, match="no file 'absent' inside"):
        extract(wheel, "absent", tmp_path / "x")
    wheel.write_bytes(wheel.read_bytes()[:20])
    with pytest.raises(SetupError, match="damaged zip"):
        extract(wheel, "absent", tmp_path / "x")
