"""What the suite must know of an operation to judge implementations of it: one description each.

The checks, the verdicts and the command line are the same for every operation. Adding one means
writing an :class:`Operation` and entering it in :data:`isoform.conformance.operations.OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import Array
from isoform.conformance.frameworks import Framework
from isoform.conformance.signatures import Signature
from isoform.reference.contract import Arithmetic, Call


class CallFor(Protocol):
    """The question that a case puts to an implementation's capabilities."""

    def __call__(
        self,
        case: Case,
        *,
        gradients: frozenset[str] = frozenset(),
        lse: bool = False,
        device: str = "cpu",
        architecture: str = "",
    ) -> Call:
        """The call for ``case``."""


class Condition(NamedTuple):
    """κ, what is multiplied with u, and λ, what is multiplied with η, of one result."""

    relative: Array
    underflow: Array


@dataclass(frozen=True)
class InvalidCall:
    """A wrong call, and the answer it must get (rule EVO-12).

    Attributes:
        name: The argument that is wrong, a colon, and what is wrong with it in a few words.
        spoil: Makes the arguments wrong.
        raises: The exception that answers it.
        says: What its message must contain: the operand.
    """

    name: str
    spoil: Callable[[dict[str, Any], Framework], dict[str, Any]]
    raises: type[Exception]
    says: str

    @property
    def about(self) -> str:
        """The argument that is wrong."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class RecordedCase(Case):
    """A case whose operands were recorded in a running model instead of being drawn.

    Attributes:
        load: Reads the operands, cotangent ``dout`` included, anew at each call.
    """

    load: Callable[[], Operands] = field(kw_only=True)


@dataclass(frozen=True)
class Operation:
    """An operation, described for the judge.

    Attributes:
        signature: Its arguments and results.
        short: What its cases' ids begin with; the package here that describes it has this name too.
        cases: Its cases by id.
        draw: The operands of a case, cotangent ``dout`` included.
        call_for: The call that a case makes.
        reference: The oracle: float64 results by name (with gradients if wanted) for operands.
        conditions: κ and λ of every result.
        twin: The results with an implementation's declared arithmetic.
        zeros: Where a result is exactly zero by contract, by result.
        invalid_calls: Wrong calls, on the operands of ``probe``.
        probe: The case that invalid calls are made from.
        memory_case: A case of a given length, to see how peak memory grows.
    """

    signature: Signature
    short: str
    cases: Mapping[str, Case]
    draw: Callable[[Case], Operands]
    call_for: CallFor
    reference: Callable[[Operands, Case, bool], Operands]
    conditions: Callable[[Operands, Case, Operands, bool], dict[str, Condition]]
    twin: Callable[[Operands, Case, Arithmetic, bool], Operands]
    zeros: Callable[[Operands, Case, Operands], dict[str, Array]]
    invalid_calls: tuple[InvalidCall, ...]
    probe: Case
    memory_case: Callable[[int], Case]

    @property
    def name(self) -> str:
        """Its name: of the function, and in capabilities."""
        return self.signature.operation

    def differentiable(self, case: Case) -> list[str]:
        """The operands of ``case`` that have a gradient."""
        present = {*self.signature.required, *case.operands}
        return [name for name in self.signature.differentiable if name in present]

    def operands(self, case: Case) -> Operands:
        """The operands of ``case``: read where they were recorded, else drawn."""
        return case.load() if isinstance(case, RecordedCase) else self.draw(case)
