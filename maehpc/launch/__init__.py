"""Where work runs: cluster profiles."""
