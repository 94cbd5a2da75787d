"""The recipe: what a user asks for, typed, with every default in one place.

How: YAML (`recipe_yaml`) -> `--set` overrides -> pydantic models that know no unknown key. Every complaint names file,
line and dotted key. Imports no torch. Imported by everyone below the CLI.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qlora_kit.adapter_files import trainable
from qlora_kit.errors import RecipeError, nearest
from qlora_kit.optimizers import OPTIMIZERS
from qlora_kit.recipe_yaml import read_value, read_yaml, to_yaml
from qlora_kit.units import parse_bytes

AUTO_MLP_TILE_TOKENS = 1024


def _size(value: Any) -> Any:
    return value if value == "auto" else parse_bytes(value)


Size = Annotated[Literal["auto"] | int, BeforeValidator(_size)]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
DType = Literal["bfloat16", "float16", "float32"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and not {bool, False} & {annotation, *get_args(annotation)}:
            raise ValueError(f"takes no true or false (yes, no, on, off), found {value}")  # YAML 1.1 reads `on` as true
        return value


class Model(_Section):
    """The frozen base."""

    path: str = Field(description="folder or hub id of the base model")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    quantization: Literal["nf4", "fp4", "none"] = Field("nf4", description="none: plain LoRA on the unquantized base")
    double_quant: bool = Field(True, description="quantize the scales too: 4.127 bits per weight instead of 4.5")
    dtype: DType = Field("bfloat16", description="of computation and of what stays unquantized")
    keep_quantized: str | None = Field(
        None,
        description="folder for the 4-bit checkpoint of a base that is not one: made once, then loaded in a second",
    )


def _method(value: Any) -> Any:
    if value == "dora":
        raise ValueError("lora expected, found 'dora': DoRA adapters run and merge here, but are not trained")
    return value


class Adapter(_Section):
    """The LoRA branch, h = W0 x + (alpha / rank) B A x."""

    method: Annotated[Literal["lora"], BeforeValidator(_method)] = Field("lora")
    start_from: str | None = Field(
        None, description="folder of a LoRA adapter to train on; rank, alpha and target_modules are then that one's"
    )
    rank: Positive = Field(16)
    alpha: Annotated[float, Field(gt=0)] = Field(32, description="the branch is scaled by alpha / rank")
    dropout: Fraction = Field(0.0, description="on the branch's input, repeatable from the seed")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear, a list of names (also of embedding and head), or a regex"
    )
    modules_to_save: list[str] = Field(
        [], description="ends of names: embedding, head, norms that are trained whole, such as [embed_tokens, lm_head]"
    )
    dtype: DType = Field("bfloat16")
    init: Literal["gaussian", "kaiming"] = Field("gaussian", description="of A; B is always zero")

    @model_validator(mode="before")
    @classmethod
    def _taken_over(cls, values: Any) -> Any:
        """Raises: ModelError: no adapter there, or one that is not trained here."""
        if not isinstance(values, dict) or not isinstance(values.get("start_from"), str):
            return values
        folder = values["start_from"]
        found = trainable(Path(folder))
        for key in ("rank", "alpha", "target_modules", "modules_to_save"):
            if key in values and values[key] != found[key]:
                raise ValueError(f"{key}: found {values[key]}, the adapter in {folder} has {found[key]}; leave it out")
        return found | values

    @property
    def scale(self) -> float:
        """What multiplies B A x."""
        return self.alpha / self.rank


def _evaluation(value: Any) -> Any:
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"a fraction lies between 0 and 1, found {value}")
    return value


class Data(_Section):
    """Training and evaluation text."""

    train: str = Field(description="jsonl file")
    eval: Annotated[str | float | None, AfterValidator(_evaluation)] = Field(
        None, description="jsonl file, or a fraction of train: 0.02"
    )
    format: Literal["auto", "chat", "alpaca", "completion", "text"] = "auto"
    seq_len: Positive = 1024
    packing: bool = Field(True, description="several documents in a row, kept apart by the attention mask")
    learn: Literal["completion", "all"] = "completion"


def _count(value: Any) -> Any:
    if isinstance(value, int) and value < 0:
        raise ValueError(f"auto, or a number of blocks from 0, found {value}")
    return value


def _together(value: Any) -> Any:
    if isinstance(value, int) and value < 1:
        raise ValueError(f"auto, or a number of micro-batches from 1, found {value}")
    return value


def _recomputed(value: Any) -> Any:
    if isinstance(value, bool) or value == "auto":
        return value
    if isinstance(value, int) and value >= 0:
        return value
    raise ValueError(f"true, false, auto, or a number of blocks from 0, found {value!r}")


def _offload(value: Any) -> Any:
    if value is True:
        return "host"
    if value not in (False, "host", "disk"):
        raise ValueError(f"false, true, host or disk, found {value!r}")
    return value


def _token_count(value: Any) -> Any:
    if value not in ("auto", "full") and not (isinstance(value, int) and value > 0):
        raise ValueError(f"auto, full or a positive number of tokens, found {value!r}")
    return value


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        raise ValueError(f"one of {', '.join(OPTIMIZERS)}, found {name!r}{nearest(name, list(OPTIMIZERS))}")
    return name


class Memory(_Section):
    """Where bytes live, and what is traded for them."""

    budget: Size = Field("auto", description="of the device; auto: what it has")
    placement: Literal["auto", "device", "host", "disk"] = Field("auto", description="where the 4-bit blocks live")
    resident_blocks: Annotated[Literal["auto"] | int, AfterValidator(_count)] = Field(
        "auto", description="with host or disk: blocks that live on the device all the same; auto: as many as fit"
    )
    host_blocks: Annotated[Literal["auto"] | int, AfterValidator(_count)] = Field(
        "auto", description="with disk: of the other blocks, how many live in host memory; auto: as many as fit there"
    )
    embeddings: Literal["auto", "device", "host", "disk"] = Field(
        "auto", description="where embedding and head live; off the device their rows are fetched when used"
    )
    gradient_checkpointing: Annotated[bool | Literal["auto"] | int, BeforeValidator(_recomputed)] = Field(
        True, description="recompute each block in backward; a number: of that many; auto: of as few as fit"
    )
    activation_offload: Annotated[Literal[False, "host", "disk"], BeforeValidator(_offload)] = Field(
        False, description="keep the blocks' inputs in host memory (true, host) or in a file (disk)"
    )
    keep_dequantized: Literal["auto"] | bool = Field(
        "auto", description="within a block's backward, keep its weights from the recomputation to their use"
    )
    mlp_tile_tokens: Annotated[Literal["auto", "full"] | int, BeforeValidator(_token_count)] = Field(
        "auto", description="tokens whose MLP activations exist at a time in a block's backward; full: all of them"
    )
    micro_batches_together: Annotated[Literal["auto"] | int, AfterValidator(_together)] = Field(
        "auto", description="micro-batches that pass a block before any passes the next: it is fetched once for them"
    )
    loss_chunk_tokens: Annotated[Literal["auto", "full"] | int, BeforeValidator(_token_count)] = Field(
        "auto", description="tokens whose logits exist at a time; full: all of them"
    )

    on_oom: Literal["fail", "split"] = Field(
        "fail",
        description="split: repeat a step that runs out of memory with smaller micro-batches, and go on with them",
    )

    @property
    def tile_tokens(self) -> int:
        """Tokens of a tile of an MLP; 0: all. The same for any budget, since sums over tiles depend on it."""
        if isinstance(self.mlp_tile_tokens, int):
            return self.mlp_tile_tokens
        return AUTO_MLP_TILE_TOKENS if self.mlp_tile_tokens == "auto" else 0


class Train(_Section):
    """The loop."""

    steps: Positive | None = Field(None, description="optimizer steps; or give epochs")
    epochs: Annotated[float, Field(gt=0)] | None = None
    micro_batch: Positive = Field(1, description="sequences per forward")
    grad_accumulation: Positive = Field(8, description="micro-batches per optimizer step")
    optimizer: Annotated[str, AfterValidator(_optimizer)] = Field(
        "paged_adamw_8bit", description=" | ".join(OPTIMIZERS)
    )
    master_weights: bool = Field(
        True,
        description="beside each bfloat16 adapter weight keep the lower half of an fp32 one, 2 bytes, so that small "
        "updates are not rounded away; other adapter dtypes have none",
    )
    lr: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = Field(0.03, description="fraction of the steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="null: no clipping")
    eval_every: Positive | None = Field(50, description="steps; null: only at the end")
    save_every: Positive | None = Field(50, description="steps; null: only at the end")
    keep_checkpoints: Annotated[int, Field(ge=2)] = Field(2, description="at least 2: one may be found damaged")
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    trackers: list[Literal["tensorboard", "wandb"]] = Field([], description="also write metrics there")

    @model_validator(mode="after")
    def _length(self) -> Train:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class Recipe(_Section):
    """Everything about one run."""

    model: Model
    adapter: Adapter = Adapter()
    data: Data
    memory: Memory = Memory()
    train: Train = Train()
    output: str = "runs/run"

    @model_validator(mode="after")
    def _output_is_not_the_base(self) -> Recipe:
        base, output = Path(self.model.path).resolve(), Path(self.output).resolve()
        if output == base or base in output.parents:
            raise ValueError(f"output {self.output!r} lies in the base model's folder {self.model.path!r}")
        if self.adapter.start_from is not None and output in Path(self.adapter.start_from).resolve().parents:
            raise ValueError(f"adapter.start_from {self.adapter.start_from!r} lies in output {self.output!r}")
        return self

    @model_validator(mode="after")
    def _trained_tensors_are_computed_with(self) -> Recipe:
        if self.adapter.modules_to_save and self.adapter.dtype != self.model.dtype:
            raise ValueError(
                f"adapter.dtype: found {self.adapter.dtype}; with adapter.modules_to_save it is model.dtype, "
                f"{self.model.dtype}, since what is trained whole stands in the base's place"
            )
        return self

    @property
    def keeps_master_weights(self) -> bool:
        """Whether the optimizer steps on fp32 masters; float16 is not the upper half of an fp32 number."""
        return self.train.master_weights and self.adapter.dtype == "bfloat16"

    def to_yaml(self) -> str:
        """The recipe as it runs, every default spelled out."""
        return to_yaml(self.model_dump(mode="json"))


# ---------------------------------------------------------------------------------------------- reading


def _apply(values: dict[str, Any], override: str) -> None:
    """Put one `--set a.b=value` into the nested mapping."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise RecipeError(f"--set {override!r}: expected key=value, such as adapter.rank=32")
    *parents, last = key.strip().split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is not a section")
        values = child
    try:
        values[last] = read_value(text)
    except ValueError as error:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML") from error


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe may have."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from known_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _key(error: Any, model_keys: Sequence[str]) -> str:
    """The dotted key of a pydantic error."""
    parts = [str(part) for part in error["loc"]]
    while error["type"] != "extra_forbidden" and len(parts) > 1 and ".".join(parts) not in model_keys:
        parts.pop()  # pydantic appends the tried branch of a union, and the place in a list
    return ".".join(parts)


