"""Which calls are right, which are wrong, and which an implementation may decline."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isoform.reference.contract import (
    AXES,
    DIFFERENTIABLE,
    FLOAT_DTYPES,
    OPTIONAL_OPERANDS,
    ORACLE_DTYPES,
    Arithmetic,
    Call,
    Capabilities,
    Shape,
    Unsupported,
    dtype_name,
    evoformer_call,
)

ROOT = Path(__file__).parents[2]
# No two axes are alike, so that no two can be taken for each other.
SHAPE = Shape(B=2, S=3, Q=5, K=7, H=4, G=2, D=6)


@dataclass
class Duck:
    """All that the contract needs to know of an array."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"


def ducks(shape: Shape = SHAPE, dtype: str = "float32") -> dict[str, Any]:
    """Every operand of one right call."""
    names = ("q", "k", "v", *OPTIONAL_OPERANDS)
    return {n: Duck(shape.of(n), "bool" if n == "mask" else dtype) for n in names}


# --- axes and shapes ---


def test_axes_are_those_of_the_specification():
    """EVO-1: what the table in the specification says is what is checked."""
    table = re.findall(r"^\| `(\w+)` \|.*?\| `\[(.*?)\]` \|", specification(), re.MULTILINE)
    assert {name: axes.replace(",", "") for name, axes in table} == dict(AXES)


def test_shape_of_every_operand():
    """EVO-1."""
    assert SHAPE.of("q") == SHAPE.of("gate") == SHAPE.of("out") == (2, 3, 5, 4, 6)
    assert SHAPE.of("k") == SHAPE.of("v") == (2, 3, 7, 2, 6)
    assert SHAPE.of("mask") == (2, 3, 7)
    assert SHAPE.of("mask_bias") == (2, 3, 1, 1, 7)
    assert SHAPE.of("pair_bias") == (2, 1, 4, 5, 7)
    assert SHAPE.of("lse") == (2, 3, 4, 5)
    assert SHAPE.logits == 2 * 3 * 4 * 5 * 7
    assert str(SHAPE) == "B=2,S=3,Q=5,K=7,H=4,G=2,D=6"


def test_every_axis_letter_is_a_size():
    letters = {axis for axes in AXES.values() for axis in axes.split()} - {"1"}
    assert letters == {field.name for field in fields(Shape)}
    assert {"q", "k", "v", *OPTIONAL_OPERANDS, "out", "lse"} == set(AXES)
    assert set(DIFFERENTIABLE) == {"q", "k", "v", *OPTIONAL_OPERANDS} - {"mask"}


# --- right calls ---


def test_a_right_call_is_described():
    """EVO-1."""
    call = evoformer_call(
        **ducks(),
        scale=0.5,
        gradients=["q", "pair_bias"],
        lse=True,
        device="cuda",
        architecture="sm_90",
    )
    assert call == Call(
        operation="evoformer_attention",
        shape=SHAPE,
        dtype="float32",
        operands=frozenset(OPTIONAL_OPERANDS),
        gradients=frozenset({"q", "pair_bias"}),
        lse=True,
        device="cuda",
        architecture="sm_90",
    )
    hash(call)


@pytest.mark.parametrize("name", OPTIONAL_OPERANDS)
def test_every_optional_operand_may_be_absent(name):
    """EVO-1."""
    operands = ducks()
    del operands[name]
    assert evoformer_call(**operands).operands == set(OPTIONAL_OPERANDS) - {name}
    assert evoformer_call(**operands, **{name: None}) == evoformer_call(**operands)


@pytest.mark.parametrize("G", [1, 2, 4])
def test_groups_divide_the_heads(G):
    """EVO-1."""
    assert evoformer_call(**ducks(replace(SHAPE, G=G))).shape.G == G


@pytest.mark.parametrize("axis", ["B", "S", "Q", "K", "H"])
def test_lengths_may_be_zero(axis):
    """EVO-10."""
    shape = replace(SHAPE, **{axis: 0})
    assert evoformer_call(**ducks(shape)).shape == shape
    assert evoformer_call(**ducks(replace(SHAPE, H=0, G=0))).shape.G == 0


