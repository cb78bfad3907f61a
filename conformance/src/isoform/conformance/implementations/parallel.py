"""Sequence-parallel attention: every strategy with every sharding, as implementations over ranks.

The hybrid's groups have as many ranks as the smallest number that divides them: with P ranks,
Ulysses in groups of that many, and rings from group to group. With a prime P there is one group.
"""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

from isoform.conformance.implementation import Implementation
from isoform.conformance.ranks import Vjp, over_ranks
from isoform.parallel.attention import attention_vjp
from isoform.parallel.sharding import Kind


def hybrid(q: Any, k: Any, v: Any, *, comm: Any, **options: Any) -> Any:
    """The hybrid strategy, in the smallest groups there can be."""
    divisors = (near for near in range(2, comm.size + 1) if comm.size % near == 0)
    return attention_vjp(q, k, v, comm=comm, strategy="hybrid", near=next(divisors, 1), **options)


STRATEGIES: dict[str, Vjp] = {
    "all-gather": partial(attention_vjp, strategy="all_gather"),
    "hybrid": hybrid,
    "ring": partial(attention_vjp, strategy="ring"),
    "ulysses": partial(attention_vjp, strategy="ulysses"),
}

PARALLEL: dict[str, Implementation] = {
    name: over_ranks(name, vjp, kind)
    for strategy, vjp in STRATEGIES.items()
    for kind in get_args(Kind)
    for name in [f"parallel/{strategy}-{kind}"]
}
