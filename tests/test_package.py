"""Source and wheel as they are given away, in an environment of their own; what they require."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from importlib.metadata import distributions, packages_distributions

import pytest

from medgemma_clinical import __version__
from medgemma_clinical.commands.demo import SAMPLE_DATA
from medgemma_clinical.provenance import ROOT, TOP_LEVEL

pytestmark = pytest.mark.slow

PARTS = (*TOP_LEVEL, "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
BUILD = "import sys; sys.path.insert(0, '.ci'); from build_backend import build_sdist as build; "
BUILD += "build(sys.argv[1])"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source as it is given away, made of a checkout with a test."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("medgemma_clinical", ".ci"):  # a build leaves files beside its source
        shutil.copytree(ROOT / name, folder / "source" / name)
    for part in PARTS:
        shutil.copy(ROOT / part, folder / "source")
    (folder / "source" / "tests").mkdir()
    shutil.copy(__file__, folder / "source" / "tests")
    subprocess.run([sys.executable, "-c", BUILD, folder], cwd=folder / "source", check=True)
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def installed(sdist):
    """An environment with the wheel of that source, and all else from that of the tests."""
    folder = sdist.parent
    venv.create(folder / "venv")
    python, pip = folder / "venv" / "bin" / "python", [sys.executable, "-m", "pip", "-q"]
    alone = ["--no-deps", "--no-index"]
    build = [*alone, "--no-build-isolation", "-w", folder]
    subprocess.run([*pip, "wheel", sdist, *build], check=True)
    subprocess.run([*pip, "--python", python, "install", *alone, *folder.glob("*.whl")], check=True)
    (site,) = (folder / "venv").glob("lib/*/site-packages")
    others = "\n".join(path for path in sys.path if path.endswith("-packages"))
    (site / "others.pth").write_text(others)  # they come last: the wheel wins over the checkout
    git = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in ("init -q", "commit -q --allow-empty -m another_program"):
        subprocess.run([*git, *words.split()], check=True)
    return folder / "venv" / "bin"


def beside_code(package):
    """Return the paths within a package of all files but code: docs, notebook, samples, pages."""
    files = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    return {path for path in files if path.suffix not in (".py", ".pyc")}


def test_the_source_holds_no_test(sdist):
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {*PARTS, "medgemma_clinical/docs/quickstart.ipynb"} <= {*names}
    assert not [name for name in names if "test" in name]


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
    run = json.loads((tmp_path / "run" / "trajectory" / "run.json").read_text())
    assert (run["versions"]["medgemma-clinical"], run["git_commit"]) == (__version__, None)


def requirements(lines):
    """Return the names of requirements, in lower case; each has a version."""
    return {re.match(r"([\w-]+)[=>]=\d", line)[1].lower().replace("_", "-") for line in lines}


def test_requirements_name_what_is_imported():
    modules = [*(ROOT / name for name in TOP_LEVEL), *(ROOT / "medgemma_clinical").rglob("*.py")]
    imported = set()
    for node in (node for path in modules for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or alias.name for alias in node.names]
            imported |= {name.partition(".")[0] for name in names}
    imported -= {*sys.stdlib_module_names, "medgemma_clinical", *(x[:-3] for x in TOP_LEVEL)}
    needed = {packages_distributions()[name][0].lower().replace("_", "-") for name in imported}
    named = requirements((ROOT / "requirements.txt").read_text().splitlines())
    # transformers loads the former for NF4; the latter reads tables of a caller who has it.
    assert named - {"bitsandbytes"} == needed - {"pyarrow"}


def test_the_constraints_of_ci_fix_all_that_is_required_and_what_is_installed_alone():
    constraints = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()[1:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = (ROOT / "requirements.txt").read_text().splitlines()
    fixed = requirements(constraints)
    assert fixed >= requirements([*required, *project["optional-dependencies"]["test"]])
    if sys.version_info[:2] == (3, 11):  # others need fewer
        installed = {x.metadata["Name"].lower().replace("_", "-") for x in distributions()}
        assert fixed <= installed
