"""The operations that the suite can judge."""

from __future__ import annotations

from isoform.conformance.attention.operation import ATTENTION
from isoform.conformance.case import Case
from isoform.conformance.evoformer.operation import EVOFORMER_ATTENTION
from isoform.conformance.operation import Operation
from isoform.conformance.rotary.operation import ROTARY_EMBEDDING

OPERATIONS: dict[str, Operation] = {
    operation.name: operation for operation in (EVOFORMER_ATTENTION, ROTARY_EMBEDDING, ATTENTION)
}
CASES: dict[str, Case] = {
    case_id: case for operation in OPERATIONS.values() for case_id, case in operation.cases.items()
}
