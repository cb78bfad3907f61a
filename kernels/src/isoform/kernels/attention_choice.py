"""The kernels of attention over a sequence that there are, what each needs, and which does a call.

As :mod:`isoform.kernels.choice`: a kernel is taken because all before it in the order for the call
(:data:`ORDERS`) decline, each for reasons that :func:`reasons` lists. Two of them are libraries'
that PyTorch brings along. They know neither documents nor windows nor shards; where they do a call
they may be faster than ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from isoform.kernels import attention_plain, attention_tensor
from isoform.kernels.arguments import View
from isoform.kernels.attention_arguments import Options
from isoform.kernels.choice import declined, first_to_accept, named
from isoform.kernels.launch import Pass, Work
from isoform.kernels.tensor import ARCHITECTURES
from isoform.reference.attention_contract import DIFFERENTIABLE, SequenceShape
from isoform.reference.contract import Call, Capabilities

FLASH_CAPABILITIES = Capabilities(
    "attention",
    dtypes=frozenset({"bfloat16", "float16"}),
    devices=frozenset({"cuda"}),
    architectures=ARCHITECTURES,
    head_dims=(8, 256),
    head_dim_multiple=8,
    min_length=1,
    operands=frozenset({"causal"}),
    grouped_heads=True,
    gradients=frozenset(DIFFERENTIABLE),
    deterministic=False,  # dq is summed by atomic additions
    memory="linear",
    arithmetic=attention_tensor.CAPABILITIES.arithmetic,
)
"""What PyTorch's flash attention is asked for here."""

CUDNN_CAPABILITIES = replace(
    FLASH_CAPABILITIES,
    min_length=2,  # of one query and one key it declines the backward
)
"""And cuDNN's."""

WIDE_HEADS: Mapping[str, tuple[int, frozenset[str]]] = {
    "cuda-flash": (192, frozenset({"sm_80", "sm_90", "sm_100"})),
    "cuda-cudnn": (128, frozenset({"sm_90"})),
}
"""Up to which D a library's backward goes everywhere, and the GPUs on which it goes up to 256."""


@dataclass(frozen=True)
class Kernel:
    """A kernel to choose.

    Attributes:
        name: Its name.
        capabilities: What it declares.
        forward: The work of a forward, by the shape, the dtype, how the operands lie, and options;
            None where it is a library's (:mod:`isoform.kernels.attention_library`).
        backward: The work of a backward, of the same and the names of the gradients wanted.
    """

    name: str
    capabilities: Capabilities
    forward: Callable[[SequenceShape, str, Mapping[str, View], Options], Work] | None = None
    backward: (
        Callable[[SequenceShape, str, Mapping[str, View], Options, Collection[str]], Work] | None
    ) = None

    @property
    def library(self) -> bool:
        """Whether it is a library's, which PyTorch brings along."""
        return self.forward is None

    def forward_of(self, options: Options) -> Pass:
        """The forward of calls with these options."""
        make = self.forward
        assert make is not None
        return lambda shape, dtype, views: make(shape, dtype, views, options)

    def backward_of(self, options: Options, wanted: Collection[str]) -> Pass:
        """The backward that computes the gradients ``wanted``."""
        make = self.backward
        assert make is not None
        return lambda shape, dtype, views: make(shape, dtype, views, options, wanted)


KERNELS = (
    Kernel("cuda-cudnn", CUDNN_CAPABILITIES),
    Kernel("cuda-flash", FLASH_CAPABILITIES),
    Kernel(
        "cuda-tensor",
        attention_tensor.CAPABILITIES,
        attention_tensor.forward,
        attention_tensor.backward,
    ),
    Kernel(
        "cuda-plain",
        attention_plain.CAPABILITIES,
        attention_plain.forward,
        attention_plain.backward,
    ),
)
"""The kernels."""

BY_NAME = {kernel.name: kernel for kernel in KERNELS}


