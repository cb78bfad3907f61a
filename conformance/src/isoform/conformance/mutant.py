"""Mutants: implementations with one known fault each, to prove that the suite sees it.

A suite that cannot fail is worthless. Every mutant names the case on which it is judged and the
check that must condemn it; a test runs them all, and also demands that the same implementation
without the fault passes on that case, and that no check is without a mutant.
"""

from __future__ import annotations

from dataclasses import dataclass

from isoform.conformance.implementation import Implementation


@dataclass(frozen=True)
class Mutant:
    """An implementation with one fault.

    Attributes:
        implementation: It.
        fault: What is wrong with it, in a sentence.
        killed_by: The check that must fail: ``out/condition``, ``unmodified``, …
        case: Id of the case it must fail on; empty for the checks that bring their own operands.
    """

    implementation: Implementation
    fault: str
    killed_by: str
    case: str = ""

    @property
    def name(self) -> str:
        """The implementation's name."""
        return self.implementation.name
