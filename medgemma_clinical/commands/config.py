"""The flags of a command in a TOML file: read like typed ones, written with open questions."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medgemma_clinical.data.dka import join_names
from medgemma_clinical.data.importers.long_request import LongRequest
from medgemma_clinical.data.importers.questions import Question
from medgemma_clinical.files import InputError, did_you_mean, one_line
from medgemma_clinical.flags import flags_of

HEAD = """\
# Flags of dataset_format.py from_long, for --config. Typed flags win; paths are as typed ones.
# Remove the # of what is right.
"""
SHOWN = {"window_hours": "  # hours before the prediction time, of which values are read"}
"""Flags that are written with their default, too, and what they are."""


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


def read_flags(path: Path, kind: type) -> dict[str, Any]:
    """Return the flags of a request that a file holds.

    Raises:
        InputError: no such file, no TOML, an unknown key, or a value of another type.
    """
    where, rows = f"--config {path}", flags_of(kind)
    content = read_toml(path, where)
    for name in content:
        if name not in rows:
            near = did_you_mean(name, [*rows]) or f": the keys are {join_names([*rows], 99)}"
            raise InputError(f"{where}: unknown key {name}{near}")
    flags = {name: rows[name].read(value, where) for name, value in content.items()}
    return {name: value for name, value in flags.items() if value != ()}  # all are comments


def toml_text(
    request: LongRequest,
    questions: Sequence[Question],
    suggested: Mapping[str, Sequence[str]],  # elements of lists, as comments
) -> str:
    """Return a file of the flags that no other file says; what is open stands first."""
    defaults, earlier = vars(type(request)()), request.earlier
    is_open = {x.flag for x in questions if not x.guessed}
    lines = []
    for name, flag in sorted(flags_of(request).items(), key=lambda pair: pair[0] not in is_open):
        value, asked = getattr(request, name), [x for x in questions if x.flag == name]
        is_new = value != earlier.values.get(name, defaults[name]) or name in SHOWN
        is_new &= name not in earlier.form or value != defaults[name]
        if flag.repeat:
            known = [x.answers[0] for x in asked if x.guessed]
            known += earlier.values.get(name, ())
            rows = [f"{quoted(x)}," for x in value if x not in known]
            rows += [line(x, is_element=True) for x in asked]
            rows += [f"# {quoted(text)}," for text in suggested.get(name, ())]
            rows = [f"    {row}" for row in dict.fromkeys(rows)]
            is_shown = is_new or asked or name in suggested
            lines += [f"{name} = [", *rows, "]"] if rows and is_shown else []
        elif is_new:
            text = quoted(str(value)) if isinstance(value, str | Path) else json.dumps(value)
            mark = "  # guessed" if asked else SHOWN.get(name, "")
            lines.append(f"{name} = {text}{mark}")
        else:
            lines += [f"# {name} = {line(x).removeprefix('# ')}" for x in asked[:1]]
    return HEAD + "".join(f"{text}\n" for text in lines)


def line(question: Question, *, is_element: bool = False) -> str:
    """Return the first answer to a question, a comment with the others unless it is guessed."""
    answers = () if question.of_cells else question.answers
    text = quoted(answers[0] if answers else "VALUE") + ("," if is_element else "")
    text = "true" if answers == ("true",) else text
    others = f"or {join_names([*map(quoted, answers[1:])])}: " if answers[1:] else ""
    asked = f"# {text}  # {others}{one_line(question.text)}"
    return f"{text}  # guessed" if question.guessed else asked


def quoted(text: str) -> str:
    """Return a text as a basic string of TOML."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
