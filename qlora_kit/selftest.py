"""`qlora-kit selftest`: the kit's promises, proved on the user's own device with a small model of random weights.

Why: a driver, a torch build or a library's new version can break what our own tests hold on other machines. Every proof
runs the code that training runs, and compares bits where bits are promised. Imported by: the command, tools.gpu_check.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_kit import files, recipe
from qlora_kit.adapters.inject import inject, merge, trainable_parameters
from qlora_kit.base import nf4
from qlora_kit.base.device import has_unified_memory
from qlora_kit.base.loader import Base, build_on_meta, load_base
from qlora_kit.base.quantize_model import quantize_model
from qlora_kit.base.shards import save_tensors
from qlora_kit.base.streaming import Placement
from qlora_kit.console import stdout
from qlora_kit.data.batches import MicroBatch
from qlora_kit.training.blocks import attach
from qlora_kit.training.loss import batch_losses, chunked_cross_entropy
from qlora_kit.training.offload import input_store
from qlora_kit.training.optim import build_optimizer, optimizer_state, restore_optimizer_state

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TILE_TOKENS = 64
STEPS = 4


class ProofFailed(Exception):
    """What was promised does not hold here; the message says what was found."""


@dataclass(frozen=True)
class Proof:
    """One promise and whether it holds here.

    Attributes:
        promise: in a few words.
        found: what was compared, or how it failed.
    """

    promise: str
    passed: bool
    found: str
    seconds: float


class Bench:
    """A small random model in a folder, as original weights and as an NF4 checkpoint, and a few batches."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device, self.original, self.checkpoint = device, folder / "original", folder / "nf4"
        self.original.mkdir()
        generator = torch.Generator().manual_seed(0)
        with torch.device("cpu"):
            model = build_on_meta(CONFIG, torch.bfloat16, "selftest")
        tensors = {}
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            tensors[name] = (noise + (parameter.dim() == 1)).bfloat16()
        files.write_json(self.original / "config.json", CONFIG)
        save_tensors(self.original / "model.safetensors", tensors, {"format": "pt"})
        quantize_model(self.original, self.checkpoint)
        self.batches = [_batch(lengths, generator) for lengths in ([160], [96, 64], [128])]
        self._resident: list[Tensor] | None = None

    @property
    def resident(self) -> list[Tensor]:
        """Losses and gradients with everything on the device: what the others are held to."""
        if self._resident is None:
            self._resident = self.gradients()
        return self._resident

    def base(self, placement: Placement | None = None, *, folder: Path | None = None, **model: Any) -> Base:
        """A base with an adapter that is not zero."""
        base = load_base(recipe.Model(path=str(folder or self.checkpoint), **model), self.device, placement)
        for name, parameter in self.adapt(base).items():
            if name.endswith("lora_B"):
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.data.copy_(values * 0.02)
        return base

    def adapt(self, base: Base) -> dict[str, torch.nn.Parameter]:
        """Hang an adapter with dropout in, and attach the blocks as training does."""
        seed = inject(base, recipe.Adapter(rank=8, dropout=0.1, dtype=_adapter_dtype(base)), seed=0)
        for linear in base.linears().values():
            linear.branches.train()
        attach(base, tile_tokens=TILE_TOKENS, dropout_seed=seed)
        return dict(trainable_parameters(base))

    def gradients(self, placement: Placement | None = None, *, together: int = 1, **passage: Any) -> list[Tensor]:
        """Losses and gradients of one optimizer step, on the host."""
        base = self.base(placement)
        if passage:
            attach(base, **{"tile_tokens": TILE_TOKENS, "dropout_seed": _dropout_seed(base), **passage})
        losses = backward(base, self.batches, together)
        return [*losses, *(parameter.grad.cpu() for _, parameter in trainable_parameters(base))]  # type: ignore[union-attr]


def _dropout_seed(base: Base) -> Any:
    linear = next(iter(base.linears().values()))
    return next(iter(linear.branches.values())).dropout_seed


def _adapter_dtype(base: Base) -> Any:
    return str(base.dtype).removeprefix("torch.")


