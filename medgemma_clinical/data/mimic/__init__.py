"""From the tables of MIMIC-IV to rows of the DKA format."""
