"""Frequencies and their scalings: to 80 bits, and against the library that most models run with."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest
from mpmath import mpf
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from isoform.reference.rotary_scaling import (
    HIGH_BITS,
    PI,
    SCALINGS,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    YaRN,
    frequencies,
)

Array = Any


def whole(rotary_dim: int, base: float, scaling: Any = None) -> Array:
    high, low, _ = frequencies(rotary_dim, base, scaling)
    return high + low


# Frequencies


@pytest.mark.parametrize("base", [1.5, 1e4, 5e5, 1e11])
@pytest.mark.parametrize("d", [2, 64, 80, 256])
def test_two_parts_are_exact_to_80_bits(d: int, base: float) -> None:
    found = frequencies(d, base)
    with mpmath.workdps(50):
        for i, (high, low) in enumerate(zip(found.high, found.low, strict=True)):
            exact = mpf(base) ** (mpf(-2 * i) / d)
            assert abs(mpf(float(high)) + mpf(float(low)) - exact) < exact * mpf(2) ** -80
    assert found.amplitude == 1


@pytest.mark.parametrize("scaling", [None, Linear(3.0), YaRN(7.0, 4096), Llama3()])
def test_the_first_part_times_a_position_is_exact(scaling: Any) -> None:
    high, low, _ = frequencies(128, 5e5, scaling)
    assert (np.abs(low) <= high * 2.0**-HIGH_BITS).all()
    for p in (2**21 - 1, 2**21, 1234567):
        assert all(Fraction(w) * p == Fraction(w * p) for w in high.tolist())


def test_pi_has_more_digits_than_are_used() -> None:
    with mpmath.workdps(70):
        assert abs(mpf(str(PI)) - mpmath.pi) < mpf(10) ** -55


def test_frequencies_are_kept_and_cannot_be_written_to() -> None:
    found = frequencies(64, 1e4, YaRN(4.0, 4096))
    assert frequencies(64, 1e4, YaRN(4.0, 4096)) is found
    with pytest.raises(ValueError, match="read-only"):
        found.high[0] = 1


# Against transformers

ORIGINAL = 4096
RISING = tuple(1.05**i for i in range(32))
STEEP = tuple(1.15**i for i in range(32))
SAME: dict[str, tuple[Any, dict[str, Any], int | None]] = {
    # ours; the same in the words of a model's configuration; the length it is asked for
    "linear": (Linear(8.0), {"factor": 8.0}, None),
    "dynamic": (DynamicNTK(4.0, ORIGINAL, 16384), {"factor": 4.0}, 16384),
    "dynamic-short": (DynamicNTK(4.0, ORIGINAL, 1000), {"factor": 4.0}, 1000),
    "yarn": (YaRN(16.0, ORIGINAL), {"factor": 16.0}, None),
    "yarn-1": (YaRN(1.0, ORIGINAL), {"factor": 1.0}, None),
    "yarn-betas": (
        YaRN(40.0, ORIGINAL, beta_fast=64.0, beta_slow=2.0),
        {"factor": 40.0, "beta_fast": 64.0, "beta_slow": 2.0},
        None,
    ),
    "yarn-attention-factor": (
        YaRN(16.0, ORIGINAL, attention_factor=1.25),
        {"factor": 16.0, "attention_factor": 1.25},
        None,
    ),
    "yarn-untruncated": (
        YaRN(16.0, ORIGINAL, truncate=False),
        {"factor": 16.0, "truncate": False},
        None,
    ),
    "longrope-short": (
        LongRoPE(RISING, STEEP, ORIGINAL, ORIGINAL, factor=32.0),
        {"factor": 32.0, "short_factor": list(RISING), "long_factor": list(STEEP)},
        ORIGINAL,
    ),
    "longrope-long": (
        LongRoPE(RISING, STEEP, ORIGINAL, ORIGINAL + 1, factor=32.0),
        {"factor": 32.0, "short_factor": list(RISING), "long_factor": list(STEEP)},
        ORIGINAL + 1,
    ),
    "longrope-attention-factor": (
        LongRoPE(RISING, STEEP, ORIGINAL, 1, attention_factor=1.5),
        {
            "factor": 1.0,
            "attention_factor": 1.5,
            "short_factor": list(RISING),
            "long_factor": list(STEEP),
        },
        1,
    ),
    "llama3": (
        Llama3(8.0, ORIGINAL, low_freq_factor=1.0, high_freq_factor=4.0),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        None,
    ),
}


@pytest.mark.parametrize("base", [1e4, 5e5])
@pytest.mark.parametrize(("D", "part"), [(64, 1.0), (128, 0.5)])
@pytest.mark.parametrize("name", SAME)
def test_as_in_transformers(name: str, D: int, part: float, base: float) -> None:
    """Theirs is float32: the exponent alone loses 2⁻²⁴ · ln(base), and ramps their part."""
    ours, words, length = SAME[name]
    parameters = {"rope_type": ours.name, "rope_theta": base, "partial_rotary_factor": part}
    if ours.name not in ("linear", "dynamic"):
        parameters["original_max_position_embeddings"] = ORIGINAL
    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=1,
        head_dim=D,
        max_position_embeddings=ORIGINAL,
        rope_parameters=parameters | words,
    )
    theirs, amplitude = ROPE_INIT_FUNCTIONS[ours.name](config, "cpu", seq_len=length)
    found = whole(int(D * part), base, ours)
    np.testing.assert_allclose(found, theirs.double().numpy(), rtol=3e-6)
    assert ours.amplitude == pytest.approx(amplitude, rel=1e-12)


def test_every_scaling_is_compared() -> None:
    assert {ours.name for ours, _, _ in SAME.values()} == SCALINGS.keys()
    assert {*SCALINGS, "proportional"} == ROPE_INIT_FUNCTIONS.keys()  # which is partial turning


@pytest.mark.parametrize("name", sorted({*SAME} - {"dynamic-short", "yarn-1"}))
def test_the_comparison_would_see_a_scaling_that_is_left_out(name: str) -> None:
    changed = np.abs(whole(64, 1e4, SAME[name][0]) / whole(64, 1e4) - 1)
    assert changed.max() > 1e-2


# What a scaling does


def test_linear_divides() -> None:
    np.testing.assert_allclose(whole(64, 1e4, Linear(8.0)), whole(64, 1e4) / 8, rtol=1e-15)


def test_dynamic_changes_nothing_up_to_the_original_length() -> None:
    for length in (1, 2047, 2048):
        np.testing.assert_array_equal(whole(64, 1e4, DynamicNTK(4.0, 2048, length)), whole(64, 1e4))
    longer = whole(64, 1e4, DynamicNTK(4.0, 2048, 2049))
    assert longer[0] == 1
    assert (longer[1:] < whole(64, 1e4)[1:]).all()


def test_dynamic_reaches_the_last_pair_by_the_factor() -> None:
    """At factor 1 the last wavelength grows as the length does: hence the exponent."""
    stretched = whole(64, 1e4, DynamicNTK(1.0, 2048, 8192))
    assert stretched[-1] == pytest.approx(whole(64, 1e4)[-1] / 4, rel=1e-14)


@pytest.mark.parametrize("scaling", [YaRN(16.0, 8192), Llama3(16.0, 8192)])
def test_fast_pairs_are_kept_and_slow_ones_divided(scaling: Any) -> None:
    plain = whole(128, 5e5)
    ratio = whole(128, 5e5, scaling) / plain
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(1 / 16, rel=1e-14)
    assert (np.diff(ratio) <= 1e-15).all()
    assert ((ratio > 0.1) & (ratio < 0.9)).any()  # a ramp between them


def test_llama3_by_wavelength() -> None:
    scaling, plain = Llama3(), whole(128, 5e5)
    turns = scaling.original_length * plain / (2 * np.pi)
    ratio = whole(128, 5e5, scaling) / plain
    assert (ratio[turns >= 4] == 1).all()
    np.testing.assert_allclose(ratio[turns <= 1], 1 / 8, rtol=1e-14)


def test_yarn_where_the_ramp_has_no_length() -> None:
    """So short an original length that every pair turns less than once: all are divided."""
    ratio = whole(64, 1e4, YaRN(4.0, 1)) / whole(64, 1e4)
    np.testing.assert_allclose(ratio[1:], 1 / 4, rtol=1e-14)


def test_longrope_turns_to_the_other_list_beyond_the_original_length() -> None:
    scaling = LongRoPE((1.0, 2.0), (4.0, 8.0), 100, 100)
    np.testing.assert_allclose(whole(4, 1e4) / whole(4, 1e4, scaling), [1, 2], rtol=1e-14)
    longer = replace(scaling, length=101)
    np.testing.assert_allclose(whole(4, 1e4) / whole(4, 1e4, longer), [4, 8], rtol=1e-14)


def test_amplitudes() -> None:
    assert Linear(8.0).amplitude == DynamicNTK(4.0, 1, 2).amplitude == Llama3().amplitude == 1
    assert YaRN(1.0, 4096).amplitude == 1
    assert YaRN(np.e, 4096).amplitude == pytest.approx(1.1)
    assert YaRN(4.0, 4096, attention_factor=2).amplitude == 2
    assert LongRoPE((), (), 4096, 1).amplitude == 1
    assert LongRoPE((), (), 4096, 1, factor=4096.0).amplitude == pytest.approx(2**0.5)


# Made wrongly


def test_a_scaling_is_a_value() -> None:
    one = LongRoPE([1.0, 2.0], [3.0, 4.0], 64, 128)  # type: ignore[arg-type]
    assert one == LongRoPE((1.0, 2.0), (3.0, 4.0), 64, 128)
    assert len({one, replace(one), replace(one, length=64)}) == 2
    with pytest.raises(FrozenInstanceError):
        one.length = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "raises", "said"),
    [
        (lambda: Linear(0.5), ValueError, "factor must be at least 1, got 0.5"),
        (lambda: Linear(float("nan")), ValueError, "factor must be positive and finite, got nan"),
        (lambda: Linear(float("inf")), ValueError, "factor must be positive and finite"),
        (lambda: Linear("8"), TypeError, "factor must be a real number, got str"),
        (lambda: Linear(True), TypeError, "factor must be a real number, got bool"),
        (lambda: DynamicNTK(4.0, 0, 1), ValueError, "original_length must be at least 1, got 0"),
        (lambda: DynamicNTK(4.0, 1, -1), ValueError, "length must be at least 1, got -1"),
        (
            lambda: DynamicNTK(4.0, 2048.0, 1),
            TypeError,
            "original_length must be an int, got float",
        ),
        (lambda: YaRN(4.0, 1, beta_fast=1, beta_slow=2), ValueError, "beta_fast must not be less"),
        (lambda: YaRN(4.0, 1, beta_slow=0), ValueError, "beta_slow must be positive"),
        (
            lambda: YaRN(4.0, 1, attention_factor=-1),
            ValueError,
            "attention_factor must be positive",
        ),
        (lambda: YaRN(4.0, 1, truncate=1), TypeError, "truncate must be a bool, got int"),
        (lambda: LongRoPE((0.0,), (1.0,), 2, 2), ValueError, "short_factors must be positive"),
        (lambda: LongRoPE((1.0,), ("1",), 2, 2), TypeError, "long_factors must be a real number"),
        (lambda: LongRoPE((1.0,), (1.0,), 1, 2), ValueError, "original_length must be at least 2"),
        (lambda: Llama3(high_freq_factor=1.0), ValueError, "high_freq_factor must be more than"),
        (lambda: Llama3(original_length=True), TypeError, "original_length must be an int"),
    ],
)
def test_what_is_wrong_is_said(make: Any, raises: type[Exception], said: str) -> None:
    with pytest.raises(raises) as raised:
        make()
    assert said in str(raised.value)
