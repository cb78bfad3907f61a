"""Cases: one call each, described by data, drawn from a seed that is hashed from its id.

A case says which operation is called, on what sizes, in which dtype, with which operands, holding
what values, laid out how in memory. Its operands are drawn only when it is run, always alike, on
any machine; so its id is all that is needed to run it again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from isoform.conformance.dtypes import Array

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

CASES_VERSION = 1
"""Version of the case set. It grows by one when a released case changes its operands."""

CPU_SIZE = 3_000_000
"""Cases with larger arrays (logits, operands) than this are not run on a CPU unless asked for
(``--large``)."""

Operands = dict[str, Array]


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        id: ``operation/sizes/dtype/variant``, unique.
        operation: Name of the operation in :mod:`isoform.conformance.operations`.
        shape: The axis sizes: :class:`isoform.reference.contract.Sizes`, of the operation's class.
        dtype: Name of the operands' dtype.
        operands: Which optional operands are present, and which features the options ask for.
        values: What the operands hold: a name in the operation's table of recipes.
        layout: How they lie in memory: a name in the operation's table of layouts.
        options: Arguments of the call that are no arrays, as pairs of name and value; what is not
            among them is left to its default.
        differentiate: Whether the gradients are checked too (not where operands are not finite).
        tags: What the case is for.
        note: Why the case exists, for reports.
    """

    id: str
    operation: str
    shape: Any
    dtype: str
    operands: frozenset[str]
    values: str = "normal"
    layout: str = "contiguous"
    options: tuple[tuple[str, Any], ...] = ()
    differentiate: bool = True
    tags: frozenset[str] = frozenset()
    note: str = ""

    @property
    def large(self) -> bool:
        """Whether the case is too large to be run on a CPU without being asked for."""
        return bool(self.shape.largest > CPU_SIZE)

    def rng(self, stream: str = "") -> np.random.Generator:
        """The case's own random numbers; ``stream`` names independent ones."""
        digest = hashlib.sha256(f"{self.id}#{stream}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))


class UnknownName(LookupError):
    """A name that nothing has; the message suggests those that are near."""

    def __init__(self, kind: str, name: str, known: Collection[str]) -> None:
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        super().__init__(f"no {kind} {name!r}.{hint}")


def select(
    cases: Mapping[str, Case],
    *,
    patterns: Iterable[str] = (),
    tags: Iterable[str] = (),
    dtypes: Iterable[str] = (),
) -> list[Case]:
    """The cases that match any of ``patterns``, all of ``tags`` and any of ``dtypes``.

    Args:
        cases: All cases by id.
        patterns: Case ids or shell patterns of them; none means every case.
        tags: Tags that a case must have.
        dtypes: Dtypes, by their long or short name; none means every dtype.

    Raises:
        UnknownName: A pattern or a tag matches no case at all.
    """
    tags, dtypes = tuple(tags), tuple(dtypes)
    chosen = set(cases) if not (patterns := tuple(patterns)) else set()
    for pattern in patterns:
        matching = {case_id for case_id in cases if fnmatchcase(case_id, pattern)}
        if not matching:
            raise UnknownName("case", pattern, cases.keys())
        chosen |= matching
    known_tags = {tag for case in cases.values() for tag in case.tags}
    for tag in tags:
        if tag not in known_tags:
            raise UnknownName("tag", tag, known_tags)
    names = {case.id.split("/")[2]: case.dtype for case in cases.values()}
    for dtype in dtypes:
        if dtype not in names and dtype not in names.values():
            raise UnknownName("dtype", dtype, [*names, *names.values()])
    return [
        case
        for case_id, case in cases.items()
        if case_id in chosen
        and case.tags.issuperset(tags)
        and (not dtypes or case.dtype in dtypes or case.id.split("/")[2] in dtypes)
    ]
