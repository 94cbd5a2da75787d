"""What the benchmarks and proofs share: a fresh process for each contender, its memory, random data, the kit's own run.

Why processes: peak memory belongs to a process, and what one contender has loaded must not slow the other. Each loads,
says so, and computes one step for each line that it is sent; so contenders alternate within one run, and other load on
the machine hits all alike. How: `Worker` is the parent's end, `serve` the child's, lines of JSON in between; the child
that runs this kit is `tools/kit_worker.py`. Imports no torch. Imported by: the other tools in this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from qlora_kit import files
from qlora_kit.data.tokenize import IGNORE_INDEX, Example
from qlora_kit.errors import QLoRAKitError
from qlora_kit.planning.planner import Plan, make_plan
from qlora_kit.recipe import Recipe, load_recipe
from tools.cgroups import Group, entering

ROOT = Path(__file__).parents[1]
ANSWERS = "QLORA_KIT_ANSWERS"  # environment: the pipe of the answers; what libraries print to stdout is none
STATUS = {"rss_bytes": "VmRSS", "anonymous_bytes": "RssAnon", "peak_bytes": "VmHWM"}
PLACEMENTS: dict[str, dict[str, Any]] = {  # recipe values, by where the blocks live; none of them resident
    "device": {"memory.placement": "device"},
    "host": {"memory.placement": "host", "memory.resident_blocks": 0},
    "disk": {"memory.placement": "disk", "memory.resident_blocks": 0},
}
Answer = dict[str, Any]
Questions = dict[str, Callable[[], Answer]]


class WorkerDied(QLoRAKitError):
    """A child ended without an answer; `code` is its exit code, negative for a signal."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


# ------------------------------------------------------------------------------------------------ data and recipe


