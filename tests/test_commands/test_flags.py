"""The trainer's table of flags: what a row says, and who reads it."""

import medgemma_trainer as trainer
from medgemma_clinical.commands import flags, python, run_folder
from medgemma_clinical.commands.command_line import rows_of

NAMES = [flag.name for flag in rows_of(trainer.FLAGS)]


def test_each_flag_is_one_row_and_the_lists_beside_it_name_flags():
    assert len({*NAMES}) == len(NAMES)
    listed = run_folder.FREE | python.COMMAND_LINE_ALONE | {*python.OF_FOLDER}
    assert listed | trainer.STAGE_1_FILE <= {*NAMES}
    for flag in rows_of(trainer.FLAGS):
        assert {*flag.unread.split()} <= {*flags.WAYS, "llm", "text"}, flag.name
        assert {*flag.unread.split()} < {*flags.WAYS, "llm", "text"}, "some way reads it"
