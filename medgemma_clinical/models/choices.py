"""What can be chosen of models: the command line reads it before torch is loaded."""

from __future__ import annotations

LLM_STAGES = ("classification", "generative")
"""Stages 2 and 3, as ``--mode`` names them."""

DEMO = "demo"
"""Name of the built-in language model."""

QUANTIZATIONS = ("nf4", "none")
PRECISIONS = ("bf16", "fp32")
ATTENTIONS = ("sdpa", "eager")
BASE_WEIGHTS = ("pretrained", "random")
"""Choices of ``--quantization``, ``--precision``, ``--attention`` and ``--base_weights``."""

INT8_REFUSED = (
    "int8 is known to make MedGemma produce unusable text (Google-Health/medgemma issue 5), and "
    "bitsandbytes computes it in float16, in which Gemma 3 overflows: use nf4, which takes half "
    "the memory, or none"
)
"""Why ``--quantization int8`` is refused. Source: bitsandbytes 0.50, ``MatMul8bitLt``."""

SOLVERS = ("rk4", "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""The encoder's own ``rk4_step``, and the adaptive solvers of torchdiffeq."""

DYNAMICS = ("ode", "decay", "none")
"""What happens to a state between two observations."""

MEMBERS, PREFIX_TOKENS, LORA_RANK = (1, 32), (1, 4096), (1, 1024)
"""Bounds of ``--members``, ``--num_prefix_tokens`` and ``--lora_rank``."""

TRACKERS = ("none", "tensorboard", "wandb", "mlflow", "aim", "dvclive", "trackio")
"""Those of accelerate that can be told to take metrics alone, by its names."""
