"""Optimizer, average, state and resume, loaders, trackers, seeds."""
