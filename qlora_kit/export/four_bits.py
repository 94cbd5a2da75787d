"""A merged model quantized again as its base is: a 4-bit checkpoint that this kit and plain transformers load.

Why only on demand: it is another model than the one that was trained; `evidence` and the proof say how far. How: the
writer of `quantize` over the merged weights, in the base's own settings. The update is added to the original weights
where there are any: these lie anywhere between two levels, so that of many a part crosses over and the update survives
as a whole. A dequantized weight lies on its level, half a step from the next, and a small update moves hardly one. A
linear that the adapter leaves alone is the base's, bit for bit. Imported by: merge.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qlora_kit import files
from qlora_kit.base.prequantized import STATE
from qlora_kit.base.quantize_model import SHARD_BYTES, Layout, Settings, Writer, quantization_config, split, tables
from qlora_kit.base.shards import write_tensors
from qlora_kit.planning.shapes import model_shapes

if TYPE_CHECKING:
    from qlora_kit.export.merge import Merge


class Requantized(Writer):
    """The files of a merged model in 4 bits.

    Attributes:
        config: fields that its config.json has beyond those of a merged model.
    """

    def __init__(self, merge: Merge) -> None:
        quantization, base = merge.quantization, merge.base
        settings = Settings(quantization.quant_type, quantization.double_quant, quantization.dtype)
        shapes = model_shapes(base.config | merge.layout.config, str(base.folder))
        super().__init__(merge.shards, shapes, settings)
        self._merge = merge
        self.config: dict[str, Any] = {"quantization_config": quantization_config(settings, self.head_names)}

    def by_shard(self) -> dict[str, Layout]:
        """Tensors by output file, of 5 GB."""
        return split(self.layouts(), SHARD_BYTES)

    def write_shard(self, path: Path, layout: Layout) -> str:
        """One safetensors file, durably; its sha256. Raises: NonFiniteError: a value is outside the dtype."""
        write_tensors(path, layout, self.produce, {"format": "pt"})
        return files.sha256(path)

    def _quantized(self, name: str) -> dict[str, Tensor]:
        """The parts of a weight; as the files have them where it stays: quantized twice, they would be others."""
        packed = self._merge.base.packed
        if packed is None or self._merge.update(name) is not None:
            return super()._quantized(name)
        weight = packed[self.architecture.name_in_model(name) or name]
        kept = {part: self._merge.base.stored.read(part) for part in self._layout(name) if STATE not in part}
        return tables(name, weight.shape, self.settings, weight.offset or 0.0) | kept
