"""Digests of weights, taken on both sides of a sync and compared."""
