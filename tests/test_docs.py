"""README and docs against the program: flags, defaults, commands, files, links."""

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dataset_format
import medgemma_trainer
import srtr_dataset

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "medgemma_clinical" / "docs"
PAGES = [
    README,
    *sorted(DOCS.glob("*.md")),
    *sorted((ROOT / ".github").glob("[A-Z]*.md")),
    ROOT / "tests" / "benchmarks" / "README.md",
]
MODULES = {
    path.name
    for folder in ("", "medgemma_clinical/**", "tests/**")
    for path in ROOT.glob(f"{folder}/*.py".lstrip("/"))
}
BUILT_FROM_DATA = {"--time_scale", "--quantization", "--output_dir", "--max_len"} | {
    "--landmark_days",
    "--horizon_days",
}
"""Flags without a value of their own, whose default the pages state in words."""

OTHERS = {
    *(
        "--help",
        "--config_file",
        "--num_processes",
        "--user",
        "--ask-password",
        "--dist",
        "--approve",
        "--version",
    ),
    *("--local-dir", "--runner", "--dtype", "--enable-prompt-embeds", "--outtype", "--outfile"),
}
"""The flag of every parser, and those of accelerate, wget, pytest, hf, vLLM and llama.cpp."""

PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "medgemma_trainer.py": medgemma_trainer.build_parser,
    "dataset_format.py": dataset_format.build_parser,
    "srtr_dataset.py": srtr_dataset.build_parser,
}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def table(text: str) -> dict[str, str]:
    """The flags of a page's tables and the defaults beside them."""
    rows = re.findall(r"^\| `(--\w+)[^`]*` \| (.+?) \|", text, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a flag stands twice"
    return dict(rows)


def defaults(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Each flag of a parser and its default as the pages write it."""
    shown = {}
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "version"):
            default = action.default
            if isinstance(default, float) and default >= 1 and default.is_integer():
                default = int(default)
            if isinstance(default, tuple):
                default = ",".join(default)
            nothing = default is None or default is False or default == ""
            shown[action.option_strings[-1]] = "—" if nothing else f"`{default}`"
    return shown


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def commands(text: str, script: str) -> Iterator[list[str]]:
    """The words behind a script's name, wherever a page writes the command out in full."""
    for found in re.findall(rf"python {re.escape(script)}((?:[^\n`]*\\\n)*[^\n`)]*)", text):
        words = shlex.split(found.replace("\\\n", " "), comments=True)
        if not {"...", "[flags]"} & {*words}:
            yield words


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def test_the_readme_is_one_page_and_holds_the_test_command() -> None:
    text = text_of(README)
    assert len(text.splitlines()) <= 200
    assert re.search(r"^<!-- test command -->\n```bash\n.+ -m pytest .+\n```$", text, re.MULTILINE)


def test_every_flag_stands_with_its_default_in_the_table_of_all_flags() -> None:
    listed = table(text_of(DOCS / "command_line.md"))
    known = defaults(medgemma_trainer.build_parser())
    assert listed.keys() == known.keys()
    for flag in known.keys() - BUILT_FROM_DATA:
        assert listed[flag] == known[flag], flag


def test_the_readmes_flags_have_the_programs_defaults() -> None:
    known = defaults(medgemma_trainer.build_parser())
    listed = table(text_of(README))
    assert len(listed) == 15
    for flag in listed.keys() - BUILT_FROM_DATA:
        assert listed[flag] == known[flag], flag


def test_the_way_from_meds_to_a_checked_file_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    (section,) = re.findall(r"^## MEDS\n.*?(?=^## )", text_of(DOCS / "import.md"), re.M | re.S)
    found = list(commands(section, "dataset_format.py"))
    assert [words[0] for words in found] == ["from_meds", "from_meds", "check"]
    for words in found:
        assert dataset_format.main(words) == 0
    dataset = dataset_format.MIMICtrajectoryDataset(tmp_path / "icu_mortality.csv")
    assert len(dataset.features) == 9


def test_the_flags_of_from_eicu_are_those_of_from_mimic() -> None:
    parsers = subparsers(dataset_format.build_parser())
    mimic, eicu = defaults(parsers["from_mimic"]), defaults(parsers["from_eicu"])
    for name in ("mimic_dir", "item", "series", "notes_dir", "max_note_words"):
        del mimic[f"--{name}"]
    assert {name: eicu[name] for name in mimic} == mimic
    assert eicu.keys() == mimic.keys() | {"--eicu_dir", "--series"}


@pytest.mark.parametrize("script", PARSERS)
def test_commands_of_the_pages_parse(script: str) -> None:
    found = [words for page in PAGES for words in commands(text_of(page), script)]
    assert found
    for words in found:
        PARSERS[script]().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_no_flag_that_does_not_exist(page: Path) -> None:
    known = set(OTHERS)
    for build in PARSERS.values():
        for parser in (build(), *subparsers(build()).values()):
            known |= defaults(parser).keys()
    for script in (*ROOT.glob("tests/benchmarks/*.py"), ROOT / "tests" / "faults.py"):
        known |= {*re.findall(r'add_argument\(\s*"(--\w+)"', text_of(script))}
    assert {*re.findall(r"(?<![\w-])--\w[\w-]*", text_of(page))} <= known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(target), re.MULTILINE)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_pages_name_exist(page: Path) -> None:
    places = (ROOT, page.parent, ROOT / "medgemma_clinical")
    for name in re.findall(r"`([\w./]+/[\w./]*|[\w]+\.py)`", text_of(page)):
        if re.match(r"(tests|medgemma_clinical|data|evaluation|models|training|commands)/", name):
            assert any((place / name).exists() for place in places), name
        elif name.endswith(".py"):
            assert name in MODULES, name


def test_every_page_is_reached_from_the_readme() -> None:
    linked = re.findall(r"\]\(medgemma_clinical/docs/([\w-]+\.md)", text_of(README))
    assert {page.name for page in DOCS.glob("*.md")} == {*linked}
