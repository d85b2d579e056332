"""Event tables with labels (MEDS, long tables) as rows of the DKA format."""