@dataclass(frozen=True)
class Order:
    """In which order kernels are asked, for some calls.

    Attributes:
        kernels: Their names, all of them.
        architectures: The GPUs that it is for; empty for all.
        head_dims: The smallest and the largest D; None for any.
        least: The fewest keys.
    """

    kernels: tuple[str, ...]
    architectures: frozenset[str] = field(default_factory=frozenset)
    head_dims: tuple[int, int] | None = None
    least: int = 0

    def fits(self, call: Call) -> bool:
        """Whether ``call`` is one of those."""
        low, high = self.head_dims or (0, call.shape.D)
        return (
            (not self.architectures or call.architecture in self.architectures)
            and low <= call.shape.D <= high
            and self.least <= call.shape.K
        )


ORDERS = (
    # On Hopper cuDNN is 1.4 to 2.2 times as fast as flash attention and 1.8 to 3.9 times as ours,
    # forward and backward, in every case of benchmark.attention; these begin with 2048 tokens.
    Order(
        ("cuda-cudnn", "cuda-flash", "cuda-tensor", "cuda-plain"),
        architectures=frozenset({"sm_90"}),
        head_dims=(64, 256),
        least=1024,
    ),
    # Elsewhere nothing was measured: ours come first, proven case by case, and deterministic.
    Order(("cuda-tensor", "cuda-cudnn", "cuda-flash", "cuda-plain")),
)
"""The first that fits a call is its order. Each line is a measurement's, which a comment names."""


@dataclass(frozen=True)
class Wish:
    """What a caller asks for that is no part of the call.

    Attributes:
        torch: The operands are tensors of PyTorch's.
        scale: The factor of the logits.
        wide: Results are wanted in float32.
        deterministic: Equal calls must give equal bits.
        low_memory: Nothing is to be taken but results, lse and δ.
    """

    torch: bool
    scale: float
    wide: bool = False
    deterministic: bool = False
    low_memory: bool = False


def order_of(call: Call) -> tuple[Kernel, ...]:
    """The kernels in the order in which they are asked for ``call``."""
    chosen = next(order for order in ORDERS if order.fits(call))
    return tuple(BY_NAME[name] for name in chosen.kernels)


def select(call: Call, wish: Wish, only: str | None = None) -> Kernel:
    """The kernel for ``call``, or the one called ``only``.

    Raises:
        ValueError: None is called so.
        Unsupported: None does this call.
    """
    order = order_of(call) if only is None else (named(only, BY_NAME),)
    return first_to_accept(order, lambda one: reasons(one, call, wish))


def reasons(kernel: Kernel, call: Call, wish: Wish) -> tuple[str, ...]:
    """Why ``kernel`` declines ``call``, with what can be done about it; empty if it does not."""
    found = declined(kernel.capabilities, call)
    if wish.deterministic and not kernel.capabilities.deterministic:
        found.append("deterministic=True")
    if kernel.library:
        found += _reasons_of_a_library(kernel.name, call, wish)
    return tuple(found)


def without_idle_places(call: Call, options: Options) -> Call:
    """``call`` without positions, where no side of a window makes anything of them."""
    if options == replace(Options(), wide=options.wide):
        return replace(call, operands=call.operands - {"positions", "key_positions"})
    return call


def _reasons_of_a_library(name: str, call: Call, wish: Wish) -> list[str]:
    found = []
    everywhere, wide = WIDE_HEADS[name]
    if everywhere < call.shape.D and call.architecture not in wide:
        found.append(f"head dim {call.shape.D} on {call.architecture} (up to {everywhere} there)")
    if wish.scale <= 0:
        found.append(f"scale {wish.scale:g} (positive only)")
    if wish.low_memory:
        found.append("low_memory=True (its backward sums dq in float32)")
    if wish.wide:
        found.append("results in float32 of 16-bit operands")
    if not wish.torch:
        return [*found, "arrays that are no tensors of PyTorch's"]
    from isoform.kernels import attention_library

    return [*found, *attention_library.MISSING[name]]
