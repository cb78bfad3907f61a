"""On a GPU: a kernel is compiled, loaded and right, and a second process only loads it.

Skipped where there is no GPU, unless ISOFORM_REQUIRE_GPU is set: then having none is an error.
"""

import importlib
import os
import subprocess
import sys

import pytest

from isoform.kernels import compiler

REQUIRED = bool(os.environ.get("ISOFORM_REQUIRE_GPU"))
cupy = importlib.import_module("cupy") if REQUIRED else pytest.importorskip("cupy")

if not REQUIRED and not cupy.cuda.is_available():
    pytest.skip("there is no GPU here", allow_module_level=True)

KERNEL = """\
#include "scale.cuh"

extern "C" __global__ void scale(Arguments arguments) {
    arguments.x[threadIdx.x] *= FACTOR;
}
"""

PROCESS = """
import sys, time
from pathlib import Path
import cupy
from isoform.kernels import compiler

cupy.zeros(1)  # CUDA starts, which is nobody's kernel
compiler.SOURCES = Path(sys.argv[1])
started = time.perf_counter()
compiler.load("scale", defines={"FACTOR": "3.0f"}).get_function("scale")
print(time.perf_counter() - started)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a small kernel, and a cache of its own."""
    (tmp_path / "scale.cu").write_text(KERNEL)
    (tmp_path / "scale.cuh").write_text("struct Arguments { float* x; };\n")
    monkeypatch.setattr(compiler, "SOURCES", tmp_path)
    monkeypatch.setattr(compiler, "_LOADED", {})
    monkeypatch.setenv("ISOFORM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_variants_are_loaded_once_and_do_not_mix(folder):
    x = cupy.arange(128, dtype=cupy.float32)
    for factor in (2, 3, 2):
        module = compiler.load("scale", defines={"FACTOR": factor})
        module.get_function("scale")((1,), (128,), (x,))
    assert compiler.load("scale", defines={"FACTOR": 2}) is module
    assert x.tolist() == [12.0 * i for i in range(128)]
    assert len(list(compiler.cache_folder().iterdir())) == 2


def test_a_second_process_loads_in_half_a_second(folder):
    def seconds():
        command = [sys.executable, "-c", PROCESS, str(folder)]
        return float(subprocess.check_output(command, text=True, timeout=120))

    seconds()
    (entry,) = compiler.cache_folder().iterdir()
    written = entry.stat().st_ino
    assert min(seconds(), seconds()) < 0.5
    assert [file.stat().st_ino for file in compiler.cache_folder().iterdir()] == [written]


def test_code_for_another_gpu_is_refused_with_the_remedy(folder, monkeypatch):
    architecture = "sm_80" if cupy.cuda.Device().compute_capability == "75" else "sm_75"
    file = compiler.cached("scale", architecture=architecture, defines={"FACTOR": 2})
    monkeypatch.setattr(compiler, "cached", lambda *_, **__: file)
    with pytest.raises(compiler.CompilerUnavailable, match="refuses machine code"):
        compiler.load("scale", defines={"FACTOR": 2})
