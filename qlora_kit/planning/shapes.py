"""From a model's config.json to every tensor it is made of, and to the linears that an adapter targets.

Why: all that a plan says follows from these shapes, so nothing has to be loaded or downloaded to make one.
How: `read_config` finds the config (folder, file, built-in catalogue, hub), `model_shapes` lays out the tensors by the
row of ARCHITECTURES, `select_targets` applies `adapter.target_modules`. `matches` is the one rule of what a target
selects: injection calls it too. Imports no torch. Imported by planning and adapters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from pathlib import Path
from typing import Any

from qlora_kit.architecture_parts import (
    Config,
    LinearShape,
    TensorShape,
    head_count,
    hidden_size,
    layer_count,
    vocabulary_size,
)
from qlora_kit.architectures import Architecture, architecture_of, final_softcap, tied
from qlora_kit.errors import ModelError, RecipeError, nearest

CONFIG_BYTES_LIMIT = 16 << 20
HUB_TIMEOUT_S = 10.0
PATTERN_LENGTH_LIMIT = 512
PATTERN_REPEATS_LIMIT = 6
ALL_LINEAR = "all-linear"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_NESTED_REPEAT = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")


@dataclass(frozen=True)
class ModelShapes:
    """Every tensor of a base model, without its values.

    Attributes:
        source: where the config came from, for messages.
        architecture: the row of ARCHITECTURES.
        hidden, heads, layers, vocabulary: width of the residual stream, query heads, blocks, rows of the embedding.
        tied: head and embedding are one tensor, counted once.
        softcap: cap on the logits, or None.
        window: positions that some blocks look back, or None: all.
        model_type: transformers' name of the architecture.
        experts: experts of an MLP, and how many of them a token passes; (1, 1): a dense MLP.
        linears: the linears of one block (all blocks are alike).
        block_tensors: what else one block holds, names relative to the block; biases of the linears included.
        outer_tensors: tensors outside the blocks, with the embedding, and with the head unless tied; absolute names.
    """

    source: str
    architecture: Architecture
    hidden: int
    heads: int
    layers: int
    vocabulary: int
    tied: bool
    softcap: float | None
    linears: tuple[LinearShape, ...]
    block_tensors: tuple[TensorShape, ...]
    outer_tensors: tuple[TensorShape, ...]
    window: int | None = None
    model_type: str = ""
    experts: tuple[int, int] = (1, 1)

    def linear(self, name: str) -> LinearShape:
        """The linear of that name, relative to the block."""
        return next(linear for linear in self.linears if linear.name == name)

    @property
    def tensors(self) -> Iterator[TensorShape]:
        """(absolute name, shape) of every tensor that is not a weight of a block's linear."""
        yield from self.outer_tensors
        for layer in range(self.layers):
            for name, shape in self.block_tensors:
                yield f"{self.architecture.blocks}.{layer}.{name}", shape

    @property
    def linear_weights(self) -> Iterator[TensorShape]:
        """(absolute name, stored shape) of the weight of every linear in the blocks: what is quantized."""
        for layer in range(self.layers):
            for linear in self.linears:
                name = f"{self.architecture.blocks}.{layer}.{linear.name}.weight"
                yield name, self.architecture.weight_shape(linear)

    @cached_property
    def block_linear_parameters(self) -> int:
        """Weights of the linears of one block."""
        return sum(linear.weights for linear in self.linears)

    @cached_property
    def other_parameters(self) -> int:
        """Parameters that are no weight of a block's linear: embedding, head, norms, biases."""
        in_a_block = sum(prod(shape) for _, shape in self.block_tensors)
        return self.layers * in_a_block + sum(prod(shape) for _, shape in self.outer_tensors)

    @property
    def total_parameters(self) -> int:
        """Parameters of the base; a tied head is counted once."""
        return self.layers * self.block_linear_parameters + self.other_parameters


