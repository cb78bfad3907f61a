r"""Where two implementations part: the tiled definition, walked step by step from outside.

Implementations return ``out`` and, some of them, ``lse``; what is inside is not seen. But a call
can be put so that one step shows in what is returned. With P the probabilities and e the
exponentials::

    one key left                   lse = s_ij                             the logit
    two keys j, r left, v_j = 1    out = e_j / (e_j + e_r)                one probability
    the same, v_j = v_r = 1        out = (e_j + e_r) / l                  1, where l is their sum
    the first tiles left           lse = m + log l                        the sum so far
    v = 0 outside one tile         out = Σ_{j in tile} P_ij v_j           that tile's product

Every such call is a call of the operation, so the oracle, the condition and the budget of the suite
say how far each reading may be off. What can be read, and what follows:

==================================================== ======================================
reading                                              the step at fault
==================================================== ======================================
lse of one key is wrong                              logits
the same, for all keys by one amount, P_j wrong too  exp: exp(0) is not 1
the same, for logits beyond 60 alone                 max
P_j is wrong, and P_j + P_r = 1, on designed logits  exp
the same on the case's own logits alone              max: its subtraction, or rescaling when
                                                     another tile raises it
P_j is exactly 0, and P_r is 1                       logits: the key is not seen
P_j + P_r ≠ 1, lse wrong (or P_j : P_r right)        sum
P_j + P_r ≠ 1, lse right                             product
lse of the first tiles is wrong                      sum
a tile's product is wrong, or Σ P_j · 1 ≠ 1          product
all of these are right, and the gated output is not  gate
==================================================== ======================================

Designed logits are at most 0, with a 0 in the same tile: no maximum is needed for them, and they
reach as far down as the case's own. A reading is *seen*; the step is *inferred* from it, by the
table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from isoform.conformance.budgets import budget, result_format, units
from isoform.conformance.case import Case, Operands
from isoform.conformance.dtypes import FORMATS, Array
from isoform.conformance.frameworks import framework
from isoform.conformance.implementation import DEFAULT_OPERATION, Implementation
from isoform.conformance.operation import Condition
from isoform.conformance.operations import OPERATIONS
from isoform.conformance.signatures import SIGNATURES

STEPS = ("logits", "max", "exp", "sum", "product", "gate")
TILE = 64
"""Queries and keys of a tile, if nobody says otherwise."""

FAR = 60.0
"""Logits further from 0 than this need the maximum: float32's exponential ends at 88."""

WORK = 4_000_000
"""Logits of all calls of one reading together, at most: else some keys alone are looked at."""


class Unexplained(Exception):
    """The walk cannot be made; the message says why."""


@dataclass(frozen=True)
class Probe:
    """One reading, put as a call: ``n`` variants of it side by side on the batch axis.

    Attributes:
        name: What is read, in a few words.
        operands: The operands.
        options: The options.
        keys: Which key each variant is about (of a tile, its first).
        result: ``out`` or ``lse``.
    """

    name: str
    operands: Operands
    options: dict[str, Any]
    keys: tuple[int, ...]
    result: str


@dataclass(frozen=True)
class Reading:
    """What one implementation says to a probe.

    Attributes:
        excess: Error over budget, elementwise; more than 1 is wrong, infinite where only one of it
            and the definition is finite.
        value: What was read, float64.
        reference: What the definition says.
        allowed: The budget, in the same unit.
    """

    excess: Array
    value: Array
    reference: Array
    allowed: Array

    @property
    def wrong(self) -> bool:
        """Whether it is outside its budget anywhere."""
        return bool((self.excess > 1).any())


@dataclass(frozen=True)
class Fault:
    """Where an implementation leaves the definition.

    Attributes:
        implementation: Its name.
        step: One of :data:`STEPS`, or several that cannot be told apart.
        seen: The reading that shows it.
        queries: The tile's queries, first and one past the last.
        keys: The tile's keys, likewise.
        coordinate: b, s, h, i, j of the element that is furthest off.
        value: What was read there.
        definition: What the definition says.
        excess: The error over its budget.
        inferred: How the step follows from what is seen.
    """

    implementation: str
    step: str
    seen: str
    queries: tuple[int, int]
    keys: tuple[int, int]
    coordinate: dict[str, int]
    value: float
    definition: float
    excess: float
    inferred: str


