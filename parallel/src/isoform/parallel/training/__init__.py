"""The genome language model of the reference, trained on P ranks at lengths that one cannot hold.

Every technique is a field of :class:`~isoform.parallel.training.switches.Switches`, and the numbers
are those of :class:`isoform.reference.torch.genome_lm.GenomeLM`, loss and gradients, at every
setting::

    from isoform.parallel.training.model import build
    from isoform.parallel.training.gradients import sum_gradients
    from isoform.parallel.training.switches import EVERYTHING, Layout
    from isoform.reference.torch.genome_lm import CONFIGURATIONS

    switches = EVERYTHING.but(layout=Layout(sequence=comm.size))
    model = build(CONFIGURATIONS["25M"], switches, comm=comm)  # the ranks that share a sequence
    sharding = model.sharding(length)
    loss = model(sharding.shard(tokens, comm.rank), sharding=sharding)  # this rank's part
    loss.backward()
    sum_gradients(model, comm)  # now they are those of the whole sequence

Losses of all ranks add up to the mean over all labelled tokens, and gradients likewise: they are
summed over ranks, never averaged.

======================  ============================================================================
module                  what is in it
======================  ============================================================================
``switches``            the techniques as data
``model``               the model of a rank: parts of the reference's, under the same names
``blocks``              a block as the switches want it
``attending``           attention stored, in tiles, by kernels, or over ranks; the rotation
``recompute``           sums over pieces that are computed again in the backward; loss in tiles
``offload``             what the backward needs, in the host's memory meanwhile
``position_table``      a learned table of which each rank has its rows
``gradients``           sums over ranks of what all of them have
``engines``             tensor and pipeline parallelism and sharded states, on one mesh with these
``precision``           AdamW for 16-bit parameters
``memory``              what tensors hold at most, counted
``plan``                what they will hold, item by item, and the longest sequence that fits
``published``           lengths that others reported, beside the plan's
``fasta``               records, letters and faults of a file, as a stream
``data``                a genome as tokens, and the windows of each step
``markov``              the order-k Markov model, to compare with
``settings``            what a run is told, from TOML
``optimizer``           AdamW by name, on float32 copies of 16 bits
``world``               which rank this is, by torchrun, mpiexec or srun
``loop``                training, its log, and going on where it stopped
``checkpoint``          the state of a run, whole, for any number of ranks
======================  ============================================================================
"""
