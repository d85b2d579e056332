"""Several runs of one command: made in turn, compared, pooled."""
