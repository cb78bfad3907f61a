r"""The frequencies of rotary embedding, and the ways in which they are scaled for longer contexts.

Rotary embedding turns pair i of a head's channels, at position p, by the angle p·ω_i, with d the
number of channels that are turned and ::

    ω_i = base^(−2i/d),   i = 0 … d/2 − 1                                 (Su et al., 2104.09864)

A model that was trained on positions up to L₀ meets angles beyond them that it has never seen. The
*scalings* here change ω so that it need not. Each is a frozen dataclass, made to be an argument of
:func:`isoform.reference.numpy.rotary_embedding`; what each does to ω stands in its docstring. Some
also multiply cosine and sine, and so q·k twice, by an *amplitude*. (Rule ROT-9.)

At position 2²¹ an error in ω counts two million times: what float64 loses in ω, some 10⁻¹⁶, is
then 10⁻¹⁰ in the angle. That would be enough, but where the cosine is small it is not a small part
of it. So ω is computed with :mod:`decimal` to 50 digits, and kept as the sum of two float64: *high*
with 32 significant bits, whose product with any position up to 2²¹ is exact, and *low*, the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from decimal import Decimal, localcontext
from functools import lru_cache
from numbers import Real
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

DIGITS = 50
"""Decimal digits that frequencies are computed to, before they are split."""

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")

HIGH_BITS = 32
"""Significant bits of the part of a frequency that is multiplied with positions exactly."""

Array = npt.NDArray[Any]


class Scaling(Protocol):
    """What is done to the frequencies.

    Attributes:
        name: What the field calls it.
    """

    name: ClassVar[str]

    def frequencies(self, d: int, base: Decimal) -> list[Decimal]:
        """ω_i for the d/2 pairs of d channels."""

    def fault(self, d: int) -> str | None:
        """What is wrong with using it for d channels; None where nothing is."""

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied with."""

    def __hash__(self) -> int: ...


class Frequencies(NamedTuple):
    """The frequencies of one call.

    Attributes:
        high: float64 ``[d/2]``, at most 32 significant bits.
        low: float64 ``[d/2]``; ω = high + low to more than 80 bits.
        amplitude: What cosine and sine are multiplied with.
    """

    high: Array
    low: Array
    amplitude: float


