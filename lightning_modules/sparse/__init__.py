"""Sparse adapters (arXiv 2507.07140): a small subset of the base weights is trained, in place."""
