"""Benchmarks: what running costs beside computing, each figure beside that of a peer."""
