"""What the kernels of attention over a sequence are told.

:data:`ATTENTION` mirrors ``AttentionArguments`` of ``cuda/attention_arguments.cuh``, field by
field; ``test_attention_arguments.py`` holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isoform.kernels.arguments import Struct
from isoform.reference.attention_contract import PLACES, UNLIMITED, resolve_window

ATTENTION = Struct(
    axes=("B", "Q", "K", "H", "G", "D"),
    arrays=(
        *("q", "k", "v", "out", "lse"),
        *("dout", "delta", "dq", "dk", "dv"),
        *PLACES,
    ),
    rank=4,
    scratch=("query_spans", "key_spans"),
    counts=("left", "right", "wide"),
)

NO_END = 2**63 - 1
"""The side of a window that has no end, as kernels know it."""


@dataclass(frozen=True)
class Options:
    """What a call asks for besides its operands.

    Attributes:
        left: How many positions before its own a query looks; :data:`NO_END`.
        right: How many after it.
        wide: Results are float32: what blocks of keys give, to be merged or summed (rule SEQ-11).
    """

    left: int = NO_END
    right: int = NO_END
    wide: bool = False

    @classmethod
    def of(cls, *, causal: bool, window: Any, wide: bool = False) -> Options:
        """Those of a call that has been checked."""
        left, right = (
            NO_END if side == UNLIMITED else min(side, NO_END)
            for side in resolve_window(window, causal)
        )
        return cls(left, right, wide)

    @property
    def counts(self) -> dict[str, int]:
        """The fields of the struct."""
        return {"left": self.left, "right": self.right, "wide": int(self.wide)}
