"""The Evoformer kernels that there are, what each needs, and which does a call.

An explicit choice, and a visible one: a kernel is taken because all before it in :data:`KERNELS`
decline, each for reasons that :func:`reasons` lists.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

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
        low_memory: It takes no memory but for results, lse, δ and one float32 ``dpair_bias``.
    """

    name: str
    capabilities: Capabilities
    forward: Pass
    backward: Callable[[Shape, str, Mapping[str, View], Collection[str]], Work]
    saved: Mapping[str, int] = field(default_factory=dict)
    low_memory: bool = True

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
        low_memory=False,
    ),
    Kernel("cuda-plain", plain.CAPABILITIES, plain.forward, plain.backward),
)
"""The kernels, the one to be preferred first."""

LOW_MEMORY = Kernel(
    "cuda-tensor-low-memory",
    tensor.CAPABILITIES,
    tensor.forward,
    tensor.sparingly()(tensor.backward),
    saved=tensor.SAVED,
)
"""As ``cuda-tensor``, without its passes that take 4 bytes more for each query and head."""

EAGER = Kernel(
    "cuda-tensor-eager",
    tensor.CAPABILITIES,
    tensor.eagerly()(tensor.forward),
    tensor.eagerly()(tensor.backward),
    saved=tensor.SAVED,
    low_memory=False,
)
"""As ``cuda-tensor``, by the kernels that only some GPUs have wherever those can, not only where
they are faster. Nobody is given it who does not name it: it is there to be judged, on small cases.
"""

BY_NAME = {kernel.name: kernel for kernel in (*KERNELS, LOW_MEMORY, EAGER)}

REMEDIES = {
    "device cpu": "move the operands to a GPU; on a CPU there is isoform.reference",
    "dtype float64": "isoform.reference.torch computes in float64 on any device",
}


def select(
    call: Call,
    *,
    deterministic: bool = False,
    low_memory: bool = False,
    only: str | None = None,
) -> Kernel:
    """The kernel for ``call``, or the one called ``only``.

    Args:
        call: What is asked for.
        deterministic: Equal bits from run to run are asked for too.
        low_memory: And no more memory than cannot be done without.
        only: The name of the one kernel that may do it.

    Returns:
        The first that has no reason to decline.

    Raises:
        ValueError: None is called so.
        Unsupported: None does this call.
    """
    candidates = order(low_memory=low_memory) if only is None else (named(only, BY_NAME),)
    asked = {"deterministic": deterministic, "low_memory": low_memory}
    return first_to_accept(candidates, lambda one: reasons(one, call, **asked))


def order(*, low_memory: bool = False) -> tuple[Kernel, ...]:
    """The kernels that are asked, the one to be preferred first."""
    return tuple(one if one.low_memory or not low_memory else LOW_MEMORY for one in KERNELS)


class Named(Protocol):
    """A kernel of any operation."""

    @property
    def name(self) -> str:
        """Its name."""


AnyKernel = TypeVar("AnyKernel", bound=Named)


def named(name: str, kernels: Mapping[str, AnyKernel]) -> AnyKernel:
    """The kernel, of any operation, that is called so.

    Raises:
        ValueError: None is.
    """
    if name not in kernels:
        raise ValueError(f"kernel must be one of {', '.join(kernels)}, got {name!r}")
    return kernels[name]


def first_to_accept(
    order: Iterable[AnyKernel], why: Callable[[AnyKernel], tuple[str, ...]]
) -> AnyKernel:
    """The first kernel, of any operation, that has no reason to decline.

    Raises:
        Unsupported: All have; the reasons are those of all.
    """
    why_not: list[str] = []
    for kernel in order:
        found = why(kernel)
        if not found:
            return kernel
        why_not += [f"{kernel.name}: {reason}" for reason in found]
    raise Unsupported(why_not, "isoform.kernels")


def reasons(
    kernel: Kernel, call: Call, *, deterministic: bool = False, low_memory: bool = False
) -> tuple[str, ...]:
    """Why ``kernel`` declines ``call``, with what can be done about it; empty if it does not.

    With ``deterministic``, equal bits from run to run are asked for too; with ``low_memory``, no
    more memory than cannot be done without.
    """
    found = declined(kernel.capabilities, call)
    if deterministic and not kernel.capabilities.deterministic:
        found.append("deterministic=True")
    if low_memory and not kernel.low_memory:
        found.append("low_memory=True")
    return tuple(found)


def declined(capabilities: Capabilities, call: Call) -> list[str]:
    """Why ``call``, of any operation, is not done, each reason with what can be done about it."""
    return [_with_remedy(reason) for reason in capabilities.unsupported_reasons(call)]


def _with_remedy(reason: str) -> str:
    for what, remedy in REMEDIES.items():
        if reason.startswith(what):
            return f"{reason}: {remedy}"
    return reason
