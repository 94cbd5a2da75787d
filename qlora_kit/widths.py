"""How wide rows are made: few widths, since a CPU keeps kernels for each.

Why: oneDNN compiles a kernel for every new shape of a matrix product and keeps it, half a MiB for each: some 17 MiB for
each width of a training step. Imports nothing. Imported by: data, planning, training.
"""

PAD_MULTIPLE = 32  # tokens
WIDTHS_PER_OCTAVE = 4


def few_sizes(count: int) -> int:
    """The smallest of few sizes that is not less than `count`: multiples of 32; above 128, four to each doubling.

    A count above 128 is padded by a quarter at most.
    """
    if count < 1:
        return 0
    step = max(PAD_MULTIPLE, (1 << (count - 1).bit_length()) // (2 * WIDTHS_PER_OCTAVE))
    return -(-count // step) * step


def padded_width(longest: int, seq_len: int) -> int:
    """Positions of a batch whose longest row has so many tokens: one of `few_sizes`, never above seq_len."""
    return min(few_sizes(longest), seq_len)


def widths(seq_len: int) -> int:
    """How many widths rows of up to seq_len tokens can have."""
    width, count = 0, 0
    while width < seq_len:
        width, count = padded_width(width + 1, seq_len), count + 1
    return count
