"""What was kept comes back with every bit; the device, host memory and file hold what the module says they do."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import threading
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qlora_kit.errors import DiskError
from qlora_kit.profiling.simulated_device import simulated_device
from qlora_kit.training.offload import input_store

HIDDEN = 64
AWAY = [("disk", "cpu"), ("host", "simgpu"), ("disk", "simgpu")]
EVERYWHERE = [("device", "cpu"), ("host", "cpu"), ("device", "simgpu"), *AWAY]


@contextlib.contextmanager
def store_on(tier, device, folder):
    """A store, and the simulated device where it is on one."""
    with simulated_device() if device == "simgpu" else contextlib.nullcontext() as simulated:
        yield input_store(tier, torch.device(device), folder), simulated


def random_input(tokens: int, seed: int, dtype=torch.bfloat16) -> torch.Tensor:
    """On the CPU, [1, tokens, HIDDEN]; every pattern of bits, NaNs too."""
    drawn = torch.randint(0, 256, (1, tokens, HIDDEN * dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8).view(dtype)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    same = found.shape == expected.shape and found.dtype == expected.dtype
    return same and torch.equal(found.cpu().contiguous().view(torch.uint8), expected.view(torch.uint8))


def step(store, device, depth, lengths, seed=0, stop_after=None):
    """Forward keeps `depth` inputs of each micro-batch, backward takes them from the last block on, one ahead."""
    order = [(block, micro) for block in range(depth) for micro in range(len(lengths))]
    kept = {}
    for block, micro in order:
        hidden = random_input(lengths[micro], seed + 1000 * block + micro).to(device)
        kept[block, micro] = store.keep(hidden)
        hidden = hidden + 1  # the block
        del hidden
    backward = [(block, micro) for block in reversed(range(depth)) for micro in range(len(lengths))]
    for number, (block, micro) in enumerate(backward):
        if number == stop_after:
            raise FloatingPointError("in the middle of a step")
        hidden = store.take(kept.pop((block, micro)))
        if number + 1 < len(backward):
            store.prefetch(kept[backward[number + 1]])
        hidden = hidden.clone()  # the block's; memory of its own
        assert same_bits(hidden, random_input(lengths[micro], seed + 1000 * block + micro)), (block, micro)


# ------------------------------------------------------------------------------------------------ every bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tier", "device"), EVERYWHERE)
def test_random_interleavings_give_back_every_bit(tier, device, dtype, tmp_path):
    chosen, open_handles, taken = random.Random(3), [], 0
    with store_on(tier, device, tmp_path) as (store, _):
        for number in range(400):
            action = chosen.choice(["keep", "keep", "prefetch", "take", "drop"])
            if action == "keep" and len(open_handles) < 24:
                expected = random_input(32 * chosen.randint(1, 5), number, dtype)
                open_handles.append((store.keep(expected.to(device)), expected))
                torch.full_like(expected, 7, device=device)  # takes the place of memory that was freed too early
            elif open_handles and action != "keep":
                at = chosen.randrange(len(open_handles))
                if action == "prefetch":
                    store.prefetch(open_handles[at][0])
                    continue
                handle, expected = open_handles.pop(at)
                if action == "take":
                    taken += 1
                    assert same_bits(store.take(handle).clone(), expected)
        assert taken > 50


@pytest.mark.parametrize("lengths", [[32], [96, 32], [32, 160, 64, 96]], ids=len)
@pytest.mark.parametrize(("tier", "device"), EVERYWHERE)
def test_steps_with_several_micro_batches_give_back_every_bit(tier, device, lengths, tmp_path):
    with store_on(tier, device, tmp_path) as (store, _):
        for number in range(3):
            step(store, device, 6, lengths, seed=10_000 * number)
            lengths = [32 + length for length in reversed(lengths)]


@pytest.mark.parametrize(("tier", "device"), AWAY)
def test_an_input_that_is_not_contiguous_comes_back_so(tier, device, tmp_path):
    with store_on(tier, device, tmp_path) as (store, _):
        expected = random_input(HIDDEN, 0)
        handles = [store.keep(expected.to(device).transpose(1, 2)) for _ in range(5)]
        for handle in handles:
            found = store.take(handle)
            assert found.is_contiguous() and same_bits(found, expected.transpose(1, 2).contiguous())


def test_what_comes_back_has_no_graph(tmp_path):
    with store_on("host", "cpu", tmp_path) as (store, _):
        hidden = torch.ones(1, 32, 4, requires_grad=True) * 2
        assert hidden.grad_fn is not None and store.take(store.keep(hidden)).grad_fn is None


@pytest.mark.parametrize(("tier", "device"), EVERYWHERE)
def test_a_handle_is_spent_once(tier, device, tmp_path):
    with store_on(tier, device, tmp_path) as (store, _):
        kept = store.keep(torch.ones(1, 32, 4, device=device))
        store.take(kept)
        store.prefetch(kept)
        with pytest.raises(ValueError, match="taken before"):
            store.take(kept)


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("tier", "device"), [("device", "cpu"), ("host", "cpu"), ("device", "simgpu")])
def test_where_nothing_is_away_the_tensor_itself_is_kept_and_freed_with_its_handle(tier, device, tmp_path):
    with store_on(tier, device, tmp_path) as (store, _):
        hidden = torch.ones(1, 32, 4, device=device)
        storage, kept = StorageWeakRef(hidden.untyped_storage()), store.keep(hidden)
        assert store.take(kept).untyped_storage()._cdata == hidden.untyped_storage()._cdata
        kept = store.keep(hidden)
        del hidden
        assert not storage.expired()
        del kept
        assert storage.expired() and store.away_bytes == 0


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_device_memory_does_not_grow_with_the_number_of_inputs(tier, tmp_path):
    size_bytes = 256 * HIDDEN * 2
    for depth in (3, 12, 48):
        with store_on(tier, "simgpu", tmp_path) as (store, device):
            step(store, "simgpu", depth, [256])
            # The caller's input, the one that leaves or comes, and what the block makes.
            assert device.peak_bytes == 3 * size_bytes
            assert device.live_bytes == 0
    with store_on("device", "simgpu", tmp_path) as (store, device):
        step(store, "simgpu", 48, [256])
        assert device.peak_bytes >= 48 * size_bytes


def test_on_the_cpu_two_inputs_are_in_memory_beside_the_callers(tmp_path):
    with store_on("disk", "cpu", tmp_path) as (store, _):
        storages, kept = [], []
        for seed in range(10):
            hidden = random_input(32, seed)
            storages.append(StorageWeakRef(hidden.untyped_storage()))
            kept.append(store.keep(hidden))
            del hidden
            assert [storage.expired() for storage in storages[-3:]] == [True, False, False][-len(storages) :]


def test_pinned_memory_is_that_of_one_step_and_used_again(tmp_path):
    for tokens in (96, 160, 352, 512):
        with store_on("host", "simgpu", tmp_path) as (store, device):
            pinned_bytes = set()
            for number in range(3):
                step(store, "simgpu", 10, [tokens] * 3, seed=number)
                pinned_bytes.add(device.pinned_bytes)
            assert pinned_bytes == {store.away_bytes}
            assert 30 <= store.away_bytes / (tokens * HIDDEN * 2) <= 1.25 * 30 + 8


def test_pinned_memory_is_bounded_where_lengths_vary(tmp_path):
    lengths = random.Random(0)
    with store_on("host", "simgpu", tmp_path) as (store, _):
        for longest in range(1, 17):
            step(store, "simgpu", 10, [32 * longest, 32 * longest, 32 * lengths.randint(1, longest)])
            assert store.away_bytes <= (1.6 * 30 + 8) * 32 * longest * HIDDEN * 2


@pytest.mark.parametrize("device", ["cpu", "simgpu"])
def test_the_file_is_as_long_as_one_step_needs_and_has_no_name(device, tmp_path):
    with store_on("disk", device, tmp_path) as (store, simulated):
        for number in range(5):
            step(store, device, 10, [96, 64], seed=number)
            assert 18 * 64 * HIDDEN * 2 < store.away_bytes <= 10 * (96 + 64) * HIDDEN * 2
        assert list(tmp_path.iterdir()) == []
        assert simulated is None or simulated.pinned_bytes <= 128 * HIDDEN * 2  # a power of two


# ------------------------------------------------------------------------------------------------ ends


@pytest.mark.parametrize(("tier", "device"), AWAY)
def test_a_step_that_ends_in_the_middle_leaves_its_room_to_the_next(tier, device, tmp_path):
    with store_on(tier, device, tmp_path) as (store, simulated):
        step(store, device, 8, [64, 96])
        taken_bytes = store.away_bytes
        for number in range(0, 16, 3):
            with pytest.raises(FloatingPointError):
                step(store, device, 8, [64, 96], seed=number, stop_after=number)
            gc.collect()
            assert simulated is None or simulated.live_bytes <= 2 * 96 * HIDDEN * 2
        step(store, device, 8, [64, 96])
        assert store.away_bytes == taken_bytes
        assert simulated is None or simulated.live_bytes == 0


@pytest.mark.parametrize(("tier", "device"), AWAY)
def test_a_store_that_is_let_go_with_copies_under_way_leaves_no_trace(tier, device, tmp_path):
    before = set(threading.enumerate())
    with store_on(tier, device, tmp_path) as (store, simulated):
        threads = set(threading.enumerate()) - before
        kept = [store.keep(random_input(32, seed).to(device)) for seed in range(4)]
        store.prefetch(kept[0])
        del store, kept
        hidden = [torch.ones(1, 32, HIDDEN, dtype=torch.bfloat16, device=device) for _ in range(4)]
        for thread in threads:
            thread.join(timeout=10)
        if simulated is not None:
            torch.accelerator.synchronize()
            assert simulated.live_bytes == 4 * 32 * HIDDEN * 2
        assert all(bool((tensor == 1).all()) for tensor in hidden)


def test_a_store_that_is_let_go_ends_its_thread_and_closes_its_file(tmp_path):
    before = set(threading.enumerate())
    store = input_store("disk", torch.device("cpu"), tmp_path)
    (thread,) = set(threading.enumerate()) - before
    file = Path(f"/proc/self/fd/{store._tier._file.fileno()}")
    kept = store.keep(torch.ones(1, 32, 4))
    assert str(file.readlink()).startswith(str(tmp_path))
    del store
    thread.join(timeout=10)
    assert not thread.is_alive() and kept.place is not None
    assert not file.exists() or not str(file.readlink()).startswith(str(tmp_path))


# ------------------------------------------------------------------------------------------------ errors


@contextlib.contextmanager
def files_limited_to(limit_bytes: int):
    """The kernel refuses to write beyond: EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("device", ["cpu", "simgpu"])
