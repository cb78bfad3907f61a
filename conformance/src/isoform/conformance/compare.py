"""Two implementations on the same operands: how far apart they are, and which is nearer the truth.

What differs between two kernels is not yet a fault of either. So every difference is shown beside
both errors against the definition, and where it is largest, beside the definition's own number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np

from isoform.conformance.budgets import budget, result_format, units
from isoform.conformance.case import Case
from isoform.conformance.dtypes import Array
from isoform.conformance.frameworks import framework
from isoform.conformance.implementation import Implementation
from isoform.conformance.metrics import Errors, errors
from isoform.conformance.operations import OPERATIONS
from isoform.conformance.oracle import Expected, expected, fault, measure
from isoform.conformance.run import environment, plain

SCHEMA = 1
"""Version of the JSON that :meth:`Comparison.as_json` writes."""


@dataclass(frozen=True)
class Side:
    """One implementation's result against the definition's.

    Attributes:
        errors: Its errors.
        share: Its largest error over its budget: more than 1 is wrong.
        fault: What is wrong with its NaN, infinities and exact zeros; empty where nothing is.
    """

    errors: Errors
    share: float
    fault: str

    @property
    def within(self) -> bool:
        """Whether the result is within its budget."""
        return self.share <= 1 and not self.fault


@dataclass(frozen=True)
class Difference:
    """One result of one case, from A and from B.

    Attributes:
        case: The case's id.
        result: Which result: ``out``, ``dq``, …
        dtype: The format it is returned in.
        between: A measured against B, as if B were the definition. ``worst`` is where they differ
            most, in units of the budget; ``worst_value`` is A there, ``worst_reference`` B.
        definition: The definition's number there.
        apart: Elements where the two disagree about NaN or infinity; not in ``between``.
        a: A against the definition.
        b: B against the definition.
    """

    case: str
    result: str
    dtype: str
    between: Errors
    definition: float
    apart: int
    a: Side
    b: Side


@dataclass(frozen=True)
class Comparison:
    """A comparison of two implementations.

    Attributes:
        a: The name of the first.
        b: The name of the second.
        differences: One for every result of every case that both returned.
        skipped: Why the others were not compared, by case or by result of a case.
        environment: As in a run.
    """

    a: str
    b: str
    differences: tuple[Difference, ...]
    skipped: dict[str, str]
    environment: dict[str, str]

    @property
    def within(self) -> bool:
        """Whether both are within their budgets everywhere."""
        return all(found.a.within and found.b.within for found in self.differences)

    def largest(self) -> tuple[Difference, ...]:
        """For every result and dtype the case where the two differ most."""
        found: dict[tuple[str, str], Difference] = {}
        for difference in self.differences:
            key = difference.dtype, difference.result
            if key not in found or _gap(difference) > _gap(found[key]):
                found[key] = difference
        return tuple(found.values())

    def as_json(self) -> str:
        """The comparison as a JSON document; NaN and infinities are strings, as in a run's."""
        document = {"schema": SCHEMA, "within": self.within} | plain(asdict(self))
        return json.dumps(document, indent=1, allow_nan=False) + "\n"


def _gap(difference: Difference) -> tuple[int, float]:
    return difference.apart, difference.between.ratio_max


def compare(
    a: Implementation,
    b: Implementation,
    cases: Iterable[Case],
    *,
    device: str = "cpu",
    architecture: str = "",
    large: bool = False,
    progress: Callable[[Case], None] = lambda case: None,
) -> Comparison:
    """Run A and B on the same operands, gradients included, and measure what differs.

    Args:
        a: The first implementation.
        b: The second; what not both offer is skipped.
        cases: On what.
        device: Where.
        architecture: The GPU's architecture, where it is one.
        large: Run on the CPU even what is too large for it.
        progress: Called before each case.
    """
    differences: list[Difference] = []
    skipped: dict[str, str] = {}
    for case in cases:
        progress(case)
        if case.large and device == "cpu" and not large:
            skipped[case.id] = "too large for a CPU; --large runs it"
            continue
        first, second = a.of(case.operation), b.of(case.operation)
        if first is None or second is None:
            skipped[case.id] = f"not both do {case.operation}"
            continue
        truth = expected(case, case.differentiate)
        try:
            results = {
                side.name: _results(side, case, truth, device, architecture)
                for side in (first, second)
            }
        except _NotRun as reason:
            skipped[case.id] = str(reason)
            continue
        for result in truth.results:
            lacking = [name for name, found in results.items() if result not in found]
            if lacking:
                skipped[f"{case.id} {result}"] = f"{' and '.join(lacking)}: no {result}"
                continue
            pair = (results[a.name][result], results[b.name][result])
            shapes = {x.shape for x in pair} | {truth.results[result].shape}
            if len(shapes) > 1:
                skipped[f"{case.id} {result}"] = f"shapes {', '.join(map(str, sorted(shapes)))}"
                continue
            differences.append(_difference((first, second), case, result, pair, truth))
    return Comparison(a.name, b.name, tuple(differences), skipped, environment((a, b), device))


class _NotRun(Exception):
    """An implementation did not return on a case; the message says who and why."""


def _results(
    implementation: Implementation, case: Case, truth: Expected, device: str, architecture: str
) -> dict[str, Array]:
    """What ``implementation`` returns: all that it offers and the definition has."""
    operation = OPERATIONS[case.operation]
    capabilities = implementation.capabilities
    call = operation.call_for(case, device=device, architecture=architecture)
    if reasons := capabilities.unsupported_reasons(call):
        raise _NotRun(f"{implementation.name}: {'; '.join(reasons)}")
    gradients = [
        name
        for name in operation.differentiable(case)
        if f"d{name}" in truth.results and name in capabilities.gradients
    ]
    library = framework(implementation.framework)
    operands = library.upload(truth.operands, device)
    try:
        returned = library.run(
            implementation,
            operands,
            dict(case.options),
            lse=capabilities.lse,
            gradients=gradients,
        )
    except Exception as exception:  # whatever an implementation raises is its answer
        summary = f"{type(exception).__name__}: {exception}".splitlines()[0]
        raise _NotRun(f"{implementation.name} raised {summary}") from exception
    return {name: library.download(x) for name, x in returned.items()}


def _difference(
    sides: tuple[Implementation, Implementation],
    case: Case,
    result: str,
    pair: tuple[Array, Array],
    truth: Expected,
) -> Difference:
    dtype = result_format(result, case.dtype)
    u, eta = units(result, case.dtype, sides[0].capabilities.arithmetic)
    condition = truth.conditions[result]
    with np.errstate(invalid="ignore"):
        allowed = np.nan_to_num(u * condition.relative + eta * condition.underflow)
        first, second = (x.astype(np.float64) for x in pair)
        alike = (np.isfinite(first) & np.isfinite(second)) | (first == second)
        apart = ~(alike | (np.isnan(first) & np.isnan(second)))
    between = errors(first, second, allowed, dtype)
    judged = [_side(*side, case, result, truth) for side in zip(sides, pair, strict=True)]
    return Difference(
        case=case.id,
        result=result,
        dtype=dtype,
        between=between,
        definition=float(truth.results[result][between.worst]) if between.worst else 0.0,
        apart=int(apart.sum()),
        a=judged[0],
        b=judged[1],
    )


def _side(
    implementation: Implementation, actual: Array, case: Case, result: str, truth: Expected
) -> Side:
    measured = measure(case, implementation.capabilities.arithmetic, result, actual, truth)
    limit = budget(case.operation, case.dtype, result).condition
    broken = fault(case, result, actual, truth)
    return Side(measured, measured.ratio_max / limit, broken or "")
