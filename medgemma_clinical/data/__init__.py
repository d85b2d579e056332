"""Trajectories, the tables they come from, checks and case mix."""
