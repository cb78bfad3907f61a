"""AdamW of a model's parameters by name, on float32 copies of those of 16 bits.

bfloat16 has 8 bits: of a step of less than 1/512 of a parameter nothing would be left. So a copy is
stepped, and the parameter is what the copy rounds to. Names are kept, so that a checkpoint says of
which parameter a state is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from isoform.parallel.training.precision import cut

STATES = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of a parameter."""


class NamedAdamW:
    """AdamW; weights of linear layers decay, and biases, gains and tables of vectors do not.

    Attributes:
        parameters: By name.
        copies: By name, what is stepped: the parameter itself, if it is of float32.

    Args:
        model: Whose parameters.
        betas: Decay of the two moments.
        weight_decay: Of what decays.
    """

    def __init__(
        self, model: nn.Module, *, betas: tuple[float, float], weight_decay: float
    ) -> None:
        decaying = {layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)}
        self.parameters = dict(model.named_parameters())
        self.copies: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().to(torch.float32, copy=True)
            for name, p in self.parameters.items()
        }
        self._chunks: list[tuple[list[str], torch.optim.AdamW]] = []
        for decays in (True, False):
            # on a GPU PyTorch steps several at once, which must be of one mesh
            kinds: dict[object, list[str]] = {}
            for name, p in self.parameters.items():
                if (p in decaying) == decays:
                    kinds.setdefault(getattr(p, "device_mesh", None), []).append(name)
            for names in kinds.values():
                for places in cut(self.parameters[name].numel() for name in names):
                    chunk = [names[place] for place in places]
                    copies = [self.copies[name] for name in chunk]
                    decay = weight_decay if decays else 0.0
                    fused = copies[0].device.type == "cuda"
                    adamw = torch.optim.AdamW(copies, betas=betas, weight_decay=decay, fused=fused)
                    self._chunks.append((chunk, adamw))

    @torch.no_grad()
    def step(self, rate: float, scale: float = 1.0) -> None:
        """One step of those parameters that have a gradient, which is gone then.

        Args:
            rate: The learning rate.
            scale: What gradients are multiplied with.
        """
        for names, adamw in self._chunks:
            for group in adamw.param_groups:
                group["lr"] = rate
            for name in names:
                p = self.parameters[name]
                gradient = None if p.grad is None else p.grad.to(torch.float32)
                if gradient is not None and scale != 1.0:
                    gradient *= scale
                self.copies[name].grad = gradient
            adamw.step()
            for name in names:
                p, copy = self.parameters[name], self.copies[name]
                p.grad = copy.grad = None
                if copy is not p:
                    p.copy_(copy)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What is kept of each parameter, by its name; zeros before its first step.

        Moments are tensors of the parameter's shape; ``step`` is a scalar.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for names, adamw in self._chunks:
            for name in names:
                copy = self.copies[name]
                kept = adamw.state[copy]
                if not kept:
                    fused = copy.device.type == "cuda"
                    kept["step"] = torch.zeros((), device=copy.device if fused else "cpu")
                    kept["exp_avg"] = torch.zeros_like(copy)
                    kept["exp_avg_sq"] = torch.zeros_like(copy)
                found[name] = {state: kept[state] for state in STATES}
        return found

    @torch.no_grad()
    def load(
        self, parameters: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Go on from ``copies`` and what :meth:`state` gave, of the same names."""
        for name, own in self.state().items():
            for key, x in own.items():
                x.copy_(state[name][key])
            self.copies[name].copy_(parameters[name])
            if self.copies[name] is not self.parameters[name]:
                self.parameters[name].copy_(self.copies[name])
