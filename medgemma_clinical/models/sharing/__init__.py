"""A trained model as others see it: terms and model card."""
