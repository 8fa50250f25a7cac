"""What the training scripts share around their loops: settings, runs, micro-batches, processes, logs."""
