r"""What a genome's short words alone predict: the order-k Markov model of its bases, in NumPy.

With n(c x) how often base x follows the j bases c in what is trained on, and c' being c without
its first base::

    p_j(x | c) = (n(c x) + a p_{j−1}(x | c')) / (Σ_y n(c y) + a)        p_{−1} = 1/4

so every order is smoothed by the one below it, which is smoothed by the next, and no base is
impossible. a, the weight of the lower order in bases, is fixed and not fitted to what is predicted.
For a bacterial genome and k = 5 it hardly matters: 4096 contexts have a thousand bases each.

A base is predicted from the k before it; from as many as there are where a sequence begins or a
base is not known. The cross entropy −Σ log₂ p / N is in bits a base; 2 bits know nothing.

Source: MacKay & Peto, A hierarchical Dirichlet language model, 1995.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from isoform.parallel.arrays import Array

PIECE = 2**22
"""Bases that are counted at once, so that a long genome needs no more memory than a short one."""

WEIGHT = 4.0
"""a: one base of each kind."""


@dataclass(frozen=True)
class Markov:
    """Probabilities of a base after those before it.

    Attributes:
        tables: By the number j of bases before it, 0 to k: ``float64 [4**j, 4]``.
    """

    tables: tuple[Array, ...]

    @property
    def order(self) -> int:
        """K."""
        return len(self.tables) - 1

    def bits(self, bases: Array) -> Array:
        """−log₂ of the probability of each base, ``float64 [n]``; 0 for one that is not known.

        Args:
            bases: ``uint8 [n]``: 0 to 3, or more where a base is not known.
        """
        found = np.zeros(len(bases))
        for j, table in enumerate(self.tables):
            for start, words, known in _words(bases, j + 1):
                # a longer context, where there is one, takes the place of the shorter
                found[start : start + len(words)][known] = -np.log2(table.ravel()[words[known]])
        return found


def fit(stretches: Iterable[Array], order: int, *, strands: int = 2) -> Markov:
    """Count words of up to ``order + 1`` bases.

    Args:
        stretches: Sequences, each ``uint8 [n]``: 0 to 3 for A, C, G and T, more for a base that is
            not known. No word is counted that has one of those or that two stretches share.
        order: k, 0 to 12.
        strands: 2: the other strand's words are counted too.

    Raises:
        ValueError: A number is out of range.
    """
    if not 0 <= order <= 12:
        raise ValueError(f"order must be 0 to 12, got {order}")
    if strands not in (1, 2):
        raise ValueError(f"strands must be 1 or 2, got {strands}")
    counts = [np.zeros(4 ** (j + 1), np.int64) for j in range(order + 1)]
    for bases in stretches:
        for j, count in enumerate(counts):
            for _, words, known in _words(bases, j + 1):
                count += np.bincount(words[known], minlength=len(count))
    if strands == 2:
        counts = [count + count[_other_strand(j + 1)] for j, count in enumerate(counts)]
    tables: list[Array] = []
    lower = np.full((1, 4), 0.25)
    for j, count in enumerate(counts):
        seen = count.reshape(4**j, 4)
        prior = np.tile(lower, (4 if j else 1, 1))  # the first base of a context is its highest
        tables.append((seen + WEIGHT * prior) / (seen.sum(1, keepdims=True) + WEIGHT))
        lower = tables[-1]
    return Markov(tuple(tables))


def _words(bases: Array, width: int) -> Iterator[tuple[int, Array, Array]]:
    """The words that end with each base from the ``width``-th on, as numbers, in pieces.

    Yields:
        The place of the first of these bases, the words ``int64 [m]``, and which hold no base that
        is not known ``bool [m]``.
    """
    for start in range(width - 1, len(bases), PIECE):
        piece = bases[start - width + 1 : start + PIECE].astype(np.int64)
        count = len(piece) - width + 1
        words, known = np.zeros(count, np.int64), np.ones(count, bool)
        for offset in range(width):
            base = piece[offset : offset + count]
            words = 4 * words + (base & 3)
            known &= base < 4
        yield start, words, known


def _other_strand(width: int) -> Array:
    """The number of each word's reverse complement, ``int64 [4**width]``."""
    words = np.arange(4**width)
    found = np.zeros_like(words)
    for _ in range(width):
        found = 4 * found + (3 - words % 4)
        words = words // 4
    return found
