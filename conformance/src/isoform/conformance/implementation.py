"""Implementations: whatever can be judged, seen alike by the judge.

Anything will do that has the contract's signature::

    class MyKernel:
        name = "mine"
        framework = "torch"                      # or "numpy": whose arrays it takes
        capabilities = Capabilities("evoformer_attention", dtypes=frozenset({"float32"}))

        @staticmethod
        def evoformer_attention(q, k, v, *, mask=None, ..., scale=None, return_lse=False): ...

        @staticmethod
        def evoformer_attention_backward(dout, q, k, v, *, mask=None, ..., scale=None): ...

With PyTorch the gradients come from autograd and the second function is not needed. A bare function
is taken too: its capabilities are read from its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from isoform.reference.contract import OPTIONAL_OPERANDS, Capabilities, evoformer_call

DEFAULT_OPERATION = "evoformer_attention"
FRAMEWORKS = ("numpy", "torch")


@dataclass(frozen=True)
class Implementation:
    """An implementation of one operation, as the judge sees it.

    Attributes:
        name: What it is called.
        framework: Whose arrays it takes, ``"numpy"`` or ``"torch"``.
        capabilities: What it declares.
        forward: The operation: ``forward(q, k, v, **operands)``.
        backward: ``backward(dout, q, k, v, **operands)`` returning the gradients in the order of
            the contract, or an object with attributes ``dq`` …; None where autograd does it.
    """

    name: str
    framework: str
    capabilities: Capabilities
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None

    @property
    def operation(self) -> str:
        """Name of the operation it implements."""
        return self.capabilities.operation


def adopt(
    candidate: object, *, framework: str = "torch", name: str | None = None
) -> Implementation:
    """Make an :class:`Implementation` of an object or of a bare function.

    Args:
        candidate: An Implementation, an object with ``name``, ``capabilities`` and the operation as
            an attribute, or a function with the operation's signature.
        framework: Whose arrays a candidate takes that does not say so itself.
        name: Its name, if it has none or another is wanted.

    Raises:
        TypeError: The candidate is none of these; the message says what is missing.
    """
    if isinstance(candidate, Implementation):
        return candidate if name is None else replace(candidate, name=name)
    framework = getattr(candidate, "framework", framework)
    if framework not in FRAMEWORKS:
        raise TypeError(f"framework must be one of {', '.join(FRAMEWORKS)}, got {framework!r}")

    names = (getattr(candidate, attribute, None) for attribute in ("name", "__name__"))
    called = name or next(filter(None, names), type(candidate).__name__)
    declared = getattr(candidate, "capabilities", None)
    if isinstance(declared, Capabilities):
        forward = getattr(candidate, declared.operation, None)
        if not callable(forward):
            raise TypeError(f"{candidate!r} declares {declared.operation} but has no such function")
        backward = getattr(candidate, f"{declared.operation}_backward", None)
        if backward is None and framework == "numpy" and declared.gradients:
            raise TypeError(
                f"{candidate!r} declares gradients but has no {declared.operation}_backward"
            )
        return Implementation(called, framework, declared, forward, backward)
    if declared is not None:
        raise TypeError(f"capabilities must be Capabilities, got {type(declared).__name__}")
    if not callable(candidate):
        raise TypeError(
            f"{candidate!r} is no implementation: it must be a function with the signature of "
            f"{DEFAULT_OPERATION}, or have 'capabilities' and {DEFAULT_OPERATION!r}"
        )
    capabilities = _capabilities_of(candidate, framework)
    forward = _declining(candidate, capabilities, called)
    return Implementation(called, framework, capabilities, forward)


def _capabilities_of(function: Callable[..., Any], framework: str) -> Capabilities:
    """What a bare function can be asked: the operands that its signature names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as cause:  # some that are written in C have none
        raise TypeError(f"{function!r} does not tell its signature") from cause
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters}
    offered = [name for name in OPTIONAL_OPERANDS if takes_all or name in named]
    differentiable = {"q", "k", "v", *offered} - {"mask"} if framework == "torch" else set()
    return Capabilities(
        DEFAULT_OPERATION,
        operands=frozenset(offered),
        gradients=frozenset(differentiable),
        lse=takes_all or "return_lse" in named,
    )


def _declining(
    function: Callable[..., Any], capabilities: Capabilities, name: str
) -> Callable[..., Any]:
    """``function``, checked and refused as the contract says, since it does not do so itself."""

    def forward(q: Any, k: Any, v: Any, **operands: Any) -> Any:
        lse = operands.get("return_lse", False)
        checked = {key: x for key, x in operands.items() if key != "return_lse"}
        capabilities.require(evoformer_call(q, k, v, **checked, lse=lse), name)
        return function(q, k, v, **operands)

    return forward
