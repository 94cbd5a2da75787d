"""How long a file's examples are, and what a seq_len does to them: what is cut, what is padding, what packing gains.

Why: a plan for full rows is a guess; the file's own lengths say how long rows really get, and how many steps an epoch
has. How: the file is read twice by `load_examples`, once uncut for the lengths, once as a run would read it, and its
rows are formed as a run forms them. Padding is counted for rows in the file's order.
Imports no torch; needs a tokenizer. Imported by the command `plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.data.packing import pack
from qlora_kit.data.tokenize import DataReport, load_examples, split_examples
from qlora_kit.recipe import Recipe
from qlora_kit.widths import padded_width

UNCUT = 1 << 31  # a seq_len that no document reaches
PERCENTILES = (10, 50, 90, 99)
BAR_CELLS = 24


@dataclass(frozen=True)
class Lengths:
    """What a file is for a recipe.

    Attributes:
        tokens: of each document before any cut, ascending.
        report: what a run would make of the file.
        seq_len, packing, rows_per_step: of the recipe.
        rows: tokens of each row that a run trains on.
        unpacked: the same with one example a row.
        padding: share of padding in all positions, in the rows; `unpacked_padding` with one example a row.
    """

    tokens: tuple[int, ...]
    report: DataReport
    seq_len: int
    packing: bool
    rows_per_step: int
    rows: tuple[int, ...]
    unpacked: tuple[int, ...]
    padding: float
    unpacked_padding: float

    @property
    def longest_row(self) -> int:
        """Positions of the widest batch: the longest row, padded as a run pads it."""
        return padded_width(max(self.rows), self.seq_len)

    @property
    def mean_row(self) -> int:
        """Tokens of a row on average, rounded up."""
        return -(-sum(self.rows) // len(self.rows))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; the last may have fewer rows."""
        return -(-len(self.rows) // self.rows_per_step)

    @property
    def cut(self) -> int:
        """Documents that are longer than seq_len."""
        return sum(count > self.seq_len for count in self.tokens)

    @property
    def lost_share(self) -> float:
        """Share of all tokens that no row holds; 0 where long texts go on in further windows."""
        return max(0.0, 1 - self.report.tokens / sum(self.tokens))

    def percentile(self, percent: int) -> int:
        """The least length that so many percent of the documents do not exceed."""
        return self.tokens[max(0, -(-percent * len(self.tokens) // 100) - 1)]

    def histogram(self) -> list[tuple[int, int]]:
        """(power of two, documents that have at most so many tokens and more than half of it), without gaps."""
        edges = [1 << power for power in range(_edge(self.tokens[0]), _edge(self.tokens[-1]) + 1)]
        return [(edge, sum(edge // 2 < count <= edge for count in self.tokens)) for edge in edges]

    def to_json(self) -> dict[str, Any]:
        """What `plan --data FILE --json` prints under "data"."""
        percentiles = {f"p{percent}": self.percentile(percent) for percent in PERCENTILES}
        return {
            "documents": len(self.tokens),
            "tokens": sum(self.tokens),
            "percentiles": percentiles | {"longest": self.tokens[-1]},
            "histogram": [{"up_to": edge, "documents": count} for edge, count in self.histogram()],
            "seq_len": self.seq_len,
            "cut": self.cut,
            "lost_share": self.lost_share,
            "dropped": self.report.dropped,
            "rows": len(self.rows),
            "longest_row": self.longest_row,
            "mean_row": self.mean_row,
            "padding": self.padding,
            "unpacked_rows": len(self.unpacked),
            "unpacked_padding": self.unpacked_padding,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def describe(self) -> list[str]:
        """The same for people."""
        percentiles = ", ".join(f"{percent} % up to {self.percentile(percent):,}" for percent in PERCENTILES)
        histogram = self.histogram()
        most = max(count for _, count in histogram)
        lines = [f"data: {len(self.tokens):,} documents, {sum(self.tokens):,} tokens; longest {self.tokens[-1]:,}"]
        bars = {edge: "█" * -(-BAR_CELLS * count // most) for edge, count in histogram}
        lines += [f"  up to {edge:>7,} {bars[edge]:<{BAR_CELLS}} {count:,}" for edge, count in histogram]
        lines.append(f"  of the documents {percentiles} tokens")
        cut = f"{self.cut:,} of them ({100 * self.cut / len(self.tokens):.1f} %)"
        lines.append(
            f"  seq_len {self.seq_len:,} is too short for {cut}: {100 * self.lost_share:.1f} % of the tokens lost"
        )
        other = f"one a row: {len(self.unpacked):,} rows, {100 * self.unpacked_padding:.0f} % padding"
        packed = f"packed: {len(self.rows):,} rows, {100 * self.padding:.0f} % padding ({other})"
        lines.append(f"  {packed if self.packing else other}; {self.steps_per_epoch:,} steps an epoch")
        return [*lines, f"  planned for rows of {self.longest_row:,} tokens, the longest that there are"]


def _edge(count: int) -> int:
    """The exponent of the smallest power of two that is not less."""
    return (count - 1).bit_length()


def _padding(rows: Sequence[int], micro_batch: int, seq_len: int) -> float:
    """Share of padding when so many rows at a time are padded to the longest of them."""
    positions = 0
    for start in range(0, len(rows), micro_batch):
        batch = rows[start : start + micro_batch]
        positions += len(batch) * padded_width(max(batch), seq_len)
    return 1 - sum(rows) / positions


def measure(path: Path, recipe: Recipe, tokenizer: Any) -> Lengths:
    """Read a file as the recipe's run would.

    Raises: DataError: a line cannot be used, or too many have nothing to learn at this seq_len.
    """
    data, train = recipe.data, recipe.train
    uncut, _ = load_examples(path, data.model_copy(update={"seq_len": UNCUT}), tokenizer)
    examples, report = load_examples(path, data, tokenizer)
    if isinstance(data.eval, float):
        examples, _ = split_examples(examples, data.eval, train.seed)
    unpacked = tuple(len(example.input_ids) for example in examples)
    packed = tuple(sum(unpacked[index] for index in row) for row in pack(unpacked, data.seq_len))
    one_a_row = _padding(unpacked, train.micro_batch, data.seq_len)
    return Lengths(
        tokens=tuple(sorted(len(example.input_ids) for example in uncut)),
        report=report,
        seq_len=data.seq_len,
        packing=data.packing,
        rows_per_step=train.micro_batch * train.grad_accumulation,
        rows=packed if data.packing else unpacked,
        unpacked=unpacked,
        padding=_padding(packed, len(packed), data.seq_len) if data.packing else one_a_row,
        unpacked_padding=one_a_row,
    )