@pytest.mark.parametrize(
    "scale", [None, 1, 0, -0.5, 1e-30, np.float32(0.25), np.float16(2), np.int64(3), Fraction(1, 3)]
)
def test_scales(scale):
    """EVO-1: any real number."""
    evoformer_call(**ducks(), scale=scale)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dtypes(dtype):
    """EVO-1."""
    assert evoformer_call(**ducks(dtype=dtype)).dtype == dtype


def test_dtype_names_are_the_same_for_every_library():
    """EVO-1."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (np.float16, np.float32, np.float64, np.longdouble, np.complex128):
        assert dtype_name(np.zeros(1, dtype)) in ORACLE_DTYPES
    assert dtype_name(np.zeros(1, ml_dtypes.bfloat16)) == "bfloat16"
    assert dtype_name(np.zeros(1, bool)) == "bool"
    assert dtype_name(Duck((1,), "torch.bfloat16")) == "bfloat16"
    torch = pytest.importorskip("torch")
    assert {dtype_name(torch.zeros(1, dtype=getattr(torch, name))) for name in FLOAT_DTYPES} == set(
        FLOAT_DTYPES
    )
    assert dtype_name(torch.zeros(1, dtype=torch.bool)) == "bool"


def test_arrays_without_a_device_are_on_the_cpu():
    """EVO-1: NumPy before version 2 says nothing of devices."""
    operands = ducks()
    for name in ("k", "mask"):
        del operands[name].device
    evoformer_call(**operands)


# --- wrong calls ---


def resized(name: str, axis: int, size: int) -> Any:
    """One operand with another size on one axis."""
    shape = list(SHAPE.of(name))
    shape[axis] = size
    return Duck(tuple(shape), "bool" if name == "mask" else "float32")


def sized_wrongly() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Every operand with a wrong size on each axis that another operand fixes."""
    found = {}
    for name in ("q", "k", "v", *OPTIONAL_OPERANDS):
        axes = AXES[name].split()
        for position, axis in enumerate(axes):
            wrong = resized(name, position, 9)
            named = [name, f"axis {position}", f"[{', '.join(axes)}]", str(wrong.shape)]
            named.append("size 1" if axis == "1" else f"{axis}={getattr(SHAPE, axis)}")
            if name == "q":  # q fixes its sizes: the first operand that disagrees is named
                named = [f"{axis}=9"]
            elif (name, axis) == ("k", "K"):
                named = ["v", "K=9"]
            elif (name, axis) == ("k", "G"):
                named = ["v", "G=9"]
            found[f"{name} {position}"] = ({name: wrong}, named)
    return found


def kinds_of_wrong_rank() -> dict[str, tuple[dict[str, Any], list[str]]]:
    """Every operand with an axis too few and one too many."""
    found = {}
    for name in ("q", "k", "v", *OPTIONAL_OPERANDS):
        axes = AXES[name].split()
        right = SHAPE.of(name)
        for wrong in (right[1:], (1, *right), ()):
            duck = Duck(wrong, "bool" if name == "mask" else "float32")
            named = [f"{name} must have {len(axes)} axes [{', '.join(axes)}]", str(wrong)]
            found[f"{name} {len(wrong)}"] = ({name: duck}, named)
    return found


def other(name: str, **changed: Any) -> dict[str, Any]:
    """One operand that is right but for what is ``changed``."""
    return {name: replace(ducks()[name], **changed)}


