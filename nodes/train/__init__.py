"""Nodes that train adapters."""
