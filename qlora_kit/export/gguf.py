"""A GGUF file, for llama.cpp, Ollama and their kin: of a base, a merged folder, or a base with an adapter.

Why straight from base + adapter: the sum is rounded once, to the file's own type, and no merged folder is needed.
How: each tensor is read, merged as `export.merge` does, brought into llama.cpp's order (`gguf_names`) and
written (`gguf_file`): matrices as f16, bf16 or q8_0, vectors as f32, as llama.cpp's own converter has it. An adapter
alone becomes a LoRA file, which llama.cpp adds to the base at run time.
Imported by: the `export gguf` command, tools.prove_gguf.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kit import files
from qlora_kit.adapters.parts import linear_shapes
from qlora_kit.adapters.store import read_adapter, require_same_base
from qlora_kit.adapters.updates import StoredBranch
from qlora_kit.base.shards import Entry, Shards, find_shards
from qlora_kit.base.source import base_fingerprint
from qlora_kit.data.tokenize import load_tokenizer
from qlora_kit.errors import ModelError
from qlora_kit.export.gguf_file import GgufTensor, gguf_package, kind_of, write_gguf
from qlora_kit.export.gguf_names import GGUF_ARCHITECTURES, GgufArchitecture
from qlora_kit.export.gguf_tokenizer import tokenizer_fields
from qlora_kit.export.merge import Merge, open_merge
from qlora_kit.export.onto import BaseFiles, Quantization
from qlora_kit.planning.shapes import ModelShapes, model_shapes, read_config

FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
SUMS = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "q8_0": "float32",
}  # what W + (alpha / r) B A is rounded to


@dataclass(frozen=True)
class GgufReport:
    """What was written."""

    file: str
    architecture: str
    dtype: str
    tensors: int
    merged_tensors: int
    bytes_written: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export_gguf(
    model: Path,
    out: Path,
    *,
    adapter: Path | None = None,
    dtype: str = "f16",
    onto: str = "auto",
    any_base: bool = False,
) -> GgufReport:
    """Write a model, with an adapter merged in if one is given, to the new file `out`.

    Args:
        dtype: f16, bf16 or q8_0. A matrix whose rows are no multiple of 32 stays f16 under q8_0.
        onto, any_base: as in `merge_model`.
    Raises: RecipeError: no `gguf` package. DiskError: `out` exists, or too little space. ModelError: base and adapter
        do not fit, or llama.cpp cannot compute this model. NonFiniteError: a value is outside the type.
    """
    plan = _Plan.of(model)
    vocabulary = tokenizer_fields(tokenizer := load_tokenizer(model), plan.shapes.vocabulary)
    weights = _weights(model, adapter, dtype, onto, any_base)
    tensors = [*plan.rope_tensors(), *plan.tensors(weights, dtype)]
    file_type = int(gguf_package().LlamaFileType[FILE_TYPES[dtype]])
    fields = {
        "general.type": "model",
        "general.name": _shown_name(model, tokenizer),
        "general.file_type": file_type,
        "general.quantization_version": gguf_package().GGML_QUANT_VERSION,
        **{f"{plan.row.name}.{name}": value for name, value in plan.row.fields(plan.config).items()},
        **{f"tokenizer.{name}": value for name, value in vocabulary.items()},
    }
    size_bytes = write_gguf(out, plan.row.name, fields, tensors)
    merged = len(weights.merge.changes.branches) if weights.merge is not None else 0
    return GgufReport(str(out), plan.row.name, dtype, len(tensors), merged, size_bytes, files.sha256(out))


def export_gguf_adapter(model: Path, adapter: Path, out: Path, *, any_base: bool = False) -> GgufReport:
    """Write an adapter alone to the new file `out`, in fp32: llama.cpp adds it to the base's GGUF at run time.

    Raises: as `export_gguf`.
    """
    plan = _Plan.of(model)
    branches = read_adapter(adapter, linear_shapes(plan.shapes), model)
    if not any_base:
        require_same_base(adapter, base_fingerprint(Shards(find_shards(model))), model)
    first = next(iter(branches.values()))
    alpha = first.scale * first.lora_A.shape[0] or 1.0  # a scale of 0 goes into B
    fields = {
        "general.type": "adapter",
        "general.name": adapter.resolve().name,
        "general.file_type": int(gguf_package().LlamaFileType.ALL_F32),
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    tensors = [tensor for name, branch in branches.items() for tensor in plan.lora_pair(name, branch, alpha)]
    size_bytes = write_gguf(out, plan.row.name, fields, tensors)
    return GgufReport(str(out), plan.row.name, "f32", len(tensors), 0, size_bytes, files.sha256(out))


def _shown_name(model: Path, tokenizer: Any) -> str:
    """The folder's name. By "phi-3" in it alone does llama.cpp know that marks swallow the spaces after them."""
    name = re.sub("phi-?3", "phi 3", model.resolve().name, flags=re.IGNORECASE)
    swallows = any(token.rstrip for token in tokenizer.added_tokens_decoder.values())
    return f"{name} (phi-3)" if swallows else name


# ------------------------------------------------------------------------------------------- where values come from


@dataclass(frozen=True)
class _Weights:
    """The model's tensors by name, with an adapter's changes where it makes any."""

    base: Shards
    merge: Merge | None
    file_names: dict[str, str]  # name in the model -> name in the files

    def entry(self, name: str) -> Entry | None:
        return self.base.entries.get(self.file_names.get(name, ""))

    def read(self, name: str) -> Tensor:
        """As the base has it, or in the dtype of the merge where something was added to it."""
        file_name = self.file_names[name]
        if self.merge is None or self.merge.update(file_name) is None:
            return self.base.read(file_name)
        return self.merge.shards.read(file_name)


