"""How close two ways of computing the same thing must be. The one place: never loosened to let a test pass."""

from __future__ import annotations

import torch

NARROW, NARROW_GRADIENT, NARROW_SUM = 1e-2, 2e-2, 5e-2
"""Norm of the difference over norm of the expected tensor, where products are taken in bfloat16 throughout: for outputs
and states; for gradients; for those of the few numbers all positions share, sums that nearly cancel."""

RELATIVE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2.0**-7,  # one unit in the last place: for outputs that were rounded once, nothing else
}
"""Largest difference over largest magnitude of the expected tensor."""

NEGLIGIBLE = 1e-3
"""A gradient smaller than this share of the largest one is compared at that magnitude: below it, 1e-5 (1e-10) of it
is less than the rounding of the largest."""
