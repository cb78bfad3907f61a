"""Who is timed: ours, and what else computes attention with a pair bias on this machine.

Each takes the operands in the contract's shapes and in the layout in memory that suits it best, so
that no copy is timed that its users would not make.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from isoform.kernels import evoformer_attention
from isoform.kernels.benchmark.records import installed

Forward = Callable[[Any, Any, Any, Any, Any], Any]
"""``q, k, v [B, S, L, H, D]``, ``mask [B, S, L]``, ``pair_bias [B, 1, H, L, L]`` to ``out``."""

FLEX_MODES = ("max-autotune", "default")


@dataclass(frozen=True)
class Settings:
    """What can be said about the competitors.

    Attributes:
        flex_mode: How hard PyTorch's compiler looks for FlexAttention's best tiles.
    """

    flex_mode: str = FLEX_MODES[0]

    def called(self, name: str) -> str:
        """What a competitor that they matter to is called: two settings are two competitors."""
        return name if self == Settings() else f"{name}, {self.flex_mode}"


@dataclass(frozen=True)
class Competitor:
    """One way to compute the call.

    Attributes:
        name: What it is called.
        make: Gives the function that is timed.
        heads_first: Whether operands lie in memory as ``[B, S, H, L, D]``, heads before lengths.
        ours: Whether it is one of this package's.
        biases: Whether it does mask and pair bias; if not, it is a bound and not a peer.
        distribution: The distribution that it comes in, where that is not PyTorch's or ours.
        configurable: Whether :class:`Settings` say anything of it.
        dtypes: What it is timed in.
        remark: Why it is not timed in other dtypes.
    """

    name: str
    make: Callable[[Settings], Forward]
    heads_first: bool = True
    ours: bool = False
    biases: bool = True
    distribution: str = ""
    configurable: bool = False
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    remark: str = ""

    def missing(self, dtype: str) -> str:
        """Why it cannot be timed here; empty if it can."""
        if self.distribution and installed(self.distribution) is None:
            return f"{self.distribution} is not installed"
        return "" if dtype in self.dtypes else self.remark


def ours(settings: Settings, **asked: Any) -> Forward:
    """:func:`isoform.kernels.evoformer_attention`, with further arguments."""

    def forward(q: Any, k: Any, v: Any, mask: Any, pair_bias: Any) -> Any:
        return evoformer_attention(q, k, v, mask=mask, pair_bias=pair_bias, **asked)

    return forward


def eager(settings: Settings) -> Forward:
    """Product, biases, softmax, product, each by itself, as OpenFold without any kernel."""
    import torch

    def forward(q: Any, k: Any, v: Any, mask: Any, pair_bias: Any) -> Any:
        query, key, value = (x.transpose(2, 3) for x in (q, k, v))
        logits = torch.matmul(query * query.shape[-1] ** -0.5, key.mT)
        if pair_bias is not None:
            logits = logits + pair_bias
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, None, None, :], -torch.inf)
        return torch.matmul(torch.softmax(logits, -1), value).transpose(2, 3)

    return forward


def sdpa(settings: Settings, *, backend: str = "") -> Forward:
    """PyTorch's own, with mask and pair bias written out as one bias for each row.

    Args:
        settings: Not looked at.
        backend: Which of its kernels, by the name in ``SDPBackend``; its own choice by default.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def forward(q: Any, k: Any, v: Any, mask: Any, pair_bias: Any) -> Any:
        bias = pair_bias
        if mask is not None:
            attended = mask[:, :, None, None, :]
            one = q.new_zeros(()) if pair_bias is None else pair_bias
            bias = torch.where(attended, one, -torch.inf)
        if bias is not None:
            B, S, L, H, _ = q.shape
            bias = bias.expand(B, S, H, L, L).reshape(-1, H, L, L)
        query, key, value = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return out.transpose(1, 2).reshape(q.shape)

    def unbiased(q: Any, k: Any, v: Any, mask: Any, pair_bias: Any) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return forward(q, k, v, None, None)

    return unbiased if backend else forward


def flex(settings: Settings) -> Forward:
    """FlexAttention, compiled, with mask and pair bias in its score function."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    def forward(q: Any, k: Any, v: Any, mask: Any, pair_bias: Any) -> Any:
        S = q.shape[1]
        rows = None if mask is None else mask.flatten(0, 1)
        pairs = None if pair_bias is None else pair_bias[:, 0]

        def score(logit: Any, row: Any, head: Any, query: Any, key: Any) -> Any:
            if pairs is not None:
                logit = logit + pairs[row // S, head, query, key]
            if rows is not None:
                logit = torch.where(rows[row, key], logit, -torch.inf)
            return logit

        query, key, value = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
        out: Any = flex_attention(query, key, value, score_mod=score)
        return out.transpose(1, 2).reshape(q.shape)

    # graphs would copy operands, and their outputs be overwritten by the next call
    mode = "max-autotune-no-cudagraphs" if settings.flex_mode == "max-autotune" else "default"
    torch.compiler.reset()  # of other cases
    return torch.compile(forward, dynamic=False, fullgraph=True, mode=mode)


def cuequivariance(settings: Settings) -> Forward:
    """NVIDIA's triangle attention."""
    from cuequivariance_torch import triangle_attention

    def forward(q: Any, k: Any, v: Any, mask: Any, pair_bias: Any) -> Any:
        query, key, value = (x.transpose(2, 3) for x in (q, k, v))
        attended = None if mask is None else mask[:, :, None, None, :]
        return triangle_attention(query, key, value, bias=pair_bias, mask=attended).transpose(2, 3)

    return forward


SIXTEEN_BITS = ("bfloat16", "float16")

COMPETITORS = (
    Competitor("isoform", ours, heads_first=False, ours=True),
    Competitor(
        "isoform, deterministic", partial(ours, deterministic=True), heads_first=False, ours=True
    ),
    Competitor("eager", eager),
    Competitor("SDPA", sdpa, heads_first=False),
    Competitor("FlexAttention", flex, configurable=True),
    Competitor(
        "cuEquivariance",
        cuequivariance,
        distribution="cuequivariance-torch",
        dtypes=SIXTEEN_BITS,
        remark="its float32 is TF32 in the backward",
    ),
    Competitor(
        "cuDNN, no bias",
        partial(sdpa, backend="CUDNN_ATTENTION"),
        heads_first=False,
        biases=False,
        dtypes=SIXTEEN_BITS,
        remark="cuDNN has no float32 attention",
    ),
)


def select(names: Iterable[str]) -> tuple[Competitor, ...]:
    """The competitors with these names; all, if there are no names.

    Raises:
        ValueError: None has the name.
    """
    asked = {name.casefold() for name in names}
    there = {one.name.casefold(): one for one in COMPETITORS}
    if unknown := sorted(asked - there.keys()):
        known = ", ".join(repr(one.name) for one in COMPETITORS)
        raise ValueError(f"no competitor {', '.join(unknown)}; there are {known}")
    return tuple(one for name, one in there.items() if not asked or name in asked)
