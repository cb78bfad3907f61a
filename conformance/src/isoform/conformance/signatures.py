"""What all implementations of an operation have in common: its arguments and its results, by name.

The contract itself is in :mod:`isoform.reference`; this is what must be known of it to call an
implementation, without knowing what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from isoform.reference import attention_contract, rotary_contract
from isoform.reference.contract import DIFFERENTIABLE, OPTIONAL_OPERANDS, Call, evoformer_call


@dataclass(frozen=True)
class Signature:
    """The signature of an operation.

    Attributes:
        operation: Its name: of the function, and in capabilities.
        required: The operands of every call, in the order in which they may be given by position.
        optional: Further arguments, and what capabilities call that which each can ask for.
        differentiable: Operands that have a gradient, in the order in which the backward returns
            them; the gradient of ``x`` is the result ``dx``.
        arithmetic: The steps of :class:`isoform.reference.contract.Arithmetic` that it has.
        check: Raises what a wrong call must raise, else says what the call asks for.
        lse: Whether the log-sum-exp can be asked for.
        basic: What is asked for where no optional argument is given.
        forward_only: Operands that the backward does without and does not take.
    """

    operation: str
    required: tuple[str, ...]
    optional: Mapping[str, frozenset[str]]
    differentiable: tuple[str, ...]
    arithmetic: tuple[str, ...]
    check: Callable[..., Call]
    lse: bool = False
    basic: frozenset[str] = frozenset()
    forward_only: frozenset[str] = frozenset()

    @property
    def results(self) -> tuple[str, ...]:
        """The results of the operation itself."""
        return ("out", "lse") if self.lse else ("out",)

    @property
    def features(self) -> frozenset[str]:
        """All that an implementation's capabilities may name as operands."""
        return self.basic.union(*self.optional.values())


EVOFORMER_ATTENTION = Signature(
    operation="evoformer_attention",
    required=("q", "k", "v"),
    optional={name: frozenset({name}) for name in OPTIONAL_OPERANDS},
    differentiable=DIFFERENTIABLE,
    arithmetic=("accumulate", "logits", "probabilities", "output", "cotangent", "dlogits"),
    check=evoformer_call,
    lse=True,
)

ROTARY_EMBEDDING = Signature(
    operation=rotary_contract.NAME,
    required=("x", "positions"),
    optional=rotary_contract.FEATURES,
    differentiable=rotary_contract.DIFFERENTIABLE,
    arithmetic=("accumulate",),
    check=rotary_contract.rotary_call,
    basic=rotary_contract.BASIC,
    forward_only=frozenset({"x"}),
)

ATTENTION = Signature(
    operation=attention_contract.NAME,
    required=("q", "k", "v"),
    optional={name: frozenset({name}) for name in attention_contract.OPTIONS},
    differentiable=attention_contract.DIFFERENTIABLE,
    arithmetic=("accumulate", "logits", "probabilities", "output", "cotangent", "dlogits"),
    check=attention_contract.attention_call,
    lse=True,
)

SIGNATURES: dict[str, Signature] = {
    signature.operation: signature
    for signature in (EVOFORMER_ATTENTION, ROTARY_EMBEDDING, ATTENTION)
}
