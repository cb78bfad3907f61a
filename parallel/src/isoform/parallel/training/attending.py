"""How a rank attends, and turns queries and keys: what :mod:`.blocks` calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from isoform.parallel.attention import attention as over_ranks
from isoform.parallel.communicator import Communicator
from isoform.parallel.sharding import Sharding
from isoform.parallel.training.switches import Switches
from isoform.reference.torch.attention import attention_tiled
from isoform.reference.torch.genome_lm import Configuration
from isoform.reference.torch.rotary import rotary_embedding

ALIGNED = 8
"""Channels of a head that a GPU's kernels read at once; a head is padded with zeros to so many."""


@dataclass(frozen=True)
class Place:
    """Where a rank's tokens lie.

    Attributes:
        sharding: Which positions each rank has.
        positions: int64 ``[L_r]`` or ``[B, L_r]``.
        segments: int64 likewise, or None where all is one segment.
        given: The positions are others than the sharding says.
        mask: Who may not attend to whom, bool ``[L, L]`` or ``[B, 1, L, L]``, where it is stored.
    """

    sharding: Sharding
    positions: Tensor
    segments: Tensor | None
    given: bool
    mask: Tensor | None


@dataclass
class Attending:
    """Causal attention of a rank's tokens, as the switches want it.

    Attributes:
        switches: The techniques.
        comm: The ranks that share a sequence; None for one.
        window: How far back a query looks; None for no end. For probes of memory, which is the
            same with one, in less time.
        kernel: Which of a GPU's kernels; by default :mod:`isoform.kernels.attention` chooses.
    """

    switches: Switches
    comm: Communicator | None
    window: int | None = None
    kernel: str | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        """``[B, L_r, H, D]`` throughout."""
        options: dict[str, Any] = {"causal": True, "scale": q.shape[-1] ** -0.5}
        options["segments"] = place.segments
        options["positions"] = place.positions if place.given else None
        if self.window is not None:
            options["window"] = (self.window, 0)
        D = q.shape[-1]
        if _on_kernels(q) and D % ALIGNED:
            q, k, v = (F.pad(x, (0, -D % ALIGNED)) for x in (q, k, v))
        return self._of_aligned(q, k, v, place, options)[..., :D]

    def _of_aligned(
        self, q: Tensor, k: Tensor, v: Tensor, place: Place, options: dict[str, Any]
    ) -> Tensor:
        if place.mask is not None:
            return stored(q, k, v, place.mask, options["scale"])
        if self.comm is not None and self.comm.size > 1:
            options |= {"strategy": self.switches.strategy, "near": self.switches.near}
            found = over_ranks(q, k, v, comm=self.comm, sharding=place.sharding, **options)
        elif _on_kernels(q):
            from isoform.kernels.attention import attention

            found = attention(q, k, v, kernel=self.kernel, **options)
        else:
            found = attention_tiled(q, k, v, **options)
        return cast(Tensor, found)


def stored(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The older scheme's attention: scores ``[B, H, L, L]`` and their softmax, in q's dtype.

    The mask is applied in place, which is the least that it can cost.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * scale) @ k.transpose(2, 3)
    return (scores.masked_fill_(mask, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def forbidden(positions: Tensor, segments: Tensor | None) -> Tensor:
    """The mask that is stored: True where a query may not see a key."""
    found = positions[..., :, None] < positions[..., None, :]
    if segments is not None:
        found = found | (segments[..., :, None] != segments[..., None, :])
    return found if found.dim() == 2 else found[:, None]


def rotate(
    configuration: Configuration, q: Tensor, k: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions; as they are where positions are learned."""
    c = configuration
    if c.positions == "learned":
        return q, k
    options: dict[str, Any] = {"base": c.base, "rotary_dim": c.rotary_dim}
    if _on_kernels(q):
        from isoform.kernels.rotary import rotary_embedding_qk

        return cast(tuple[Tensor, Tensor], rotary_embedding_qk(q, k, positions, **options))
    return rotary_embedding(q, positions, **options), rotary_embedding(k, positions, **options)


def _on_kernels(x: Tensor) -> bool:
    """Whether ``x`` is on a GPU, and no float64: that, kernels leave to the reference."""
    return x.device.type == "cuda" and x.dtype.itemsize < 8
