"""What a run keeps on disk: run folders, manifests, checkpoints."""
