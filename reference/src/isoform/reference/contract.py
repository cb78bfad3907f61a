"""The contract of the operations: which calls are right, and what an implementation may decline.

Three answers are possible to a call, and this module is where they are told apart:

- the call is wrong (a shape, an axis, a dtype, a device): ``ValueError`` or ``TypeError`` that
  names the operand and the axis; raised by :func:`evoformer_call`, the same for everybody;
- the call is right and the implementation does not do it: :class:`Unsupported`, with *every*
  reason; raised by :meth:`Capabilities.require`;
- the call is right and supported: a :class:`Call`, which says in a few words what was asked.

Nothing here looks at an operand's values or knows an array library: operands are anything with
``shape`` and ``dtype``, so NumPy, PyTorch, CuPy and meta tensors are checked by the same lines.

Axes (the letters are used alike everywhere): B batch, S rows that share one pair bias, Q queries,
K keys, H query heads, G key/value heads (G divides H), D head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
"""The dtypes that operands may have in general, by name."""

ORACLE_DTYPES = (*FLOAT_DTYPES, "longdouble", "complex128")
"""What the NumPy oracle takes besides: extended precision, and complex for differentiation by
complex steps."""

OPTIONAL_OPERANDS = ("mask", "mask_bias", "pair_bias", "gate")
DIFFERENTIABLE = ("q", "k", "v", "mask_bias", "pair_bias", "gate")


class Unsupported(Exception):
    """The call is right, but this implementation does not do it.

    Attributes:
        reasons: Every reason, not just the first, so that a caller can mend all of them at once.
    """

    def __init__(self, reasons: Iterable[str], implementation: str | None = None) -> None:
        self.reasons = tuple(reasons)
        self.implementation = implementation
        who = f"{implementation} does not support this call" if implementation else "unsupported"
        super().__init__(f"{who}: {'; '.join(self.reasons)}")


AXES: Mapping[str, str] = {
    "q": "B S Q H D",
    "k": "B S K G D",
    "v": "B S K G D",
    "mask": "B S K",
    "mask_bias": "B S 1 1 K",
    "pair_bias": "B 1 H Q K",
    "gate": "B S Q H D",
    "out": "B S Q H D",
    "lse": "B S H Q",
}
"""The axes of every operand and result of Evoformer attention, by name (rule EVO-1)."""


class Sizes(Protocol):
    """The axis sizes of one call of any operation: a frozen dataclass with a field for each axis.

    Attributes:
        axes: The axes of every operand and result, by name.
    """

    axes: ClassVar[Mapping[str, str]]

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of the operand or result ``name``."""

    @property
    def largest(self) -> int:
        """How many numbers the largest array has that the definition works with."""


@dataclass(frozen=True)
class Shape:
    """The axis sizes of one call of Evoformer attention."""

    axes: ClassVar[Mapping[str, str]] = AXES

    B: int
    S: int
    Q: int
    K: int
    H: int
    G: int
    D: int

    def of(self, name: str) -> tuple[int, ...]:
        """The shape of the operand or result ``name``."""
        return tuple(1 if axis == "1" else getattr(self, axis) for axis in AXES[name].split())

    @property
    def logits(self) -> int:
        """How many logits the call has: B·S·H·Q·K, the measure of its work."""
        return self.B * self.S * self.H * self.Q * self.K

    @property
    def largest(self) -> int:
        """How many numbers the largest array has: the logits, or q or k."""
        return max(self.logits, math.prod(self.of("q")), math.prod(self.of("k")))

    def __str__(self) -> str:
        return ",".join(f"{axis}={size}" for axis, size in vars(self).items())


@dataclass(frozen=True)
class Call:
    """What one call asks for, without its numbers: the question put to :class:`Capabilities`.

    Attributes:
        operation: Name of the operation, e.g. ``"evoformer_attention"``.
        shape: The axis sizes: :class:`Sizes`, of the operation's own class.
        dtype: Name of the operands' dtype, e.g. ``"bfloat16"``.
        operands: Which optional operands are present, and which features are asked for by other
            arguments, such as ``causal``.
        gradients: Which operands a gradient is wanted for (empty: forward alone).
        lse: Whether the log-sum-exp is wanted too.
        device: Kind of device, ``"cpu"`` or ``"cuda"``.
        architecture: The GPU's architecture, e.g. ``"sm_90"``; empty on a CPU.
    """

    operation: str
    shape: Any
    dtype: str
    operands: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()
    lse: bool = False
    device: str = "cpu"
    architecture: str = ""


