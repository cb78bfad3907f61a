"""The operations over many ranks: shardings, communicators, and the algorithms that join them.

A parallel result equals the one-rank result, forward and backward, at every world size. MPI,
``torch.distributed`` and NCCL are imported where a communicator of that kind is made.
"""
