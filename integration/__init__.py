"""StyleInject inside ComfyUI, below the nodes: patching, sampling runs, recordings, files, training. No maths of the method."""
