"""What the four top-level files use: data, evaluation, models, training, commands."""

__version__ = "0.3.0"
