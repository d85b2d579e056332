"""From tables of a hospital to a DKA file: one module a source."""