SWAPPED = Duck((2, 1, 4, 7, 5))
VALUE_ERRORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{f"size: {name}": case for name, case in sized_wrongly().items()},
    **{f"rank: {name}": case for name, case in kinds_of_wrong_rank().items()},
    "pair bias transposed": ({"pair_bias": SWAPPED}, ["pair_bias", "Q=5", "axis 3"]),
    "broadcast rows of k": ({"k": resized("k", 1, 1)}, ["k", "S=3", "axis 1"]),
    "broadcast mask": ({"mask": resized("mask", 1, 1)}, ["mask", "S=3", "axis 1"]),
    "no head dim": (
        {name: Duck((*SHAPE.of(name)[:-1], 0)) for name in ("q", "k", "v", "gate")},
        ["D must be at least 1", "(2, 3, 5, 4, 0)"],
    ),
    "groups do not divide": (
        {name: resized(name, 3, 3) for name in "kv"},
        ["must divide", "G=3", "H=4"],
    ),
    "more groups than heads": (
        {name: resized(name, 3, 8) for name in "kv"},
        ["must divide", "G=8", "H=4"],
    ),
    "no groups": ({name: resized(name, 3, 0) for name in "kv"}, ["must divide", "G=0", "H=4"]),
    **{
        f"device: {name}": (other(name, device="cuda:1"), [f"{name} is on cuda:1, but q is on cpu"])
        for name in ("k", "v", *OPTIONAL_OPERANDS)
    },
    "scale nan": ({"scale": float("nan")}, ["scale must be finite, got nan"]),
    "scale inf": ({"scale": float("-inf")}, ["scale must be finite, got -inf"]),
    "scale inf of NumPy": ({"scale": np.float32("inf")}, ["scale must be finite, got inf"]),
    "scale beyond floats": ({"scale": 10**400}, ["scale must be finite, got 1000"]),
}
TYPE_ERRORS: dict[str, tuple[dict[str, Any], list[str]]] = {
    **{
        f"dtype: {name}": (
            other(name, dtype="float16"),
            [f"{name} must be float32, the dtype of q, got float16"],
        )
        for name in ("k", "v", "mask_bias", "pair_bias", "gate")
    },
    **{
        f"mask {dtype}": (other("mask", dtype=dtype), [f"mask must be bool, got {dtype}"])
        for dtype in ("float32", "uint8", "int64")
    },
    **{
        f"q {dtype}": (
            other("q", dtype=dtype),
            ["q must be one of float16, bfloat16, float32, float64", f"got {dtype}"],
        )
        for dtype in ("int32", "bool", "complex64", "float8_e4m3fn", "longdouble")
    },
    **{
        f"no array: {name}": ({name: [[1.0]]}, [f"{name} must be an array, got list"])
        for name in ("q", "k", "v", *OPTIONAL_OPERANDS)
    },
    "q absent": ({"q": None}, ["q must be an array, got NoneType"]),
    **{
        f"scale {type(scale).__name__}": (
            {"scale": scale},
            ["scale must be a real number or None", type(scale).__name__],
        )
        for scale in ("1", True, 1j, np.bool_(True), Decimal(1), np.ones(1))
    },
}


@pytest.mark.parametrize(("changed", "named"), VALUE_ERRORS.values(), ids=list(VALUE_ERRORS))
def test_wrong_sizes_devices_and_scales(changed, named):
    """EVO-1 and EVO-12: ValueError that names the operand, the axis and both sizes."""
    with pytest.raises(ValueError, match=re.escape(named[0])) as error:
        evoformer_call(**ducks() | changed)
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(("changed", "named"), TYPE_ERRORS.values(), ids=list(TYPE_ERRORS))
def test_wrong_dtypes_and_kinds(changed, named):
    """EVO-1 and EVO-12: TypeError that names the operand and both dtypes."""
    with pytest.raises(TypeError, match=re.escape(named[0])) as error:
        evoformer_call(**ducks() | changed)
    assert all(part in str(error.value) for part in named), error.value


def test_the_oracle_takes_more_dtypes():
    """EVO-1: extended precision, and complex numbers for complex steps."""
    for dtype in ("longdouble", "complex128"):
        assert evoformer_call(**ducks(dtype=dtype), dtypes=ORACLE_DTYPES).dtype == dtype
        with pytest.raises(TypeError, match=f"got {dtype}"):
            evoformer_call(**ducks(dtype=dtype))
    with pytest.raises(TypeError, match="q must be one of float32, got float16"):
        evoformer_call(**ducks(dtype="float16"), dtypes=["float32"])


