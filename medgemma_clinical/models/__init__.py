"""Encoder parts, soft prompt, language models, prompts as tokens, checkpoints."""
