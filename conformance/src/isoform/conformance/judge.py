"""The judge: runs one implementation on one case and says, check by check, what it is worth."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from isoform.conformance.budgets import Budget, budget, result_format
from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, Array, same
from isoform.conformance.frameworks import Framework, framework
from isoform.conformance.implementation import Implementation
from isoform.conformance.metrics import Errors
from isoform.conformance.operation import Operation
from isoform.conformance.operations import OPERATIONS
from isoform.conformance.oracle import Expected, expected, fault, figures, measure
from isoform.conformance.ranks import Ranks
from isoform.conformance.verdicts import GROUPS, Outcome, Part, Verdict
from isoform.reference.contract import Unsupported

FORWARD = ("out", "lse")
"""Results of the operation itself; all others are gradients."""


def judge(
    implementation: Implementation,
    case: Case,
    *,
    groups: Collection[str] = GROUPS,
    device: str = "cpu",
    architecture: str = "",
    large: bool = False,
) -> list[Outcome]:
    """Judge ``implementation`` on ``case``.

    Args:
        implementation: Whom to judge; it offers the case's operation.
        case: On what.
        groups: Which groups of checks.
        device: Where to run it: where its ranks are, of what runs over ranks.
        architecture: The GPU's architecture, where it is one.
        large: Run on the CPU even what is too large for it.

    Returns:
        One outcome per check; at least one, and ``not run`` with the reason where nothing ran.

    Raises:
        ValueError: It does not offer the operation, or there is no such group of checks.
    """
    offered = implementation.of(case.operation)
    if offered is None:
        raise ValueError(f"{implementation.name} does not offer {case.operation}")
    library = framework(offered.framework)
    trial = _Trial(offered, case, library, device, architecture)
    ordered = [group for group in GROUPS if group in groups]
    if not ordered:
        raise ValueError(f"groups must be some of {', '.join(GROUPS)}, got {list(groups)}")
    if why := not_here(offered, device):
        return [trial.outcome(ordered[0], "case", Verdict.NOT_RUN, why)]
    if case.large and device == "cpu" and not large:
        message = "too large for a CPU; --large runs it"
        return [trial.outcome(ordered[0], "case", Verdict.NOT_RUN, message)]
    return list(trial.run(ordered))


def not_here(implementation: Implementation, device: str) -> str:
    """Why ``implementation`` cannot be run on ``device`` here; empty if it can."""
    if implementation.spread is None:
        there = framework(implementation.framework).devices()
        return "" if device in there else f"no device {device} here"
    ranks = implementation.spread.ranks
    if ranks.device != device:
        return f"its ranks ({ranks.communicator}) are on {ranks.device}, not on {device}"
    return ranks.lacking()


@dataclass(frozen=True)
class _Answer:
    """What a call came to: results of the library, or an exception."""

    results: dict[str, Any] | None
    exception: Exception | None
    seconds: float


@dataclass(frozen=True)
class _Trial:
    """One implementation on one case."""

    implementation: Implementation
    case: Case
    library: Framework
    device: str
    architecture: str

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.case.operation]

    @property
    def host(self) -> str:
        """Where the operands of the call are: ranks take their shards to where they compute."""
        return self.device if self.implementation.spread is None else "cpu"

    def run(self, groups: Sequence[str]) -> Iterator[Outcome]:
        """All checks of ``groups``."""
        declared = self.implementation.capabilities
        differentiates = self.case.differentiate and not {"gradients", "precision"}.isdisjoint(
            groups
        )
        present = self.operation.differentiable(self.case) if differentiates else []
        gradients = [name for name in present if name in declared.gradients]
        declined = self.reasons()
        lse = declared.lse and not declined

        truth = expected(self.case, differentiates)
        # a copy: an implementation that writes to its operands must not spoil the oracle's
        shared = self.host == "cpu"
        own = self.operation.operands(self.case) if shared else truth.operands
        operands = self.library.upload(own, self.host)
        before = self.downloaded(operands)
        if groups == ["gradients"] and present and not (gradients or declined):
            yield from self.undeclared("gradients", "gradients", operands, truth, gradients=present)
            return
        self.library.poison(operands)
        answer = self.ask(operands, lse=lse, gradients=gradients)

        if declined:
            yield self.refused(groups[0], "case", answer, declined)
        elif answer.results is None and gradients:
            forward = self.ask(operands, lse=lse, gradients=[])
            if forward.results is not None:  # the fault is the backward's: the rest is judged
                yield self.failed(
                    "gradients" if "gradients" in groups else "precision", "gradients", answer
                )
                answer = forward
        if answer.results is None:
            if not declined:
                yield self.failed(groups[0], "case", answer)
            return
        results = self.downloaded(answer.results)
        for group in groups:
            for name, actual in results.items():
                if _looks_at(group, name):
                    yield self.compared(group, name, actual, truth, answer.seconds)
        if declined:
            return

        if "conformance" in groups and self.operation.signature.lse and not declared.lse:
            yield from self.undeclared("conformance", "lse", operands, truth, lse=True)
        if "gradients" in groups and len(gradients) < len(present):
            yield from self.undeclared("gradients", "gradients", operands, truth, gradients=present)
        if groups != ["precision"]:
            yield from self.behaves(groups[0], operands, before, answer.results, results, truth)

    def ask(self, operands: dict[str, Any], *, lse: bool, gradients: Sequence[str]) -> _Answer:
        """Call the implementation. Whatever it raises is its answer."""
        start = time.perf_counter()
        try:
            results = self.library.run(
                self.implementation,
                operands,
                dict(self.case.options),
                lse=lse,
                gradients=gradients,
            )
        except Exception as exception:
            return _Answer(None, exception, time.perf_counter() - start)
        return _Answer(results, None, time.perf_counter() - start)

    def reasons(self, gradients: Sequence[str] = (), lse: bool = False) -> tuple[str, ...]:
        """Why the implementation declares such a call unsupported; empty if it does not."""
        call = self.operation.call_for(
            self.case,
            gradients=frozenset(gradients),
            lse=lse,
            device=self.device,
            architecture=self.architecture,
        )
        return self.implementation.capabilities.unsupported_reasons(call)

    def failed(self, group: str, check: str, answer: _Answer) -> Outcome:
        """A supported call that did not return."""
        broken = isinstance(answer.exception, Unsupported)
        verdict = Verdict.BROKEN_DECLARATION if broken else Verdict.ERROR
        return self.outcome(group, check, verdict, _sentence(answer.exception))

    def refused(self, group: str, check: str, answer: _Answer, reasons: tuple[str, ...]) -> Outcome:
        """A call that is declared unsupported."""
        declared = f"declared unsupported: {'; '.join(reasons)}"
        if isinstance(answer.exception, Unsupported):
            return self.outcome(group, check, Verdict.UNSUPPORTED, declared)
        if answer.exception is None:
            return self.outcome(group, check, Verdict.UNDECLARED, f"{declared}, but it returned")
        message = f"{declared}, but raised {_sentence(answer.exception)}"
        return self.outcome(group, check, Verdict.BAD_REFUSAL, message)

    def undeclared(
        self,
        group: str,
        check: str,
        operands: dict[str, Any],
        truth: Expected,
        *,
        lse: bool = False,
        gradients: Sequence[str] = (),
    ) -> Iterator[Outcome]:
        """What is declared unsupported of a call that is else supported: to be refused. Where it is
        returned all the same it must be right.
        """
        answer = self.ask(operands, lse=lse, gradients=gradients)
        yield self.refused(group, check, answer, self.reasons(gradients, lse))
        declared = {"out", *(f"d{name}" for name in self.implementation.capabilities.gradients)}
        for name, actual in self.downloaded(answer.results or {}).items():
            if name not in declared:
                yield self.compared(group, name, actual, truth, answer.seconds)

    def compared(
        self, group: str, name: str, actual: Array, truth: Expected, seconds: float
    ) -> Outcome:
        """One result against the part of its budget that ``group`` looks at."""
        dtype = result_format(name, self.case.dtype)
        shape = truth.results[name].shape
        for kind, got, wanted in (
            ("shape", actual.shape, shape),
            ("dtype", str(actual.dtype), dtype),
        ):
            if got != wanted:
                message = f"{name} has {kind} {got}, must have {wanted}"
                part = Part(kind, False, detail=message)
                return self.outcome(group, name, Verdict.WRONG, message, parts=(part,))

        arithmetic = self.implementation.capabilities.arithmetic
        errors = measure(self.case, arithmetic, name, actual, truth)
        limits = budget(self.case.operation, self.case.dtype, name)
        if group == "precision":
            found = figures(self.case, arithmetic, name, errors, truth)
            parts = _statistics(found, limits)
            if not all(part.holds for part in parts):
                unit = FORMATS[arithmetic.resolve("accumulate", self.case.dtype)].unit_roundoff
                floored = _beside_noise(found or {}, name, errors, truth, unit)
                parts = _statistics(floored, limits)
        else:
            broken_pattern = fault(self.case, name, actual, truth)
            parts = (_pattern(broken_pattern), _condition(errors, limits))
        broken = [part for part in parts if not part.holds]
        return self.outcome(
            group,
            name,
            Verdict.WRONG if broken else Verdict.PASS,
            self.located("; ".join(_describe(name, part) for part in broken)),
            parts=parts,
            errors=errors,
            seconds=seconds,
        )

    def located(self, message: str) -> str:
        """``message`` with the rank that has computed the element it speaks of, if there are many.

        All results but lse have the axis of the sequence second.
        """
        spread = self.implementation.spread
        if spread is None:
            return message

        def with_rank(found: re.Match[str]) -> str:
            rank = spread.rank_of(int(found[1]), self.case.shape.Q)
            return f"{found[0]} (rank {rank} of {spread.ranks.size})"

        return re.sub(r"at \[\d+, (\d+), \d+, \d+\]", with_rank, message)

    def behaves(
        self,
        group: str,
        operands: dict[str, Any],
        before: Operands,
        returned: dict[str, Any],
        results: Operands,
        truth: Expected,
    ) -> Iterator[Outcome]:
        """What must hold of any call, whatever its numbers."""
        after = self.downloaded(operands)
        changed = [name for name in operands if not same(before[name], after[name])]
        yield self.say(group, "unmodified", not changed, f"the call changed {', '.join(changed)}")

        # a call with other operands in between, then the same again
        lse = "lse" in results
        gradients = [name[1:] for name in results if name not in FORWARD]
        others = {name: x if x.dtype.kind in "biu" else -x[..., ::-1] for name, x in before.items()}
        self.ask(self.library.upload(others, self.host), lse=lse, gradients=gradients)
        kept = self.downloaded(returned)
        overwritten = [name for name in results if not same(results[name], kept[name])]
        again = self.ask(operands, lse=lse, gradients=gradients)
        if again.results is None:
            yield self.failed(group, "independence", again)
            return
        repeated = self.downloaded(again.results)
        different = [name for name in results if not same(results[name], repeated[name])]
        if self.implementation.capabilities.deterministic:  # rules EVO-13, ROT-11, SEQ-13
            message = f"{', '.join(different)} differ from one run to the next"
            yield self.say(group, "determinism", not different, message)
        wrong = [
            name
            for name in different
            if self.compared(group, name, repeated[name], truth, 0.0).verdict.fails
        ]
        message = (
            f"a later call changed {', '.join(overwritten)}, returned by an earlier one"
            if overwritten
            else f"{', '.join(wrong)} are wrong after a call with other operands"
        )
        yield self.say(group, "independence", not overwritten and not wrong, message)

    def downloaded(self, arrays: dict[str, Any]) -> Operands:
        """NumPy copies."""
        return {name: self.library.download(x) for name, x in arrays.items()}

    def say(self, group: str, check: str, holds: bool, message: str) -> Outcome:
        """The outcome of a check that is a plain yes or no."""
        verdict = Verdict.PASS if holds else Verdict.WRONG
        return self.outcome(group, check, verdict, "" if holds else message)

    def outcome(
        self, group: str, check: str, verdict: Verdict, message: str = "", **more: Any
    ) -> Outcome:
        """An outcome of this trial."""
        return Outcome(
            self.implementation.name, self.case.id, group, check, verdict, message, **more
        )


def _looks_at(group: str, result: str) -> bool:
    return group == "precision" or (group == "gradients") == (result not in FORWARD)


def _pattern(fault: str | None) -> Part:
    return Part("pattern", fault is None, float(fault is not None), 0.0, fault or "")


def _condition(errors: Errors, limits: Budget) -> Part:
    where = (
        f"at {list(errors.worst)} it is {errors.worst_value:g}, "
        f"the definition says {errors.worst_reference:g}"
    )
    holds = errors.ratio_max <= limits.condition
    return Part("condition", holds, errors.ratio_max, limits.condition, where)


def _statistics(found: dict[str, float] | None, limits: Budget) -> tuple[Part, ...]:
    """The parts of the budget that look at all elements together."""
    return tuple(
        Part(name, figure <= getattr(limits, name), figure, getattr(limits, name))
        for name, figure in (found or {}).items()
    )


def _beside_noise(
    found: dict[str, float], name: str, measured: Errors, truth: Expected, unit: float
) -> dict[str, float]:
    """``found``, where the definition has nothing but what cancels to zero: beside a rounding of
    what cancels, since the twin's error there only tells how much luck it had.

    A part of a rounding as in :func:`~.oracle.figures`, but of sums, of which ``unit`` is the unit
    roundoff, and beside κ.
    """
    reference, kappa = truth.results[name], truth.conditions[name].relative
    comparable = np.isfinite(reference) & np.isfinite(kappa)
    noise = unit * kappa[comparable]
    if not noise.any() or (np.abs(reference[comparable]) > noise).any():
        return found
    beside = {
        "twin_max": 4 * measured.max_abs / float(noise.max()),
        "twin_mean": 16 * measured.mean_abs / float(noise.mean()),
    }
    return {part: min(figure, beside.get(part, figure)) for part, figure in found.items()}


_WORDS = {
    "pattern": "{detail}",
    "condition": "error {figure:.3g} u·κ, allowed {limit:.3g}: {detail}",
    "twin_max": "largest error {figure:.3g} times the twin's, allowed {limit:.3g}",
    "twin_mean": "mean error {figure:.3g} times the twin's, allowed {limit:.3g}",
    "bias": "errors lean to one side by {figure:.3g} of their size, allowed {limit:.3g}",
}


def _describe(result: str, part: Part) -> str:
    return f"{result}: {_WORDS[part.name].format(**vars(part))}"


def _sentence(exception: Exception | None) -> str:
    return f"{type(exception).__name__}: {exception}".splitlines()[0]


def judge_invalid_calls(implementation: Implementation, device: str = "cpu") -> list[Outcome]:
    """Whether every wrong call gets the right exception, which names the operand (EVO-12).

    Of the operations that the implementation offers, each has its own wrong calls; they are made on
    ``device``.
    """
    return [
        outcome for one in implementation.offers for outcome in _judge_invalid_calls(one, device)
    ]


def _judge_invalid_calls(implementation: Implementation, device: str) -> list[Outcome]:
    operation = OPERATIONS[implementation.operation]
    capabilities = implementation.capabilities
    library = framework(implementation.framework)
    if why := not_here(implementation, device):
        trial = _Trial(implementation, operation.probe, library, device, "")
        return [trial.outcome("conformance", "invalid", Verdict.NOT_RUN, why)]
    shape = operation.probe.shape
    probe = replace(
        operation.probe,
        shape=shape if capabilities.cross_lengths else replace(shape, K=shape.Q),
        dtype=next(name for name in _PROBE_DTYPES if name in capabilities.dtypes),
        operands=operation.probe.operands & capabilities.operands,
    )
    trial = _Trial(implementation, probe, library, device, "")
    operands = library.upload(operation.draw(probe), trial.host)
    before = trial.downloaded(operands)

    outcomes = []
    for invalid in operation.invalid_calls:
        optional = operation.signature.optional
        asked = frozenset().union(*(optional.get(x, ()) for x in (invalid.about, invalid.says)))
        if not asked <= capabilities.operands or (
            invalid.about == "heads" and not capabilities.grouped_heads
        ):
            continue
        spoiled = invalid.spoil(operands | dict(probe.options), library)
        if _alike(operands.get(invalid.about), spoiled.get(invalid.about)):
            continue  # axes exchanged of which one is as long as the other: nothing is wrong
        try:
            library.run(implementation, spoiled, {}, lse=False, gradients=[])
        except invalid.raises as exception:
            fault = (
                ""
                if invalid.says in str(exception)
                else (f"the message does not name {invalid.says}: {_sentence(exception)}")
            )
        except Exception as exception:
            fault = f"must raise {invalid.raises.__name__}, raised {_sentence(exception)}"
        else:
            fault = f"must raise {invalid.raises.__name__}, returned"
        outcomes.append(trial.say("conformance", f"invalid/{invalid.name}", not fault, fault))
    after = trial.downloaded(operands)
    changed = [name for name in operands if not same(before[name], after[name])]
    message = f"wrong calls changed {', '.join(changed)}"
    outcomes.append(trial.say("conformance", "invalid/unmodified", not changed, message))
    return outcomes


def _alike(one: Any, other: Any) -> bool:
    """Whether two operands are arrays that a contract does not tell apart."""

    def described(x: Any) -> tuple[Any, ...]:
        return type(x), tuple(x.shape), str(x.dtype), str(getattr(x, "device", ""))

    return hasattr(one, "shape") and hasattr(other, "shape") and described(one) == described(other)


_PROBE_DTYPES = ("float32", "bfloat16", "float16", "float64")

MEMORY_LENGTHS = (512, 1024, 2048)
MEMORY_GROWTH = 1.25
"""What counts as linear: the exponent of the growth from the second length to the third."""


def judge_memory(implementation: Implementation, device: str = "cpu") -> list[Outcome]:
    """Whether peak memory grows with the length, not with its square, where so declared: one
    outcome for each operation that the implementation offers, on ``device``.
    """
    return [_judge_memory(one, device) for one in implementation.offers]


MEMORY_RANKS = Ranks(2)
"""Where implementations over ranks are run for it: what threads allocate can be seen. Lengths are
those of a rank's shard then, which is longer than what is worked on at once. What is on GPUs of
other processes is not seen."""


def _judge_memory(implementation: Implementation, device: str) -> Outcome:
    operation = OPERATIONS[implementation.operation]
    shards = 1
    if implementation.spread is not None:
        implementation = implementation.on(MEMORY_RANKS)
        shards, device = MEMORY_RANKS.size, MEMORY_RANKS.device
    capabilities = implementation.capabilities
    library = framework(implementation.framework)
    peaks = []
    for length in MEMORY_LENGTHS:
        named = operation.memory_case(length)
        case = operation.memory_case(length * shards)
        case = replace(case, id=named.id, operands=case.operands & capabilities.operands)
        trial = _Trial(implementation, case, library, device, "")
        if why := not_here(implementation, device):
            return trial.outcome("conformance", "memory", Verdict.NOT_RUN, why)
        if reasons := trial.reasons():
            return trial.outcome("conformance", "memory", Verdict.NOT_RUN, "; ".join(reasons))
        operands = library.upload(operation.draw(case), device)
        run = partial(
            library.run,
            implementation,
            operands,
            dict(case.options),
            lse=capabilities.lse,
            gradients=[name for name in operands if name in capabilities.gradients],
        )

        try:
            peaks.append(library.peak_memory(run, device))
        except Exception as exception:
            return trial.failed("conformance", "memory", _Answer(None, exception, 0.0))
    if not all(peaks):
        message = f"what it allocates is not seen by {implementation.framework}"
        return trial.outcome("conformance", "memory", Verdict.NOT_RUN, message)
    growth = float(np.log2(peaks[-1] / peaks[-2]))
    allowed = MEMORY_GROWTH if capabilities.memory == "linear" else 2.25
    part = Part("growth", growth <= allowed, growth, allowed)
    if part.holds:
        return trial.outcome("conformance", "memory", Verdict.PASS, parts=(part,))
    figures = ", ".join(
        f"{peak / 2**20:.1f} MiB at L={length}"
        for length, peak in zip(MEMORY_LENGTHS, peaks, strict=True)
    )
    message = f"declared {capabilities.memory}, but grows as L^{growth:.2f}: {figures}"
    return trial.outcome("conformance", "memory", Verdict.WRONG, message, parts=(part,))
