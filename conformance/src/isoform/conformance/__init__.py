"""The judge: cases, budgets, verdicts and reports for implementations of isoform's operations.

Nothing in here computes attention but to judge it. The command line is ``isoform``
(:mod:`isoform.conformance.cli`); in Python, :func:`isoform.conformance.verdicts.judge`.
"""