# --- what may be declined ---

CAPABLE = Capabilities("evoformer_attention")
ASKED = evoformer_call(**ducks(), gradients=DIFFERENTIABLE, lse=True)
REASONS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    # what is declared, what is asked for, and every reason
    "nothing": ({}, {}, ()),
    "operation": ({}, {"operation": "rotary"}, ("operation rotary",)),
    "dtypes": (
        {"dtypes": frozenset({"float32", "bfloat16"})},
        {"dtype": "float16"},
        ("dtype float16 (bfloat16, float32 only)",),
    ),
    "devices": ({}, {"device": "cuda"}, ("device cuda (cpu only)",)),
    "architectures": (
        {"architectures": frozenset({"sm_90", "sm_80"})},
        {"architecture": "sm_75"},
        ("architecture sm_75 (sm_80, sm_90 only)",),
    ),
    "unknown architecture": (
        {"architectures": frozenset({"sm_90"})},
        {},
        ("architecture unknown (sm_90 only)",),
    ),
    "known architecture": (
        {"architectures": frozenset({"sm_90"})},
        {"architecture": "sm_90"},
        (),
    ),
    "head_dims, too small": ({"head_dims": (8, 128)}, {}, ("head dim D=6 (8 to 128 only)",)),
    "head_dims, too large": ({"head_dims": (1, 5)}, {}, ("head dim D=6 (1 to 5 only)",)),
    "head_dims, at either end": ({"head_dims": (6, 6)}, {}, ()),
    "head_dim_multiple": ({"head_dim_multiple": 4}, {}, ("head dim D=6 (multiples of 4 only)",)),
    "head_dim_power_of_two": (
        {"head_dim_power_of_two": True},
        {},
        ("head dim D=6 (powers of two only)",),
    ),
    "a power of two": ({"head_dim_power_of_two": True}, {"shape": replace(SHAPE, D=8)}, ()),
    "min_length of Q": ({"min_length": 6}, {}, ("lengths Q=5, K=7 (at least 6)",)),
    "min_length of K": (
        {"min_length": 4},
        {"shape": replace(SHAPE, K=3)},
        ("lengths Q=5, K=3 (at least 4)",),
    ),
    "min_length of the others": (
        {"min_length": 1},
        {"shape": replace(SHAPE, S=0)},
        ("an empty axis in B=2,S=0,Q=5,K=7,H=4,G=2,D=6",),
    ),
    "length_multiple": ({"length_multiple": 5}, {}, ("lengths Q=5, K=7 (multiples of 5 only)",)),
    "length_multiple, of both": ({"length_multiple": 5}, {"shape": replace(SHAPE, K=10)}, ()),
    "cross_lengths": ({"cross_lengths": False}, {}, ("lengths Q=5, K=7 (equal ones only)",)),
    "no cross_lengths": ({"cross_lengths": False}, {"shape": replace(SHAPE, K=5)}, ()),
    "empty axes": ({}, {"shape": replace(SHAPE, B=0, S=0, Q=0, K=0, H=0)}, ()),
    "operands": (
        {"operands": frozenset({"mask", "mask_bias"})},
        {},
        ("operand gate", "operand pair_bias"),
    ),
    "grouped_heads": ({"grouped_heads": False}, {}, ("grouped key/value heads (G=2, H=4)",)),
    "no grouped_heads": ({"grouped_heads": False}, {"shape": replace(SHAPE, G=4)}, ()),
    "gradients": (
        {"gradients": frozenset({"q", "k", "v"})},
        {"gradients": frozenset({"q", "gate", "pair_bias"})},
        ("gradient of gate", "gradient of pair_bias"),
    ),
    "lse": ({"lse": False}, {}, ("returning lse",)),
    "lse not asked for": ({"lse": False}, {"lse": False}, ()),
    # said of results, and never a reason to decline
    "deterministic": ({"deterministic": True}, {}, ()),
    "memory": ({"memory": "linear"}, {}, ()),
    "arithmetic": ({"arithmetic": Arithmetic(logits="operand")}, {}, ()),
    "several": (
        {"dtypes": frozenset({"float32"}), "lse": False, "operands": frozenset()},
        {"dtype": "float64", "operands": frozenset({"gate"})},
        ("dtype float64 (float32 only)", "returning lse", "operand gate"),
    ),
}


