"""Reading the DKA format: the names of its columns."""
