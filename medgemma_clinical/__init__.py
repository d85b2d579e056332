"""What the four top-level files use: data, evaluation, models, training, commands."""
