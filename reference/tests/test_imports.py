"""The oracle imports where there is nothing but NumPy."""

import subprocess
import sys

import pytest

# A finder in front of all others refuses these, installed or not.
REFUSED = ("cupy", "hypothesis", "ml_dtypes", "mpi4py", "mpmath", "pytest", "torch")
PROGRAM = f"""
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {REFUSED}:
            raise ModuleNotFoundError(f"refused {{name}}")

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(name)
loaded = {{name.partition(".")[0] for name in sys.modules}} & set({REFUSED})
sys.exit(f"loaded {{loaded}}" if loaded else 0)
"""


def importing(*modules: str) -> "subprocess.CompletedProcess[str]":
    """Import ``modules`` in a fresh interpreter where all else is refused."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *modules]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "module",
    [
        "isoform.reference",
        "isoform.reference.contract",
        "isoform.reference.numpy",
        "isoform.reference.attention_contract",
        "isoform.reference.numpy.attention",
        "isoform.reference.numpy.attention_tiled",
        "isoform.reference.numpy.evoformer",
        "isoform.reference.numpy.evoformer_tiled",
        "isoform.reference.numpy.rotary",
        "isoform.reference.rotary_contract",
        "isoform.reference.rotary_scaling",
    ],
)
def test_numpy_is_enough(module):
    done = importing(module)
    assert done.returncode == 0, done.stderr


def test_the_contract_needs_no_numpy_of_its_own():
    """Nothing but the standard library: a kernel's host code can check a call before any import."""
    program = "import sys, isoform.reference.contract; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_what_is_refused_would_be_noticed():
    done = importing("isoform.reference.torch")
    assert done.returncode != 0
    assert "refused torch" in done.stderr