@pytest.mark.parametrize(("declared", "asked", "reasons"), REASONS.values(), ids=list(REASONS))
def test_every_reason_is_given(declared, asked, reasons):
    """EVO-12: a declaration answers each call with all that stands against it."""
    capabilities, call = replace(CAPABLE, **declared), replace(ASKED, **asked)
    assert capabilities.unsupported_reasons(call) == reasons
    if reasons:
        with pytest.raises(Unsupported) as refusal:
            capabilities.require(call, "flash")
        assert refusal.value.reasons == reasons
        assert refusal.value.implementation == "flash"
        assert str(refusal.value) == f"flash does not support this call: {'; '.join(reasons)}"
    else:
        assert capabilities.require(call) is None


def test_every_field_of_the_declaration_is_tested():
    assert {name.split()[0].rstrip(",") for name in REASONS} >= {
        f.name for f in fields(Capabilities)
    }


def test_unsupported_is_no_error_of_the_caller():
    """EVO-12: nobody who catches ValueError or TypeError takes it for a wrong call."""
    assert not issubclass(Unsupported, ValueError | TypeError | NotImplementedError)
    assert str(Unsupported(iter(["this", "that"]))) == "unsupported: this; that"
    assert Unsupported(iter(["this", "that"])).reasons == ("this", "that")


def test_declarations_are_values():
    """Two that say the same are the same, and none can be changed behind the judge's back."""
    assert Capabilities("a") == Capabilities("a") != Capabilities("b")
    hash(CAPABLE)
    hash(ASKED)
    for value, name in ((CAPABLE, "lse"), (ASKED, "lse"), (SHAPE, "B"), (Arithmetic(), "logits")):
        with pytest.raises(AttributeError):
            setattr(value, name, 1)


@pytest.mark.parametrize(
    ("chosen", "dtype", "resolved"),
    [
        ("wide", "bfloat16", "float32"),
        ("wide", "float32", "float32"),
        ("wide", "float64", "float64"),
        ("operand", "bfloat16", "bfloat16"),
        ("operand", "float64", "float64"),
        ("float16", "bfloat16", "float16"),
    ],
)
def test_declared_arithmetic_is_resolved_for_a_dtype(chosen, dtype, resolved):
    """EVO-7."""
    for step in fields(Arithmetic):
        assert Arithmetic(**{step.name: chosen}).resolve(step.name, dtype) == resolved


# --- the specification ---


def specification() -> str:
    return (ROOT / "docs" / "spec" / "evoformer.md").read_text(encoding="utf-8")


def rules_cited(text: str) -> set[str]:
    return set(re.findall(r"\bEVO-\d+\b", text))


def test_every_rule_has_a_test_and_every_citation_a_rule():
    rules = re.findall(r"^## (EVO-\d+)\b", specification(), re.MULTILINE)
    assert rules == [f"EVO-{number + 1}" for number in range(len(rules))]
    tests = [*Path(__file__).parent.glob("test_numpy_*.py"), Path(__file__)]
    assert set(rules) <= rules_cited("".join(path.read_text(encoding="utf-8") for path in tests))
    for component in ("reference", "kernels", "parallel", "conformance"):
        for path in (ROOT / component).rglob("*.py"):
            unknown = rules_cited(path.read_text(encoding="utf-8")) - set(rules)
            assert not unknown, path
