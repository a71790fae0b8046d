"""Options for SWAA settings, engine, sampling and output, which several commands share."""
