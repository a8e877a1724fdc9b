"""Benchmarks of the cost of norms, and the classifier of the studies."""