def _complaint(key: str, errors: Sequence[Any], where: str, model_keys: Sequence[str]) -> str:
    """One line for what pydantic says of one key (once for each branch of a union): what was found, what expected."""
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}{nearest(key, list(model_keys))}"
    if first["type"] == "missing":
        return f"{where}: key {key!r} is missing"
    messages = [error["msg"].removeprefix("Value error, ") for error in errors]
    if first["type"] == "model_type":
        messages = ["a section with keys of its own expected"]
    message = " or ".join(dict.fromkeys(text[0].lower() + text[1:] for text in messages))
    if first["type"] != "value_error":  # ours say what they found
        message += f", found {first['input']!r}"
    return f"{where}: {key}: {message}" if key and not where.startswith("--set") else f"{where}: {message}"


def _where(key: str, source: str, lines: dict[str, int], overrides: Sequence[str]) -> str:
    """The option or the line that gave `key` its value."""
    if any(f"{override.split('=')[0].strip()}.".startswith(f"{key}.") for override in overrides):
        return f"--set {key}"
    line = lines.get(key) or lines.get(key.rpartition(".")[0])
    return f"{source}:{line}" if line else source


def _parse(values: dict[str, Any], source: str, lines: dict[str, int], overrides: Sequence[str]) -> Recipe:
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        model_keys = [*known_keys(), *Recipe.model_fields]
        by_key: dict[str, list[Any]] = {}
        for entry in error.errors():
            by_key.setdefault(_key(entry, model_keys), []).append(entry)
        wheres = {key: _where(key, source, lines, overrides) for key in by_key}
        complaints = [_complaint(key, entries, wheres[key], model_keys) for key, entries in by_key.items()]
        raise RecipeError("\n".join(complaints)) from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path`, with `--set` overrides (dotted `key=value`) applied.

    Raises: RecipeError: what is wrong, in which file, line and key, one line each.
    """
    values, lines = read_yaml(path)
    return _parse(values, str(path), lines, overrides)


def recipe_for_model(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """The default recipe for a bare model folder or name, as `plan MODEL` uses it."""
    values: dict[str, Any] = {"model": {"path": model}, "data": {"train": "train.jsonl"}}
    if Path(model).is_dir():
        values["output"] = f"{Path(model).resolve()}-run"  # the default would lie in it for `plan .`
    return _parse(values, "command line", {}, overrides)
