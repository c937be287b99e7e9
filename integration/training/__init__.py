"""Training inside ComfyUI: its models, what comes from the graph, jobs, and runs kept by name."""
