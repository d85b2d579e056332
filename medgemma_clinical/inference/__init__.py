"""Trained models in use: scores of rows, reports, sharing, export."""
