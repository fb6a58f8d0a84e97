"""Least squares without a network: removed channels reconstructed from kept ones."""
