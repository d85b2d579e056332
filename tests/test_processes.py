"""Several processes: two that share each step must do what one does alone."""

import pandas as pd
import pytest
import torch

from faults import launch, result_of

KEEPS = """  # the gradients of the first step
clip = trainer.clip_grad_norm_
def keep(parameters, norm):
    path = pathlib.Path({folder!r}, os.environ.get("WORLD_SIZE", "1") + ".pt")
    if os.environ.get("RANK", "0") == "0" and not path.exists():
        torch.save([p.grad for p in parameters], path)
    return clip(parameters, norm)
trainer.clip_grad_norm_ = keep
"""
DIES = """
step = trainer.step
def die(state, *rest):
    if state.progress.steps == 5 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(state, *rest)
trainer.step = die
"""
FAILS = """
from medgemma_clinical.models.trajectory_llm import LLMClassifier
trained, forward = [], LLMClassifier.forward
def fail(model, batch):
    output = forward(model, batch)
    trained.append(model.training)
    last = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    bad = last and model.training and sum(trained) == 3
    return output._replace(loss=output.loss + float("nan")) if bad else output
LLMClassifier.forward = fail
"""
"""The loss of the third pass that trains is NaN in the last process alone, its gradient is not."""
TINY = "--model_name tiny --lora_dropout 0"
STAGES = {
    "trajectory": "--trajectory_only --trajectory_epochs 2",
    "classification": f"--mode classification --epochs 2 --gradient_accumulation 2 {TINY}",
    "generative": f"--mode generative --epochs 1 --gradient_checkpointing {TINY}",
}


def words_for(data, batch, folder, flags):
    words = f"--data_path {data} --batch_size {batch} --output_dir {folder} {flags} --members 2"
    return f"{words} --log_file none".split()


def run(processes, words, folder, before=""):
    """Run the program in so many processes; return what they printed."""
    program = launch(processes, words, folder, before)
    out, error = program.communicate(timeout=300)
    assert program.returncode == 0, error[-9000:]  # the cause stands above what the launcher says
    return out


def read(path):
    """Return a table but for its times."""
    table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
    return table.drop(columns="seconds", errors="ignore")


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one(stage, dka_file, tmp_path):
    """With ``FAILS`` both leave the step out, as one process does."""
    before = FAILS if stage == "classification" else ""
    folders = {processes: tmp_path / f"{processes}" for processes in (1, 2)}
    for processes, folder in folders.items():
        words = words_for(dka_file, 8 // processes, folder, STAGES[stage])
        out = run(processes, words, tmp_path, KEEPS.format(folder=str(tmp_path)) + before)
        assert f"processes: {processes}" in out
        assert out.count("epoch 1/") == 1, "one of several processes speaks"
    one, two = (torch.load(tmp_path / f"{k}.pt") for k in folders)
    assert any(gradient.abs().max() > 1e-3 for gradient in one)
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
    names = ["history.jsonl", "predictions_val.csv", "predictions_test.csv"]
    for name in [*names, *(["generations_test.jsonl"] if stage == "generative" else [])]:
        one, two = (read(folder / stage / name) for folder in folders.values())
        pd.testing.assert_frame_equal(two, one, rtol=1e-4, atol=2e-5)
    assert read(folders[2] / stage / names[0])["skipped_steps"].sum() == int(before == FAILS)


def test_when_a_process_dies_the_other_ends_and_the_run_resumes(dka_file, tmp_path):
    """The one that writes dies; each draws numbers of its own; ``faults.py`` kills at any time."""
    flags = f"{STAGES['classification']} --save_every 2"
    words = [*words_for(dka_file, 4, tmp_path / "run", flags), "--lora_dropout", "0.3"]
    run(2, [*words, "--output_dir", str(tmp_path / "whole")], tmp_path)
    broken = launch(2, words, tmp_path, DIES)
    before, said, _ = broken.communicate(timeout=300)[1].partition("error: ")
    assert broken.returncode != 0
    assert said
    assert 'File "' not in before, "a traceback"
    run(2, [*words, "--resume"], tmp_path)
    one, two = (result_of(tmp_path / name, "classification") for name in ("run", "whole"))
    assert one == two
