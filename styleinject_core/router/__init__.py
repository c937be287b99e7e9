"""Looking at the style router: recording what it does while a model runs."""
