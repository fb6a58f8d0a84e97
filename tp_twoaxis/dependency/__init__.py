"""Torch-Pruning's dependency graph, read, checked and used: the only place that touches it."""
