"""Options that several commands share, so that they read the same everywhere."""
