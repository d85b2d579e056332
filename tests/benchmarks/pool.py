"""Units of a file as sites: what ``pool`` says of their aggregates, beside ``--site``.

    python tests/benchmarks/pool.py [--data FILE.csv] [--seed 0] [flags of the trainer]

Trains stage 1 on a random half of the rows. The other half is split by its ``static_unit_...``
columns, each unit writes an aggregate, and the units are pooled twice: from these files, and from
the joined rows by ``predict --site``.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from common import SAMPLE, machine, train, write

UNIT = "static_unit_"


def split_rows(source, seed, folder):
    """Write the rows to train on, those of all sites, and those of each; return the sites."""
    rows = pd.read_csv(source, dtype=str)
    columns = [name for name in rows if name.startswith(UNIT)]
    if not columns:
        raise SystemExit(f"{source}: has no column {UNIT}...")
    units = rows[columns].astype(float).idxmax(axis=1).str.removeprefix(UNIT)
    patients = rows["subject_id"].drop_duplicates().sample(frac=0.5, random_state=seed)
    in_training = rows["subject_id"].isin(patients)
    files = {"train": rows[in_training], "all": rows[~in_training].assign(unit=units)}
    names = sorted(files["all"]["unit"].unique())
    files |= {name: files["all"][files["all"]["unit"] == name] for name in names}
    description = source.with_suffix(".json")
    for name, table in files.items():
        table.to_csv(folder / f"{name}.csv", index=False)
        if description.exists():
            shutil.copy(description, folder / f"{name}.json")
    return names


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--seed", type=int, default=0)
    arguments, flags = parser.parse_known_args(argv)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sites = split_rows(arguments.data, arguments.seed, folder)
        words = ["--trajectory_only", "--data_path", folder / "train.csv", "--log_file", "none"]
        train(*words, "--output_dir", folder / "run", "--seed", arguments.seed, *flags)

        def predicted(name, *more):
            source, out = folder / f"{name}.csv", folder / f"{name}.out.csv"
            words = ["predict", "--checkpoint", folder / "run" / "trajectory", *more]
            return train(*words, "--data_path", source, "--predictions", out)

        for name in sites:
            predicted(name, "--aggregate", folder / f"{name}.agg.json")
        predicted("all", "--site", "unit")
        page = (folder / "all.out.report.html").read_text(encoding="utf-8").replace("\xa0", " ")
        files = [folder / f"{name}.agg.json" for name in sites]
        table = train("pool", *files, "--output_dir", folder / "pooled")
        counts = [json.loads(file.read_text()) for file in files]
    joined = re.search(r"(Pooled over|Nothing is pooled).*?(?=</p>)", page)
    each = (f"{name} {x['patients']}/{x['events']}" for name, x in zip(sites, counts, strict=True))
    write(
        f"{arguments.data.name} {' '.join(flags)}, seed {arguments.seed}; {machine('torch')}\n"
        f"patients/events, rounded: {', '.join(each)}\n"
        f"pool:\n{table.strip().rpartition(chr(10))[0]}\n"
        f"--site: {joined[0]}\n{time.perf_counter() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