def unscaled(d: int, base: Decimal) -> list[Decimal]:
    """ω_i = base^(−2i/d)."""
    logarithm = base.ln()
    return [(-2 * i * logarithm / d).exp() for i in range(d // 2)]


class _Plain:
    """What most scalings have in common: any d will do, and nothing is multiplied."""

    def fault(self, d: int) -> str | None:
        return None

    @property
    def amplitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(_Plain):
    """Position interpolation: ω / factor, as if positions were closer together.

    Attributes:
        factor: How much longer the context becomes; at least 1.

    Raises:
        TypeError: The factor is no number.
        ValueError: It is below 1 or not finite.

    Source:
        Chen et al., arXiv 2306.15595, equation 4.
    """

    name: ClassVar[str] = "linear"

    factor: float

    def __post_init__(self) -> None:
        _check(self, factor=1)

    def frequencies(self, d: int, base: Decimal) -> list[Decimal]:
        """ω / factor."""
        return [w / Decimal(self.factor) for w in unscaled(d, base)]


@dataclass(frozen=True)
class DynamicNTK(_Plain):
    """A larger base, the more the sequence exceeds L₀: fast pairs keep their ω, slow ones lose. ::

        base' = base · (factor · length / L₀ − (factor − 1))^(d / (d − 2))     where length > L₀

    ``length`` is an argument and not the largest position seen: a shard, a packed segment or one
    step of generation does not see how long the sequence is, and all must turn alike.

    Attributes:
        factor: How much longer the context becomes; at least 1.
        original_length: L₀, the length that the model was trained on.
        length: The length of the whole sequence. Up to L₀ nothing is changed.

    Raises:
        TypeError: A factor is no number, or a length no integer.
        ValueError: The factor is below 1, or a length below 1.

    Source:
        Peng et al., arXiv 2309.00071, sections 3.1 (the base) and 3.3 (dynamic scaling).
    """

    name: ClassVar[str] = "dynamic"

    factor: float
    original_length: int
    length: int

    def __post_init__(self) -> None:
        _check(self, factor=1)

    def fault(self, d: int) -> str | None:
        """Two channels have one pair, with ω = 1 whatever the base."""
        return "rotary_dim must be at least 4 with DynamicNTK scaling" if d < 4 else None

    def frequencies(self, d: int, base: Decimal) -> list[Decimal]:
        """ω of the larger base."""
        factor = Decimal(self.factor)
        ratio = Decimal(max(self.length, self.original_length)) / self.original_length
        stretched = factor * ratio - (factor - 1)
        return unscaled(d, base * (stretched.ln() * d / (d - 2)).exp())


@dataclass(frozen=True)
class YaRN(_Plain):
    """Pairs that turn often within L₀ keep their ω, those that hardly turn have it divided, and
    between them there is a ramp over the index i. ::

        i(r)   = d · ln(L₀ / 2πr) / (2 ln base)          the pair that turns r times within L₀
        low    = max(⌊i(beta_fast)⌋, 0),   high = min(⌈i(beta_slow)⌉, d − 1)
        ramp_i = clamp((i − low) / (high − low), 0, 1)
        ω_i'   = (1 − ramp_i) · ω_i + ramp_i · ω_i / factor

    Where low and high meet, high is 0.001 more. Cosine and sine are multiplied by the attention
    factor, which makes up for logits that flatten over longer contexts.

    Attributes:
        factor: How much longer the context becomes; at least 1.
        original_length: L₀, the length that the model was trained on.
        beta_fast: Turns within L₀ from which a pair keeps its ω.
        beta_slow: Turns within L₀ up to which its ω is divided.
        attention_factor: The amplitude; None for 0.1 · ln(factor) + 1.
        truncate: Whether low and high are rounded outwards to whole pairs.

    Raises:
        TypeError: A factor is no number, a length no integer, or ``truncate`` no bool.
        ValueError: The factor is below 1, a length or a factor not positive, or beta_fast is less
            than beta_slow.

    Source:
        Peng et al., arXiv 2309.00071, sections 3.2 (the ramp) and 3.4 (the attention factor).
    """

    name: ClassVar[str] = "yarn"

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check(self, factor=1)
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast must not be less than beta_slow, got {self.beta_fast} and "
                f"{self.beta_slow}"
            )

    @property
    def amplitude(self) -> float:
        """The attention factor."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return 0.1 * math.log(self.factor) + 1

    def frequencies(self, d: int, base: Decimal) -> list[Decimal]:
        """The ramp between ω and ω / factor."""

        def pair(turns: float) -> Decimal:
            return d * (self.original_length / (2 * PI * Decimal(turns))).ln() / (2 * base.ln())

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = Decimal(math.floor(low)), Decimal(math.ceil(high))
        low = max(low, Decimal(0))
        high = max(min(high, Decimal(d - 1)), low)
        if low == high:
            high += Decimal("0.001")
        return [
            _between(w, w / Decimal(self.factor), (i - low) / (high - low))
            for i, w in enumerate(unscaled(d, base))
        ]


@dataclass(frozen=True)
class LongRoPE(_Plain):
    """Every ω divided by a factor of its own, found by search: one list for sequences up to L₀, and
    one for longer ones. ::

        ω_i' = ω_i / short_factors_i      where length ≤ L₀,      ω_i / long_factors_i elsewhere

    ``length`` is an argument for the reason that :class:`DynamicNTK` gives.

    Attributes:
        short_factors: A positive number for each of the d/2 pairs.
        long_factors: The same, for long sequences.
        original_length: L₀, the length that the model was trained on; at least 2.
        length: The length of the whole sequence.
        factor: How much longer the context becomes; only the amplitude depends on it.
        attention_factor: The amplitude; None for √(1 + ln(factor) / ln(L₀)).

    Raises:
        TypeError: A factor is no number, or a length no integer.
        ValueError: A factor is not positive, ``factor`` below 1, or a length too small.

    Source:
        Ding et al., arXiv 2402.13753; the amplitude is that of the Phi-3 models
        (arXiv 2404.14219).
    """

    name: ClassVar[str] = "longrope"

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_length: int
    length: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        for name in ("short_factors", "long_factors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # to be hashed
        _check(self, factor=1)
        if self.original_length < 2:
            raise ValueError(f"original_length must be at least 2, got {self.original_length}")

    def fault(self, d: int) -> str | None:
        """Every pair needs its factor."""
        for name in ("short_factors", "long_factors"):
            if (given := len(getattr(self, name))) != d // 2:
                return f"{name} must have rotary_dim / 2 = {d // 2} numbers, got {given}"
        return None

    @property
    def amplitude(self) -> float:
        """The attention factor."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def frequencies(self, d: int, base: Decimal) -> list[Decimal]:
        """ω over the factors of the list that applies."""
        long = self.length > self.original_length
        factors = self.long_factors if long else self.short_factors
        return [w / Decimal(f) for w, f in zip(unscaled(d, base), factors, strict=True)]


@dataclass(frozen=True)
class Llama3(_Plain):
    """Pairs with a short wavelength λ = 2π/ω keep their ω, those with a long one have it divided,
    and between them there is a ramp over 1/λ. ::

        keep_i = clamp((L₀ / λ_i − low) / (high − low), 0, 1)
        ω_i'   = keep_i · ω_i + (1 − keep_i) · ω_i / factor

    Attributes:
        factor: How much longer the context becomes; at least 1.
        original_length: L₀, the length that the model was trained on.
        low_freq_factor: Turns within L₀ up to which ω is divided.
        high_freq_factor: Turns within L₀ from which it is kept; more than low_freq_factor.

    Raises:
        TypeError: A factor is no number, or a length no integer.
        ValueError: The factor is below 1, a length or a factor not positive, or high_freq_factor
            is not more than low_freq_factor.

    Source:
        The reference code of the Llama 3.1 models.
    """

    name: ClassVar[str] = "llama3"

    factor: float = 8.0
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _check(self, factor=1)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be more than low_freq_factor, got {self.high_freq_factor} "
                f"and {self.low_freq_factor}"
            )

    def frequencies(self, d: int, base: Decimal) -> list[Decimal]:
        """The ramp between ω / factor and ω."""
        low, high = Decimal(self.low_freq_factor), Decimal(self.high_freq_factor)
        return [
            _between(
                w / Decimal(self.factor),
                w,
                (self.original_length * w / (2 * PI) - low) / (high - low),
            )
            for w in unscaled(d, base)
        ]