@dataclass(frozen=True)
class Explanation:
    """The walk through one case.

    Attributes:
        a: The name of the first.
        b: The name of the second.
        case: The case's id.
        tile: Queries and keys of a tile.
        rows: What was read: its name, the largest error over its budget of A and of B, and their
            difference over it.
        faults: Where each leaves the definition that does.
        parted: The step at which the two part; empty where they do not, or where no reading tells.
        remarks: What was not looked at.
    """

    a: str
    b: str
    case: str
    tile: int
    rows: tuple[tuple[str, float, float, float], ...]
    faults: tuple[Fault, ...]
    parted: str
    remarks: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for scripts."""
        return asdict(self)


def explain(
    a: Implementation, b: Implementation, case: Case, *, tile: int = TILE, device: str = "cpu"
) -> Explanation:
    """Walk through ``case`` and say where ``a`` and ``b`` part.

    Args:
        a: The first implementation.
        b: The second.
        case: A case of Evoformer attention, drawn or captured.
        tile: Queries and keys of a tile, as the kernels have them, for naming the place.
        device: Where to run.

    Raises:
        Unexplained: It is another operation, there are no keys or queries, or the two have no
            operand in common by which keys can be left out.
    """
    if case.operation != DEFAULT_OPERATION:
        raise Unexplained(f"{case.operation} cannot be walked through, only {DEFAULT_OPERATION}")
    sides = [side for one in (a, b) if (side := one.of(case.operation)) is not None]
    if len(sides) < 2:
        raise Unexplained(f"not both do {case.operation}")
    if 0 in vars(case.shape).values():
        raise Unexplained(f"{case.id} has an empty axis: there is nothing to walk through")
    walk = _Walk(sides[0], sides[1], case, tile, device)
    return walk.explanation()


class _Walk:
    """The readings of one case, made when they are asked for."""

    def __init__(
        self, a: Implementation, b: Implementation, case: Case, tile: int, device: str
    ) -> None:
        self.sides, self.case, self.tile, self.device = (a, b), case, tile, device
        self.operation = OPERATIONS[case.operation]
        self.capabilities = [side.capabilities for side in self.sides]
        offered = frozenset.intersection(*(each.operands for each in self.capabilities))
        self.by = next((x for x in ("mask", "mask_bias", "pair_bias") if x in offered), "")
        if not self.by:
            raise Unexplained(
                f"{a.name} and {b.name} have no mask and no bias in common: no key can be left out"
            )
        self.lse = all(each.lse for each in self.capabilities)
        self.remarks: list[str] = []
        if not self.lse:
            self.remarks.append("not both return lse: a logit is seen through probabilities alone")
        self.rows: list[tuple[str, float, float, float]] = []
        whole = self.operation.operands(case)
        self.options = dict(case.options)
        self._known: tuple[Operands, tuple[Operands, Case, dict[str, Condition]]] | None = None
        self.place = (0, 0)  # batch entry and row that are looked at, where not all are
        self.operands = self._focused(whole)
        self.keys = self._chosen_keys()

    def _focused(self, operands: Operands) -> Operands:
        """One batch entry and one row, where all would be too much."""
        shape = self.case.shape
        if shape.logits * min(shape.K, 64) <= WORK or shape.B * shape.S == 1:
            return operands
        b, s = self._worst_row(operands)
        self.remarks.append(f"looked at batch {b}, row {s} alone, where the results differ most")
        self.place = (b, s)
        return {
            name: x[b : b + 1] if name == "pair_bias" else x[b : b + 1, s : s + 1]
            for name, x in operands.items()
        }

    def _worst_row(self, operands: Operands) -> tuple[int, int]:
        """Batch entry and row of the largest error of either."""
        probe = Probe("", operands, self.options, (0,), "out")
        excess = np.maximum(*(self._read(side, probe).excess for side in self.sides))
        where = np.unravel_index(int(np.argmax(excess.max((2, 3, 4)))), excess.shape[:2])
        return int(where[0]), int(where[1])

    def _chosen_keys(self) -> tuple[int, ...]:
        """The keys that are looked at one by one: all, or those at tiles' ends and between."""
        B, S, Q, H, _ = self.operands["q"].shape
        K = self.operands["k"].shape[2]
        most = max(2 * -(-K // self.tile), WORK // max(B * S * Q * H * K, 1))
        if most >= K:
            return tuple(range(K))
        edges = {
            j for first in range(0, K, self.tile) for j in (first, min(first + self.tile, K) - 1)
        }
        spread = {int(j) for j in np.linspace(0, K - 1, max(most - len(edges), 2))}
        self.remarks.append(f"{len(edges | spread)} of {K} keys were looked at one by one")
        return tuple(sorted(edges | spread))

    # Putting the questions

    def _repeated(self, n: int, *, gate: bool = False) -> Operands:
        return {
            name: np.concatenate([x] * n)
            for name, x in self.operands.items()
            if gate or name != "gate"
        }

    def _left(self, operands: Operands, kept: Array) -> Operands:
        """``operands`` with the keys ``kept [n, K]`` of each variant left, by what both support."""
        B, S, Q, H, _ = operands["q"].shape
        K = operands["k"].shape[2]
        of_batch = np.repeat(kept, B // len(kept), axis=0)[:, None]  # [B, 1, K]
        if self.by == "mask":
            own = operands.get("mask", np.ones((B, S, K), bool))
            return {**operands, "mask": own & of_batch}
        shape = (B, S, 1, 1, K) if self.by == "mask_bias" else (B, 1, H, Q, K)
        own = operands.get(self.by, np.zeros(shape, operands["q"].dtype))
        here = of_batch[:, :, None, None]
        return {**operands, self.by: np.where(here, own, np.array(-np.inf, own.dtype))}

    def _values(self, operands: Operands, ones: Array) -> Operands:
        """``operands`` with v one at ``ones [n, K]`` and zero elsewhere."""
        v = operands["v"]
        per_batch = np.repeat(ones, len(v) // len(ones), axis=0)[:, None, :, None, None]
        return {**operands, "v": np.broadcast_to(per_batch, v.shape).astype(v.dtype)}

    def single_keys(self, *, designed: bool = False) -> Probe:
        """One key left: lse is its logit."""
        kept = self._at(self.keys)
        operands, options, name = self._repeated(len(kept)), self.options, "lse with one key left"
        if designed:
            span = self._span
            operands, options = self._with_designed_logits(operands, self.keys, span), {}
            name += ", designed logits"
        operands = self._left(operands, kept)
        return Probe(f"logits: {name}", operands, options, self.keys, "lse")

    def pairs(self, *, cross: bool, designed: bool, ones: bool) -> list[Probe]:
        """Key j beside key r: r is the first of j's own tile, or of the first tile."""
        K = self.operands["k"].shape[2]
        mates = {j: 0 if cross else j - j % self.tile for j in self.keys}
        chosen = [(j, r) for j, r in mates.items() if j != r and (not cross or j >= self.tile)]
        if not chosen:
            return []
        keys, others = (tuple(side) for side in zip(*chosen, strict=True))
        n = len(keys)
        kept = self._at(keys) | self._at(others)
        operands, options = self._repeated(n), self.options
        if designed:
            operands, options = self._with_designed_logits(operands, keys, self._span), {}
        operands = self._left(operands, kept)
        operands = self._values(operands, np.ones((n, K), bool) if ones else self._at(keys))
        where = "across tiles" if cross else "within a tile"
        own = "designed logits" if designed else "its own logits"
        what = "P_j + P_r" if ones else "P_j"
        step = "exp" if designed else "max"
        names = {"out": f"{step}: {what} of two keys {where}, {own}"}
        if ones and self.lse:
            names["lse"] = f"sum: lse of two keys {where}, {own}"
        return [Probe(name, operands, options, keys, result) for result, name in names.items()]

    def _with_designed_logits(
        self, operands: Operands, keys: Sequence[int], span: float
    ) -> Operands:
        """Logits −x for key j of each variant and 0 for all others, x from 0 to ``span``."""
        n, dtype = len(keys), operands["q"].dtype
        q, k = np.zeros_like(operands["q"]), np.zeros_like(operands["k"])
        q[..., 0] = 1
        per = len(q) // n
        depth = np.linspace(0.0, span, n) if n > 1 else np.array([span / 2])
        for index, key in enumerate(keys):
            k[index * per : (index + 1) * per, :, key, :, 0] = -depth[index] * q.shape[-1] ** 0.5
        plain = {name: operands[name] for name in ("v", "dout")}
        return {**plain, "q": q.astype(dtype), "k": k.astype(dtype)}

    @cached_property
    def _span(self) -> float:
        """How far the case's logits are apart within a query, at most 20 and at least 1."""
        probe = self.single_keys()
        lse = self._truth(probe)[0]["lse"]
        n = len(probe.keys)
        by_key = lse.reshape(n, -1)
        with np.errstate(invalid="ignore"):
            finite = np.where(np.isfinite(by_key), by_key, np.nan)
            apart = np.nanmax(finite, 0, initial=-np.inf) - np.nanmin(finite, 0, initial=np.inf)
        largest = float(apart[np.isfinite(apart)].max(initial=1.0))
        return min(max(largest, 1.0), 20.0)

    def prefixes(self) -> list[Probe]:
        """The first t tiles left, v = 1: lse is the sum so far, and out is 1."""
        K = self.operands["k"].shape[2]
        firsts = tuple(range(0, K, self.tile))
        kept = np.arange(K) < np.array([[first + self.tile] for first in firsts])
        operands = self._left(self._repeated(len(firsts)), kept)
        operands = self._values(operands, np.ones((len(firsts), K), bool))
        found = [
            Probe("product: Σ P_j · 1 over the first tiles", operands, self.options, firsts, "out")
        ]
        if self.lse:
            name = "sum: lse over the first tiles"
            found.insert(0, Probe(name, operands, self.options, firsts, "lse"))
        return found

    def products(self) -> Probe:
        """All keys left, v zero outside one tile."""
        K = self.operands["k"].shape[2]
        firsts = tuple(range(0, K, self.tile))
        operands = self._repeated(len(firsts))
        v = operands["v"].copy()
        per = len(v) // len(firsts)
        for index, first in enumerate(firsts):
            outside = np.ones(K, bool)
            outside[first : first + self.tile] = False
            v[index * per : (index + 1) * per, :, outside] = 0
        operands["v"] = v
        return Probe("product: one tile's values", operands, self.options, firsts, "out")

    def gated(self) -> Probe:
        """The call as it is."""
        return Probe(
            "gate: the gated output", self._repeated(1, gate=True), self.options, (0,), "out"
        )

    def _at(self, keys: Sequence[int]) -> Array:
        K = self.operands["k"].shape[2]
        at: Array = np.arange(K) == np.array(keys)[:, None]
        return at

    # Reading the answers

    def _truth(self, probe: Probe) -> tuple[Operands, Case, dict[str, Condition]]:
        """What the definition says to a probe; kept for the other side and the other result."""
        if self._known is None or self._known[0] is not probe.operands:
            self._known = (probe.operands, self._defined(probe))
        return self._known[1]

    def _defined(self, probe: Probe) -> tuple[Operands, Case, dict[str, Condition]]:
        given = {name: x for name, x in probe.operands.items() if name != "dout"}
        asked = SIGNATURES[self.case.operation].check(**given, **probe.options)
        fields = {key: x for key, x in vars(self.case).items() if key != "load"}
        put = replace(
            Case(**fields),
            shape=asked.shape,
            operands=asked.operands,
            options=tuple(probe.options.items()),
        )
        results = self.operation.reference(probe.operands, put, False)
        conditions = self.operation.conditions(probe.operands, put, results, False)
        return results, put, conditions

    def _read(self, side: Implementation, probe: Probe) -> Reading:
        results, put, conditions = self._truth(probe)
        library = framework(side.framework)
        given = {name: x for name, x in probe.operands.items() if name != "dout"}
        try:
            returned = library.run(
                side,
                library.upload(given, self.device),
                probe.options,
                lse=probe.result == "lse",
                gradients=[],
            )
        except Exception as exception:  # whatever it raises, it says nothing of the step
            raise Unexplained(
                f"{side.name} raised {type(exception).__name__}: {exception}"
            ) from None
        value = library.download(returned[probe.result]).astype(np.float64)
        reference = results[probe.result]
        u, eta = units(probe.result, put.dtype, side.capabilities.arithmetic)
        limit = budget(put.operation, put.dtype, probe.result).condition
        condition = conditions[probe.result]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            smallest = FORMATS[result_format(probe.result, put.dtype)].smallest
            allowed = limit * np.nan_to_num(u * condition.relative + eta * condition.underflow)
            allowed = np.maximum(allowed, smallest)
            excess = np.abs(value - reference) / allowed
        alike = (value == reference) | (np.isnan(value) & np.isnan(reference))
        excess = np.where(alike, 0.0, np.where(np.isfinite(excess), excess, np.inf))
        return Reading(excess, value, reference, allowed)

    def read(self, probe: Probe) -> tuple[Reading, Reading]:
        """Both readings; a row of the table."""
        a, b = (self._read(side, probe) for side in self.sides)
        with np.errstate(invalid="ignore"):
            apart = np.abs(a.value - b.value) / np.maximum(a.allowed, b.allowed)
        same = (a.value == b.value) | (np.isnan(a.value) & np.isnan(b.value))
        apart = np.where(same, 0.0, np.where(np.isfinite(apart), apart, np.inf))
        self.rows.append(
            (probe.name, float(a.excess.max()), float(b.excess.max()), float(apart.max()))
        )
        return a, b

    # Drawing the conclusion

    def explanation(self) -> Explanation:
        """The whole walk."""
        faults: dict[str, Fault] = {}
        for step, probe, readings, inferred in self._conclusions():
            for index, (side, reading) in enumerate(zip(self.sides, readings, strict=True)):
                name = step[index]
                if name and reading.wrong and side.name not in faults:
                    faults[side.name] = self._fault(side, name, probe, reading, inferred[index])
            if len(faults) == 2:
                break
        found = sorted(faults.values(), key=lambda fault: STEPS.index(fault.step.split(" ")[0]))
        return Explanation(
            self.sides[0].name,
            self.sides[1].name,
            self.case.id,
            self.tile,
            tuple(self.rows),
            tuple(found),
            found[0].step if found and self._part(found) else "",
            tuple(self.remarks),
        )

    def _part(self, found: Sequence[Fault]) -> bool:
        """Whether the two differ by more than the budget anywhere."""
        return any(apart > 1 for _, _, _, apart in self.rows)

    def _conclusions(
        self,
    ) -> Iterator[tuple[tuple[str, str], Probe, tuple[Reading, Reading], tuple[str, str]]]:
        """Step by step: the step that each side's reading would convict, and how that follows."""

        def both(step: str, why: str) -> tuple[tuple[str, str], tuple[str, str]]:
            return (step, step), (why, why)

        if self.lse:
            yield from self._logit_conclusions()
        for cross, designed in ((False, True), (False, False), (True, False)):
            yield from self._pair_conclusions(cross=cross, designed=designed)
        for probe in self.prefixes():
            readings = self.read(probe)
            if probe.result == "lse":
                step, why = both(
                    "sum", "logits and two-key sums are right; that of the tiles is not"
                )
            elif self.lse:
                step, why = both("product", "the sum, as lse shows it, is right; Σ P·1 is not 1")
            else:
                step, why = both(
                    "sum or product", "Σ P·1 is not 1; without lse the two cannot be told apart"
                )
            yield step, probe, readings, why
        probe = self.products()
        step, why = both("product", "all probabilities and their sum are right; P·V is not")
        yield step, probe, self.read(probe), why
        if "gate" in self.operands:
            probe = self.gated()
            step, why = both("gate", "the output without the gate is right; with it, it is not")
            yield step, probe, self.read(probe), why

    def _logit_conclusions(
        self,
    ) -> Iterator[tuple[tuple[str, str], Probe, tuple[Reading, Reading], tuple[str, str]]]:
        own, designed = self.single_keys(), self.single_keys(designed=True)
        readings, on_designed = self.read(own), self.read(designed)
        near = self._looked_ahead(cross=False, designed=True)
        across = self._looked_ahead(cross=True, designed=False)
        steps, whys = [], []
        for index, (of_case, made) in enumerate(zip(readings, on_designed, strict=True)):
            off = of_case.excess > 1
            far = bool(np.abs(of_case.reference[off]).min(initial=np.inf) > FAR)
            over = off & (np.isnan(of_case.value) | (of_case.value == np.inf))
            whole, share = near[index] if near else (None, None)
            step, why = "logits", "with one key left, lse is its logit and nothing else"
            if over.any():
                step, why = "max", "lse of one key is beyond all numbers: its exponential overflows"
            elif of_case.wrong and far and not made.wrong:
                step = "max"
                why = (
                    f"logits up to {FAR:g} are right, beyond lse of a single key is lost: what is "
                )
                why += "subtracted is not the maximum"
            elif share and whole and share.wrong and not whole.wrong and self._alike(made):
                step, why = "exp", "lse of one key is off alike for all logits: exp(0) is not 1"
            elif across and across[index][0].wrong:
                found, because = self._sum_or_product(*across[index], None)
                if found == "sum":
                    step, why = found, f"lse of one key is lost, and {because}"
            steps.append(step)
            whys.append(why)
        for probe, both in ((own, readings), (designed, on_designed)):
            yield (steps[0], steps[1]), probe, both, (whys[0], whys[1])

    def _looked_ahead(self, *, cross: bool, designed: bool) -> list[tuple[Reading, Reading]]:
        """Of each side P_j + P_r and P_j of two keys; none where there are no such pairs."""
        probes = [
            probe
            for ones in (True, False)
            for probe in self.pairs(cross=cross, designed=designed, ones=ones)[:1]
        ]
        return [
            (self._read(side, probes[0]), self._read(side, probes[1]))
            for side in self.sides
            if probes
        ]

    def _alike(self, reading: Reading) -> bool:
        """Whether a reading of single keys errs by one amount within each tile."""
        error = (reading.value - reading.reference).reshape(len(self.keys), -1)
        allowed = float(reading.allowed.max())
        tiles = np.array(self.keys) // self.tile
        spread = [np.ptp(error[tiles == t]) for t in np.unique(tiles)]
        return bool(np.max(spread) <= 2 * allowed)  # and not where it is NaN

    def _pair_conclusions(
        self, *, cross: bool, designed: bool
    ) -> Iterator[tuple[tuple[str, str], Probe, tuple[Reading, Reading], tuple[str, str]]]:
        wholes = self.pairs(cross=cross, designed=designed, ones=True)
        if not wholes:
            return
        (single,) = self.pairs(cross=cross, designed=designed, ones=False)[:1]
        ones = self.read(wholes[0])
        sums = self.read(wholes[1]) if len(wholes) > 1 else None
        shares = self.read(single)
        steps, whys = [], []
        for index, (whole, share) in enumerate(zip(ones, shares, strict=True)):
            broken = not (np.isfinite(whole.value).all() and np.isfinite(share.value).all())
            if broken and np.isfinite(whole.reference).all():
                step, why = "max", "exponentials overflow: what is subtracted is not the maximum"
            elif not cross and not self.lse and self._nothing(whole):
                step, why = "", "both keys are gone: pairs across tiles tell whether they are lost"
            elif whole.wrong:
                step, why = self._sum_or_product(whole, share, sums and sums[index])
            elif self._lost(share):
                step, why = "logits", "P_j is exactly 0, and P_r is 1: key j is not seen at all"
            elif designed:
                step, why = "exp", "P_j + P_r is 1, P_j is not what exp(s_j − s_r) makes it"
            elif cross:
                step = "max"
                why = (
                    "P_j + P_r is 1, and within a tile P_j is right: what the first tiles left is "
                )
                why += "not rescaled as the maximum rises"
            elif not self.lse:
                step = "logits"
                why = (
                    "exp is right on designed logits, P_j on its own logits is not: they are wrong "
                )
                why += "(or the maximum is)"
            else:
                step = "max"
                why = (
                    "logits are right, and exp is on designed ones: what is subtracted is not the "
                )
                why += "maximum"
            steps.append(step)
            whys.append(why)
        pair, reasons = (steps[0], steps[1]), (whys[0], whys[1])
        yield pair, single, shares, reasons
        yield pair, wholes[0], ones, reasons
        if sums is not None:
            why = "lse of two keys is wrong, their probabilities are right"
            yield ("sum", "sum"), wholes[1], sums, (why, why)

    def _nothing(self, whole: Reading) -> bool:
        """Whether P_j + P_r is wrong by being 0, and another tile has keys to compare with."""
        wrong = whole.value[whole.excess > 1]
        return bool(wrong.size and (wrong == 0).all() and max(self.keys) >= self.tile)

    def _lost(self, share: Reading) -> bool:
        """Whether probabilities are wrong by being 0 that are far from it."""
        off = share.excess > 1
        gone = off & (share.value == 0) & (share.reference > 0.01)
        return bool(gone.any() and gone[off & (share.reference > 0.01)].all())

    def _sum_or_product(
        self, whole: Reading, share: Reading, lse: Reading | None
    ) -> tuple[str, str]:
        """Which of the two makes P_j + P_r differ from 1."""
        if lse is not None:
            if lse.wrong:
                return "sum", "P_j + P_r is not 1, and lse of the two keys is wrong"
            return "product", "P_j + P_r is not 1, but lse of the two keys is right"
        with np.errstate(all="ignore"):
            ratio = share.value / whole.value
            off = np.abs(ratio - share.reference) > 2 * (share.allowed + whole.allowed)
        if not off[np.isfinite(ratio)].any() and np.isfinite(ratio).any():
            return "sum", "P_j + P_r is not 1, but P_j and P_r are to each other as they must be"
        return "product", "P_j + P_r is not 1, and P_j to P_r is not as it must be"

    def _fault(
        self, side: Implementation, step: str, probe: Probe, reading: Reading, inferred: str
    ) -> Fault:
        excess = reading.excess
        if probe.name.startswith(("sum: lse over", "product: Σ")):  # the first tile that is wrong
            per = len(excess) // len(probe.keys)
            by_tile = excess.reshape(len(probe.keys), per, -1).max((1, 2))
            first = int(np.argmax(by_tile > 1))
            lead = np.zeros_like(excess)
            lead[first * per : (first + 1) * per] = excess[first * per : (first + 1) * per]
            excess = lead
        worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(excess)), excess.shape))
        per = len(excess) // len(probe.keys)
        if probe.result == "lse":
            n, s, h, i = worst
        else:
            n, s, i, h, _ = worst
        j = probe.keys[n // per]
        B, S = self.place
        Q, K = self.operands["q"].shape[2], self.operands["k"].shape[2]
        first_query, first_key = i - i % self.tile, j - j % self.tile
        return Fault(
            implementation=side.name,
            step=step,
            seen=probe.name.partition(": ")[2],
            queries=(first_query, min(first_query + self.tile, Q)),
            keys=(first_key, min(first_key + self.tile, K)),
            coordinate={"b": n % per + B, "s": s + S, "h": h, "i": i, "j": j},
            value=float(reading.value[worst]),
            definition=float(reading.reference[worst]),
            excess=float(reading.excess[worst]),
            inferred=inferred,
        )
