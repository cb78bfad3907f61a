"""What each strategy will cost before anything is run: bytes, messages, balance, memory, time.

Bytes and messages are exact (:mod:`isoform.parallel.traffic`), and so is what each rank computes
(:mod:`~.planner.work`). Memory is right to a few percent (:mod:`~.planner.memory`). Time is a model
(:mod:`~.planner.time`) of a machine that is described by data (:mod:`~.planner.topology`)::

    from isoform.parallel import Sharding
    from isoform.parallel.planner import Attended, Sizes, load_topology, plan

    found = plan(
        [Sharding.zigzag(2**20, 64)],
        Sizes(B=1, H=32, G=8, D=128, itemsize=2),
        dtype="bfloat16",
        attended=Attended(causal=True),
        topology=load_topology("h100"),
    )
    print(found.best.name, found.best.time.total)
"""

from isoform.parallel.planner.plan import ITEMSIZE, Candidate, Cost, Plan, plan
from isoform.parallel.planner.time import Time
from isoform.parallel.planner.topology import Level, Topology, load_topology, topologies
from isoform.parallel.planner.work import Attended
from isoform.parallel.traffic import Sizes

__all__ = [
    "ITEMSIZE",
    "Attended",
    "Candidate",
    "Cost",
    "Level",
    "Plan",
    "Sizes",
    "Time",
    "Topology",
    "load_topology",
    "plan",
    "topologies",
]
