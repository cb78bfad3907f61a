"""Fast forms of the operations, in CUDA C++ compiled at run time: no nvcc, no build step.

The host side is here, the device side in ``isoform/kernels/cuda``. CuPy is imported where a kernel
is launched, so this package can be imported on any machine.
"""
