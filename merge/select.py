"""The exact k-th largest magnitude, of numbers that come in blocks and need not fit into memory.

A sample gives a bracket that almost surely holds the wanted number; one pass counts what lies above it and keeps what
lies inside (Floyd & Rivest 1975). Where the sample misled, or too much lies inside, two passes of counting by the bits
of the numbers find it (non-negative float32 are ordered as their bits are). Both are exact; memory is bounded.

n numbers, k of them kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SAMPLE = 1 << 16
"""Numbers in a sample."""
INSIDE = 1 << 24
"""Numbers that may lie in a bracket before counting is the better way."""
_LOW_BITS = 16
_SPREAD = (
    4.0  # standard errors of a sample's quantile on each side: missed once in some 10^4 draws, which costs time only
)


class Cut(NamedTuple):
    """Which magnitudes are kept: all above `value`, and by index the first `equals` of those equal to it.

    Attributes:
        value: a float32.
        equals: 0 wherever no tie has to be broken.
    """

    value: float
    equals: int


NOTHING_CUT = Cut(0.0, 0)
"""Keeps everything but zeros, which stay what they are."""


def kept(n: int, density: float) -> int:
    """How many of n numbers are kept at a density: ⌊density · n⌋ in double precision, and at least one of any.

    So no tensor is trimmed to nothing, a number alone least of all. peft and mergekit round down as well.

    >>> kept(10, 0.25), kept(3, 0.2), kept(1, 0.01), kept(0, 0.5)
    (2, 1, 1, 0)
    """
    return min(n, max(1, int(density * n)))


def cut(blocks: Callable[[], Iterable[Tensor]], n: int, k: int, sample: Tensor, *, draws: int | None = None) -> Cut:
    """The cut that keeps exactly the k largest of n magnitudes.

    Args:
        blocks: gives all magnitudes, float32 ≥ 0 and 1-d, in blocks that may be overwritten when the next is asked
            for; called once, or three times.
        n: how many there are.
        k: how many are kept, 0 < k <= n.
        sample: magnitudes drawn from them; the better it stands for all, the likelier one pass is enough.
        draws: how many independent draws the sample is worth; its length when None.
    """
    if k >= n:
        return NOTHING_CUT
    low, high = _bracket(sample, k / n, draws or len(sample))
    above, inside, size = 0, [], 0
    for block in blocks():
        numbers = block.numpy()  # whose comparisons are several times faster than torch's on a CPU
        above += int(np.count_nonzero(numbers > high))
        inside.append(torch.from_numpy(numbers[(numbers >= low) & (numbers <= high)]))
        size += len(inside[-1])
        if above >= k or size > INSIDE:
            return _by_counting(blocks, k)
    if above + size < k:
        return _by_counting(blocks, k)
    values = torch.cat(inside)
    value = _kth_largest(values, k - above)
    return _cut(value, k - above - int((values > value).sum()), int((values == value).sum()))


def _bracket(sample: Tensor, share: float, draws: int) -> tuple[float, float]:
    """Magnitudes between which the number of rank `share` from above lies, as far as a sample tells."""
    m = len(sample)
    if m == 0:
        return 0.0, float("inf")
    margin = _SPREAD * (share * (1 - share) / draws) ** 0.5 + 2 / draws
    first, last = int((share - margin) * m), int((share + margin) * m) + 1
    high = _kth_largest(sample, first) if first >= 1 else float("inf")
    low = _kth_largest(sample, last) if last <= m else 0.0
    return low, high


def _kth_largest(values: Tensor, k: int) -> float:
    return float(values.kthvalue(len(values) - k + 1).values)


def _cut(value: float, wanted: int, equal: int) -> Cut:
    """Of `equal` magnitudes that are `value`, `wanted` are kept."""
    if value == 0.0:
        return NOTHING_CUT
    if wanted < equal:
        return Cut(value, wanted)
    return Cut(float(torch.nextafter(torch.tensor(value), torch.tensor(0.0))), 0)


def _by_counting(blocks: Callable[[], Iterable[Tensor]], k: int) -> Cut:
    """The same by the upper bits of all numbers, then by the lower bits of those that share the upper ones."""
    counts = torch.zeros(1 << (31 - _LOW_BITS), dtype=torch.int64)
    for block in blocks():
        counts += torch.bincount(_bits(block) >> _LOW_BITS, minlength=len(counts))
    upper, k = _find(counts, k)
    counts = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)
    for block in blocks():
        bits = _bits(block)
        lower = bits[(bits >> _LOW_BITS) == upper] & ((1 << _LOW_BITS) - 1)
        counts += torch.bincount(lower, minlength=len(counts))
    lower_bits, k = _find(counts, k)
    value = torch.tensor((upper << _LOW_BITS) | lower_bits, dtype=torch.int32).view(torch.float32)
    return _cut(float(value), k, int(counts[lower_bits]))


def _bits(block: Tensor) -> Tensor:
    return block.contiguous().view(torch.int32)


def _find(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin in which the k-th number from above lies, and its rank from above in it."""
    from_above = counts.flip(0).cumsum(0)
    position = int((from_above < k).sum())
    before = int(from_above[position - 1]) if position else 0
    return len(counts) - 1 - position, k - before
