"""Options that several commands share, so that they read and act alike: SWAA settings, engine, sampling, output."""
