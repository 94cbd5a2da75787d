"""The catalogue of GPUs: memory as the driver hands it out, and the rates that times are estimated from.

Why: a plan is often made for a card that is not here. How: one row a card. Memory is `total_memory` as torch's
out-of-memory messages print it, rounded down to 0.1 GiB: less than the number on the box, since firmware, and error
correction where it is on, take their part. Rates are the vendor's datasheet and architecture whitepaper figures: dense
(no sparsity) tensor products in bf16 with fp32 sums, at boost clock; for cards without bf16 units in fp16. Cards with
several memory sizes carry the size in their name. Imports nothing heavy. Imported by planning/hardware and
planning/timing.
"""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """One card.

    Attributes:
        gib: what a driver hands to torch.
        teraflops: dense tensor products, 10**12 operations a second.
        gigabytes_s: bandwidth of its memory, 10**9 bytes a second.
        pcie: generation and lanes.
        has_bf16: whether its units multiply bf16; if not, `teraflops` is of fp16.
    """

    gib: float
    teraflops: float
    gigabytes_s: float
    pcie: tuple[int, int] = (4, 16)
    has_bf16: bool = True

    @property
    def memory_bytes(self) -> int:
        return int(self.gib * 2**30)


CARDS: dict[str, Card] = {
    # GeForce and Titan
    "rtx-2060-6gb": Card(5.7, 25.8, 336, (3, 16), has_bf16=False),
    "rtx-2070": Card(7.6, 29.9, 448, (3, 16), has_bf16=False),
    "rtx-2080": Card(7.6, 40.3, 448, (3, 16), has_bf16=False),
    "rtx-2080-ti": Card(10.7, 53.8, 616, (3, 16), has_bf16=False),
    "titan-rtx": Card(23.5, 130.5, 672, (3, 16), has_bf16=False),
    "rtx-3050-8gb": Card(7.6, 18.2, 224, (4, 8)),
    "rtx-3060-12gb": Card(11.7, 25.5, 360),
    "rtx-3060-ti": Card(7.6, 32.4, 448),
    "rtx-3070": Card(7.6, 40.6, 448),
    "rtx-3070-ti": Card(7.6, 43.5, 608),
    "rtx-3080-10gb": Card(9.6, 59.5, 760),
    "rtx-3080-12gb": Card(11.7, 61.3, 912),
    "rtx-3080-ti": Card(11.7, 68.2, 912),
    "rtx-3090": Card(23.5, 71.0, 936),
    "rtx-3090-ti": Card(23.5, 80.0, 1008),
    "rtx-4060": Card(7.6, 30.2, 272, (4, 8)),
    "rtx-4060-ti-8gb": Card(7.6, 44.1, 288, (4, 8)),
    "rtx-4060-ti-16gb": Card(15.5, 44.1, 288, (4, 8)),
    "rtx-4070": Card(11.6, 58.3, 504),
    "rtx-4070-super": Card(11.6, 71.0, 504),
    "rtx-4070-ti": Card(11.6, 80.2, 504),
    "rtx-4070-ti-super": Card(15.6, 88.2, 672),
    "rtx-4080": Card(15.6, 97.5, 717),
    "rtx-4080-super": Card(15.6, 104.4, 736),
    "rtx-4090": Card(23.5, 165.2, 1008),
    "rtx-5060": Card(7.5, 38.4, 448, (5, 8)),
    "rtx-5060-ti-8gb": Card(7.5, 47.4, 448, (5, 8)),
    "rtx-5060-ti-16gb": Card(15.4, 47.4, 448, (5, 8)),
    "rtx-5070": Card(11.5, 61.7, 672, (5, 16)),
    "rtx-5070-ti": Card(15.4, 87.9, 896, (5, 16)),
    "rtx-5080": Card(15.4, 112.6, 960, (5, 16)),
    "rtx-5090": Card(31.3, 209.5, 1792, (5, 16)),
    # workstations
    "quadro-rtx-6000": Card(22.1, 130.5, 672, (3, 16), has_bf16=False),
    "quadro-rtx-8000": Card(44.4, 130.5, 672, (3, 16), has_bf16=False),
    "rtx-a2000-12gb": Card(11.5, 31.9, 288),
    "rtx-a4000": Card(15.6, 76.7, 448),
    "rtx-a4500": Card(19.5, 94.6, 640),
    "rtx-a5000": Card(23.5, 111.1, 768),
    "rtx-a6000": Card(47.4, 154.8, 768),
    "rtx-2000-ada": Card(15.5, 48.0, 224, (4, 8)),
    "rtx-4000-ada": Card(19.5, 106.9, 360),
    "rtx-4500-ada": Card(23.5, 158.5, 432),
    "rtx-5000-ada": Card(31.4, 261.1, 576),
    "rtx-6000-ada": Card(47.4, 364.2, 960),
    "rtx-pro-6000": Card(94.9, 503.8, 1792, (5, 16)),
    # data centres
    "p100": Card(15.8, 18.7, 732, (3, 16), has_bf16=False),
    "v100-16gb": Card(15.7, 125.0, 900, (3, 16), has_bf16=False),
    "v100-32gb": Card(31.7, 125.0, 900, (3, 16), has_bf16=False),
    "t4": Card(14.5, 65.0, 320, (3, 16), has_bf16=False),
    "a2": Card(14.5, 18.0, 200, (4, 8)),
    "a10": Card(22.0, 125.0, 600),
    "a10g": Card(22.0, 70.0, 600),
    "a30": Card(23.4, 165.0, 933),
    "a40": Card(44.4, 149.7, 696),
    "l4": Card(22.0, 121.0, 300),
    "l40": Card(44.4, 181.0, 864),
    "l40s": Card(44.4, 362.0, 864),
    "a100-40gb": Card(39.3, 312.0, 1555),
    "a100-80gb": Card(79.1, 312.0, 1935),
    "h100": Card(79.1, 989.0, 3350, (5, 16)),
    "h100-pcie": Card(79.1, 756.0, 2000, (5, 16)),
    "h100-nvl": Card(93.0, 835.0, 3900, (5, 16)),
    "h200": Card(139.7, 989.0, 4800, (5, 16)),
    "h20": Card(95.0, 148.0, 4000, (5, 16)),
    "b200": Card(178.3, 2250.0, 8000, (5, 16)),
}
