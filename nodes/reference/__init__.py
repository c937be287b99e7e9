"""Style, or content, from a reference image."""