def model_shapes(config: Config, source: str, *, planned_only: bool = False) -> ModelShapes:
    """Lay out all tensors of a config.

    Args:
        planned_only: also of an architecture that this kit cannot train.
    Raises: ModelError: unsupported architecture, or a field that is absent or absurd; names `source` and field.
    """
    row = architecture_of(config, source, planned_only=planned_only)
    try:
        linears = tuple(row.linears(config))
        table = (vocabulary_size(config), hidden_size(config))
        is_tied = tied(config)
        head = [] if is_tied else [(f"{row.head}.weight", table)]
        biases = [(f"{linear.name}.bias", (linear.out_features,)) for linear in linears if linear.bias]
        return ModelShapes(
            source=source,
            architecture=row,
            hidden=hidden_size(config),
            heads=head_count(config),
            layers=layer_count(config),
            vocabulary=vocabulary_size(config),
            tied=is_tied,
            softcap=final_softcap(config),
            linears=linears,
            block_tensors=(*biases, *row.block_tensors(config)),
            outer_tensors=((f"{row.embedding}.weight", table), *row.outer_tensors(config), *head),
            window=row.window(config),
            model_type=config["model_type"],
            experts=row.experts(config),
        )
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None


# ------------------------------------------------------------------------------------------------ targets


@lru_cache(maxsize=64)
def _pattern(text: str) -> re.Pattern[str]:
    """Compile a target expression; its length and its repeats are bounded, since matching time grows with them.

    Raises: RecipeError: not a regular expression, or one that could match for hours.
    """
    where = f"adapter.target_modules: {text!r:.80}"
    if len(text) > PATTERN_LENGTH_LIMIT:
        raise RecipeError(f"{where}: longer than {PATTERN_LENGTH_LIMIT} characters; give a list of names")
    if len(re.findall(r"[*+{]", text)) > PATTERN_REPEATS_LIMIT or _NESTED_REPEAT.search(text):
        raise RecipeError(
            f"{where}: more than {PATTERN_REPEATS_LIMIT} repeats, or a repeat inside a repeat; give a list of names"
        )
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(f"{where}: not a regular expression: {error}") from None


def matches(module_name: str, target_modules: str | Sequence[str]) -> bool:
    """Whether a block's linear gets an adapter.

    Args:
        module_name: absolute name, such as "model.layers.0.self_attn.q_proj".
        target_modules: "all-linear" (every linear of the blocks: true for any name); another string: a regular
            expression for the whole name; a list: names or their endings at a dot.
    Raises: RecipeError: not a usable regular expression.
    Source: peft's `check_target_module_exists`.
    """
    if isinstance(target_modules, str):
        return target_modules == ALL_LINEAR or _pattern(target_modules).fullmatch(module_name) is not None
    return any(module_name == target or module_name.endswith(f".{target}") for target in target_modules)


def select_targets(shapes: ModelShapes, target_modules: str | Sequence[str]) -> list[list[LinearShape]]:
    """The targeted linears of each block, in order; a selection may differ from block to block.

    A list may also name embedding and head, which are no linears of a block; see `planning.trained`.
    Raises: RecipeError: a target that selects nothing; lists what there is, with the nearest name.
    """
    blocks = shapes.architecture.blocks
    names = [f"{blocks}.{layer}.{linear.name}" for layer in range(shapes.layers) for linear in shapes.linears]
    if isinstance(target_modules, str):
        wanted: list[str | list[str]] = [target_modules]
    else:
        wanted = [[target] for target in target_modules] or [[]]
    tables = [shapes.architecture.embedding, shapes.architecture.head]
    for target in wanted:
        if isinstance(target, list) and any(matches(name, target) for name in tables):
            continue
        if not any(matches(name, target) for name in names):
            raise RecipeError(_nothing_selected(shapes, target))
    if not any(matches(name, target_modules) for name in names):
        raise RecipeError(
            f"adapter.target_modules: {target_modules!r} selects no linear of the decoder blocks; add one of "
            f"{', '.join(linear.name for linear in shapes.linears)}"
        )
    return [
        [linear for linear in shapes.linears if matches(f"{blocks}.{layer}.{linear.name}", target_modules)]
        for layer in range(shapes.layers)
    ]


