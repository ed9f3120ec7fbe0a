"""Training on one rank: the loops, the techniques, the clock, checkpoints."""
