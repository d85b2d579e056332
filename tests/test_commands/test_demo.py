"""The demo: three training commands, shown as a user would type them."""

import json
import logging
import shlex
from types import SimpleNamespace

import medgemma_trainer as trainer
from medgemma_clinical.commands import demo
from medgemma_clinical.commands.demo import SAMPLE_DATA
from medgemma_clinical.commands.logs import command_logging
from medgemma_clinical.commands.run_folder import stage_folder
from medgemma_clinical.models.checkpoints import TRAJECTORY_FILE
from predicting import STAGES
from shared_metrics import metric, run_metrics
from stages import arguments, parsed


def run_demo(folder, train, *more):
    args = parsed("--output_dir", str(folder), *more, table=demo.FLAGS)
    script = SimpleNamespace(train=train, FLAGS=trainer.FLAGS, set_defaults=trainer.set_defaults)
    return demo.run(args, script)


def finish(args):
    """Write what the demo reads of a finished stage, and say something."""
    logging.getLogger("medgemma_clinical").info("a line of the run")
    stage_folder(args).mkdir()
    written = {"reports": 10, "right_answer_share": metric(0.7), "parse_share": metric(0.6)}
    written |= {"inventing_share": metric(0.2)}
    content = run_metrics(**({"reports": written} if args.mode == "generative" else {}))
    content["test"] |= {"planned": ["last value"], "widening": 1.0}
    content |= {} if args.trajectory_only else {"residual_weight": 0}
    (stage_folder(args) / "metrics.json").write_text(json.dumps(content))
    return 0


def test_the_three_commands_that_are_shown_are_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made, encoder = [], tmp_path / TRAJECTORY_FILE
    assert run_demo(tmp_path, lambda own: made.append(own) or finish(own), "--seed", "4") == 0
    stages = [(own.trajectory_only, own.mode, own.ode_checkpoint) for own in made]
    expected = [("classification", encoder), ("generative", encoder)]
    assert stages == [(True, "classification", None), *((False, *each) for each in expected)]
    shown = [text.split("$ medgemma-clinical train ")[1] for text in caplog.messages if "$" in text]
    for own, words in zip(made, map(shlex.split, shown), strict=True):
        assert (own.data_path, own.seed) == (SAMPLE_DATA, 4)
        assert own.show_values, "the sample is open data"
        assert vars(arguments(*words)) == vars(own)
    pages = [str(tmp_path / stage / "report.html") for stage in STAGES]
    assert [line.strip() for line in caplog.messages[-1].splitlines()[2:]] == pages


def test_the_console_has_commands_results_and_pages_only(tmp_path, capsys):
    with command_logging():
        run_demo(tmp_path, finish)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 20
    assert "a line of the run" not in lines
    assert sum("0.700 [0.600, 0.800]" in line for line in lines) == 3
    assert sum("60.0 [50.0, 70.0] %" in line for line in lines) == 1
    assert sum("weight 0" in line for line in lines) == 2, "of stages 2 and 3"


def test_a_stage_that_fails_ends_the_demo_with_its_code(tmp_path):
    codes = iter([0, 130, 0])
    assert run_demo(tmp_path, lambda own: finish(own) or next(codes)) == 130
    assert list(codes) == [0]
