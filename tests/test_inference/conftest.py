"""Runs of all three stages, shared by the tests of this folder."""

from trained_runs import runs, table

__all__ = ["runs", "table"]
