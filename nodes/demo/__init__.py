"""Nodes of the embedded emoji model."""
