"""Training adapters: objectives (method, section 4) and the loop."""
