"""The suite: every check of :mod:`isoform.conformance.judge` as a pytest test.

Run with ``pytest -p isoform.conformance.plugin --pyargs isoform.conformance.suite --impl NAME``;
``-m conformance``, ``-m gradients`` and ``-m precision`` choose the groups.
"""
