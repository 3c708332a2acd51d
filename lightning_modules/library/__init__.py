"""Adapter libraries: experts in a store, in a stack, and routers that find them."""
