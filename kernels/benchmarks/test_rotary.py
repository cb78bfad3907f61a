"""How long rotary embedding of queries and keys takes on this GPU, beside a copy of them.

All competitors of a case are timed in turns (`isoform.kernels.benchmark.rotary`); with ``--record``
each leaves a line. A test passes if ours are as fast as they have to be.
"""

import pytest

from isoform.kernels.benchmark import records
from isoform.kernels.benchmark.rotary import CASES, COPY, bars, row, run

# PyTorch's compiler warns of itself, and of the GPU that it is on.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("rotary_case", CASES, ids=lambda case: case.name)
def test_bars(rotary_case, pytestconfig):
    around = records.surroundings(pytestconfig.getoption("commit"))
    for dtype in pytestconfig.getoption("dtype") or ["bfloat16"]:
        found = run(rotary_case, dtype, around, pytestconfig.getoption("rounds"))
        if path := pytestconfig.getoption("record"):
            records.append(path.with_name(f"rotary_{path.name}"), found)
        copy = next(one for one in found if one.competitor == COPY)
        print(*(row(one, copy) for one in found), sep="\n")
        held = bars(found)
        assert held
        assert not [str(bar) for bar in held if not bar.met]
