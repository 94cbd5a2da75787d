"""fp64 to the dtype of a file, rounded to nearest as if at once.

Why: torch converts fp64 to fp16 through fp32, and a value that fp32 rounds onto the middle between two fp16 values is
then rounded a second time, wrongly in half of the cases: 6 weights in 10^5, where 0.5 ulp is the promise for all.
How: among the fp32 values those that lie on such a middle are found by their low bits, and those of them that are not
exact are moved by one fp32 step to the side where the exact value is. Source: Boldo & Melquiond 2008, "Emulation of FMA
and correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers 57(4).
Imported by: merge, audit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

DROPPED_BITS = {torch.float16: 13, torch.bfloat16: 16}  # of an fp32's mantissa


def round_once(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` (fp64, any shape, on the host) in `dtype`: to nearest, ties to even; what does not fit is infinite.

    Below fp16's normal range (6.1e-5) the middle lies at higher bits, and at most 1 value in 2^14 is rounded twice.
    """
    single = exact.float().contiguous()
    if dtype in DROPPED_BITS:
        _leave_middles(single.view(-1).numpy(), exact.reshape(-1).numpy(), DROPPED_BITS[dtype])
    return single.to(dtype)


def _leave_middles(single: np.ndarray, exact: np.ndarray, dropped: int) -> None:
    """Move what fp32 rounded onto the middle of two results back to its side of it; in place."""
    low = np.bitwise_and(single.view(np.uint32), (1 << dropped) - 1)
    (found,) = np.nonzero(np.equal(low, 1 << (dropped - 1)))
    middle, value = single[found], exact[found]
    towards = np.where(value > middle, np.inf, np.where(value < middle, -np.inf, middle)).astype(np.float32)
    single[found] = np.nextafter(middle, towards)
