"""Routers: which experts answer, for every token, for every row, or for all alike."""