@dataclass(frozen=True)
class Arithmetic:
    """The precision in which an implementation does the steps that leave it a choice.

    Operands and results have the call's dtype. Dtype names, or ``"operand"`` for the call's dtype.

    Attributes:
        accumulate: Logits, softmax and every sum. ``"wide"`` is float32, or float64 for float64.
        logits: What the logits are rounded to before the softmax.
        probabilities: What P is rounded to before it is multiplied with V or with dO.
        output: What O is rounded to before the backward takes δ = Σ_d dO∘O from it.
        cotangent: What dO is rounded to, after the gate, before it is multiplied.
        dlogits: What dS is rounded to before it is multiplied with K or with Q.
        sums: How sums over channels of 16-bit operands are rounded: to the ``"nearest"``, or
            ``"truncated"`` after each sixteen, which is what tensor cores do.
    """

    accumulate: str = "wide"
    logits: str = "wide"
    probabilities: str = "wide"
    output: str = "wide"
    cotangent: str = "wide"
    dlogits: str = "wide"
    sums: Literal["nearest", "truncated"] = "nearest"

    def resolve(self, step: str, dtype: str) -> str:
        """The dtype name of ``step`` when the operands are ``dtype``."""
        chosen: str = getattr(self, step)
        wide = "float64" if dtype == "float64" else "float32"
        return {"wide": wide, "operand": dtype}.get(chosen, chosen)


LENGTHS = ("Q", "K", "L")
"""The axes along which a sequence lies."""


@dataclass(frozen=True)
class Capabilities:
    """What an implementation of one operation declares that it does.

    The declaration is itself judged: what is declared supported must be right, what is declared
    unsupported must raise :class:`Unsupported`.

    Attributes:
        operation: Name of the operation.
        dtypes: Operand dtypes, by name.
        devices: Kinds of device.
        architectures: GPU architectures that are supported; empty means any.
        head_dims: Smallest and largest D.
        head_dim_multiple: D must be a multiple of this.
        head_dim_power_of_two: Whether D must be a power of two, as a block of Triton's must.
        min_length: Smallest length, such as Q and K.
        length_multiple: Lengths must be multiples of this, as where ranks have equal shards.
        cross_lengths: Whether K may differ from Q.
        operands: Optional operands that may be present, and features that may be asked for.
        grouped_heads: Whether G < H is supported.
        gradients: Operands that a gradient can be had for.
        lse: Whether the log-sum-exp can be returned.
        deterministic: Whether equal calls give bitwise equal results, gradients included.
        memory: How peak memory grows with the length, where no pair bias is given.
        arithmetic: The declared arithmetic; what the twin is run with.
    """

    operation: str
    dtypes: frozenset[str] = frozenset(FLOAT_DTYPES)
    devices: frozenset[str] = frozenset({"cpu"})
    architectures: frozenset[str] = frozenset()
    head_dims: tuple[int, int] = (1, 256)
    head_dim_multiple: int = 1
    head_dim_power_of_two: bool = False
    min_length: int = 0
    length_multiple: int = 1
    cross_lengths: bool = True
    operands: frozenset[str] = frozenset(OPTIONAL_OPERANDS)
    grouped_heads: bool = True
    gradients: frozenset[str] = frozenset(DIFFERENTIABLE)
    lse: bool = True
    deterministic: bool = False
    memory: Literal["linear", "quadratic"] = "quadratic"
    arithmetic: Arithmetic = field(default_factory=Arithmetic)

    def unsupported_reasons(self, call: Call) -> tuple[str, ...]:
        """Every reason why ``call`` is not supported; empty when it is."""
        sizes: Mapping[str, int] = {
            # as vars(call.shape), which torch.compile cannot follow
            axis.name: getattr(call.shape, axis.name)
            for axis in fields(call.shape)
        }
        H, D = sizes["H"], sizes["D"]
        lengths = {axis: size for axis, size in sizes.items() if axis in LENGTHS}
        empty = any(size == 0 for axis, size in sizes.items() if axis not in LENGTHS)
        low, high = self.head_dims
        reasons: list[tuple[bool, str]] = [
            (call.operation != self.operation, f"operation {call.operation}"),
            (call.dtype not in self.dtypes, f"dtype {call.dtype} ({_listed(self.dtypes)} only)"),
            (
                call.device not in self.devices,
                f"device {call.device} ({_listed(self.devices)} only)",
            ),
            (
                bool(self.architectures) and call.architecture not in self.architectures,
                f"architecture {call.architecture or 'unknown'} "
                f"({_listed(self.architectures)} only)",
            ),
            (not low <= D <= high, f"head dim D={D} ({low} to {high} only)"),
            (
                D % self.head_dim_multiple != 0,
                f"head dim D={D} (multiples of {self.head_dim_multiple} only)",
            ),
            (
                self.head_dim_power_of_two and D.bit_count() != 1,
                f"head dim D={D} (powers of two only)",
            ),
            (
                min(lengths.values()) < self.min_length,
                f"lengths {', '.join(f'{axis}={size}' for axis, size in lengths.items())} "
                f"(at least {self.min_length})",
            ),
            (
                any(size % self.length_multiple for size in lengths.values()),
                f"lengths {', '.join(f'{axis}={size}' for axis, size in lengths.items())} "
                f"(multiples of {self.length_multiple} only)",
            ),
            (
                len({*lengths.values()}) > 1 and not self.cross_lengths,
                f"lengths {', '.join(f'{axis}={size}' for axis, size in lengths.items())} "
                "(equal ones only)",
            ),
            (empty and self.min_length > 0, f"an empty axis in {call.shape}"),
            (
                sizes.get("G", H) != H and not self.grouped_heads,
                f"grouped key/value heads (G={sizes.get('G')}, H={H})",
            ),
            (call.lse and not self.lse, "returning lse"),
        ]
        reasons += [
            (True, f"operand {name}" if name.isidentifier() else name)  # "scaling=yarn" says it all
            for name in _missing(call.operands, self.operands)
        ]
        reasons += [
            (True, f"gradient of {name}") for name in _missing(call.gradients, self.gradients)
        ]
        return tuple(reason for holds, reason in reasons if holds)

    def require(self, call: Call, implementation: str | None = None) -> None:
        """Raise :class:`Unsupported` with every reason unless ``call`` is supported."""
        if reasons := self.unsupported_reasons(call):
            raise Unsupported(reasons, implementation)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _missing(wanted: frozenset[str], offered: frozenset[str]) -> list[str]:
    return sorted(wanted - offered)