def test_a_full_disk_is_an_error_that_names_the_folder_and_the_way_out_and_passes(device, tmp_path):
    with store_on("disk", device, tmp_path) as (store, _):
        with files_limited_to(4 << 14):
            with pytest.raises(DiskError, match=r"cannot hold .* 64.0 KiB so far: File too large; .*=host") as error:
                step(store, device, 10, [128])
            assert str(tmp_path) in str(error.value)
            del error
            step(store, device, 4, [128])
        gc.collect()
        step(store, device, 10, [128])


@pytest.mark.parametrize("device", ["cpu", "simgpu"])
def test_a_file_cut_short_is_an_error_where_the_input_is_taken(device, tmp_path):
    with store_on("disk", device, tmp_path) as (store, _):
        kept = [store.keep(random_input(128, seed).to(device)) for seed in range(4)]
        for seed in (3, 2):  # all is written then
            assert same_bits(store.take(kept[seed]), random_input(128, seed))
        os.truncate(f"/proc/self/fd/{store._tier._file.fileno()}", 20_000)
        store.prefetch(kept[1])
        with pytest.raises(DiskError, match="the file ends too early"):
            store.take(kept[1])
        assert same_bits(store.take(kept[0]), random_input(128, 0))


def test_a_folder_that_cannot_be_written_is_an_error_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        input_store("disk", torch.device("cpu"), tmp_path / "file")
