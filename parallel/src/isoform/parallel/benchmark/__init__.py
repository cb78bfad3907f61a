"""How much faster attention is on several ranks than on one, by strategy, and where its time goes.

    python -m isoform.parallel.benchmark --ranks 2 --plot timeline.png

Every rank is a process with one thread. Each round measures one rank, and then the same call on
several by every strategy, so that whatever else the machine does meets all alike; of the rounds the
fastest counts, for one rank too. The call is causal attention of a float32 sequence, forward and
backward, its shards zigzag.

In one more run, everything that a rank does is written down with its time: computing blocks,
merging them, and waiting for other ranks. The plot shows it, a row for each rank.
"""
