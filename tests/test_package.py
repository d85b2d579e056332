"""The wheel in an environment of its own, and requirements.txt against what is imported."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import packages_distributions

import pytest

from medgemma_clinical import __version__
from medgemma_clinical.commands.demo import SAMPLE_DATA
from medgemma_clinical.provenance import ROOT, TOP_LEVEL

PARTS = (*TOP_LEVEL, "pyproject.toml", "requirements.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that holds the wheel, and all else from the environment of the tests."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "medgemma_clinical", folder / "source" / "medgemma_clinical")
    for part in PARTS:  # a build leaves files beside its source
        shutil.copy(ROOT / part, folder / "source")
    venv.create(folder / "venv")
    python, pip = folder / "venv" / "bin" / "python", [sys.executable, "-m", "pip", "-q"]
    alone = ["--no-deps", "--no-index"]
    build = [*alone, "--no-build-isolation", "-w", folder]
    subprocess.run([*pip, "wheel", folder / "source", *build], check=True)
    subprocess.run([*pip, "--python", python, "install", *alone, *folder.glob("*.whl")], check=True)
    (site,) = (folder / "venv").glob("lib/*/site-packages")
    others = "\n".join(path for path in sys.path if path.endswith("-packages"))
    (site / "others.pth").write_text(others)  # they come last: the wheel wins over the checkout
    git = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in ("init -q", "commit -q --allow-empty -m another_program"):
        subprocess.run([*git, *words.split()], check=True)
    return folder / "venv" / "bin"


def beside_code(package):
    """Return the paths within a package of all files but code, and of the docs the pages alone."""
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    return {path for path in files if path.suffix not in (".py", ".pyc", ".ipynb")}


@pytest.mark.slow
def test_the_program_of_the_wheel_trains_on_the_sample_and_all_else_is_there_too(
    installed, tmp_path
):
    (package,) = installed.parent.glob("lib/*/site-packages/medgemma_clinical")
    assert beside_code(package) == beside_code(ROOT / "medgemma_clinical")
    words = ["train", "--trajectory_only", "--data_path", package / "sample" / SAMPLE_DATA.name]
    words += ["--output_dir", "run", "--max_samples", "100", "--trajectory_epochs", "1"]
    environment = {**os.environ, "PYTHONPATH": ""}
    command = [installed / "medgemma-clinical", *words]
    subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, check=True)
    known = json.loads((tmp_path / "run" / "trajectory" / "run.json").read_text())
    assert (known["versions"]["medgemma-clinical"], known["git_commit"]) == (__version__, None)


def test_requirements_name_what_is_imported():
    modules = [*(ROOT / name for name in TOP_LEVEL), *(ROOT / "medgemma_clinical").rglob("*.py")]
    imported = set()
    for node in (node for path in modules for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or alias.name for alias in node.names]
            imported |= {name.partition(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "medgemma_clinical", *(x[:-3] for x in TOP_LEVEL)}
    needed = {packages_distributions()[name][0].lower() for name in imported}
    lines = (ROOT / "requirements.txt").read_text().splitlines()  # each has a lower bound
    named = {re.match(r"([\w-]+)>=\d", line)[1] for line in lines}
    # transformers loads the former for NF4; the latter reads tables of a caller who has it.
    assert named - {"bitsandbytes"} == needed - {"pyarrow"}
