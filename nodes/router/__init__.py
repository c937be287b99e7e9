"""Nodes that record, draw and steer the style router."""
