"""Equivalence testing for graph rewrites."""
