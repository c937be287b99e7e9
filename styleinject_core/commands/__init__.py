"""The training commands: a TOML file becomes a run."""
