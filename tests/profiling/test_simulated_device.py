"""The simulated accelerator computes what the CPU computes, counts bytes exactly, and finds what is not ordered."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes.functional
import bitsandbytes.optim
import psutil
import pytest
import torch
import torch.nn.functional as F

from qlora_kit.adapters.inject import inject, trainable_parameters
from qlora_kit.architectures import ARCHITECTURES
from qlora_kit.base.linear import FrozenLinear
from qlora_kit.base.loader import Base, load_base
from qlora_kit.base.owners import owner
from qlora_kit.planning.shapes import catalogue
from qlora_kit.profiling.simulated_device import DeviceRaceError, simulated_device
from qlora_kit.profiling.unfilled import unfilled_base
from qlora_kit.recipe import Adapter, Model
from qlora_kit.training.blocks import attach
from qlora_kit.training.loss import batch_losses

TORCH = (torch.Stream, torch.Event, torch.Generator, torch.empty, torch.accelerator.current_stream)


def filled(value: float, size: int = 8) -> torch.Tensor:
    return torch.full((size,), float(value))


def main() -> torch.Stream:
    return torch.accelerator.current_stream()


# -------------------------------------------------------------------------------------------- the kit's own code


def adapted(folder, device, quantization="nf4"):
    """A tiny base on `device` with an adapter that is not zero, its blocks recomputed in backward."""
    base = load_base(Model(path=str(folder), quantization=quantization), device)
    inject(base, Adapter(dropout=0.1), seed=0)
    for index, (name, parameter) in enumerate(trainable_parameters(base)):
        if name.endswith("lora_B"):
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.data.copy_(values.mul_(0.1))
    for linear in base.linears().values():
        linear.branches.train()
    attach(base, True)
    return base


def packed(ids):
    """Two documents a row; the first tokens are not learned."""
    positions = torch.cat([torch.arange(10), torch.arange(14)]).expand_as(ids)
    targets = ids.masked_fill(torch.arange(24) < 5, -100)
    return SimpleNamespace(input_ids=ids, position_ids=positions, targets=targets)


def step(base, ids):
    """Loss and gradients, on the host."""
    (loss,) = batch_losses(base, [packed(ids)], 16)
    loss.backward()
    return loss.item(), {name: parameter.grad.cpu() for name, parameter in trainable_parameters(base)}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_loss_and_gradients_are_bit_identical_to_those_of_the_cpu(model_type, tiny_model, ids):
    expected_loss, expected = step(adapted(tiny_model(model_type), "cpu"), ids)
    with simulated_device():
        loss, gradients = step(adapted(tiny_model(model_type), "simgpu"), ids)
    assert loss == expected_loss
    for name, gradient in gradients.items():
        assert gradient.any() and torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_bytes_are_the_same_with_shapes_only(model_type, tiny_model, ids):
    seen = []
    for shapes_only in (False, True):
        with simulated_device(shapes_only=shapes_only) as device:
            base = adapted(tiny_model(model_type, vocab_size=8192), "simgpu")
            loaded = device.live_bytes
            device.reset_peak()
            step(base, ids)
            seen.append((loaded, device.peak_bytes, device.live_bytes))
    assert seen[0] == seen[1]


def test_a_step_leaves_nothing_but_the_gradients(tiny_model, ids):
    with simulated_device() as device:
        base = adapted(tiny_model("llama"), "simgpu")
        step(base, ids)
        with_gradients = device.live_bytes
        step(base, ids)
        assert device.live_bytes == with_gradients
        del base
        gc.collect()
        assert device.live_bytes <= 1024  # the code table of the absmax, cached for the process


# -------------------------------------------------------------------------------------------------- memory


def test_peak_of_a_known_sequence_is_exact():
    with simulated_device() as device:
        a = torch.empty(1000, device="simgpu")  # 4000 bytes, rounded to 4096
        b = a + 1
        assert (device.live_bytes, device.peak_bytes) == (8192, 8192)
        c = b[:10].view(2, 5).t()
        assert device.live_bytes == 8192
        del a, b
        assert device.live_bytes == 4096
        del c
        assert (device.live_bytes, device.peak_bytes) == (0, 8192)
        device.reset_peak()
        torch.zeros(1, dtype=torch.uint8, device="simgpu").add_(1).mul_(2)
        assert (device.live_bytes, device.peak_bytes) == (0, 512)


def test_limit_says_what_was_asked_and_everything_is_free_afterwards():
    with simulated_device(limit_bytes=8192) as device:
        kept = torch.zeros(512, device="simgpu")
        with pytest.raises(torch.OutOfMemoryError, match=r"asked for 6144 bytes; 4096 of 8192 are in use, 4096 free"):
            (kept + 1).repeat(3)
        assert (device.live_bytes, device.limit_bytes) == (2048, 8192)
        device.limit_bytes = None
        assert (kept + 1).repeat(2).sum().item() == 1024


@pytest.mark.parametrize("free_bytes", range(0, 3 << 15, 1 << 13))
def test_out_of_memory_within_backward_is_raised_and_frees_what_it_made(free_bytes):
    with simulated_device() as device:
        weight = torch.ones(64, 64, device="simgpu").requires_grad_()
        x = torch.ones(32, 64, device="simgpu")
        device.limit_bytes = device.live_bytes + free_bytes
        before = device.live_bytes
        with contextlib.suppress(torch.OutOfMemoryError):
            F.silu(F.softmax(x @ weight, -1) @ weight).sum().backward()
        weight.grad = None
        assert device.live_bytes == before
        device.limit_bytes = None
        (x @ weight).sum().backward()
        assert torch.equal(weight.grad.cpu(), torch.full((64, 64), 32.0))


def test_bytes_are_attributed_to_their_owner_in_backward_too():
    with simulated_device() as device:
        with owner("weights"):
            weight = torch.ones(128, device="simgpu").requires_grad_()
        with owner("gradients"):
            (weight * 2).sum().backward()
        assert device.bytes_by_owner() == {"weights": 512, "gradients": 512}
        assert sorted(allocation.owner for allocation in device.allocations()) == ["gradients", "weights"]


def test_accelerator_reports_the_device_while_it_is_active():
    with simulated_device(limit_bytes=4096) as device:
        assert torch.accelerator.current_accelerator(check_available=True) == torch.device("simgpu")
        x = torch.ones(4, device="simgpu")
        assert torch.accelerator.memory_allocated() == torch.accelerator.max_memory_allocated() == 512
        assert torch.accelerator.get_memory_info() == (3584, 4096)
        del x
        torch.accelerator.reset_peak_memory_stats()
        assert device.peak_bytes == 0
    assert torch.accelerator.current_accelerator(check_available=True) is None


def test_torch_is_as_it_was_after_the_block_and_after_an_error():
    for error in (None, ValueError("mine")):
        try:
            with simulated_device():
                assert torch.Stream is not TORCH[0] and isinstance(torch.default_generator, torch.Generator)
                with pytest.raises(RuntimeError, match="active already"), simulated_device():
                    pass
                if error:
                    raise error
        except ValueError as raised:
            assert raised is error
        assert (torch.Stream, torch.Event, torch.Generator, torch.empty, torch.accelerator.current_stream) == TORCH
        assert "is_pinned" not in vars(torch.Tensor)
        with torch.device("meta"):
            assert torch.empty(2).is_meta


def test_a_block_that_ends_on_another_stream_is_an_error():
    with pytest.raises(RuntimeError, match="another stream"), simulated_device():
        torch.accelerator.set_stream(torch.Stream(device="simgpu"))


def test_tensors_outlive_their_block_but_work_only_within_one():
    with simulated_device() as first:
        x = torch.ones(4, device="simgpu")
    with pytest.raises(RuntimeError, match="no simulated device is active"):
        x + 1
    with simulated_device() as second:
        assert (x + 1).tolist() == [2.0] * 4
        assert (first.live_bytes, second.live_bytes) == (0, 512)


# -------------------------------------------------------------------------------------------------- tensors


def test_host_tensors_are_refused_but_for_single_values():
    with simulated_device():
        x = torch.ones(4, device="simgpu")
        with pytest.raises(RuntimeError, match=r"same device.*simgpu:0 and cpu.*aten.add.*shape \(4,\)"):
            x + torch.ones(4)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(4).mul_(x)
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([x, torch.ones(4)])
        assert (x + torch.tensor(2.0)).tolist() == [3.0] * 4
        assert x[torch.tensor([0, 2])].tolist() == [1.0, 1.0]


def test_generators_of_the_device_are_repeatable_and_those_of_the_host_are_refused():
    with simulated_device():
        x = torch.empty(16, device="simgpu")
        draws = [x.bernoulli_(0.5, generator=torch.Generator(x.device).manual_seed(3)).tolist() for _ in range(2)]
        assert (
            draws[0] == draws[1] == torch.empty(16).bernoulli_(0.5, generator=torch.Generator().manual_seed(3)).tolist()
        )
        with pytest.raises(RuntimeError, match="Expected a 'simgpu' device type for generator"):
            x.normal_(generator=torch.Generator())


@pytest.mark.parametrize("shapes_only", [False, True])
def test_common_operations_work(shapes_only):
    with simulated_device(shapes_only=shapes_only):
        x = torch.arange(12, device="simgpu").view(3, 4)
        assert x.device == torch.device("simgpu:0") and x.is_simgpu
        assert x[x > 5].tolist() == [6, 7, 8, 9, 10, 11]
        assert (x % 2 == 0).nonzero().shape == (6, 2)
        assert x.index_select(0, torch.tensor([2], device="simgpu")).tolist() == [[8, 9, 10, 11]]
        assert x.clone().scatter_add_(1, x[:, :1] * 0, x[:, 1:2]).tolist()[0] == [1, 1, 2, 3]
        assert F.embedding(x[0, :3], x).shape == (3, 4)
        out = torch.empty(0, dtype=torch.int64, device="simgpu")
        torch.add(x, x, out=out)
        assert out.unsqueeze_(0).shape == (1, 3, 4) and out.sum().item() == 132
        assert torch.tensor([1.5, 2], device="simgpu").to(torch.bfloat16).to("cpu").tolist() == [1.5, 2.0]
        x[0] = torch.tensor([7, 7, 7, 7])
        assert x[0].tolist() == [7] * 4


def test_modules_move_and_cast_and_copy():
    with simulated_device() as device:
        linear = torch.nn.Linear(4, 4)
        expected = linear.weight.detach().clone()
        linear.to("simgpu").to(torch.bfloat16)
        twin = copy.deepcopy(linear)
        assert isinstance(twin.weight, torch.nn.Parameter) and twin.weight.dtype == torch.bfloat16
        assert device.live_bytes == 4 * 512
        linear.weight.data = torch.zeros(2, 4, device="simgpu")
        assert (linear.weight + 1).tolist() == [[1.0] * 4] * 2
        assert torch.equal(twin.cpu().weight, expected.to(torch.bfloat16))


@pytest.mark.parametrize("mask", ["none", "causal", "bool", "additive"])
def test_attention_holds_no_scores(mask):
    tokens = 256
    options: dict = {"is_causal": mask == "causal"}
    if mask in ("bool", "additive"):
        options["attn_mask"] = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    if mask == "additive":
        options["attn_mask"] = torch.zeros(1, 1, tokens, tokens).masked_fill(~options["attn_mask"], float("-inf"))
    qkv = [torch.randn(1, 4, tokens, 8, requires_grad=True) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*qkv, **options)
    expected.sum().backward()
    with simulated_device() as device:
        theirs = [x.detach().to("simgpu").requires_grad_() for x in qkv]
        options = {k: v.to("simgpu") if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        before, device.memory.peak_bytes = device.live_bytes, 0
        result = F.scaled_dot_product_attention(*theirs, **options)
        result.sum().backward()
        scores_bytes = 4 * tokens * tokens * 4
        assert device.peak_bytes - before < (0.75 if mask == "bool" else 0.5) * scores_bytes
        assert torch.equal(result.cpu(), expected)
        assert all(torch.equal(x.grad.cpu(), y.grad) for x, y in zip(theirs, qkv))


# ------------------------------------------------------------------------------------------- bitsandbytes, optimizers


@pytest.mark.parametrize("double_quant", [False, True])
def test_quantization_is_that_of_the_cpu(double_quant):
    weight = torch.randn(64, 96)
    with simulated_device() as device:
        results = []
        for where in ("cpu", "simgpu"):
            linear = FrozenLinear(
                96, 64, bias=False, quantization="nf4", double_quant=double_quant, dtype=torch.bfloat16
            )
            linear.store(weight.to(where))
            results.append([linear.base_weight().cpu()] + [getattr(linear, name).cpu() for name in linear.stored])
        assert all(torch.equal(a, b) for a, b in zip(*results))
        assert device.live_bytes > 0


@pytest.mark.parametrize("build", [torch.optim.AdamW, bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.AdamW32bit])
def test_optimizer_steps_are_those_of_the_cpu(build):
    start, gradient = torch.randn(96, 64), torch.randn(96, 64)
    with simulated_device() as device:
        results = []
        for where in ("cpu", "simgpu"):
            parameter = torch.nn.Parameter(start.clone().to(where))
            optimizer = build([parameter], lr=0.1)
            for _ in range(3):
                parameter.grad = gradient.to(where)
                optimizer.step()
            results.append(parameter.detach().cpu())
        state_bytes = device.live_bytes - 2 * 4 * start.numel()
        assert torch.equal(*results) and (results[1] != start).all()
        assert state_bytes >= (2 if build is bitsandbytes.optim.AdamW8bit else 8) * start.numel()


# ------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
def test_a_copy_that_is_not_waited_for_is_poison_until_it_is(dtype):
    with simulated_device(on_race="poison"):
        side, host = torch.Stream(device="simgpu"), filled(3).to(dtype).pin_memory()
        with side:
            copied = host.to("simgpu", non_blocking=True)
            event = side.record_event()
        early = copied + 0
        main().wait_event(event)
        assert torch.equal(copied.cpu(), host)
        poison = torch.full((8 * host.element_size(),), 0xAA, dtype=torch.uint8).view(dtype)
        assert early.isnan().all().item() if dtype.is_floating_point else torch.equal(early.cpu(), poison)


@pytest.mark.parametrize("shapes_only", [False, True])
def test_a_copy_that_is_not_waited_for_raises(shapes_only):
    with simulated_device(shapes_only=shapes_only):
        side = torch.Stream(device="simgpu")
        with side:
            copied = filled(3, 4096).pin_memory().to("simgpu", non_blocking=True)
        view = copied[4:].view(-1, 2)  # looks at no values
        with pytest.raises(DeviceRaceError, match=r"aten.mul.*reads memory that stream \d+ may still be writing"):
            view * 2
        main().wait_stream(side)
        assert (view * 2).shape == (2046, 2)


@pytest.mark.parametrize("way", ["event.wait", "event.synchronize", "event.query", "stream", "device", "same stream"])
def test_every_way_of_waiting_makes_the_copy_land(way):
    with simulated_device():
        side = torch.Stream(device="simgpu")
        with side:
            copied = filled(3).pin_memory().to("simgpu", non_blocking=True)
            event = torch.Event(device="simgpu")
            event.record()
        waits = {
            "event.wait": lambda: event.wait(main()),
            "event.synchronize": event.synchronize,
            "event.query": event.query,
            "stream": side.synchronize,
            "device": torch.accelerator.synchronize,
            "same stream": lambda: torch.accelerator.set_stream(side),
        }
        waits[way]()
        assert copied.tolist() == [3.0] * 8
        torch.accelerator.set_stream(None)


def test_waiting_is_handed_on_through_a_third_stream():
    with simulated_device():
        reader, between = torch.Stream(device="simgpu"), torch.Stream(device="simgpu")
        with reader:
            copied = filled(3).pin_memory().to("simgpu", non_blocking=True)
        between.wait_stream(reader)
        main().wait_event(between.record_event())
        assert (copied + 1).tolist() == [4.0] * 8


def test_copies_that_are_not_late():
    with simulated_device():
        side = torch.Stream(device="simgpu")
        with side:
            from_unpinned = filled(3).to("simgpu", non_blocking=True)
            blocking = filled(4).pin_memory().to("simgpu")
        assert (from_unpinned + blocking).tolist() == [7.0] * 8  # the host waited for them


def test_a_slot_is_not_overwritten_while_it_may_still_be_read():
    with simulated_device():
        slot, side = filled(0).to("simgpu"), torch.Stream(device="simgpu")
        used = slot * 2
        with side, pytest.raises(DeviceRaceError, match=r"a copy to the device.*writes memory.*may still be reading"):
            slot.copy_(filled(1).pin_memory(), non_blocking=True)
        side.wait_stream(main())
        with side:
            slot.copy_(filled(1).pin_memory(), non_blocking=True)
        main().wait_stream(side)
        assert (used + slot).tolist() == [1.0] * 8


def test_a_slot_given_back_too_early_is_poisoned_again():
    with simulated_device(on_race="poison"):
        slot, side = filled(0).to("simgpu"), torch.Stream(device="simgpu")
        with side:
            slot.copy_(filled(1).pin_memory(), non_blocking=True)
        assert slot.isnan().all().item()


def test_slots_of_one_buffer_do_not_disturb_each_other():
    with simulated_device():
        ring, side = torch.zeros(2, 8, device="simgpu"), torch.Stream(device="simgpu")
        side.wait_stream(main())
        used = ring[0] + 1
        with side:
            ring[1].copy_(filled(5).pin_memory(), non_blocking=True)
        assert (used + ring[0]).tolist() == [1.0] * 8
        with pytest.raises(DeviceRaceError):
            ring.sum()


@pytest.mark.parametrize("remedy", ["none", "record_stream", "wait"])
def test_memory_freed_while_another_stream_uses_it_is_caught_when_it_is_handed_out_again(remedy):
    with simulated_device():
        side, host = torch.Stream(device="simgpu"), torch.empty(8, pin_memory=True)
        with owner("activations"):
            offloaded = torch.ones(8, device="simgpu")
        side.wait_stream(main())
        with side:
            host.copy_(offloaded, non_blocking=True)
        if remedy == "record_stream":
            offloaded.record_stream(side)
        del offloaded
        if remedy == "wait":
            main().wait_stream(side)
        if remedy == "none":
            with pytest.raises(DeviceRaceError, match=r"take the place of 512 freed ones of 'activations'"):
                torch.zeros(8, device="simgpu")
        else:
            torch.zeros(8, device="simgpu")
        side.synchronize()
        assert host.isnan().all() if remedy == "none" else host.tolist() == [1.0] * 8


def test_the_host_sees_a_late_copy_only_after_it_waited():
    with simulated_device() as device:
        x = torch.ones(8, device="simgpu")
        host = x.to("cpu", non_blocking=True)
        assert host.is_pinned() and device.pinned_bytes == 32
        assert host.isnan().all()
        torch.accelerator.synchronize()
        assert host.tolist() == [1.0] * 8


def test_what_was_offloaded_comes_back_on_the_same_stream_without_the_host_waiting():
    with simulated_device() as device:
        x, side = torch.arange(512.0, device="simgpu"), torch.Stream(device="simgpu")
        host = torch.empty(512, pin_memory=True)
        side.wait_stream(main())
        with side:
            host.copy_(x, non_blocking=True)
        x.record_stream(side)
        del x
        assert device.live_bytes == 0
        with side:
            back = host.to("simgpu", non_blocking=True)
        main().wait_stream(side)
        assert torch.equal((back + 0).cpu(), torch.arange(512.0))


@pytest.mark.parametrize("synchronize", [False, True])
def test_a_pinned_buffer_may_be_overwritten_only_when_the_host_knows(synchronize):
    with simulated_device():
        staging, side = filled(1).pin_memory(), torch.Stream(device="simgpu")
        with side:
            first = staging.to("simgpu", non_blocking=True)
        main().wait_stream(side)
        assert (first + 1).shape == (8,)  # landed, but the host does not know it
        if synchronize:
            side.synchronize()
        staging.fill_(2)
        with side:
            if synchronize:
                assert staging.to("simgpu", non_blocking=True).tolist() == [2.0] * 8
            else:
                with pytest.raises(DeviceRaceError, match=r"pinned source.*overwritten"):
                    staging.to("simgpu", non_blocking=True)
        staging.fill_(1 + synchronize)


def test_a_stream_object_is_entered_once_at_a_time():
    with simulated_device():
        side = torch.Stream(device="simgpu")
        with side, pytest.raises(RuntimeError, match="context should not be initialized"), side:
            pass
        with side:
            assert main() == side


def test_backward_runs_on_the_stream_of_its_caller():
    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            streams.append(main())
            return grad

    streams: list[torch.Stream] = []
    with simulated_device():
        side = torch.Stream(device="simgpu")
        with side:
            Seen.apply(torch.ones(3, device="simgpu").requires_grad_()).sum().backward()
        assert streams == [side] and main() != side


def test_a_reader_thread_fills_slots_while_the_main_thread_computes():
    with simulated_device() as device:
        side, blocks = torch.Stream(device="simgpu"), [filled(float(i)) for i in range(6)]
        slots, staging = torch.zeros(2, 8, device="simgpu"), torch.empty(2, 8, pin_memory=True)
        side.wait_stream(main())
        ready = [threading.Semaphore(0) for _ in blocks]
        free = [threading.Semaphore(1), threading.Semaphore(1)]
        filled_events, used_events, failures = {}, {}, []

        def read():
            try:
                for i, block in enumerate(blocks):
                    free[i % 2].acquire()
                    if i >= 2:
                        filled_events[i - 2].synchronize()  # the staging buffer is free
                        side.wait_event(used_events[i - 2])  # and so is the slot
                    staging[i % 2].copy_(block)
                    with side:
                        slots[i % 2].copy_(staging[i % 2], non_blocking=True)
                        filled_events[i] = side.record_event()
                    ready[i].release()
            except BaseException as problem:
                failures.append(problem)

        thread = threading.Thread(target=read)
        thread.start()
        total = torch.zeros(8, device="simgpu")
        for i in range(len(blocks)):
            assert ready[i].acquire(timeout=30), failures
            main().wait_event(filled_events[i])
            total += slots[i % 2]
            used_events[i] = main().record_event()
            free[i % 2].release()
        thread.join()
        assert not failures and total.tolist() == [15.0] * 8
        assert device.live_bytes == 1024


# ------------------------------------------------------------------------------------------- shapes only


def test_shapes_only_takes_no_memory_and_keeps_the_values_that_steer():
    with simulated_device(limit_bytes=1 << 50, shapes_only=True) as device:
        big = torch.empty(1 << 40, dtype=torch.bfloat16, device="simgpu")
        assert ((big + 1).sum().item(), device.peak_bytes) == (1.0, (2 << 41) + 512)
        ids = torch.tensor([[0, 1, 2, 0, 1]]).to("simgpu")
        assert (ids.diff() != 1).any().item() and not (ids > 2).any().item()
        assert torch.isfinite(big.sum()).item()
        assert big[:10][big[:10] > 0].shape == (10,)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 50, device="simgpu")


def test_shapes_only_touches_no_host_memory_either():
    def resident_bytes() -> int:
        return psutil.Process().memory_info().rss

    with simulated_device(shapes_only=True) as device:
        before = resident_bytes()
        blocks = [torch.empty(1 << 30, dtype=torch.uint8).pin_memory() for _ in range(4)]
        side = torch.Stream(device="simgpu")
        with side:
            slots = [block.to("simgpu", non_blocking=True) for block in blocks]
        main().wait_stream(side)
        offloaded = (slots[0] + slots[1]).to("cpu", non_blocking=True)
        assert device.live_bytes == device.pinned_bytes - offloaded.numel() == 4 << 30
        assert resident_bytes() - before < 64 << 20


def llama_70b(folder: Path, blocks: int) -> Base:
    """The shape of Llama-3-70B, or of some of its blocks: NF4 with double quantization, LoRA of rank 16."""
    config = folder / f"{blocks}.json"
    config.write_text(json.dumps(catalogue()["llama-3-70b"]["config"] | {"num_hidden_layers": blocks}))
    base = unfilled_base(Model(path=str(config)), "simgpu")
    inject(base, Adapter(dtype="bfloat16"), seed=0)
    attach(base, True)
    return base


def peak_of_a_70b_step(folder: Path, blocks: int, tokens: int = 2048) -> tuple[int, int]:
    """Bytes once loaded, and at the peak of forward and backward."""
    with simulated_device(shapes_only=True) as device:
        base = llama_70b(folder, blocks)
        loaded = device.live_bytes
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        batch = SimpleNamespace(input_ids=ids, position_ids=torch.arange(tokens)[None], targets=ids)
        batch_losses(base, [batch], chunk_tokens=256)[0].backward()
        return loaded, device.peak_bytes


def test_each_block_of_a_70b_adds_its_weights_and_one_kept_input(tmp_path):
    (loaded_2, peak_2), (loaded_3, peak_3) = (peak_of_a_70b_step(tmp_path, blocks) for blocks in (2, 3))
    assert (peak_3 - peak_2) - (loaded_3 - loaded_2) == 2048 * 8192 * 2
    weights = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert 0 < loaded_3 - loaded_2 - weights // 2 - weights // 64 < 8 << 20  # adapter, scales of the scales, norms


@pytest.mark.slow
def test_a_step_of_a_70b_takes_seconds_and_fits_where_its_weights_fit(tmp_path, capsys):
    started = time.monotonic()
    loaded, peak = peak_of_a_70b_step(tmp_path, 80)
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"70B, 2048 tokens: {loaded / 2**30:.2f} GiB loaded, {peak / 2**30:.2f} GiB at the peak, {seconds:.0f} s")
    assert 37 << 30 < loaded < peak < 42 << 30
    assert seconds < 60  # 15-20 s on one core
