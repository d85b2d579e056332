"""Several runs: made in turn, compared, pooled, set side by side."""
