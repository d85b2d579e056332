"""The flags of a command in a TOML file: read like typed ones, written with open questions."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medgemma_clinical.data.dka import join_names
from medgemma_clinical.data.importers.questions import Question
from medgemma_clinical.files import InputError, did_you_mean, one_line

KINDS = {bool: "true or false", tuple: "a list of texts", float: "a number", str: "a text"}
HEAD = """\
# Flags of dataset_format.py from_long, for --config. Typed flags win; paths are as typed ones.
# Remove the # of what is right.
"""


def kind_of(default: Any) -> type:
    """Return what a flag of a default takes in a file."""
    if isinstance(default, int | float) and not isinstance(default, bool):
        return float
    return type(default) if isinstance(default, bool | tuple) else str


def read_toml(path: Path, where: str) -> dict[str, Any]:
    """Read a TOML file; ``where`` begins the message about one that cannot be read."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{where}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a text file in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not in TOML's form: {error}") from error


def read_words(path: Path, defaults: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return each flag of a file as words of a command line; ``defaults`` are of all flags.

    Raises:
        InputError: no such file, no TOML, an unknown key, or a value of another type.
    """
    where = f"--config {path}"
    content = read_toml(path, where)
    words = dict[str, list[str]]()
    for name, value in content.items():
        if name not in defaults:
            near = (
                did_you_mean(name, [*defaults]) or f": the keys are {join_names([*defaults], 99)}"
            )
            raise InputError(f"{where}: unknown key {name}{near}")
        kind = kind_of(defaults[name])
        texts = value if isinstance(value, list) else [value]
        is_right = {
            bool: isinstance(value, bool),
            tuple: isinstance(value, list) and all(isinstance(x, str) for x in value),
            float: isinstance(value, int | float) and not isinstance(value, bool),
            str: isinstance(value, str),
        }
        if not is_right[kind]:
            raise InputError(f"{where}: {name} must be {KINDS[kind]}")
        if kind is bool:
            words[name] = [f"--{name}"] if value else []
        else:
            words[name] = [f"--{name}={text}" for text in texts]
    return words


def toml_text(
    flags: Mapping[str, Any],  # those that differ from ``defaults`` are written
    defaults: Mapping[str, Any],
    questions: Sequence[Question],
    suggested: Mapping[str, Sequence[str]],  # elements of lists, as comments
    shown: Mapping[str, str],  # flags that are written with their default, too, and what they are
) -> str:
    """Return a file of flags; what is open stands first, as comments."""
    guesses = {(x.flag, answer) for x in questions if x.guessed for answer in x.answers[:1]}
    asked = [x for x in questions if not x.guessed]
    is_open = {name: any(x.flag == name for x in asked) for name in flags}
    lines = []
    for name in sorted(defaults, key=lambda name: not is_open[name]):
        value = flags[name]
        comments = list(dict.fromkeys(comment(x, value) for x in asked if x.flag == name))
        comments += [f"{quoted(text)}," for text in suggested.get(name, ())]
        if isinstance(defaults[name], tuple):
            marks = [",  # guessed" if (name, text) in guesses else "," for text in value]
            cells = [f"    {quoted(x)}{mark}" for x, mark in zip(value, marks, strict=True)]
            cells += [f"    # {text}" for text in comments]
            lines += [f"{name} = [", *cells, "]"] if cells else []
        elif value != defaults[name] or name in shown:
            is_text = isinstance(value, str | Path)
            text = quoted(str(value)) if is_text else json.dumps(value)
            mark = "  # guessed" if (name, str(value)) in guesses else ""
            mark = f"  # {shown[name]}" if name in shown else mark
            lines.append(f"{name} = {text}{mark}")
        else:
            lines += [f"# {name} = {text}" for text in comments[:1]]
    return HEAD + "".join(f"{line}\n" for line in lines)


def comment(question: Question, value: Any) -> str:
    """Return the first answer of an open question, and behind it the others and the question."""
    answers = () if question.of_cells else question.answers
    text = "true" if value is False else quoted(answers[0] if answers else "VALUE")
    text += "," if isinstance(value, tuple) else ""
    others = f"or {join_names([*map(quoted, answers[1:])])}: " if answers[1:] else ""
    return f"{text}  # {others}{one_line(question.text)}"


def quoted(text: str) -> str:
    """Return a text as a basic string of TOML."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
