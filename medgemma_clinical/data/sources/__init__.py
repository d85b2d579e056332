"""Commands that make a DKA file from tables, a module each."""
