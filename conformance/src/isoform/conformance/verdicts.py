"""Verdicts: what a check can say of an implementation, and what counts as its fault.

A check is named by the result it looks at and the part of the budget that must hold, such as
``out/condition`` or ``dpair_bias/twin_mean``; others look at behaviour, such as ``unmodified``.
What an implementation *declares* decides what counts as a fault:

=========== ======================= =====================================================
declared    behaviour               verdict
=========== ======================= =====================================================
supported   within budget           pass
supported   outside                 **wrong**
supported   raises ``Unsupported``  **broken declaration**
supported   raises anything else    **error**
unsupported raises ``Unsupported``  unsupported (counted, never a pass)
unsupported returns                 undeclared: checked, and wrong numbers are **wrong**
unsupported crashes                 **bad refusal**
=========== ======================= =====================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from isoform.conformance.metrics import Errors


class Verdict(StrEnum):
    """What a check says."""

    PASS = "pass"
    WRONG = "wrong"
    BROKEN_DECLARATION = "broken declaration"
    ERROR = "error"
    BAD_REFUSAL = "bad refusal"
    UNSUPPORTED = "unsupported"
    UNDECLARED = "undeclared"
    NOT_RUN = "not run"

    @property
    def fails(self) -> bool:
        """Whether the implementation is at fault."""
        return self in _FAILING


_FAILING = {Verdict.WRONG, Verdict.BROKEN_DECLARATION, Verdict.ERROR, Verdict.BAD_REFUSAL}

GROUPS = ("conformance", "gradients", "precision")
"""Checks come in groups: results as such, gradients as such, and how exact both are."""


@dataclass(frozen=True)
class Part:
    """One part of a budget: a measured figure and its limit.

    Attributes:
        name: ``pattern``, ``condition``, ``twin_max``, ``twin_mean`` or ``bias``.
        holds: Whether the figure is within its limit.
        figure: What was measured.
        limit: What is allowed.
        detail: A sentence, where a figure alone does not tell.
    """

    name: str
    holds: bool
    figure: float = 0.0
    limit: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one check said of one implementation on one case.

    Attributes:
        implementation: Its name.
        case: The case's id.
        group: The group of the check.
        check: The result looked at (``out``, ``dq``, …) or a behaviour (``determinism``, …).
        verdict: The verdict.
        message: Why, in a sentence; empty for a pass.
        parts: Every part of the budget that was looked at.
        errors: The measured errors, where numbers were compared.
        excused: Why it was expected to fail, by a list that the run was given; empty if it was not.
        seconds: How long the implementation took.
    """

    implementation: str
    case: str
    group: str
    check: str
    verdict: Verdict
    message: str = ""
    parts: tuple[Part, ...] = ()
    errors: Errors | None = None
    excused: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """The full names of what failed: ``out/condition``; just ``check`` for behaviours."""
        if not self.verdict.fails:
            return ()
        broken = [f"{self.check}/{part.name}" for part in self.parts if not part.holds]
        return tuple(broken) or (self.check,)
