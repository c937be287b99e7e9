"""What particular host models need to be known by: their layer shapes, names and loaders."""