def _nothing_selected(shapes: ModelShapes, target: str | list[str]) -> str:
    available = [linear.name for linear in shapes.linears]
    listing = f"the linears of a block are {', '.join(available)}"
    if isinstance(target, str):
        expected = f"{shapes.architecture.blocks}.0.{available[0]}"
        hint = nearest(target, [ALL_LINEAR]) or f"; it must match whole names such as {expected!r}"
        if any(matches(f"{shapes.architecture.blocks}.0.{name}", [target]) for name in available):
            hint = f"; as a list it would: [{target}]"
        return f"adapter.target_modules: the regular expression {target!r} selects nothing{hint}; {listing}"
    if not target:
        return f"adapter.target_modules: the list is empty; {listing}"
    tables = [shapes.architecture.embedding, shapes.architecture.head]
    hint = nearest(target[0], [name.rpartition(".")[2] for name in (*available, *tables)] + available)
    return f"adapter.target_modules: {target[0]!r} selects nothing{hint}; {listing}"


# ------------------------------------------------------------------------------------------ finding a config


def read_config(model: str, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """A model's config and where it was found.

    Args:
        model: a folder with config.json, a config.json, a name or hub id of the built-in catalogue (no network; a
            `revision` goes past it), or another hub id (its config.json alone is fetched, or taken from the cache).
        revision: branch, tag or commit on the hub.
    Raises: ModelError: nothing there, unreadable, not JSON, or the hub cannot be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelError(f"{path}: no such file; a model folder has a config.json")
    if path.is_file():
        return parse_config(path), str(path)
    entry = catalogue_entry(model) if revision is None else None
    if entry is not None:
        return dict(entry["config"]), model
    if _HUB_ID.fullmatch(model) is None:
        hint = nearest(model.lower(), list(catalogue()))
        raise ModelError(f"{model}: no such folder, config.json or known model{hint}; known: {', '.join(catalogue())}")
    return parse_config(_hub_config(model, revision)), model


@lru_cache(maxsize=1)
def catalogue() -> dict[str, dict[str, Any]]:
    """The built-in models: name -> {"hub": ids with these shapes, "config": what a plan needs of config.json}."""
    entries: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text("utf-8"))
    return entries


def catalogue_entry(model: str) -> dict[str, Any] | None:
    """The built-in model of that name or hub id, in any case; None: there is none."""
    wanted = model.lower()
    if wanted in catalogue():
        return catalogue()[wanted]
    return next((entry for entry in catalogue().values() if wanted in map(str.lower, entry["hub"])), None)


def parse_config(path: Path) -> dict[str, Any]:
    """A config.json as a mapping.

    Raises: ModelError: unreadable, too large, not JSON, NaN or a key twice, not an object; names the file.
    """

    def refuse_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for key in keys if keys.count(key) > 1), None) if len(set(keys)) < len(keys) else None
        if twice is not None:
            raise ValueError(f"key {twice!r} is given twice")
        return dict(pairs)

    try:
        if path.stat().st_size > CONFIG_BYTES_LIMIT:
            raise ModelError(f"{path}: larger than {CONFIG_BYTES_LIMIT} bytes; this is no config.json")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except OSError as error:
        raise ModelError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _hub_config(model: str, revision: str | None) -> Path:
    """The path of a hub model's config.json, from the local cache when it is there.

    Raises: ModelError: not on the hub, not reachable, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    except ImportError:
        raise ModelError(f"{model}: huggingface_hub is not installed; give a local folder instead") from None
    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        get_hf_file_metadata(
            hf_hub_url(model, "config.json", revision=revision), timeout=HUB_TIMEOUT_S
        )  # fails at once
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except Exception as error:  # huggingface_hub raises requests', its own and OS errors
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{model}: no such local folder, and its config.json cannot be fetched from the hub: {reason}; "
            f"give a local folder, or a known name: {', '.join(catalogue())}"
        ) from None
