"""The layer's mathematics as pure functions: `reference` (the paper), `stack` and `fold` (fast), `dispatch` (chooses)."""