def dtype_name(operand: Any) -> str:
    """The dtype of ``operand`` as a plain name: ``"float32"`` for NumPy's and for PyTorch's."""
    return str(operand.dtype).removeprefix("torch.").replace("float128", "longdouble")


def evoformer_call(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    mask_bias: Any = None,
    pair_bias: Any = None,
    gate: Any = None,
    scale: float | None = None,
    dtypes: Iterable[str] = FLOAT_DTYPES,
    gradients: Iterable[str] = (),
    lse: bool = False,
    device: str = "cpu",
    architecture: str = "",
) -> Call:
    """Check the operands of Evoformer attention and say what the call asks for (rule EVO-1).

    Args:
        q: Queries ``[B, S, Q, H, D]``, one of ``dtypes``.
        k: Keys ``[B, S, K, G, D]``.
        v: Values ``[B, S, K, G, D]``.
        mask: Bool ``[B, S, K]``, True where the key may be attended to.
        mask_bias: ``[B, S, 1, 1, K]``.
        pair_bias: ``[B, 1, H, Q, K]``.
        gate: ``[B, S, Q, H, D]``.
        scale: A finite real number, or None for ``D**-0.5``.
        dtypes: Names of the dtypes to accept. All floating operands must share one.
        gradients: Operands that a gradient is wanted for (copied into the call).
        lse: Whether lse is wanted (copied into the call).
        device: Kind of device (copied into the call).
        architecture: GPU architecture (copied into the call).

    Raises:
        TypeError: An operand is no array, or its dtype is not the one called for.
        ValueError: An operand's rank or an axis size is wrong, G does not divide H, operands lie
            on different devices, or the scale is not finite.
    """
    optional = {"mask": mask, "mask_bias": mask_bias, "pair_bias": pair_bias, "gate": gate}
    present = {name: operand for name, operand in optional.items() if operand is not None}
    operands = {"q": q, "k": k, "v": v, **present}

    check_arrays(operands)
    check_dtypes(operands, tuple(dtypes), {"mask": ("bool",)})
    check_ranks(operands, AXES)
    # q and k fix the size of every axis; each operand is then held to it.
    B, S, Q, H, D = (int(size) for size in q.shape)
    K, G = (int(size) for size in k.shape[2:4])
    shape = Shape(B, S, Q, K, H, G, D)
    check_sizes(operands, AXES, vars(shape))
    check_heads(q, G)
    check_devices(operands)
    check_scale(scale)
    return Call(
        operation="evoformer_attention",
        shape=shape,
        dtype=dtype_name(q),
        operands=frozenset(present),
        gradients=frozenset(gradients),
        lse=lse,
        device=device,
        architecture=architecture,
    )


