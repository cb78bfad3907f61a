"""What is timed: the calls that models make, and the times that ours have to beat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from isoform.kernels.benchmark import calls
from isoform.reference.contract import Shape

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Times:
    """Milliseconds of a forward and of a backward; None where there is no such figure."""

    forward: float | None
    backward: float | None


@dataclass(frozen=True)
class Case:
    """One call, with query = key = ``L``, and what is expected of it.

    Attributes:
        name: What it is called.
        B: Batch.
        S: Rows that share a pair bias.
        L: Queries, and keys.
        H: Heads.
        D: Head dim.
        must_beat: What ours must be faster than on an H100 in bfloat16, in ms.
        goal: What would be as fast as the best there is without any bias, in ms.
        mask: Whether there is a mask, which leaves out a tenth of the keys.
        pair_bias: Whether there is a pair bias.
        gradients: Whether the backward is timed, with the gradients of all operands.
    """

    name: str
    B: int
    S: int
    L: int
    H: int
    D: int
    must_beat: Times
    goal: Times
    mask: bool = True
    pair_bias: bool = True
    gradients: bool = True

    @property
    def shape(self) -> Shape:
        """The axis sizes."""
        return Shape(B=self.B, S=self.S, Q=self.L, K=self.L, H=self.H, G=self.H, D=self.D)


CASES = (
    Case("triangle-256", 1, 256, 256, 4, 32, Times(0.062, 0.36), Times(0.045, 0.20)),
    Case("triangle-512", 1, 512, 512, 4, 32, Times(0.36, 1.25), Times(0.25, 0.95)),
    Case("triangle-1024", 1, 1024, 1024, 4, 32, Times(2.6, 9.0), Times(1.8, 6.6)),
    Case("msa-row-512x256", 1, 512, 256, 8, 32, Times(0.20, 0.72), Times(0.15, 0.60)),
    Case("extra-msa-5120x384", 1, 5120, 384, 8, 8, Times(4.5, 16.0), Times(3.0, 10.0)),
    Case("diffusion-48x768", 1, 48, 768, 16, 48, Times(0.43, 1.55), Times(0.27, 0.90)),
    Case("single-768", 1, 1, 768, 16, 24, Times(0.042, 0.20), Times(0.02, 0.10)),
    Case("template-4x256", 4, 256, 256, 4, 16, Times(0.25, 0.90), Times(0.19, 0.60)),
)

DETERMINISTIC = 1.2
"""``deterministic=True`` may take so many times what ours take without."""

FLOAT32 = 2.0
"""In float32, IEEE's, ours must be so many times faster than eager PyTorch."""

WORKSPACE = 1.5
"""Ours may take so many times the memory that cannot be done without."""


def select(patterns: Iterable[str]) -> tuple[Case, ...]:
    """The cases whose name matches one of these shell patterns; all, if there are no patterns.

    Raises:
        ValueError: A pattern matches nothing.
    """
    return calls.select(CASES, patterns)
