"""The style router: recording what it does while a model runs, looking at it, and steering it."""
