"""What `auto` comes to: it fits, nothing better would, and no more is traded than must be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlora_kit.planning.hardware import Device
from qlora_kit.planning.planner import Plan, make_plan, plan_shapes
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.recipe import recipe_for_model

GIB = 2**30


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A host with 64 GiB free; `host["gib"] = 16` makes it another."""
    free = {"gib": 64}
    monkeypatch.setattr("qlora_kit.planning.decide.host_memory_bytes", lambda: free["gib"] * GIB)
    return free


def plan(model: str, *overrides: str, gib: float = 1000, device: str = "cuda") -> Plan:
    return make_plan(recipe_for_model(model, (f"train.device={device}", *overrides)), budget_bytes=int(gib * GIB))


def memory(made: Plan, *keys: str) -> tuple[object, ...]:
    return tuple(made.settings["memory"][key] for key in keys)


# ---------------------------------------------------------------------------------------------------- where things live


def test_what_fits_on_the_device_stays_there() -> None:
    made = plan("llama-2-7b", gib=23.5)
    assert (made.resident_blocks, made.streamed_blocks) == (32, 0)
    assert memory(made, "placement", "embeddings", "resident_blocks", "host_blocks") == ("device", "device", 32, 0)


def test_embedding_and_head_leave_first() -> None:
    on_device = plan("llama-3.1-8b", "memory.embeddings=device", gib=1000).peak_bytes
    made = plan("llama-3.1-8b", gib=on_device / GIB - 0.5)
    assert memory(made, "placement", "embeddings") == ("device", "host")
    assert made.fits


@pytest.mark.parametrize(("model", "gib"), [("llama-3.1-70b", 22.5), ("llama-2-7b", 3), ("qwen2.5-32b", 12)])
def test_auto_keeps_as_many_blocks_on_the_device_as_fit_and_streams_the_rest(model: str, gib: float) -> None:
    made = plan(model, gib=gib)
    decided = [f"memory.{key}={value}" for key, value in made.settings["memory"].items() if key != "budget"]
    one_more = plan(model, *decided, f"memory.resident_blocks={made.resident_blocks + 1}", gib=gib)
    assert made.streamed_blocks > 0
    assert made.peak_bytes <= 0.95 * made.budget_bytes < one_more.peak_bytes


def test_a_budget_below_what_a_card_has_is_used_up() -> None:
    shapes = model_shapes(*read_config("llama-3.1-70b"))
    card = Device("cuda", "card", int(22.5 * GIB), int(1.5 * GIB))
    made = plan_shapes(shapes, recipe_for_model("llama-3.1-70b", ["train.device=cuda"]), card)
    assert 22 * GIB < made.peak_bytes <= 22.5 * GIB


def test_blocks_on_the_host_are_counted_there() -> None:
    made = plan("llama-3.1-70b", "memory.embeddings=device", gib=22.5)
    assert memory(made, "placement", "host_blocks") == ("host", made.streamed_blocks)
    in_use = made.streamed_blocks * 33 * GIB / 80
    assert in_use < made.phases["train"].host_bytes < 1.1 * in_use  # pinned memory comes in powers of two


def test_embedding_and_head_on_the_host_are_counted_there() -> None:
    away, here = (plan("llama-3.1-70b", f"memory.embeddings={where}") for where in ("host", "device"))
    tables = 2 * 128256 * 8192 * 2
    assert away.phases["train"].host_bytes - here.phases["train"].host_bytes == 2 << 31  # powers of two
    assert here.components["base_unquantized"] - away.components["base_unquantized"] == tables


def test_what_the_host_cannot_hold_stays_on_disk(host: dict[str, int]) -> None:
    host["gib"] = 16
    made = plan("llama-3.1-70b", gib=22.5)
    assert memory(made, "placement") == ("disk",)
    assert 0 < made.host_blocks < made.streamed_blocks
    assert 0.75 * 16 * GIB < made.phases["train"].host_bytes <= 0.8 * 16 * GIB


def test_host_blocks_can_be_given() -> None:
    made = plan("llama-3.1-70b", "memory.placement=disk", "memory.host_blocks=7", gib=22.5)
    assert (made.host_blocks, memory(made, "host_blocks")) == (7, (7,))


def test_offloaded_inputs_take_their_part_of_the_host(host: dict[str, int]) -> None:
    host["gib"] = 40
    settings = ("memory.placement=disk", "memory.embeddings=device", "data.seq_len=4096")
    here, away = (
        plan("llama-3.1-70b", *settings, f"memory.activation_offload={at}", gib=16) for at in ("disk", "host")
    )
    assert away.host_blocks < here.host_blocks
    assert away.phases["train"].disk_bytes == 0 < here.phases["train"].disk_bytes


