"""The Evoformer kernels that there are, what each needs, and which does a call.

An explicit choice, and a visible one: a kernel is taken because all before it in :data:`KERNELS`
decline, each for reasons that :func:`reasons` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from isoform.kernels import plain, tensor
from isoform.kernels.arguments import View
from isoform.kernels.launch import Pass, Work
from isoform.reference.contract import Call, Capabilities, Shape, Unsupported


@dataclass(frozen=True)
class Kernel:
    """A kernel to choose.

    Attributes:
        name: Its name.
        capabilities: What it declares.
        forward: The work of a forward, by the shape, the dtype and how the operands lie.
        backward: The work of a backward, of the same and the names of the gradients wanted.
        saved: What the forward leaves for the backward, ``[B, S, H, Q]``: bytes of each number.
            With it the backward reads the output too. Where there is nothing, it computes both
            again.
    """

    name: str
    capabilities: Capabilities
    forward: Pass
    backward: Callable[[Shape, str, Mapping[str, View], Collection[str]], Work]
    saved: Mapping[str, int] = field(default_factory=dict)

    def backward_of(self, wanted: Collection[str]) -> Pass:
        """The backward that computes the gradients ``wanted``."""
        return lambda shape, dtype, views: self.backward(shape, dtype, views, wanted)


KERNELS = (
    Kernel(
        "cuda-tensor",
        tensor.CAPABILITIES,
        tensor.forward,
        tensor.backward,
        saved=tensor.SAVED,
    ),
    Kernel("cuda-plain", plain.CAPABILITIES, plain.forward, plain.backward),
)
"""The kernels, the one to be preferred first."""

BY_NAME = {kernel.name: kernel for kernel in KERNELS}

REMEDIES = {
    "device cpu": "move the operands to a GPU; on a CPU there is isoform.reference",
    "dtype float64": "isoform.reference.torch computes in float64 on any device",
}


def select(call: Call, *, deterministic: bool = False, only: str | None = None) -> Kernel:
    """The kernel for ``call``, or the one called ``only``.

    Raises:
        ValueError: None is called so.
        Unsupported: None does this call.
    """
    if only is not None and only not in BY_NAME:
        raise ValueError(f"kernel must be one of {', '.join(BY_NAME)}, got {only!r}")
    why_not: list[str] = []
    for kernel in KERNELS if only is None else (BY_NAME[only],):
        why = reasons(kernel, call, deterministic=deterministic)
        if not why:
            return kernel
        why_not += [f"{kernel.name}: {reason}" for reason in why]
    raise Unsupported(why_not, "isoform.kernels")


def reasons(kernel: Kernel, call: Call, *, deterministic: bool = False) -> tuple[str, ...]:
    """Why ``kernel`` declines ``call``, with what can be done about it; empty if it does not."""
    found = declined(kernel.capabilities, call)
    if deterministic and not kernel.capabilities.deterministic:
        found.append("deterministic=True")
    return tuple(found)


def declined(capabilities: Capabilities, call: Call) -> list[str]:
    """Why ``call``, of any operation, is not done, each reason with what can be done about it."""
    return [_with_remedy(reason) for reason in capabilities.unsupported_reasons(call)]


def _with_remedy(reason: str) -> str:
    for what, remedy in REMEDIES.items():
        if reason.startswith(what):
            return f"{reason}: {remedy}"
    return reason
