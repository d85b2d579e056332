"""What intervals say: the scale of verdicts, and the sentences of a page."""
