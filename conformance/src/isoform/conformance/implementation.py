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

With PyTorch the gradients come from autograd and the second function is not needed. Whoever offers
several operations gives ``capabilities`` as a tuple, one for each, and has a function of each name.

A bare function is taken too: its capabilities are read from its signature, and so is its operation
where nobody says which it is: the first whose operands it takes, Evoformer attention by default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from isoform.conformance.signatures import SIGNATURES
from isoform.reference.contract import Capabilities

if TYPE_CHECKING:
    from isoform.conformance.ranks import Ranks, Spread

DEFAULT_OPERATION = "evoformer_attention"
FRAMEWORKS = ("numpy", "torch")


@dataclass(frozen=True)
class Implementation:
    """An implementation of one operation, and of others under the same name, as the judge sees it.

    Attributes:
        name: What it is called.
        framework: Whose arrays it takes, ``"numpy"`` or ``"torch"``.
        capabilities: What it declares.
        forward: The operation, such as ``forward(q, k, v, **operands)``.
        backward: ``backward(dout, q, k, v, **operands)`` returning the gradients in the order of
            the contract, or an object with attributes ``dq`` …; None where autograd does it.
        others: Implementations of other operations that go by the same name.
        spread: How it is spread over ranks; None for what runs in one place.
    """

    name: str
    framework: str
    capabilities: Capabilities
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    others: tuple[Implementation, ...] = ()
    spread: Spread | None = None

    @property
    def operation(self) -> str:
        """Name of the operation it implements."""
        return self.capabilities.operation

    @property
    def offers(self) -> tuple[Implementation, ...]:
        """One implementation, of one operation alone, for each operation that the name offers."""
        alone = replace(self, others=()) if self.others else self
        return (alone, *(replace(other, name=self.name) for other in self.others))

    def of(self, operation: str) -> Implementation | None:
        """The implementation of ``operation`` alone; None where it is not offered."""
        return next((one for one in self.offers if one.operation == operation), None)

    def on(self, ranks: Ranks) -> Implementation:
        """The same spread over other ranks; itself where it is spread over none."""
        return self if self.spread is None else replace(self.spread.on(ranks), name=self.name)


def adopt(
    candidate: object,
    *,
    framework: str = "torch",
    name: str | None = None,
    operation: str | None = None,
) -> Implementation:
    """Make an :class:`Implementation` of an object or of a bare function.

    Args:
        candidate: An Implementation, an object with ``name``, ``capabilities`` (one or a tuple) and
            each operation as an attribute, or a function with an operation's signature.
        framework: Whose arrays a candidate takes that does not say so itself.
        name: Its name, if it has none or another is wanted.
        operation: Which operation a bare function is; None for what its signature says.

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
    if declared is not None:
        several = declared if isinstance(declared, tuple) and declared else (declared,)
        first, *others = (_offered(candidate, one, framework, called) for one in several)
        return replace(first, others=tuple(others))
    if not callable(candidate):
        raise TypeError(
            f"{candidate!r} is no implementation: it must be a function with the signature of "
            f"{DEFAULT_OPERATION}, or have 'capabilities' and {DEFAULT_OPERATION!r}"
        )
    capabilities = _capabilities_of(candidate, framework, operation)
    forward = _declining(candidate, capabilities, called)
    return Implementation(called, framework, capabilities, forward)


def _offered(candidate: object, declared: object, framework: str, name: str) -> Implementation:
    """The operation that ``declared`` says ``candidate`` offers."""
    if not isinstance(declared, Capabilities):
        raise TypeError(f"capabilities must be Capabilities, got {type(declared).__name__}")
    operation = declared.operation
    forward = getattr(candidate, operation, None)
    if not callable(forward):
        raise TypeError(f"{candidate!r} declares {operation} but has no such function")
    backward = getattr(candidate, f"{operation}_backward", None)
    if backward is None and framework == "numpy" and declared.gradients:
        raise TypeError(f"{candidate!r} declares gradients but has no {operation}_backward")
    return Implementation(name, framework, declared, forward, backward)


def _capabilities_of(
    function: Callable[..., Any], framework: str, operation: str | None
) -> Capabilities:
    """What a bare function can be asked: the operands that its signature names."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as cause:  # some that are written in C have none
        raise TypeError(f"{function!r} does not tell its signature") from cause
    signature = SIGNATURES[operation or _operation_of([p.name for p in parameters])]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters}
    given = {name: x for name, x in signature.optional.items() if takes_all or name in named}
    differentiable = {*signature.required, *given} & {*signature.differentiable}
    return Capabilities(
        signature.operation,
        operands=signature.basic.union(*given.values()),
        gradients=frozenset(differentiable if framework == "torch" else ()),
        lse=signature.lse and (takes_all or "return_lse" in named),
    )


def _operation_of(parameters: list[str]) -> str:
    """The first operation whose operands a function with these parameters begins with."""
    taken = (
        name
        for name, signature in SIGNATURES.items()
        if tuple(parameters[: len(signature.required)]) == signature.required
    )
    return next(taken, DEFAULT_OPERATION)


def _declining(
    function: Callable[..., Any], capabilities: Capabilities, name: str
) -> Callable[..., Any]:
    """``function``, checked and refused as the contract says, since it does not do so itself."""
    signature = SIGNATURES[capabilities.operation]

    def forward(*operands: Any, **arguments: Any) -> Any:
        given = dict(zip(signature.required, operands, strict=False)) | arguments
        checked = {key: x for key, x in given.items() if key != "return_lse"}
        if signature.lse:
            checked["lse"] = given.get("return_lse", False)
        capabilities.require(signature.check(**checked), name)
        by_position = [given.pop(key) for key in signature.required]
        return function(*by_position, **given)

    return forward
