"""Quantization on the CPU against bitsandbytes': same bits? how fast? and what quantizing and loading a model take.

    python tools/bench_quantize.py bits                  large random weights, every dtype and type: equal bit for bit?
    python tools/bench_quantize.py speed                 weights per second of both, alternating in one run
    python tools/bench_quantize.py load --model M        seconds to a base in NF4: by bitsandbytes, by this kit, from
                                                         an NF4 checkpoint
    python tools/bench_quantize.py memory --dir D        peak memory of `qlora-kit quantize` on a small model and on one
                                                         16 times as large in several shards, both made in D

Each prints its figures on stdout; nothing is downloaded. Imported by nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from qlora_kit.base import nf4, quantize_cpu
from qlora_kit.base.shards import write_tensors

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MEASURE = (
    "import resource, sys; from qlora_kit.cli import app; "
    "app(sys.argv[1:], standalone_mode=False); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def by_bitsandbytes(weight: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes and absmax by bitsandbytes' own code."""
    import bitsandbytes.functional

    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=quantize_cpu.BLOCK, quant_type=quant_type)
    return codes, state.absmax


def large_weights(count: int) -> Iterator[tuple[str, Tensor]]:
    """fp32 weights of several distributions, and one with its values at the thresholds and around them."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator)
    yield "normal", normal * 0.02
    yield "uniform", torch.rand(count, generator=generator) - 0.5
    yield "heavy-tailed", normal.pow(7)
    yield "every magnitude", normal * torch.logspace(-44, 38, count)
    yield "few values", normal.mul(8).round().div(8)
    for quant_type in ("nf4", "fp4"):
        thresholds = torch.tensor([float(value) for value in quantize_cpu._levels(quant_type)[0]])
        blocks = count // quantize_cpu.BLOCK
        absmax = normal[:blocks].abs().clamp(min=1e-3)[:, None]
        picked = thresholds[torch.randint(15, (blocks, quantize_cpu.BLOCK - 1), generator=generator)] * absmax
        ulps = torch.randint(-3, 4, picked.shape, generator=generator, dtype=torch.int32)
        beside = (picked.view(torch.int32) + ulps).view(torch.float32)
        yield f"at the thresholds of {quant_type}", torch.cat([absmax, beside], dim=1).reshape(-1)


def bits(count: int) -> bool:
    """Compare codes and absmax on large weights."""
    all_equal = True
    for name, weight in large_weights(count):
        for dtype in DTYPES:
            value = weight.to(dtype)
            for quant_type in ("nf4", "fp4"):
                ours, theirs = quantize_cpu.quantize_4bit(value, quant_type), by_bitsandbytes(value, quant_type)
                equal = torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].nan_to_num(), theirs[1].nan_to_num())
                all_equal &= equal
                verdict = "equal" if equal else "DIFFER"
                print(f"{name:<28} {str(dtype)[6:]:<9} {quant_type}  {len(value):,} weights  {verdict}")
    return all_equal


def best_of(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """The shortest time of each function in seconds, called in turn."""
    best = [float("inf")] * len(functions)
    for _ in range(repeats):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def speed(count: int, repeats: int) -> None:
    """Weights per second, absmax quantized too."""
    import bitsandbytes.functional

    weight = torch.randn(count // 4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    for dtype in DTYPES:
        value = weight.to(dtype)
        for quant_type in ("nf4", "fp4"):
            options = {"blocksize": quantize_cpu.BLOCK, "compress_statistics": True, "quant_type": quant_type}
            theirs, ours = best_of(
                repeats,
                lambda value=value, options=options: bitsandbytes.functional.quantize_4bit(value, **options),  # type: ignore[misc]
                lambda value=value, quant_type=quant_type: nf4.quantize(value, quant_type, True),  # type: ignore[misc]
            )
            print(
                f"{str(dtype)[6:]:<9} {quant_type}  bitsandbytes {value.numel() / theirs / 1e6:6.1f} M weights/s"
                f"  kit {value.numel() / ours / 1e6:6.1f} M weights/s  x {theirs / ours:.1f}"
            )
    value = torch.randn(8192, 8192).bfloat16()
    for shape in ((576, 576), (2048, 2048), (8192, 8192)):
        part = value[: shape[0], : shape[1]].contiguous()
        codes, state = bitsandbytes.functional.quantize_4bit(part, compress_statistics=True, quant_type="nf4")
        stored, buffer = nf4.quantize(part, "nf4", True), torch.empty_like(part)
        theirs, fresh, reused = best_of(
            repeats * 4,
            lambda codes=codes, state=state: bitsandbytes.functional.dequantize_4bit(codes, state),  # type: ignore[misc]
            lambda s=stored, shape=shape: nf4.dequantize(s, shape, "nf4", torch.bfloat16),  # type: ignore[misc]
            lambda s=stored, shape=shape, out=buffer: nf4.dequantize(s, shape, "nf4", torch.bfloat16, out=out),  # type: ignore[misc]
        )
        print(
            f"dequantize {shape[0]} x {shape[1]}: bitsandbytes {theirs * 1e3:.3f} ms, kit {fresh * 1e3:.3f} ms, "
            f"into a reused buffer {reused * 1e3:.3f} ms"
        )


def load(model: str, repeats: int) -> None:
    """Seconds until the base is in memory in NF4; files in the page cache, libraries imported."""
    from qlora_kit.base.loader import load_base
    from qlora_kit.base.quantize_model import quantize_model
    from qlora_kit.recipe import Model

    def load_by_bitsandbytes() -> None:
        with mock.patch.object(quantize_cpu, "quantize_4bit", by_bitsandbytes):
            load_base(Model(path=model))

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "nf4"
        start = time.perf_counter()
        report = quantize_model(Path(model), checkpoint)
        print(f"quantize to a checkpoint     {time.perf_counter() - start:6.2f} s  ({report.bytes_written:,} bytes)")
        load_base(Model(path=str(checkpoint)))
        seconds = best_of(
            repeats,
            load_by_bitsandbytes,
            lambda: load_base(Model(path=model)),
            lambda: load_base(Model(path=str(checkpoint))),
        )
    for name, taken in zip(("by bitsandbytes", "by this kit", "from the checkpoint"), seconds):
        print(f"load, {name:<22} {taken:6.2f} s")


def synthetic_model(folder: Path, layers: int, shard_layers: int) -> int:
    """A Llama of random weights in bf16, a shard for every `shard_layers` blocks; returns its bytes."""
    hidden, inner, vocabulary = 2048, 5632, 8192
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "vocab_size": vocabulary,
    }
    config |= {"intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16}
    config |= {"num_key_value_heads": 16, "tie_word_embeddings": True, "dtype": "bfloat16"}
    square = dict.fromkeys((f"self_attn.{name}_proj.weight" for name in "qkvo"), (hidden, hidden))
    mlp = {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (hidden,))
    block: dict[str, tuple[int, ...]] = {**square, **mlp, "mlp.down_proj.weight": (hidden, inner), **norms}
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    ]
    for first in range(0, layers, shard_layers):
        numbers = range(first, min(first + shard_layers, layers))
        shards.append({f"model.layers.{n}.{name}": shape for n in numbers for name, shape in block.items()})
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = {key: (torch.bfloat16, shape) for key, shape in shapes.items()}
        write_tensors(folder / name, layout, lambda key, s=shapes: torch.randn(s[key], generator=generator).bfloat16())  # type: ignore[misc]
        weight_map |= dict.fromkeys(shapes, name)
        total += sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def memory(folder: Path) -> None:
    """Peak resident memory of the command in a process of its own."""
    for layers in (1, 4, 20):
        model, out = folder / f"bench-{layers}", folder / f"bench-{layers}-nf4"
        try:
            size_bytes = synthetic_model(model, layers, shard_layers=5)
            command = [sys.executable, "-c", MEASURE, "quantize", "--model", str(model), "--out", str(out)]
            start = time.perf_counter()
            environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
            output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            seconds = time.perf_counter() - start
            shards = len(list(model.glob("*.safetensors")))
        finally:
            shutil.rmtree(model, ignore_errors=True)
            shutil.rmtree(out, ignore_errors=True)
        peak_bytes = int(output.split()[-1]) * 1024
        print(
            f"model of {size_bytes / 2**30:.2f} GiB in {shards} shards: peak {peak_bytes / 2**20:.0f} MiB, "
            f"{seconds:.1f} s with start and imports"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bits", "speed", "load", "memory"])
    parser.add_argument("--model", help="a model folder, for load")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="for memory: 2.7 GiB free")
    parser.add_argument("--weights", type=int, default=1 << 24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "bits":
        sys.exit(0 if bits(arguments.weights) else 1)
    elif arguments.what == "speed":
        speed(arguments.weights, arguments.repeats)
    elif arguments.what == "load":
        load(arguments.model or parser.error("load needs --model"), arguments.repeats)
    else:
        memory(arguments.dir)


if __name__ == "__main__":
    main()
