"""README and docs against the program: flags, defaults, commands, links, length."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import dataset_format
import medgemma_trainer
import srtr_dataset
from medgemma_clinical.__main__ import VERBS
from medgemma_clinical.commands.command_line import build_parser, rows_of

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "medgemma_clinical" / "docs"
COMMAND_LINE = DOCS / "command_line.md"
COUNTED = [README, *sorted(DOCS.glob("*.md"))]
PAGES = [
    *COUNTED,
    *sorted((ROOT / ".github").glob("*.md")),
    ROOT / "tests" / "benchmarks" / "README.md",
    ROOT / "tests" / "data" / "README.md",
    ROOT / "medgemma_clinical" / "sample" / "README.md",
]
MAX_WORDS = 20_000
MODULES = {
    verb: import_module(f"medgemma_clinical.commands.{verb}") for verb in VERBS if verb != "train"
}
TABLES = {"train": medgemma_trainer.FLAGS, **{verb: each.FLAGS for verb, each in MODULES.items()}}
VERB_PARSERS = {verb: build_parser(verb, "", table) for verb, table in TABLES.items()}
PARSERS = {
    "medgemma_trainer.py": VERB_PARSERS["train"],
    "dataset_format.py": dataset_format.build_parser(),
    "srtr_dataset.py": srtr_dataset.build_parser(),
}
OTHER_PROGRAMS = {
    *("--config_file", "--num_processes", "--user", "--ask-password", "--local-dir"),
    "--nproc_per_node",
    *("--array", "--requeue", "--signal", "--nthreads"),
    "--gpus-per-node",
    "--nnodes",
    "--nodes",
    "--ntasks-per-node",
    "--rdzv_backend",
    "--rdzv_endpoint",
    *("--runner", "--dtype", "--enable-prompt-embeds", "--outtype", "--outfile", "--dist"),
    *("--app-dir", "--factory"),
    *("--arms", "--reference", "--open", "--curves"),
    *("--approve", "--durations", "--editable", "--help", "--version"),
}
"""Flags of every parser, and those of accelerate, torchrun, wget, hf and other programs."""

GENERATED = re.compile(r"(?<=<!-- generated -->\n).*?(?=<!-- end -->)", re.DOTALL)


def commands_of(script):
    """The parsers of a script by command, the whole one where it has none."""
    (found,) = [a.choices for a in PARSERS[script]._actions if a.dest == "command"] or [None]
    return found or {"": PARSERS[script]}


def flags_of(parser):
    return [a for a in parser._actions if a.option_strings and a.dest not in ("help", "version")]


def row(action, commands):
    """A flag as a line of a table: the commands that have it, its default, what it does."""
    default, text = action.default, action.help or ""
    if isinstance(default, float) and default >= 1 and default.is_integer():
        default = int(default)
    nothing = default is None or default is False or default in ("", (), argparse.SUPPRESS)
    shown = "—" if nothing else f"`{default}`"
    choices = ", ".join(f"`{each}`" for each in action.choices or ())
    described = ": ".join(filter(None, (text, choices)))
    return f"| {' | '.join([f'`{action.option_strings[-1]}`', *commands, shown, described])} |"


def flag_tables():
    """All flags of all parsers as Markdown; a flag that several commands share stands once."""
    lines = []
    for verb, table in TABLES.items():
        places = " ".join(flag.name.upper() for flag in rows_of(table) if flag.positional)
        lines += [f"## {verb} {places}".rstrip(), "", f"{VERBS[verb]}.", ""]
        # Of a short command the groups are one table.
        groups = table if verb == "train" else {"": [*rows_of(table)]}
        for title, flags in groups.items():
            lines += [f"### {title}", ""] if title else []
            rows = [row(a, []) for a in flags_of(build_parser(verb, "", {title: flags}))]
            lines += ["| Flag | Default | Description |", "|---|---|---|", *rows, ""]
    shared, makers = {}, commands_of("dataset_format.py")
    for command in [name for name in makers if name != "check"]:
        for action in flags_of(makers[command]):
            key = str((action.option_strings, action.default, action.help))
            shared.setdefault(key, (action, []))[1].append(command.removeprefix("from_"))
    lines += ["## Flags of the commands that make a file", ""]
    lines += ["| Flag | from_ | Default | Description |", "|---|---|---|---|"]
    for action, names in sorted(shared.values(), key=lambda found: [-len(found[1]), found[1]]):
        lines.append(row(action, ["all" if len(names) == 4 else ", ".join(names)]))
    return "\n".join([*lines, ""])


def text_of(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text_of(page).lower(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def test_generated_flag_tables_are_those_of_the_parsers(assert_approved):
    assert_approved(COMMAND_LINE, GENERATED.sub(lambda _: flag_tables(), text_of(COMMAND_LINE)))


def test_readme_states_the_defaults_of_the_parser():
    listed = re.findall(r"^\| `(--\w+)` \| (.+?) \|", text_of(README), re.MULTILINE)
    generated = re.findall(r"^\| `(--\w+)` \| (.+?) \|", flag_tables(), re.MULTILINE)
    assert len(listed) == 15
    assert {*listed} - {*generated} == {("--time_scale", "`72.0` (DKA)")}
    assert medgemma_trainer.DATASETS["dka"].time_scale == 72.0


@pytest.mark.parametrize("program", ["medgemma-clinical", *(f"python {each}" for each in PARSERS)])
def test_commands_of_the_pages_parse(program):
    pattern = rf"(?<![\w-]){re.escape(program)} ((?:[^\n`]*\\\n)*[^\n`)]*)"
    found = [x for page in PAGES for x in re.findall(pattern, text_of(page)) if "..." not in x]
    assert found
    for text in found:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
        if words[0] in VERBS and words[1:]:
            VERB_PARSERS[words[0]].parse_args(words[1:])
        elif not {"COMMAND", "--help", "--version", *VERBS} & {words[0]}:
            script = program.removeprefix("python ") if " " in program else "dataset_format.py"
            PARSERS[script].parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_name_only_flags_that_exist(page):
    parsers = [p for script in PARSERS for p in (PARSERS[script], *commands_of(script).values())]
    parsers += VERB_PARSERS.values()
    known = {name for p in parsers for a in flags_of(p) for name in a.option_strings}
    for script in ROOT.glob("tests/benchmarks/*.py"):
        known |= {*re.findall(r"add(?:_argument)?\(\s*\"(--\w+)\"", text_of(script))}
    assert {*re.findall(r"(?<![\w-])--\w[\w-]*", text_of(page))} <= known | OTHER_PROGRAMS


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_named_files_exist(page):
    for path, anchor in re.findall(r"\]\(([^)\s#:]*)(?:#([^)\s]+))?\)", text_of(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
    for name in re.findall(r"(?<![\w/])(?:tests|medgemma_clinical)/[\w./-]*\w", text_of(page)):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        links = re.findall(r"\]\(([\w./-]+\.(?:md|ipynb))", text_of(page))
        waiting += [x for link in links if (x := (page.parent / link).resolve()) not in reached]
        reached.update(waiting)
    assert {*DOCS.glob("*.*"), *(ROOT / ".github").glob("[A-Z]*.md")} <= {README, *reached}


def test_readme_and_docs_stay_within_their_words():
    lengths = {page.name: len(text_of(page).split()) for page in COUNTED}
    assert sum(lengths.values()) <= MAX_WORDS, lengths
    assert len(text_of(README).splitlines()) <= 200
