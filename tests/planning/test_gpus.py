"""The catalogue of cards: rows that cannot be true are caught by what rates and sizes have to do with each other."""

from __future__ import annotations

import re

import pytest

from qlora_kit.planning.gpus import CARDS
from qlora_kit.planning.hardware import GIB, find_gpu


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_plausible_figures_and_is_found_by_its_name(name: str) -> None:
    card = CARDS[name]
    assert find_gpu(name.upper().replace("-", " ")).memory_bytes == card.memory_bytes
    assert 10 < card.teraflops < 3000 and 150 < card.gigabytes_s <= 8000
    assert 20 < card.teraflops * 1000 / card.gigabytes_s < 600  # operations for a byte
    assert card.pcie in {(generation, lanes) for generation in (3, 4, 5) for lanes in (8, 16)}
    boxed = re.search(r"-(\d+)gb$", name)
    assert boxed is None or 0.9 * int(boxed[1]) * GIB < card.memory_bytes < int(boxed[1]) * GIB


def test_only_cards_before_ampere_have_no_bf16() -> None:
    old = [name for name, card in CARDS.items() if not card.has_bf16]
    assert all(CARDS[name].pcie == (3, 16) for name in old)
    assert {"t4", "v100-32gb", "p100", "rtx-2080-ti"} <= set(old) and "a100-80gb" not in old


def test_geforce_cards_of_a_generation_are_faster_the_higher_their_number() -> None:
    for series in (("3060-12gb", "3070", "3080-10gb", "3090"), ("4060", "4070", "4080", "4090"), ("5060", "5070")):
        rates = [CARDS[f"rtx-{name}"].teraflops for name in series]
        assert rates == sorted(rates)
