"""What every script needs and that knows nothing of models, data or runs: flags, the hub, files, locks."""
