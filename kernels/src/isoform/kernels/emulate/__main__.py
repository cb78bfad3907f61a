"""``python -m isoform.kernels.emulate``: whether kernels can be emulated, and what it is worth."""

import sys

from isoform.kernels.emulate import CANNOT_SEE, HostCompilerUnavailable, host_compiler


def main() -> int:
    """Say which compiler would be used and what emulation cannot see; 1 where there is none."""
    try:
        compiler = host_compiler()
    except HostCompilerUnavailable as missing:
        print(f"cuda-emulated: not run: {missing}")  # noqa: T201
        return 1
    print(f"CUDA kernels are emulated with {compiler}. It cannot see:")  # noqa: T201
    for what in CANNOT_SEE:
        print(f"  - {what}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
