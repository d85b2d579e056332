"""From SRTR's Standard Analysis Files to a cohort and its inputs."""
