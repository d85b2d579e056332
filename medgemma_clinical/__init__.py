"""What the four top-level files use: data, evaluation, models, training, commands."""

import os
import platform

# Before any library loads: peft imports bitsandbytes, which starts CUDA, whose allocator reads this
# once. Batches of many lengths then leave no fragments. Under WSL drivers fail with it.
if "microsoft" not in platform.release().lower() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

__version__ = "0.3.0"
