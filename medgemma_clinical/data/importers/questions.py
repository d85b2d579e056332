"""Questions on tables that a flag answers: a run refuses to guess, a preview goes on with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from medgemma_clinical.files import InputError


@dataclass(frozen=True)
class Question:
    """What only the user knows, and the flag that says it."""

    text: str
    flag: str
    answers: tuple[str, ...] = ()  # possible values of the flag
    assumed: str = ""  # with what a preview goes on, by default the first answer
    guessed: bool = False  # there is one answer, by what the cells are
    of_cells: bool = False  # the answers are words of cells, which no other file may hold
    advice: str = ""  # what a refusal says beside the text


class OpenQuestions(InputError):
    """Wrong input that flags, or other ones, put right; a preview asks all of them together."""

    def __init__(self, text: str, questions: Sequence[Question]) -> None:
        """Keep the questions beside the text of the refusal."""
        super().__init__(text)
        self.questions = tuple(questions)


def unclear(questions: Sequence[Question], where: str = "") -> OpenQuestions:
    """Return the refusal of questions on one place: in one line each text once, with its advice."""
    begin = f"{where}: " if where else ""
    texts = dict.fromkeys(f"{x.text}: {x.advice}" if x.advice else x.text for x in questions)
    asked = [replace(x, text=f"{begin}{x.text}") for x in questions]
    return OpenQuestions(begin + "; ".join(texts), asked)
