"""The definition: what every operation of isoform means, in NumPy and in PyTorch.

``isoform.reference.numpy`` is the oracle (float64, hand-derived gradients, no other dependency),
``isoform.reference.torch`` the same functions under autograd, and ``isoform.reference.contract``
the vocabulary both share with every kernel: operand checks, :class:`~.contract.Capabilities` and
:class:`~.contract.Unsupported`.
"""