SCALINGS: dict[str, type[Any]] = {
    scaling.name: scaling for scaling in (Linear, DynamicNTK, YaRN, LongRoPE, Llama3)
}
"""Every scaling by its name."""

FIELDS = {name: tuple(field.name for field in fields(made)) for name, made in SCALINGS.items()}
"""The names of each scaling's arguments, in order."""


@lru_cache(maxsize=256)
def frequencies(rotary_dim: int, base: float, scaling: Scaling | None = None) -> Frequencies:
    """The frequencies of ``rotary_dim`` channels, exact to more than 80 bits.

    Args:
        rotary_dim: d, even.
        base: More than 1.
        scaling: What is done to them; None for nothing.

    Returns:
        The frequencies in two parts, read-only, and the amplitude.
    """
    compute: Callable[[int, Decimal], list[Decimal]] = scaling.frequencies if scaling else unscaled
    with localcontext() as context:
        context.prec = DIGITS
        parts = [_split(w) for w in compute(rotary_dim, Decimal(base))]
    high, low = np.array(parts, np.float64).reshape(-1, 2).T.copy()
    high.flags.writeable = low.flags.writeable = False
    return Frequencies(high, low, scaling.amplitude if scaling else 1.0)


def _split(w: Decimal) -> tuple[float, float]:
    """``w`` as a float64 of :data:`HIGH_BITS` significant bits, and the rest."""
    mantissa, exponent = math.frexp(float(w))
    high = math.ldexp(round(math.ldexp(mantissa, HIGH_BITS)), exponent - HIGH_BITS)
    return high, float(w - Decimal(high))


def _between(start: Decimal, end: Decimal, part: Decimal) -> Decimal:
    """The point between ``start`` (part ≤ 0) and ``end`` (part ≥ 1)."""
    part = min(max(part, Decimal(0)), Decimal(1))
    return (1 - part) * start + part * end


def _check(scaling: Any, **smallest: float) -> None:
    """Raise unless every length is an integer of at least 1, every flag a bool, and every factor a
    finite number, positive and not below what ``smallest`` says of it.
    """
    for field in fields(scaling):
        value = getattr(scaling, field.name)
        if field.name == "truncate":
            if not isinstance(value, bool):
                raise TypeError(f"truncate must be a bool, got {type(value).__name__}")
        elif field.name.endswith("length"):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{field.name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        elif value is not None:
            for number in value if isinstance(value, tuple) else (value,):
                _check_number(field.name, number, smallest.get(field.name))


def _check_number(name: str, number: Any, smallest: float | None) -> None:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} must be a real number, got {type(number).__name__}")
    if not 0 < float(number) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number}")
    if smallest is not None and float(number) < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {number}")
