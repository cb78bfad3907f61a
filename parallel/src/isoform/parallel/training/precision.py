"""AdamW for parameters of 16 bits: it keeps a float32 copy of each and steps that.

bfloat16 has 8 bits: of a step of less than 1/512 of a parameter nothing would be left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 1 << 27
"""Numbers whose gradients are lifted to float32 at once."""


class MasterAdamW:
    """16 bytes for each parameter: 2 + 2 for it and its gradient, 4 each for copy and moments.

    Args:
        parameters: To be trained, of any float dtype.
        options: Of ``torch.optim.AdamW``: ``lr``, ``betas``, ``weight_decay`` …
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: Any) -> None:
        self._chunks: list[tuple[list[nn.Parameter], list[Tensor], torch.optim.AdamW]] = []
        every = list(parameters)
        for places in cut(p.numel() for p in every):
            chunk = [every[place] for place in places]
            masters = [p.detach().to(torch.float32, copy=True) for p in chunk]
            fused = masters[0].device.type == "cuda"
            optimizer = torch.optim.AdamW(masters, fused=fused, **options)
            self._chunks.append((chunk, masters, optimizer))

    @torch.no_grad()
    def step(self) -> None:
        """One step of those parameters that have a gradient."""
        for parameters, masters, optimizer in self._chunks:
            for p, master in zip(parameters, masters, strict=True):
                master.grad = None if p.grad is None else p.grad.to(torch.float32)
            optimizer.step()
            for p, master in zip(parameters, masters, strict=True):
                master.grad = None
                p.copy_(master)

    def zero_grad(self) -> None:
        """Forget gradients."""
        for parameters, _, _ in self._chunks:
            for p in parameters:
                p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Copies and moments, to be saved."""
        chunks = [{"masters": m, "adamw": o.state_dict()} for _, m, o in self._chunks]
        return {"chunks": chunks}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        for (parameters, masters, optimizer), saved in zip(
            self._chunks, state["chunks"], strict=True
        ):
            for p, master, given in zip(parameters, masters, saved["masters"], strict=True):
                master.copy_(given)
                p.copy_(given)
            optimizer.load_state_dict(saved["adamw"])


def cut(sizes: Iterable[int]) -> list[list[int]]:
    """Places of parameters of so many numbers each, in chunks of at most :data:`CHUNK` numbers.

    One that is larger has a chunk to itself.
    """
    found: list[list[int]] = []
    held = 0
    for place, size in enumerate(sizes):
        if not found or held + size > CHUNK:
            found.append([])
            held = 0
        found[-1].append(place)
        held += size
    return found
