"""Training: batches, the step, the loop, its callbacks and checkpoints, optimizer and losses."""
