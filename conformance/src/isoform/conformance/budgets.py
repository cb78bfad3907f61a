"""Budgets: how much error is allowed, where that comes from, and whether it is still true.

The constants are not chosen but measured: ``isoform calibrate`` runs implementations that are known
to be right over all cases, and records the largest error over u·κ, the largest ratio to the twin
and the largest bias that they show, on each device. The constant is that figure times a margin. The
record, with the date, the implementations and a digest of everything it depends on, is part of the
package; a test fails when the digest of the CPU's part no longer fits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isoform.conformance.dtypes import FORMATS
from isoform.reference.contract import Arithmetic

if TYPE_CHECKING:
    from isoform.conformance.operation import Operation

HERE = Path(__file__).parent
DEPENDS_ON = ("dtypes.py", "metrics.py", "oracle.py", "chunks.py", "case.py")
"""What every calibration depends on: it is stale when any of these changes."""

OF_THE_OPERATION = ("cases.py", "values.py", "condition.py", "twin.py")
"""And on which modules of the operation's own package."""

MARGIN = 2.0
"""A constant is the largest figure seen in calibration times this."""

SMALLEST = {"condition": 1.0, "twin_max": 3.0, "twin_mean": 1.5, "bias": 0.3}
"""No constant is smaller than this, however well the calibrated implementations do."""

ENOUGH = 256
"""Elements a result must have for its statistics (twin, bias) to mean something."""


@dataclass(frozen=True)
class Budget:
    """The limits for one result in one dtype.

    Attributes:
        condition: C: no error is above C·(u·κ + η·λ).
        twin_max: Largest error, as a multiple of the twin's.
        twin_mean: Mean error, as a multiple of the twin's.
        bias: The mean signed error, as a part of the root mean square of the error.
    """

    condition: float
    twin_max: float
    twin_mean: float
    bias: float


def calibration_path(operation: str) -> Path:
    """Where the calibration of ``operation`` is recorded."""
    return HERE / "calibration" / f"{operation}.json"


@cache
def calibration(operation: str) -> dict[str, Any]:
    """The recorded calibration of ``operation``.

    Raises:
        FileNotFoundError: It has never been calibrated.
    """
    record: dict[str, Any] = json.loads(calibration_path(operation).read_text())
    return record


def budget(operation: str, dtype: str, result: str) -> Budget:
    """The limits for ``result`` of ``operation`` in ``dtype``."""
    limits = calibration(operation)["limits"][dtype][result]
    return Budget(**{name: limits[name] for name in SMALLEST})


def digest(operation: Operation) -> str:
    """A digest of everything that the calibration of ``operation`` depends on."""
    content = hashlib.sha256()
    for name in (*DEPENDS_ON, *(f"{operation.short}/{name}" for name in OF_THE_OPERATION)):
        content.update((HERE / name).read_bytes())
    return content.hexdigest()


def result_format(result: str, dtype: str) -> str:
    """The format a result of ``dtype`` operands is returned in: lse is float32 at least (EVO-7)."""
    return "float32" if result == "lse" and FORMATS[dtype].digits < 24 else dtype


def units(result: str, dtype: str, arithmetic: Arithmetic) -> tuple[float, float]:
    """Units (u and η) for ``result`` of operands in ``dtype``: of the format it is returned in; for
    lse of what the logits are kept in by the declared ``arithmetic``, where that is coarser.
    """
    formats = [FORMATS[result_format(result, dtype)]]
    if result == "lse":
        formats.append(FORMATS[arithmetic.resolve("logits", dtype)])
    coarsest = min(formats, key=lambda float_format: float_format.digits)
    return coarsest.unit_roundoff, coarsest.smallest
