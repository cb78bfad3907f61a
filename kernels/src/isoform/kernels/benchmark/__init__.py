"""How fast Evoformer attention is on this GPU: ours, and what else there is, in one run.

Needs a GPU, PyTorch and CuPy. The cases and what is expected of them are data
(:mod:`~isoform.kernels.benchmark.cases`), and so are the competitors
(:mod:`~isoform.kernels.benchmark.competitors`). They run in turns, so that a clock that drifts
drifts for all (:mod:`~isoform.kernels.benchmark.timing`), and each leaves a line in a record
(:mod:`~isoform.kernels.benchmark.records`)::

    python -m isoform.kernels.benchmark --quick
    python -m isoform.kernels.benchmark --case 'triangle-*' --record benchmarks.jsonl
"""