# The checks of which the operations' are made.


def check_arrays(operands: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` unless every operand is an array: has a shape and a dtype."""
    for name, operand in operands.items():
        if not (hasattr(operand, "shape") and hasattr(operand, "dtype")):
            raise TypeError(f"{name} must be an array, got {type(operand).__name__}")


def check_dtypes(
    operands: Mapping[str, Any],
    dtypes: tuple[str, ...],
    others: Mapping[str, tuple[str, ...]],
) -> None:
    """Raise ``TypeError`` unless q has one of ``dtypes`` and all others q's.

    Args:
        operands: By name, ``q`` among them.
        dtypes: Names of the dtypes that q may have.
        others: Names of the dtypes of operands that do not share q's.
    """
    dtype = dtype_name(operands["q"])
    if dtype not in dtypes:
        raise TypeError(f"q must be one of {', '.join(dtypes)}, got {dtype}")
    for name, operand in operands.items():
        wanted = others.get(name, (dtype,))
        if dtype_name(operand) not in wanted:
            why = "" if name in others else ", the dtype of q"
            raise TypeError(f"{name} must be {' or '.join(wanted)}{why}, got {dtype_name(operand)}")


def check_ranks(operands: Mapping[str, Any], axes: Mapping[str, str]) -> None:
    """Raise ``ValueError`` unless every operand has as many axes as ``axes`` gives it."""
    for name, operand in operands.items():
        letters = axes[name].split()
        if len(operand.shape) != len(letters):
            raise ValueError(
                f"{name} must have {len(letters)} axes [{', '.join(letters)}], "
                f"got shape {tuple(operand.shape)}"
            )


def check_sizes(
    operands: Mapping[str, Any], axes: Mapping[str, str], sizes: Mapping[str, int]
) -> None:
    """Raise ``ValueError`` unless every axis has the size that ``sizes`` gives to its letter."""
    for name, operand in operands.items():
        letters = axes[name].split()
        for position, (axis, found) in enumerate(zip(letters, operand.shape, strict=True)):
            if int(found) != (1 if axis == "1" else sizes[axis]):
                called = "size 1" if axis == "1" else f"{axis}={sizes[axis]}"
                raise ValueError(
                    f"{name} must have {called} on axis {position} of [{', '.join(letters)}], "
                    f"got shape {tuple(operand.shape)}"
                )


def check_heads(q: Any, G: int) -> None:
    """Raise ``ValueError`` unless q ``[..., H, D]`` has channels, and heads that G divides."""
    H, D = (int(size) for size in q.shape[-2:])
    if D == 0:
        raise ValueError(f"head dim D must be at least 1, got shape {tuple(q.shape)}")
    if H % G if G else H:
        raise ValueError(f"key/value heads must divide query heads, got G={G} and H={H}")


def check_devices(operands: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless all operands are on the device of q."""
    where = str(getattr(operands["q"], "device", "cpu"))
    for name, operand in operands.items():
        device = str(getattr(operand, "device", "cpu"))
        if device != where:
            raise ValueError(f"{name} is on {device}, but q is on {where}")


def check_scale(scale: float | None) -> None:
    """Raise unless ``scale`` is None or a finite real number."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a real number or None, got {type(scale).__name__}")
    try:
        finite = math.isfinite(scale)
    except OverflowError:  # an integer larger than any float
        finite = False
    if not finite:
        raise ValueError(f"scale must be finite, got {scale}")
