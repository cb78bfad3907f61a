"""Genomes as tokens: codons or single nucleotides, and the other strand of both.

A token is a word of ``width`` bases over A, C, G and T, so there are ``4**width`` of them; with
GenSLM's five special tokens 69 for codons, as published, and 9 for nucleotides. Words are numbered
in alphabetical order (GenSLM's own order is another).

Nothing is dropped. Lower case is read as upper, U as T. A word with an ambiguous base, and a last
word that is not full, become ``[UNK]``; what is no base at all is an error that says where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
BASES = "ACGT"
AMBIGUOUS = frozenset("RYSWKMBDHVN")
COMPLEMENT = str.maketrans(BASES, BASES[::-1])


@dataclass(frozen=True)
class Tokenizer:
    """Words of ``width`` bases, and the special tokens."""

    width: int

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token by its number."""
        return (*SPECIAL, *map("".join, product(BASES, repeat=self.width)))

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of every token."""
        return {token: number for number, token in enumerate(self.vocabulary)}

    def encode(self, sequence: str) -> Tensor:
        """The tokens ``int64 [⌈bases / width⌉]`` of a sequence, read from its first base.

        Raises:
            ValueError: A letter stands for no base; the message says which, and where.
        """
        bases = sequence.upper().replace("U", "T")
        for place, base in enumerate(bases):
            if base not in BASES and base not in AMBIGUOUS:
                raise ValueError(f"{sequence[place]!r} at base {place} of the sequence is no base")
        words = (bases[start : start + self.width] for start in range(0, len(bases), self.width))
        return torch.tensor([self.numbers.get(word, 0) for word in words], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """The sequence of ``tokens [L]``: N for each base of an ``[UNK]``, special ones by name."""
        unknown = "N" * self.width
        return "".join(self.vocabulary[t] if t else unknown for t in tokens.tolist())

    def reverse_complement(self, tokens: Tensor) -> Tensor:
        """The tokens of the other strand, ``[..., L]``, from its own first base.

        Words are turned round and complemented, special tokens only move. A last word that was not
        full is ``[UNK]``, and comes first.
        """
        pairs = (token if token in SPECIAL else self._other(token) for token in self.vocabulary)
        table = torch.tensor([self.numbers[token] for token in pairs], device=tokens.device)
        return table[tokens].flip(-1)

    @staticmethod
    def _other(word: str) -> str:
        return word.translate(COMPLEMENT)[::-1]


codons = Tokenizer(3)
nucleotides = Tokenizer(1)
