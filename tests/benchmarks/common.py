"""What the benchmarks share: the path, a line about the machine, medians, runs of the trainer.

A measured process starts with these imports, so this module imports nothing large.
"""

import contextlib
import importlib
import io
import json
import os
import platform
import resource
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "medgemma_clinical" / "sample" / "physionet2012_bicarbonate.csv"

sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]  # a checkout need not be installed


def machine(*packages, threads=None):
    """Return what a measurement depends on: processor, cores, threads, load, versions."""
    cores = f"{os.cpu_count()} cores" + (f", {threads} threads" if threads else "")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    on = f"{(names or [platform.machine()])[0]}, {cores}, load {os.getloadavg()[0]:.1f}"
    return f"{on}; {platform.system()}, Python {platform.python_version()}, {versions}"


def needed(module, package):
    """Return a module of a package that only benchmarks use, or stop with how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"{error}: pip install {package}") from error


def peak_mib():
    """Return the peak memory of this process.

    Linux: VmHWM, since getrusage also counts the parent before the process started.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def spread(values, digits=1):
    """Return the median, with the minimum and the maximum in brackets."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def write(text):
    """Print a line at once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def train(*words):
    """Run the trainer in this process; return what it prints, or stop with its last lines."""
    import medgemma_trainer

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        code = medgemma_trainer.main([*map(str, words)])
    if code:
        raise SystemExit(f"the trainer ended with {code}: {text.getvalue()[-2000:]}")
    return text.getvalue()


def train_stage1(data, seed, output, *flags):
    """Train stage 1 in a folder; return its metrics and the median ``seconds_an_epoch``."""
    from medgemma_clinical.commands.compare import cost_of

    words = ["--trajectory_only", "--data_path", data, "--seed", seed, "--output_dir", output]
    train(*words, "--log_file", "none", *flags)
    folder = Path(output) / "trajectory"
    return json.loads((folder / "metrics.json").read_text()) | cost_of(folder)


def members_table(folder, data):
    """Return the test predictions of a stage 1 of N members, and of its first member alone.

    ``data`` is the file that it was trained on. Members learn from seeds of their own, so the first
    one is a model of one member.
    """
    from torch import nn

    from medgemma_clinical.commands.prediction_files import read_predictions
    from medgemma_clinical.evaluation.baselines import ENSEMBLE, best_blend, blend
    from medgemma_clinical.evaluation.target import LABEL
    from medgemma_trainer import TrajectoryModel

    stage, first = TrajectoryModel.from_pretrained(folder), "stage 1, 1 member"
    n = stage.config["members"]
    name = first if n == 1 else f"stage 1, {n} members"
    table = read_predictions(folder, name, [LABEL])
    table = table.rename(columns={ENSEMBLE: f"{ENSEMBLE} with {name}"})
    if n > 1:
        stage1 = stage.trained.model
        stage1.members, stage1.learn = nn.ModuleList([stage1.members[0]]), [True]
        risks = stage.predictions(data).set_index("id")["probability"]
        table[first] = table["id"].map(risks)
        ensemble = blend(table[first].to_numpy(), table[best_blend(table.columns)].to_numpy())
        table[f"{ENSEMBLE} with {first}"] = ensemble
    assert table.notna().all(axis=None)
    return table


def stage_maker(*words):
    """Return arguments, data and a function that builds the stage of the trainer's flags."""
    import medgemma_trainer
    from medgemma_clinical.commands.command_line import build_parser
    from medgemma_clinical.data.training_data import prepare_data

    args = build_parser("", "", medgemma_trainer.FLAGS).parse_args([*map(str, words)])
    medgemma_trainer.set_defaults(args)
    data = prepare_data(
        medgemma_trainer.read_dataset(args),
        max_samples=args.max_samples,
        seed=args.seed,
        prompts=medgemma_trainer.run_folder.prompt_options(args),
    )
    return args, data, lambda: medgemma_trainer.make_stage(args, data, None)


def still(known, risk):
    """Return no calibration: that of a period decides nothing and takes most of the time."""
    return dict.fromkeys(("intercept", "slope"), 0 * known.draws[:, 0])
