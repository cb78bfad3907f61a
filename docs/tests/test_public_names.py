"""Every name that the reference shows says what a reader needs: shapes, results, errors, source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from public_names import Name, faults, not_shown, shown


def test_every_public_name_says_what_it_must():
    names = list(shown())
    assert len(names) > 150
    assert [fault for name in names for fault in faults(name)] == []


def test_every_name_that_a_package_gives_is_shown():
    assert not_shown() == []


Array = Any


def bare(x: Array, n: int) -> Array: ...


def untold(x: Array, n: int) -> Array:
    """Compute it.

    Args:
        x: What it is made of.
    """
    if n < 0:
        raise ValueError("n must not be negative")
    return x


def told(x: Array, n: int) -> Array:
    """Compute it.

    Args:
        x: What it is made of, ``[B, L]``.
        n: How often.

    Returns:
        The result, ``[B, L]``.

    Raises:
        ValueError: n is negative.

    Source:
        Nobody's.
    """
    return untold(x, n)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (bare, ["no docstring"]),
        (
            untold,
            [
                "x is an array, of what shape?",
                "says nothing of n",
                "says nothing of what it returns",
                "raises ValueError, which it does not say",
                "names no source",
            ],
        ),
        (told, []),
    ],
)
def test_what_is_left_unsaid_is_seen(function, says):
    function.__annotations__ = {"x": "Array", "n": "int", "return": "Array"}
    name = Name("isoform.reference.numpy.here", function.__name__, function)
    found = [fault.partition(": ")[2] for fault in faults(name)]
    assert found == says
