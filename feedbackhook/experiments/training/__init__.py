"""One run: training, evaluation, checkpoints, processes."""