def random_examples(count: int, seq_len: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """`count` documents of `seq_len` random token ids, every position learned but the last, which has no next token."""
    generator = random.Random(seed)
    examples = []
    for number in range(count):
        ids = generator.choices(range(vocabulary), k=seq_len)
        examples.append(Example(ids, [*ids[1:], IGNORE_INDEX], f"random:{number + 1}"))
    return examples


def write_recipe(
    folder: Path, model: Path, values: dict[str, Any], overrides: Sequence[str] = ()
) -> tuple[Path, Recipe, Plan]:
    """A recipe for random data in `folder`, what it says once every placement is decided, and its plan.

    Args:
        values: dotted key -> value, over the tools' own defaults: rows of full length, constant learning rate, no
            accumulation.
        overrides: the user's `--set`, which go before all.
    """
    defaults: dict[str, Any] = {
        "model.path": str(model),
        "data.train": "random",
        "data.packing": False,
        "data.learn": "all",
        "train.steps": 1_000_000,
        "train.schedule": "constant",
        "train.warmup": 0.0,
        "train.grad_accumulation": 1,
        "train.optimizer": "adamw_8bit",
        "output": str(folder / "run"),
    }
    path, nested = folder / "recipe.yaml", {}  # type: tuple[Path, dict[str, Any]]
    for key, value in (defaults | values).items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    files.write_text(path, Recipe.model_validate(nested).to_yaml())
    recipe = load_recipe(path, overrides)
    plan = make_plan(recipe)
    recipe = plan.placed(recipe)
    files.write_text(path, recipe.to_yaml())
    return path, recipe, plan


# ------------------------------------------------------------------------------------------------- child's end


def process_memory(pid: int | str = "self") -> dict[str, int]:
    """Resident bytes of a process on the host: now, now without mapped files, and the most so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    return {name: int(fields[field][0]) * 1024 for name, field in STATUS.items()}


def forget_peak() -> None:
    """Let the process' peak begin anew at what it holds now; Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def serve(modules: Iterable[str], load: Callable[[], Questions]) -> None:
    """The child's life: import, load, say so, then answer each line that is the name of a question.

    Args:
        modules: imported before the clock starts, so that loading is loading.
        load: gives the questions; each returns what is to be answered, to which memory and seconds are added.
    """
    answers = os.fdopen(int(os.environ[ANSWERS]), "w", buffering=1)
    for module in modules:
        importlib.import_module(module)
    loaded = {
        "libraries_bytes": process_memory()["rss_bytes"],
        "import_s": time.time() - psutil.Process().create_time(),
    }
    forget_peak()
    started = time.monotonic()
    questions = load()
    loaded["load_s"] = time.monotonic() - started
    print(json.dumps(loaded | process_memory()), file=answers)
    forget_peak()
    for line in sys.stdin:
        started = time.monotonic()
        answer = questions[line.strip()]()
        print(json.dumps({"seconds": time.monotonic() - started, **process_memory(), **answer}), file=answers)


# ------------------------------------------------------------------------------------------------ parent's end


class Worker:
    """A contender in a process of its own, for as long as the with-block lasts.

    Args:
        arguments: of the interpreter, such as `["-m", "tools.kit_worker", recipe]`.
        threads: OMP_NUM_THREADS; None: as the user's shell has it.
        groups: control groups that the child lives in.
    Attributes:
        loaded: what it said when it was ready.
        pid: of the process.
    Raises: WorkerDied: it ended before it answered; the message holds the end of what it printed.
    """

    def __init__(self, arguments: Sequence[str], *, threads: int | None = None, groups: Sequence[Group] = ()) -> None:
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the worker
        answers, childs_end = os.pipe()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), ANSWERS: str(childs_end)}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            entering([sys.executable, *arguments], groups),
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            text=True,
            env=environment,
            pass_fds=[childs_end],
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children
        )
        os.close(childs_end)
        self._answers = os.fdopen(answers)
        self.pid = self._process.pid
        self._loaded: Answer | None = None

    @property
    def loaded(self) -> Answer:
        if self._loaded is None:
            self._loaded = self._answer()
        return self._loaded

    def ask(self, question: str = "step") -> Answer:
        """The answer, waited for."""
        _ = self.loaded
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: `_answer` says how
            self._process.stdin.write(f"{question}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Answer:
        line = self._answers.readline()
        if line:
            answer: Answer = json.loads(line)
            return answer
        code = self._process.wait()
        self.log.seek(0)
        end = "".join(self.log.readlines()[-15:]).strip()
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        raise WorkerDied(f"a worker {how}:\n{end}" if end else f"a worker {how}", code)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *unused: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._answers.close()
        self.log.close()


def kit_worker(recipe: Path, *, steps: int, gradients: Path | None = None, **options: Any) -> Worker:
    """A worker that runs this kit.

    Args:
        steps: how many have data of their own; later ones see it again.
        gradients: a file, written before each update.
        options: of `Worker`.
    """
    arguments = ["-m", "tools.kit_worker", str(recipe), "--steps", str(steps)]
    return Worker(arguments + (["--gradients", str(gradients)] if gradients else []), **options)


def alternate(workers: dict[str, Worker], steps: int, warm_up: int = 1) -> dict[str, list[Answer]]:
    """Steps of all workers in turn, after `warm_up` steps whose answers are kept out (kernels are compiled in them)."""
    answers: dict[str, list[Answer]] = {name: [] for name in workers}
    for round_number in range(warm_up + steps):
        for name, worker in workers.items():
            answer = worker.ask()
            if round_number >= warm_up:
                answers[name].append(answer)
    return answers


def median(answers: Sequence[Answer], key: str = "seconds") -> float:
    return statistics.median(answer[key] for answer in answers)


# ---------------------------------------------------------------------------------------------- commands' common part


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options that every tool here has."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dir", type=Path, required=True, help="where checkpoints are made and kept")
    parser.add_argument("--layers", type=int, help="take only so many blocks of the shape")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter on all linears (default 16)")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of every process; default: as your shell has it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of a recipe")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows, the first a heading, in aligned columns: the first to the left, the others to the right."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder for recipes and what runs leave, removed at the end."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="run-", dir=parent) as folder:
        yield Path(folder)


def carry_out(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Measure in a scratch folder, and print what was found as tables or as one JSON object."""
    with scratch(options.dir) as folder:
        found = measure(options, folder)
    print(json.dumps(found, indent=2)) if options.json else show(found)
    return 0


def command(main: Callable[[], int]) -> None:
    """Run a tool: an error of the kit is one line, Ctrl-C and SIGTERM end it with everything removed."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell has it ignored
    try:
        sys.exit(main())
    except QLoRAKitError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