def _batch(lengths: Sequence[int], generator: torch.Generator) -> MicroBatch:
    total = sum(lengths)
    ids = torch.randint(0, CONFIG["vocab_size"], (1, total), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return MicroBatch(ids, ids.roll(-1, 1), positions, total, total, [list(lengths)])


def backward(base: Base, batches: Sequence[MicroBatch], together: int = 1) -> list[Tensor]:
    """Backward of the mean loss of all batches; returns the loss of each, on the host."""
    losses: list[Tensor] = []
    for start in range(0, len(batches), together):
        keys = [(0, 0, index) for index in range(start, min(start + together, len(batches)))]
        found = batch_losses(base, batches[start : start + together], 96, keys)
        (torch.stack(found).sum() / sum(batch.tokens for batch in batches)).backward()
        losses += [loss.detach().cpu() for loss in found]
    return losses


def _require_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    differ = sum(not torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    if differ:
        raise ProofFailed(f"{differ} of {len(expected)} tensors differ")
    if not all(tensor.any() for tensor in expected):
        raise ProofFailed("a tensor is all zeros, so the comparison shows nothing")
    return f"{len(expected)} tensors, {sum(tensor.numel() for tensor in expected):,} values, every bit"


def _require_close(found: Tensor, expected: Tensor, limit: float) -> str:
    distance = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    if not distance <= limit:
        raise ProofFailed(f"relative distance {distance:.1e}, at most {limit:.0e} expected")
    return f"relative distance {distance:.0e}"


# ------------------------------------------------------------------------------------------------------ proofs


def codes(bench: Bench) -> str:
    """Against bitsandbytes' own functions, called as its users call them."""
    functional = nf4.bitsandbytes_functional()
    compared = 0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        weight = torch.randn(257, 384, generator=torch.Generator().manual_seed(1)).to(bench.device, dtype)
        stored = nf4.quantize(weight, "nf4", True)
        wanted, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        again = nf4.dequantize(stored, (257, 384), "nf4", dtype)
        _require_same([stored["codes"].cpu(), stored["absmax"].cpu()], [wanted.cpu(), state.absmax.cpu()])
        _require_same([again.cpu()], [functional.dequantize_4bit(wanted, state).cpu().view(257, 384)])
        compared += weight.numel()
    return f"{compared:,} weights, every code and every dequantized bit"


def checkpoint(bench: Bench) -> str:
    """The NF4 checkpoint is the base that is made from the original weights at load."""
    found, expected = (bench.base(folder=folder).linears() for folder in (bench.checkpoint, bench.original))
    weights = [[linear.base_weight().cpu() for linear in linears.values()] for linears in (found, expected)]
    return _require_same(*weights)


def recomputed(bench: Bench) -> str:
    """No block recomputed, half of them, all."""
    _require_same(bench.gradients(recomputed=2), bench.resident)
    return _require_same(bench.gradients(recomputed=0), bench.resident)


def from_host(bench: Bench) -> str:
    """No block resident, and one of four."""
    _require_same(bench.gradients(Placement("host", 1)), bench.resident)
    return _require_same(bench.gradients(Placement("host")), bench.resident)


def from_disk(bench: Bench) -> str:
    """No block resident, and one of four."""
    _require_same(bench.gradients(Placement("disk", 1)), bench.resident)
    return _require_same(bench.gradients(Placement("disk")), bench.resident)


def together(bench: Bench) -> str:
    """Two and three micro-batches at a time, the dequantized weights kept and not."""
    _require_same(bench.gradients(Placement("disk"), together=2), bench.resident)
    return _require_same(bench.gradients(together=3, keep_dequantized=True), bench.resident)


def offloaded(bench: Bench) -> str:
    """Block inputs in host memory, and in a file."""
    for tier in ("host", "disk"):
        found = bench.gradients(together=2, store=input_store(tier, bench.device, bench.original))
        said = _require_same(found, bench.resident)
    return said


def chunked_loss(bench: Bench) -> str:
    """Loss and gradient in tiles against torch's own on whole logits, in fp32."""
    generator = torch.Generator().manual_seed(2)
    grads: list[Tensor] = []
    hidden, head = (torch.randn(n, 64, generator=generator).to(bench.device) for n in (300, 5000))
    targets = torch.randint(0, 5000, (300,), generator=generator).to(bench.device)
    for loss_of in (
        lambda x: F.cross_entropy(x @ head.T, targets, reduction="sum"),
        lambda x: chunked_cross_entropy(x, head, targets, chunk_tokens=128),
    ):
        x = hidden.clone().requires_grad_()
        grads += torch.autograd.grad(loss_of(x), x)
    return _require_close(grads[1], grads[0], 1e-5)


def resumed(bench: Bench) -> str:
    """Parameters after some steps, one run of them stopped, saved and restored in the middle."""

    def run(stop_after: int | None) -> list[Tensor]:
        base = bench.base()
        parameters = dict(trainable_parameters(base))
        optimizer = _optimizer(parameters, bench.device)
        for step in range(STEPS):
            if step == stop_after:
                saved = [p.detach().clone() for p in parameters.values()], optimizer_state(optimizer, parameters)
                base = bench.base()
                parameters = dict(trainable_parameters(base))
                optimizer = _optimizer(parameters, bench.device)
                for parameter, value in zip(parameters.values(), saved[0]):
                    parameter.data.copy_(value)
                restore_optimizer_state(optimizer, parameters, *saved[1])
            backward(base, bench.batches[:1])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [parameter.detach().cpu() for parameter in parameters.values()]

    return _require_same(run(STEPS // 2), run(None))


def _optimizer(parameters: dict[str, torch.nn.Parameter], device: torch.device) -> Any:
    name = "paged_adamw_8bit" if has_unified_memory(device) else "adamw_8bit"
    settings = recipe.Train(optimizer=name, lr=1e-3)
    return build_optimizer(settings, parameters, device, master_weights=True)


def merged(bench: Bench) -> str:
    """Logits with the update put into the weights, against the branches beside them, in fp32."""
    base = bench.base(dtype="float32")
    base.model.eval()
    ids = bench.batches[0].input_ids.to(bench.device)
    with torch.no_grad():
        beside = base.model(input_ids=ids, use_cache=False).logits
        merge(base)
        return _require_close(base.model(input_ids=ids, use_cache=False).logits, beside, 1e-5)


PROOFS: dict[str, Callable[[Bench], str]] = {
    "NF4 codes are bitsandbytes'": codes,
    "an NF4 checkpoint is the base it was made from": checkpoint,
    "recomputed gradients are the stored ones": recomputed,
    "gradients of blocks streamed from host memory are the resident ones": from_host,
    "gradients of blocks streamed from disk are the resident ones": from_disk,
    "micro-batches together give the gradients of one after the other": together,
    "offloaded activations are the kept ones": offloaded,
    "the loss in tiles is the whole loss": chunked_loss,
    "a resumed run is the run that was not stopped": resumed,
    "a merged model answers as the adapter does": merged,
}


def run(device: torch.device) -> Iterator[Proof]:
    """Every proof on the device, one after the other; a proof that breaks is one that fails."""
    with tempfile.TemporaryDirectory(prefix="qlora_kit-selftest-") as folder:
        bench = Bench(Path(folder), device)
        for promise, prove in PROOFS.items():
            started = time.monotonic()
            try:
                passed, found = True, prove(bench)
            except ProofFailed as failure:
                passed, found = False, str(failure)
            except Exception as error:  # whatever a broken driver or library raises is the finding
                passed, found = False, f"{type(error).__name__}: {error}"
            yield Proof(promise, passed, found, time.monotonic() - started)


def report(proofs: Iterable[Proof], device: torch.device, *, quiet: bool = False) -> list[Proof]:
    """The proofs, each said as it comes in."""
    done = []
    for proof in proofs:
        done.append(proof)
        if not quiet:
            verdict = "[green]proved[/green]" if proof.passed else "[red]FAILED[/red]"
            stdout.print(f"{verdict}  {proof.promise}  [dim]{proof.found}, {proof.seconds:.1f} s[/dim]")
    if not quiet:
        failed = sum(not proof.passed for proof in done)
        stdout.print(f"{failed} of {len(done)} FAILED" if failed else f"all {len(done)} hold on {device.type}")
    return done
