"""Trained models that are kept in a folder or shared: exactly the files of a checkpoint.

A shared copy holds no hashes of its training patients: identifiers of a small range, and outcomes
of known patients, can be guessed from them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, snapshot_download

from medgemma_clinical.data.small_cells import MIN_CELL
from medgemma_clinical.data.summaries import summary_names
from medgemma_clinical.evaluation.baselines import ENSEMBLE
from medgemma_clinical.evaluation.rules import stored
from medgemma_clinical.files import InputError, atomic, owner_only, write_text
from medgemma_clinical.models import checkpoints
from medgemma_clinical.models.checkpoints import BASELINES, CARD, TEXT, TRAJECTORY_FILE, Config
from medgemma_clinical.models.decoders import terms_of
from medgemma_clinical.models.model_card import shareable
from medgemma_clinical.models.scaler import Scaler
from medgemma_clinical.models.trained_model import TrainedModel
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

logger = logging.getLogger(__name__)

SHARED_FILES = [
    TRAJECTORY_FILE,
    *checkpoints.HASHED_FILES,
    checkpoints.CONFIG,
    checkpoints.NOTICE,
    CARD,
    checkpoints.FACTS,
    checkpoints.IMPORT,
    BASELINES,
    TEXT,
]
REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""Form of a repository's id, which a path may have too."""


def find_checkpoint(checkpoint: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the path of a trained model, downloaded where ``checkpoint`` is a repository's id."""
    path = Path(checkpoint)
    repo_id = os.fspath(checkpoint)
    if os.path.lexists(path) or not REPO_ID.fullmatch(repo_id):
        if revision is not None:
            raise InputError(f"{path}: is not of the hub: leave revision out")
        return path
    with hub_errors(f"{repo_id}: no such path, and on the hub"):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=SHARED_FILES))


def check_folder(folder: Path, config: Config) -> None:
    """Refuse a folder that ``save_model`` would not write, or a model that it does not write."""
    if checkpoints.is_merged(config):
        raise InputError("an export, which holds a whole language model: copy its folder instead")
    if not os.path.lexists(folder):
        return
    files = {""}
    if folder.is_dir():
        paths = (path for path in folder.rglob("*") if not path.is_dir())
        files = {path.relative_to(folder).as_posix() for path in paths}
    if files - {*SHARED_FILES} or (files and CARD not in files):
        raise InputError(f"{folder}: exists and holds other files: name a new folder")


def save_model(
    trained: TrainedModel, folder: Path, min_cell: int = MIN_CELL, repo_id: str | None = None
) -> None:
    """Write a model as a folder that loads again, new or in place of an earlier model."""
    check_folder(folder, trained.config)
    config = checkpoints.without_baselines(trained.config)
    baselines, text = trained.baselines, trained.text
    if text is not None:
        config["text_sha256"] = text.sha256
    if baselines is not None:
        baselines = replace(baselines, text=text)
        models = stored({name: trained.rules[name] for name in (*baselines.names, ENSEMBLE)})
        config |= {"baselines_sha256": baselines.sha256, "models": models}
        config["baseline_inputs"] = baselines.inputs
    folder.parent.mkdir(parents=True, exist_ok=True)
    with owner_only(), atomic(folder) as temporary:
        if isinstance(trained.model, TrajectoryLLM):
            checkpoints.save_llm(temporary, trained.model, config)
        else:
            assert trained.train_patients is not None
            temporary.mkdir()
            weights = trained.model.state_dict()
            path = temporary / TRAJECTORY_FILE
            checkpoints.save_trajectory(path, weights, config, trained.train_patients)
        checkpoints.write_card(temporary, config, repo_id, min_cell)
        if baselines is not None:
            write_text(temporary / BASELINES, baselines.to_json())
        if text is not None:
            write_text(temporary / TEXT, text.to_json())


def shared_copy(
    trained: TrainedModel,
    folder: Path,
    allow_small_cells: bool = False,
    share_text: bool = False,
    repo_id: str | None = None,  # of the hub, where the copy goes there
) -> None:
    """Write what others may get of a model: no hash or word of a patient, and no small counts."""
    min_cell = 0 if allow_small_cells else MIN_CELL
    text = trained.text if share_text else None
    if checkpoints.adds_text(trained.config) and text is None:
        raise InputError(
            f"{repo_id or folder}: its risks also rest on a regression on patients' texts: share "
            "it by share_text=True (--share_text), or train again without --text_features"
        )
    names = columns_of_few(trained)
    if names and not allow_small_cells:
        raise InputError(
            f"{repo_id or folder}: fewer than {MIN_CELL} training patients stand behind a mean of "
            f"{', '.join(names)}, or an earlier version did not count them: train again, without "
            "an input of so few, or pass allow_small_cells=True"
        )
    baselines = trained.baselines
    if baselines is not None and baselines.leaf_patients < min_cell:
        message = "%s: without baselines, which may tell of fewer than %d patients"
        logger.info(message, repo_id or folder, min_cell)
        baselines = None
    shared = replace(
        trained,
        config=shareable(trained.config, min_cell),
        train_patients=np.empty(0, np.int64),
        baselines=baselines,
        text=text,
    )
    save_model(shared, folder, min_cell, repo_id)


def columns_of_few(trained: TrainedModel) -> list[str]:
    """Return the columns of a model's scalers with a mean of fewer than ``MIN_CELL`` patients."""
    features, inputs = trained.config["features"], trained.config["inputs"]
    columns = {
        "scaler": features,
        "static_scaler": inputs["static"],
        "summary_scaler": summary_names(features, prediction_time=inputs["prediction_time"]),
    }
    few: list[str] = []
    for path, scaler in trained.model.named_modules():
        if isinstance(scaler, Scaler):
            names = columns[path.rpartition(".")[2]]
            few += itertools.compress(names, scaler.means_of_few())
    return list(dict.fromkeys(few))


def push_model(
    trained: TrainedModel,
    repo_id: str,
    private: bool = True,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    allow_small_cells: bool = False,
    share_text: bool = False,
) -> str:
    """Upload a shared copy in place of an earlier model's files; see ``push_to_hub``."""
    if not REPO_ID.fullmatch(repo_id):
        raise InputError(f"{repo_id}: not an id of the hub: give user/name")
    begins = terms_of(trained.config).name_begins
    if not repo_id.rpartition("/")[2].startswith(begins):
        problem = f"the licence of its base model asks for a name that begins with {begins}"
        raise InputError(f"{repo_id}: {problem}: rename it")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shared_copy(trained, folder, allow_small_cells, share_text, repo_id)
        with hub_errors(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise InputError(
                    f"{repo_id}: exists and is public: make it private, or push with private=False"
                )
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=SHARED_FILES,
                delete_patterns=[name for name in SHARED_FILES if not (folder / name).exists()],
                commit_message=commit_message or "Upload a trained model with its card",
                revision=revision,
            )
    return str(commit.commit_url)


@contextlib.contextmanager
def hub_errors(subject: str) -> Iterator[None]:
    """Turn any failure of the hub's library into one line with its own words."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of HTTP, of the disk and of the library: no common class
        words = " ".join(str(error).split())[:300]
        raise InputError(f"{subject}: {type(error).__name__}: {words}") from error
