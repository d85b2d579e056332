"""The tags of a flag: some way of use reads it; without tags it is refused, and fixed."""

import argparse

import pytest

import medgemma_trainer as trainer
from medgemma_clinical.commands import flags
from medgemma_clinical.files import InputError


def test_some_way_of_use_reads_each_flag():
    unread = {n for n, flag in flags.FLAGS.items() if not flag.tags & {*flags.WAYS, "llm", "text"}}
    assert unread == set()
    declared = {action.dest for action in trainer.build_parser()._actions}
    assert declared - {"help", "version"} == flags.FLAGS.keys()


@pytest.mark.parametrize("way", ["--trajectory_only", "--demo", "--dry_run", "--ablation"])
def test_a_flag_without_tags_is_refused_and_no_keyword(way, monkeypatch):
    args = flags.complete(trainer.build_parser().parse_args([way]))
    monkeypatch.setattr(flags, "FLAGS", dict(flags.FLAGS))
    flags.adders(argparse.ArgumentParser().add_argument_group("new"), "")[1]("--new", "")
    flags.check_flags(args, {way})
    with pytest.raises(InputError, match="--new"):
        flags.check_flags(args, {way, "--new"})
    assert "new" not in flags.tagged("free")
    with pytest.raises(TypeError, match="new"):
        trainer.fit_trajectory(None, new=1)
