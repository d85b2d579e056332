"""What a language model reads and learns to write, in three forms of data: approved texts."""

import pytest

from conftest import DATA, SAMPLE
from dataset_format import MIMICtrajectoryDataset
from medgemma_clinical.data.texts import PromptOptions
from srtr_dataset import SRTRTrajectoryDataset


@pytest.mark.slow
def test_prompts_and_notes_are_approved(assert_approved):
    several = MIMICtrajectoryDataset(DATA / "physionet2012_chemistry.csv.gz", max_len=6)
    datasets = {"one series": MIMICtrajectoryDataset(SAMPLE), "several series": several}
    for organ in ("kidney", "liver"):
        datasets[organ] = SRTRTrajectoryDataset(DATA / "srtr_saf", organ)
    options = {"stage 2": PromptOptions(), "stage 3": PromptOptions(computed=True)}
    options["last values alone"] = PromptOptions("last", context=False)
    text = []
    for name, dataset in datasets.items():
        row = int(dataset.lengths.argmax())
        for stage, each in options.items():
            text += [f"==== {name}, prompt of {stage}", dataset.prompt(row, each)]
        text += [f"==== {name}, note", dataset.report(row)]
    assert_approved("prompts_and_notes", "\n".join(text) + "\n")
