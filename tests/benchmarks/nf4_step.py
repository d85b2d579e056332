"""Take steps of stages 2 and 3 in NF4 with random weights in the shape of MedGemma-4B.

    python tests/benchmarks/nf4_step.py [--rows 2] [--max_text_tokens 256] [--precision bf16]

Needs no GPU, no network and no weights: random ones are written to a temporary folder (8 GB, TMPDIR
says where) and deleted at the end. Each stage is a ``--dry_run`` of the program: two steps on the
longest rows. Prints its line with seconds a step and loss, and the peak memory of its process
(VmHWM), in which the pages of the weights' file that were read count too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, SAMPLE, machine

RUN = """
import sys
sys.path[:0] = {places!r}
import medgemma_trainer
from common import peak_mib
code = medgemma_trainer.main(sys.argv[1:])
sys.stdout.write(f"\\nVmHWM {{peak_mib():,.0f}} MiB\\n")
sys.exit(code)
"""
"""The program, and then the peak memory of its process, which has begun with nothing."""


def write_weights(folder: Path, *, toy: bool) -> None:
    """Write a Gemma 3 with random weights and the byte tokenizer."""
    from gpu_steps import LAYERS, TOY, save_model

    save_model(folder, 2 if toy else LAYERS, **(TOY if toy else {}))


def dry_run(mode: str, model: Path, arguments: argparse.Namespace) -> list[str]:
    """Take two steps of a stage; return the lines that say what they took."""
    words = ["--mode", mode, "--model_name", str(model), "--quantization", "nf4", "--dry_run"]
    words += ["--data_path", str(SAMPLE), "--max_samples", "200", "--precision"]
    words += [arguments.precision, "--batch_size", str(arguments.rows)]
    words += ["--max_text_tokens", str(arguments.max_text_tokens)]
    program = RUN.format(places=[str(ROOT), str(Path(__file__).parent)])
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-5000:])
    lines = (done.stdout + done.stderr).splitlines()
    shown = [line for line in lines if line.startswith(("dry run", "tokens: ", "VmHWM"))]
    return [f"\n{mode}, {time.perf_counter() - began:.0f} s with loading", *shown]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=2, help="of a batch")
    parser.add_argument("--max_text_tokens", type=int, default=256)
    parser.add_argument("--precision", default="auto")
    modes = ["classification", "generative"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--toy", action="store_true", help="two narrow layers")
    arguments = parser.parse_args()
    sys.stdout.write(machine("torch", "transformers", "peft", "bitsandbytes") + "\n")
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: the whole weights are in its memory.
        keywords = {"toy": arguments.toy}
        writer = multiprocessing.get_context("spawn").Process(
            target=write_weights, args=(Path(folder),), kwargs=keywords
        )
        writer.start()
        writer.join()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        sys.stdout.write(f"random weights: {size / 1e9:.1f} GB\n")
        for mode in arguments.modes:
            sys.stdout.write("\n".join(dry_run(mode, Path(folder), arguments)) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
