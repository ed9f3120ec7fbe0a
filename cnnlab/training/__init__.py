"""Training on one rank: the loop, the techniques, the clock, checkpoints."""