def _weights(model: Path, adapter: Path | None, dtype: str, onto: str, any_base: bool) -> _Weights:
    """Raises: ModelError: base and adapter do not fit, or the adapter makes another model of the base."""
    merge = None
    if adapter is not None:
        merge = open_merge(model, adapter, dtype=SUMS[dtype], onto=onto, any_base=any_base)
        if merge.layout.config:
            raise ModelError(
                f"{adapter}: changes {', '.join(sorted(merge.layout.config))} of the model; merge it "
                "(qlora-kit merge), and export the merged folder"
            )
        opened, weights = merge.base, merge.weights
    else:
        opened, quantization = BaseFiles.open(model), Quantization.recorded({})
        resolved = opened.resolve("original" if opened.packed is None else onto, quantization, model)
        weights = opened.weights(resolved, quantization)
    name_in_model = opened.shapes.architecture.name_in_model
    return _Weights(weights, merge, {name: stored for stored in weights.entries if (name := name_in_model(stored))})


# ------------------------------------------------------------------------------------------------ what the file holds


@dataclass(frozen=True)
class _Plan:
    """A model, and how llama.cpp wants it."""

    shapes: ModelShapes
    row: GgufArchitecture
    config: Any  # transformers' config object: defaults filled in
    gguf_names: Any  # the package's map of tensor names

    @classmethod
    def of(cls, model: Path) -> _Plan:
        """Raises: ModelError: llama.cpp cannot compute this model."""
        from transformers import AutoConfig

        gguf = gguf_package()
        shapes = model_shapes(*read_config(str(model)))
        row = GGUF_ARCHITECTURES[shapes.model_type]
        config = AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
        activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        activation = activation or config.activation_function
        if activation not in row.activations:
            raise ModelError(f"{shapes.source}: activation {activation!r}: llama.cpp computes {row.activations[0]!r}")
        if not row.biases and (found := [linear.name for linear in shapes.linears if linear.bias]):
            raise ModelError(f"{shapes.source}: {found[0]} has a bias, for which llama.cpp's {row.name} has no place")
        row.require(config)
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == row.name)
        return cls(shapes, row, config, gguf.get_tensor_name_map(number, shapes.layers))

    def rope_tensors(self) -> Iterator[GgufTensor]:
        """Factors of the rotary frequencies, where there are any."""
        for name, value in self.row.rope_tensors(self.config).items():
            yield GgufTensor(name, tuple(value.shape), "f32", lambda value=value: value)  # type: ignore[misc]

    def tensors(self, weights: _Weights, dtype: str) -> Iterator[GgufTensor]:
        """Every tensor of the model. Raises: ModelError: the files lack one, or it has another shape."""
        for name, shape in (*self.shapes.tensors, *self.shapes.linear_weights):
            entry = weights.entry(name)
            if entry is None or entry.shape != shape:
                found = "is missing" if entry is None else f"is {list(entry.shape)}"
                raise ModelError(f"{self.shapes.source}: tensor {name!r} {found}, {list(shape)} expected")
            if self._is_transposed(name):
                shape = shape[::-1]
            gguf_name = self._gguf_name(name)
            kind = "f32" if gguf_name.startswith("position_embd") else kind_of(shape, dtype)
            yield GgufTensor(gguf_name, shape, kind, self._arranged(name, weights.read))

    def lora_pair(self, linear: str, branch: StoredBranch, alpha: float) -> Iterator[GgufTensor]:
        """A, and B with its rows in llama.cpp's order, times what its scale differs from alpha / rank."""
        rank = branch.lora_A.shape[0]
        lora_B = self._in_order(linear, branch.lora_B.float() * (branch.scale * rank / alpha))
        name = self._gguf_name(f"{linear}.weight")
        for leaf, value in (("lora_a", branch.lora_A.float()), ("lora_b", lora_B)):
            yield GgufTensor(f"{name}.{leaf}", tuple(value.shape), "f32", lambda value=value: value)  # type: ignore[misc]

    def _arranged(self, name: str, read: Callable[[str], Tensor]) -> Callable[[], Tensor]:
        def produce() -> Tensor:
            value = read(name)
            if self._is_transposed(name):
                value = value.t()
            if name.endswith("norm.weight") and self.row.norm_offset:
                value = value.float() + self.row.norm_offset
            return self._in_order(name.rpartition(".")[0], value)

        return produce

    def _in_order(self, linear: str, value: Tensor) -> Tensor:
        _, _, relative = linear.removeprefix(f"{self.shapes.architecture.blocks}.").partition(".")
        order = self.row.row_order(self.config, relative)
        return value if order is None else value[order]

    def _is_transposed(self, name: str) -> bool:
        """Weights of the blocks' linears are stored [in, out] in GPT-2; GGUF has them the other way round."""
        linears = {f"{linear.name}.weight" for linear in self.shapes.linears}
        return self.shapes.architecture.transposed and name.endswith(tuple(f".{linear}" for linear in linears))

    def _gguf_name(self, name: str) -> str:
        found = self.gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"{self.shapes.source}: tensor {name!r}: llama.cpp's {self.row.name} has no such tensor")
        return str(found)
