"""Without a GPU: what the rotary front doors refuse, and how."""

import subprocess
import sys

import numpy as np
import pytest

from isoform.kernels import (
    rotary,
    rotary_embedding,
    rotary_embedding_,
    rotary_embedding_backward,
    rotary_embedding_qk,
    rotary_embedding_qk_,
)
from isoform.kernels.rotary import overlapping
from isoform.reference import numpy as oracle
from isoform.reference.contract import Unsupported
from isoform.reference.rotary_scaling import Linear, LongRoPE

ONE = (rotary_embedding, rotary_embedding_, rotary_embedding_backward)
TWO = (rotary_embedding_qk, rotary_embedding_qk_)

POSITIONS = np.arange(5)


def rows(H=2, D=8, dtype="float32", B=3, L=5):
    return np.ones((B, L, H, D), dtype)


def test_importing_it_imports_neither_torch_nor_cupy():
    code = (
        "import sys, isoform.kernels.rotary;"
        "sys.exit(bool({'torch', 'cupy', 'mpmath'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("function", ONE)
def test_what_is_on_a_cpu_is_declined_with_the_remedy(function):
    with pytest.raises(Unsupported, match=r"device cpu.*on a CPU there is isoform\.reference"):
        function(rows(), POSITIONS)


@pytest.mark.parametrize("function", TWO)
def test_every_reason_is_given(function):
    q, k = (rows(H, D=300, dtype="float64") for H in (4, 2))
    with pytest.raises(Unsupported) as raised:
        function(q, k, POSITIONS, rotary_dim=8)
    text = " ".join(raised.value.reasons)
    for reason in ("device cpu", "dtype float64", "head dim D=300"):
        assert reason in text


@pytest.mark.parametrize("function", ONE)
def test_a_wrong_call_is_wrong_before_it_is_unsupported(function):
    name = "dout" if function is rotary_embedding_backward else "x"
    for wrong, raises, says in (
        ({"x": rows()[0]}, ValueError, f"{name} must have 4 axes"),
        ({"x": rows(dtype="int32")}, TypeError, f"{name} must be one of"),
        ({"positions": POSITIONS[None]}, ValueError, "positions must be"),
        ({"positions": POSITIONS / 2}, TypeError, "positions must be integers"),
        ({"base": 1.0}, ValueError, "base must be"),
        ({"rotary_dim": 7}, ValueError, "rotary_dim must be even"),
        ({"layout": "thirds"}, ValueError, "layout must be one of"),
        ({"scaling": "linear"}, TypeError, "scaling must be"),
        ({"scaling": LongRoPE((1.0,), (1.0,), 8, 8)}, ValueError, "scaling: short_factors"),
    ):
        call = {"x": rows(), "positions": POSITIONS} | wrong
        with pytest.raises(raises, match=says):
            function(call.pop("x"), call.pop("positions"), **call)


@pytest.mark.parametrize("function", TWO)
@pytest.mark.parametrize(
    ("k", "raises", "says"),
    [
        (rows(dtype="float16"), TypeError, "k must be float32, the dtype of q, got float16"),
        (rows(D=6), ValueError, "k must have D=8 of q on axis 3"),
        (rows(B=2), ValueError, "k must have B=3 of q on axis 0"),
        (rows(L=4), ValueError, r"positions must be \[L\] or \[B, L\] with L=4, B=3 of k"),
        (rows()[0], ValueError, "k must have 4 axes"),
        (None, TypeError, "k must be an array"),
    ],
)
def test_keys_must_fit_queries(function, k, raises, says):
    with pytest.raises(raises, match=says):
        function(rows(), k, POSITIONS)


@pytest.mark.parametrize("function", [*ONE, *TWO])
def test_the_arguments_are_the_references(function):
    """By name and default, whatever stands before them."""
    import inspect

    def by_name(one):
        parameters = inspect.signature(one).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    wanted = by_name(oracle.rotary_embedding)
    del wanted["compute_dtype"]
    assert by_name(function) == wanted


def test_what_reaches_the_kernel(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def turned(turn, *arrays):
            asked.append(turn)
            return arrays[:2]

    monkeypatch.setattr(rotary, "whereabouts", lambda x: ("cuda", "sm_70"))
    monkeypatch.setattr(rotary, "_library", lambda x: Library)
    how = {"rotary_dim": 4, "layout": "interleaved", "scaling": Linear(2.0)}
    rotary_embedding_qk(rows(), rows(1), POSITIONS, base=77, **how)
    rotary_embedding_backward(rows(), POSITIONS)
    assert asked == [
        rotary.Turn(4, 77.0, "interleaved", Linear(2.0), False),
        rotary.Turn(8, 10000.0, "half", None, True),
    ]
    assert isinstance(asked[0].base, float)


@pytest.mark.parametrize(
    ("shape", "strides", "wanted"),
    [
        ((2, 3, 4), (12, 4, 1), False),
        ((2, 3, 4), (1, 8, 2), False),  # some order of the axes, every step a larger one
        ((2, 3, 4), (-12, 4, -1), False),
        ((2, 1, 4), (4, 0, 1), False),
        ((2, 3, 4), (12, 0, 1), True),
        ((2, 3, 4), (8, 4, 1), True),
        ((2, 3, 4), (9, 3, 1), True),
        ((0, 3, 4), (0, 0, 0), False),
        ((1, 1, 1), (0, 0, 0), False),
    ],
)
def test_overlapping(shape, strides, wanted):
    assert overlapping(shape, strides) is wanted