def test_streaming_everything_leaves_what_the_device_must_hold() -> None:
    least = ("memory.resident_blocks=0", "memory.micro_batches_together=1", "memory.keep_dequantized=false")
    made = plan("llama-3.1-70b", "memory.placement=disk", *least, gib=22.5)
    assert made.components["base_nf4"] == 0
    assert made.peak_bytes < 10 * GIB


def test_on_a_cpu_the_host_is_the_device() -> None:
    away = ("memory.placement=host", "memory.embeddings=host", "memory.activation_offload=host", "memory.host_blocks=3")
    made, resident = plan("llama-2-7b", *away, gib=20, device="cpu"), plan("llama-2-7b", gib=20, device="cpu")
    assert replace(made, room=resident.room) == resident  # `auto` may still go to disk
    assert memory(made, "placement", "embeddings", "activation_offload", "host_blocks") == (
        "device",
        "device",
        False,
        0,
    )


def test_on_a_cpu_the_disk_is_the_other_place() -> None:
    made = plan("llama-2-7b", gib=3, device="cpu")
    assert made.fits
    assert (memory(made, "placement"), made.host_blocks) == (("disk",), 0)
    assert made.phases["train"].host_bytes == 0


def test_if_nothing_fits_the_least_is_planned() -> None:
    made = plan("llama-3.1-70b", gib=2)
    assert not made.fits
    assert (made.resident_blocks, memory(made, "micro_batches_together")) == (0, (1,))


# ------------------------------------------------------------------------------------------------- what is left over


def test_as_few_blocks_are_recomputed_as_fit() -> None:
    auto = "memory.gradient_checkpointing=auto"
    made = plan("llama-2-7b", auto, gib=8)
    (recomputed,) = memory(made, "gradient_checkpointing")
    fewer = (f"memory.gradient_checkpointing={recomputed - 1}", "memory.keep_dequantized=false")
    one_fewer = plan("llama-2-7b", *fewer, gib=8)
    assert 0 < recomputed < 32
    assert made.peak_bytes <= 0.95 * 8 * GIB < one_fewer.peak_bytes
    assert memory(plan("llama-2-7b", auto, gib=80), "gradient_checkpointing") == (False,)
    assert memory(plan("llama-3.1-70b", auto, gib=10), "gradient_checkpointing") == (True,)


def test_true_stays_true() -> None:
    assert memory(plan("llama-2-7b", gib=80), "gradient_checkpointing") == (True,)


@pytest.mark.parametrize(
    ("settings", "keeps"),
    [
        ((), True),
        (("memory.gradient_checkpointing=false",), False),  # nothing is dequantized twice
        (("memory.gradient_checkpointing=false", "memory.micro_batches_together=2"), True),
        (("model.quantization=none",), False),
    ],
)
def test_weights_are_kept_dequantized_where_it_spares_something(settings: tuple[str, ...], keeps: bool) -> None:
    assert memory(plan("llama-2-7b", *settings, gib=80), "keep_dequantized") == (keeps,)


def test_weights_are_not_kept_dequantized_where_blocks_could_be_resident_instead() -> None:
    assert memory(plan("llama-3.1-70b", gib=22.5), "keep_dequantized") == (False,)


@pytest.mark.parametrize(("seq_len", "together"), [(256, 4), (1000, 2), (1024, 1), (4096, 1)])
def test_short_micro_batches_pass_resident_blocks_together(seq_len: int, together: int) -> None:
    made = plan("llama-2-7b", f"data.seq_len={seq_len}", gib=23.5)
    assert memory(made, "micro_batches_together") == (together,)


@pytest.mark.parametrize(("placement", "together"), [("host", 2), ("disk", 8)])
def test_a_fetch_is_shared_by_as_many_tokens_as_cover_it(placement: str, together: int) -> None:
    settings = (f"memory.placement={placement}", "memory.host_blocks=0", "data.seq_len=512")
    assert memory(plan("llama-2-7b", *settings, gib=6), "micro_batches_together") == (together,)


def test_groups_are_smaller_where_their_inputs_do_not_fit() -> None:
    settings = ("memory.placement=disk", "memory.host_blocks=0", "data.seq_len=512")
    small, large = (memory(plan("llama-2-7b", *settings, gib=gib), "micro_batches_together")[0] for gib in (2.2, 6))
    assert 1 <= small < large == 8


def test_a_group_that_is_given_stays() -> None:
    made = plan("llama-2-7b", "memory.micro_batches_together=3", gib=23.5)
    assert memory(made, "micro_batches_together") == (3,)
