"""One rule for "close": twice the error that the input's dtype makes by itself.

``max|out - ref64| <= 2 * max|low - ref64| + eps * max|ref64|`` and the same of root mean squares,
with ``low`` as truth.py makes it: exact angles, everything after them rounded to the input's
dtype. ``eps`` is one unit in the last place of that dtype; on CUDA it is at least the 1e-6 that
the package promises for cos and sin, since the hardware's fast sine is good to 2**-21.

``low`` sums in a few orders, and a processor in one of its own. Of n terms ``x`` added one by one
the partial sum ``s_k`` is rounded by an error of at most ``u |s_k|``; errors that are independent
and of no sign (Higham and Mary 2019) and uniform have the variance ``u**2 s_k**2 / 3``. A random
order draws without replacement, so that with ``S`` the sum and ``Q`` the sum of squares

    E s_k**2 = (k S / n)**2 + k (n - k) / (n - 1) * (Q / n - (S / n)**2)
    sum over k = 2 ... n of E s_k**2 = (n + 1) (2 S**2 + Q) / 6 - Q / n

since the first term is added to nothing; ``u**2 / 3`` times that is `variance_of_sum`. The truths
of attention and decoding carry it from scores and softmax to each element (`Expected.sums`), and
the largest of N such errors is sqrt(2 ln 2N) standard deviations. Where that is more than all of
``low``'s error, it takes the place of the second of the two. A rotation sums nothing.
"""

from __future__ import annotations

import math

import torch
from truth import Expected

PROMISED = 1e-6


def unit(out: torch.Tensor) -> float:
    eps = torch.finfo(out.dtype).eps
    return max(eps, PROMISED) if out.is_cuda else eps


def variance_of_sum(
    n: torch.Tensor | int, total: torch.Tensor, squares: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Of the error that n terms of that sum, and sum of squares, take from a random order."""
    u = torch.finfo(dtype).eps / 2
    return u * u / 3 * ((n + 1) * (2 * total * total + squares) / 6 - squares / n)


def assert_close(out: torch.Tensor, expected: Expected, name: str = "out") -> None:
    """Raise with the coordinates and values of the worst element where the rule is broken."""
    ref64, low, sums = expected
    assert out.shape == ref64.shape, f"{name}: shape {tuple(out.shape)}, not {tuple(ref64.shape)}"
    assert out.dtype == low.dtype, f"{name}: dtype {out.dtype}, not {low.dtype}"
    if out.numel() == 0:
        return
    eps = unit(out)
    got = out.detach().cpu().double()
    error, budget = (got - ref64).abs(), (low.double() - ref64).abs()
    deviations = math.sqrt(2 * math.log(2 * out.numel()))
    most = budget.max()
    allowed = most + torch.maximum(most, deviations * sums.max()) + eps * ref64.abs().max()
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), out.shape))
    assert error.flatten()[worst] <= allowed, (
        f"{name}: worst element at {at} of {tuple(out.shape)}: got {got[at]:.9g}, "
        f"expected {ref64[at]:.9g}, off by {error[at]:.3e}, allowed {allowed:.3e}; "
        f"{int((~(error <= allowed)).sum())} of {out.numel()} elements are off by more"
    )
    rms, rms_allowed = _rms(error), _rms(budget) + max(_rms(budget), _rms(sums)) + eps * _rms(ref64)
    assert rms <= rms_allowed, (
        f"{name}: root mean square error {rms:.3e}, allowed {rms_allowed:.3e}; "
        f"worst element at {at}: got {got[at]:.9g}, expected {ref64[at]:.9g}"
    )


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())
