"""Nodes that load adapters and put them on models."""
