"""Options that several commands share: SWAA settings, engine, sampling and output."""
