"""CUDA kernels on a machine without a GPU: the same source text, compiled for the processor.

A CUDA kernel is a C++ function that many threads run. Here each thread is a *fiber*, a stack of its
own that takes turns on one processor thread, and the C++ compiler at hand compiles the unchanged
``.cu`` file against headers in ``include/`` that stand for CUDA's (barriers, shuffles, atomics,
float16 and bfloat16). It is slow and says nothing of speed. It says whether a kernel is *right*,
and sees what a GPU lets pass:

- shared memory holds NaN before each block, so what is read before it is written shows;
- threads take turns in forward, in reverse and in shuffled order (:data:`ORDERS`), blocks too; a
  missing ``__syncthreads`` makes the result depend on the order;
- a barrier that some threads skip, a thread that returns while others wait for it, a shuffle from
  a lane that does not take part: :class:`KernelFault`, naming the lines of the source;
- ``python -m isoform.kernels.emulate.sanitized`` runs a program under AddressSanitizer and
  UndefinedBehaviorSanitizer: stores out of bounds, misaligned loads, signed overflow.

What it cannot see is listed in :data:`CANNOT_SEE`; ``python -m isoform.kernels.emulate`` prints it.
"""

from isoform.kernels.emulate.program import (
    ORDERS,
    CompilationFailed,
    HostCompilerUnavailable,
    KernelFault,
    Order,
    Program,
    build,
    check,
    host_compiler,
    sanitized,
)

CANNOT_SEE = (
    "timing, register pressure and spills",
    "weak memory ordering: threads take turns, so every store is seen at once and in order",
    "a missing __syncwarp between lanes that also meet at shuffles",
    "the last bits of the device's own exp, log and division, and fused multiply-add",
    "a pointer that runs from one static __shared__ array into the next",
    "TMA, wgmma and thread-block clusters, which are not modelled",
)
"""What emulation leaves to the compile gate and to a run on a GPU."""

__all__ = [
    "CANNOT_SEE",
    "ORDERS",
    "CompilationFailed",
    "HostCompilerUnavailable",
    "KernelFault",
    "Order",
    "Program",
    "build",
    "check",
    "host_compiler",
    "sanitized",
]
