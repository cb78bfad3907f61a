"""What a call cannot take less than, from what the card is made of.

Three things are needed whatever the kernel does: operands are read and results written once, each
logit has one exponential, and each matrix product its multiplications. None of it is measured: a
floor is what the card's multiprocessors, clock and memory bus would allow if nothing else were to
be done and nothing ever waited. On an H100 a copy reaches nine tenths of the bytes, and a large
matrix product seven tenths of the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from isoform.kernels.benchmark.cases import Case
from isoform.reference.contract import Shape

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

EXPONENTIALS = 16
"""Exponentials of a multiprocessor in a clock; of an sm_103, twice as many."""

PRODUCTS = {
    # architecture: operations (a multiplication and an addition are two) of a multiprocessor in a
    # clock, of 16-bit operands summed in float32 by tensor cores, and of float32
    "sm_80": (2048, 128),
    "sm_86": (512, 256),
    "sm_89": (512, 256),
    "sm_90": (4096, 256),
    "sm_100": (8192, 256),
    "sm_103": (8192, 256),
    "sm_120": (512, 256),
}


@dataclass(frozen=True)
class Card:
    """What a GPU is made of.

    Attributes:
        name: Its name.
        architecture: Such as ``"sm_90"``.
        multiprocessors: How many.
        clock_hz: Their highest clock.
        bytes_per_s: What the memory's clock and bus give.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock_hz: float
    bytes_per_s: float


H100 = Card("NVIDIA H100 80GB HBM3", "sm_90", 132, 1.98e9, 3.352e12)
"""The card that the cases' figures are of."""


@dataclass(frozen=True)
class Floor:
    """Milliseconds that each of the three would take by itself."""

    bytes: float
    exponentials: float
    products: float

    @property
    def ms(self) -> float:
        """The largest of the three."""
        return max(self.bytes, self.exponentials, self.products)


def card_of_device() -> Card:
    """What the current GPU is made of, as its driver says."""
    import cupy

    device = cupy.cuda.Device()
    said = device.attributes
    return Card(
        cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode(),
        f"sm_{device.compute_capability}",
        said["MultiProcessorCount"],
        1e3 * said["ClockRate"],  # in kHz
        # twice in a clock, a bit on each line of the bus
        2e3 * said["MemoryClockRate"] * said["GlobalMemoryBusWidth"] / 8,
    )


def floors(case: Case, dtype: str, card: Card) -> tuple[Floor, Floor] | None:
    """What the forward and the backward of ``case`` cannot take less than.

    The backward reads what the forward read, and the output, its cotangent and a number for each
    query, and has five matrix products where the forward has two.

    Returns:
        None for a card whose architecture is not in :data:`PRODUCTS`.
    """
    if card.architecture not in PRODUCTS:
        return None
    shape = case.shape
    rate = card.multiprocessors * card.clock_hz
    exponentials = EXPONENTIALS * (2 if card.architecture == "sm_103" else 1)
    products = PRODUCTS[card.architecture][dtype == "float32"]
    read, output = _operands(case, shape, dtype), BYTES[dtype] * prod(shape.of("out"))
    gradients = _gradients(case, shape, dtype)
    per_query = 4 * prod(shape.of("lse"))

    def floor(moved: int, multiplied: int) -> Floor:
        operations = 2 * multiplied * shape.logits * shape.D
        return Floor(
            1e3 * moved / card.bytes_per_s,
            1e3 * shape.logits / (exponentials * rate),
            1e3 * operations / (products * rate),
        )

    backward = read + 2 * output + per_query + gradients
    return floor(read + output, 2), floor(backward, 5)


def memory_bytes(case: Case, dtype: str) -> int:
    """Above the operands, what a forward and a backward cannot do without: the output, gradients,
    two numbers for each query, and the sum over rows of the pair bias' gradient in float32.
    """
    shape = case.shape
    output = BYTES[dtype] * prod(shape.of("out"))
    if not case.gradients:
        return output
    wide = 4 * prod(shape.of("pair_bias")) if case.pair_bias and dtype != "float32" else 0
    per_query = 2 * 4 * prod(shape.of("lse"))
    return output + _gradients(case, shape, dtype) + per_query + wide


def _operands(case: Case, shape: Shape, dtype: str) -> int:
    mask = prod(shape.of("mask")) if case.mask else 0
    return _gradients(case, shape, dtype) + mask


def _gradients(case: Case, shape: Shape, dtype: str) -> int:
    names = ["q", "k", "v", *(["pair_bias"] if case.pair_bias else [])]
    return BYTES[dtype] * sum(prod(shape.of(name)) for name in names)
