"""The page of single patients: what explains each risk, its picture, the page."""
