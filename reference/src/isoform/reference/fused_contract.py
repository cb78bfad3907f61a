"""The contract of the fused operations: which calls are right.

Operands of LayerNorm, of bias and GeLU, and of bias, dropout and residual, are activations ``[...,
C]``, of any axes, and a number for each of C channels. All have one dtype and one device. Those of
the masked softmax are scores ``[B, H, Q, K]``, of B batch items, H heads, Q queries and K keys, and
a mask of bool.

Dropout is a function of a seed, so that it can be computed again, and tested. Of each element there
is a draw from 0 to 65535, and those below 65536 p are dropped; the rest is multiplied by the
inverse of the share of draws that are kept, exactly, so that the expectation is the operand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from isoform.reference.contract import FLOAT_DTYPES, check_arrays, check_scale, dtype_name

DRAWS = 65536
"""How many values a draw can have: probabilities are rounded to a multiple of 1/65536."""

APPROXIMATIONS = ("tanh", "none")
"""Forms of GeLU, by PyTorch's names: by the tangent, or by the error function."""

MULTIPLIERS, INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
"""Of Philox 4x32, the generator of the draws (Salmon et al., SC 2011)."""

VECTORS = ("weight", "bias")
"""The operands that are a number for each channel."""


def check_operands(operands: Mapping[str, Any], *, dtypes: Iterable[str] = FLOAT_DTYPES) -> None:
    """Check activations and vectors: the first operand says what the others have to be.

    Args:
        operands: By name, in order; those of :data:`VECTORS` are ``[C]``, all others ``[..., C]``.
        dtypes: Names of the dtypes to accept.

    Raises:
        TypeError: An operand is no array, or has the wrong dtype.
        ValueError: An operand has the wrong shape, or lies elsewhere than the first.
    """
    check_arrays(operands)
    (called, x), *others = operands.items()
    if dtype_name(x) not in (dtypes := tuple(dtypes)):
        raise TypeError(f"{called} must be one of {', '.join(dtypes)}, got {dtype_name(x)}")
    if len(x.shape) < 1:
        raise ValueError(f"{called} must have axes [..., C], got a number without axes")
    where = str(getattr(x, "device", "cpu"))
    for name, operand in others:
        if dtype_name(operand) != dtype_name(x):
            raise TypeError(
                f"{name} must be {dtype_name(x)}, the dtype of {called}, got {dtype_name(operand)}"
            )
        wanted = tuple(x.shape[-1:]) if name in VECTORS else tuple(x.shape)
        if tuple(operand.shape) != wanted:
            axes = f"[C] with C={x.shape[-1]}" if name in VECTORS else f"of shape {wanted}"
            raise ValueError(f"{name} must be {axes} of {called}, got shape {tuple(operand.shape)}")
        if (there := str(getattr(operand, "device", "cpu"))) != where:
            raise ValueError(f"{name} is on {there}, but {called} is on {where}")


def check_epsilon(epsilon: float) -> None:
    """Raise unless ``epsilon`` is a finite number above 0, so that no row is divided by 0."""
    if isinstance(epsilon, bool) or not isinstance(epsilon, Real):
        raise TypeError(f"epsilon must be a real number, got {type(epsilon).__name__}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be finite and above 0, got {epsilon}")


def check_approximate(approximate: str) -> None:
    """Raise ``ValueError`` unless it is one of :data:`APPROXIMATIONS`."""
    if approximate not in APPROXIMATIONS:
        known = ", ".join(APPROXIMATIONS)
        raise ValueError(f"approximate must be one of {known}, got {approximate!r}")


def threshold_of(p: float) -> int:
    """Of :data:`DRAWS` draws, how many are dropped.

    Raises:
        TypeError: p is no real number.
        ValueError: It is no probability.
    """
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"p must be a real number, got {type(p).__name__}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be from 0 to 1, got {p}")
    return round(DRAWS * float(p))


def check_seed(seed: Any) -> None:
    """Raise unless ``seed`` is an integer of 64 bits, with or without sign."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must have 64 bits, got {seed}")


SCORES = "B H Q K"
"""The axes of scores and of probabilities."""


def check_softmax(scores: Any, mask: Any, causal: bool, scale: float) -> None:
    """Check a call of the masked softmax.

    Args:
        scores: ``[B, H, Q, K]``, a float dtype.
        mask: None, or bool ``[B or 1, H or 1, Q or 1, K]``.
        causal: Whether a query attends to no key after it. Where Q is not K that is ambiguous, as
            in rule SEQ-2, and the mask has to say it.
        scale: A finite real number.

    Raises:
        TypeError: An operand is no array or has the wrong dtype, or another argument's type is
            wrong.
        ValueError: An operand's shape or device is wrong, causal is ambiguous, or the scale is not
            finite.
    """
    _check_scores("scores", scores)
    if mask is not None:
        check_arrays({"mask": mask})
        if dtype_name(mask) != "bool":
            raise TypeError(f"mask must be bool, got {dtype_name(mask)}")
        sizes = tuple(scores.shape)
        fits = len(mask.shape) == 4 and mask.shape[3] == sizes[3]
        if not fits or any(m not in (1, n) for m, n in zip(mask.shape[:3], sizes, strict=False)):
            B, H, Q, K = sizes
            raise ValueError(
                f"mask must be [B or 1, H or 1, Q or 1, K] with B={B}, H={H}, Q={Q}, K={K} of "
                f"scores, got shape {tuple(mask.shape)}"
            )
        where, there = (str(getattr(x, "device", "cpu")) for x in (scores, mask))
        if there != where:
            raise ValueError(f"mask is on {there}, but scores is on {where}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    Q, K = scores.shape[2:]
    if causal and Q != K:
        raise ValueError(f"causal needs as many queries as keys, got Q={Q} and K={K}: give a mask")
    _check_factor(scale)


def check_softmax_backward(dout: Any, probabilities: Any, scale: float) -> None:
    """Check a call of its backward, as :func:`check_softmax` does."""
    _check_scores("probabilities", probabilities)
    check_operands({"probabilities": probabilities, "dout": dout})
    _check_factor(scale)


def _check_scores(name: str, x: Any) -> None:
    check_operands({name: x})
    if len(x.shape) != 4:
        axes = ", ".join(SCORES.split())
        raise ValueError(f"{name} must have 4 axes [{axes}], got shape {tuple(x.shape)}")


def _check_factor(scale: float) -> None:
    if scale is None:
        raise TypeError("scale must be a real number, got NoneType")
    check_scale(scale)
