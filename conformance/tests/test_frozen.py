"""The case set is the one that its version names: a file of digests says what each case asks.

    python conformance/tests/test_frozen.py    # enters new cases; refuses where one has changed

A case may be added. One that changes what it asks, or its operands, or goes, makes results that
were published something else: then CASES_VERSION must grow, and the digests of the new version get
a file of their own.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from isoform.conformance.case import CASES_VERSION, Case
from isoform.conformance.operations import CASES, OPERATIONS

FILE = Path(__file__).parent / "frozen" / f"cases-{CASES_VERSION}.txt"
BY_MACHINE = {"one-hot", "spread-values"}
"""Recipes of numbers whose last digit NumPy's power and sum leave to the processor."""


def digest(case: Case) -> str:
    """Of all that says what is asked; of the operands too, where they are not too large to draw."""
    asked = (
        *(case.operation, case.shape, case.dtype, sorted(case.operands), case.values, case.layout),
        *(case.options, case.differentiate),
    )
    content = hashlib.sha256(repr(asked).encode())
    if not case.large and case.values not in BY_MACHINE:
        for name, x in sorted(OPERATIONS[case.operation].draw(case).items()):
            content.update(f"{name} {x.dtype} {x.shape} ".encode())
            content.update(np.ascontiguousarray(x).tobytes())
    return content.hexdigest()[:16]


def recorded() -> dict[str, str]:
    """The digests in the file, by case."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return dict(line.split() for line in lines)


def changed(known: dict[str, str], found: dict[str, str]) -> list[str]:
    """The recorded cases that are no longer what they were, or no longer there."""
    return [case_id for case_id in known if found.get(case_id) != known[case_id]]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cases_are_those_of_their_version(operation: str) -> None:
    cases = OPERATIONS[operation].cases
    short = OPERATIONS[operation].short
    known = {name: x for name, x in recorded().items() if name.startswith(f"{short}/")}
    found = {case_id: digest(case) for case_id, case in cases.items()}
    assert not changed(known, found), (
        f"of version {CASES_VERSION}, but no longer what they were: if that is meant, "
        "CASES_VERSION must grow (once for a release), and the budgets be calibrated again"
    )
    new = sorted(found.keys() - known.keys())
    assert not new, f"new cases are not entered: run python conformance/tests/{Path(__file__).name}"


def test_a_change_of_what_is_asked_is_seen() -> None:
    from dataclasses import replace

    case = CASES["evoformer/length-17/fp32/all-operands"]
    others = [
        replace(case, layout="packed"),
        replace(case, options=(("scale", 1.0),)),
        replace(case, differentiate=False),
        replace(case, id="another seed"),
        replace(case, operands=frozenset({"mask"})),
    ]
    assert len({digest(case), *map(digest, others)}) == 1 + len(others)
    assert digest(replace(case, tags=frozenset(), note="said otherwise")) == digest(case)
    assert changed({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "0"}) == ["b", "c"]


def main() -> int:
    """Enter new cases."""
    known, found = recorded(), {case_id: digest(case) for case_id, case in CASES.items()}
    if wrong := changed(known, found):
        sys.stderr.write(f"changed, so CASES_VERSION must grow: {', '.join(wrong)}\n")
        return 1
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text("".join(f"{case_id} {x}\n" for case_id, x in found.items()))
    sys.stderr.write(f"{len(found) - len(known)} entered in {FILE.name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
