"""Trained models that are shared: what may leave the machine, to the hub and from the hub.

Exactly the files of a checkpoint travel. Stage 1's copy holds no hashes of the patients that
trained: identifiers of a small range can be guessed from them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medgemma_clinical.files import InputError, atomic, owner_only, write_text
from medgemma_clinical.models.checkpoints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CARD,
    CONFIG,
    MODULE_WEIGHTS,
    NOTICE,
    TRAJECTORY_FILE,
    is_merged,
    read_config,
    read_trajectory,
    save_llm,
    save_trajectory,
)
from medgemma_clinical.models.sharing.model_card import model_card
from medgemma_clinical.models.sharing.terms import terms_of
from medgemma_clinical.models.trained_model import TrainedModel, checkpoint_path
from medgemma_clinical.models.trajectory_llm import TrajectoryLLM

COPIED = (CONFIG, MODULE_WEIGHTS, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
"""Files of stages 2 and 3 that are shared as they are; each has its hash in one of them."""

SHARED_FILES = (TRAJECTORY_FILE, *COPIED, NOTICE, CARD)
"""All that a shared model may hold: the first file of stage 1, the next ones of stages 2 and 3."""

HUB_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
"""Form of a repository's id, which a path may have too."""

LOG_IN = "log in: hf auth login"


# ------------------------------------------------------------------ what may leave the machine


def share_checkpoint(path: Path, folder: Path, repo_id: str | None = None) -> None:
    """Write those files of a trained model that others may get, with a new card and notice.

    Args:
        path: a stage's folder, its ``best``, stage 1's file, or a folder that was written here.
        folder: a new folder; one that holds a shared model alone is replaced.
        repo_id: where the files will lie on the hub, for the card.

    Raises:
        InputError: no trained model there, it is damaged, or the folder holds other files.
    """
    place = checkpoint_path(path)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic(folder) as temporary:
        temporary.mkdir()
        if place.is_file():
            checkpoint = read_trajectory(place)
            config, unnamed = checkpoint.config, np.empty(0, np.int64)
            save_trajectory(temporary / TRAJECTORY_FILE, checkpoint.weights, config, unnamed)
        else:
            config = read_config(place)
            (temporary / ADAPTER_CONFIG).parent.mkdir()
            for name in COPIED:
                shutil.copyfile(place / name, temporary / name)
            write_text(temporary / NOTICE, terms_of(config).notice)
        write_text(temporary / CARD, model_card(config, repo_id))


def check_replaceable(folder: Path) -> None:
    """Check that a folder is new, empty, or holds a shared model alone.

    Raises:
        InputError: the folder holds other files.
    """
    if not os.path.lexists(folder):
        return
    files = files_of(folder)
    if not folder.is_dir() or not files <= {*SHARED_FILES} or (files and CARD not in files):
        raise InputError(f"{folder}: exists and holds other files: name a new folder")


def files_of(folder: Path) -> set[str]:
    """Return the paths, within a folder, of all that is no folder there."""
    places = (each for each in folder.rglob("*") if each.is_symlink() or not each.is_dir())
    return {each.relative_to(folder).as_posix() for each in places}


def save_model(trained: TrainedModel, folder: Path) -> None:
    """Write a model of the memory as a folder that loads again, with its card.

    Stage 1 keeps the hashes of its training patients: stages 2 and 3 find leaks by these hashes.

    Args:
        trained: of any stage.
        folder: new, or of an earlier model.

    Raises:
        InputError: the folder holds other files, or the model is an export.
    """
    check_replaceable(folder)
    if is_merged(trained.config):
        raise InputError("an export, which holds a whole language model: copy its folder instead")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with owner_only():
        if isinstance(trained.model, TrajectoryLLM):
            save_llm(folder, trained.model, trained.config)
            return
        with atomic(folder) as temporary:
            temporary.mkdir()
            assert trained.train_patients is not None
            weights, patients = trained.model.state_dict(), trained.train_patients
            save_trajectory(temporary / TRAJECTORY_FILE, weights, trained.config, patients)
            write_text(temporary / CARD, model_card(trained.config))


# ------------------------------------------------------------------ to the hub


def upload_checkpoint(
    path: Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a trained model: the files of ``share_checkpoint``, in place of an earlier model's.

    Args:
        path: as for ``share_checkpoint``.
        repo_id: ``user/name``; made where there is none.
        private: whether the repository must be private.
        revision: branch, made where there is none; None takes ``main``.
        commit_message: one line; None names the program.
        token: of the hub; None takes that of the login.

    Returns:
        Address of the commit.

    Raises:
        InputError: no trained model there, no login, no right to write, or a public repository
            where a private one is asked for.
    """
    from huggingface_hub import HfApi, get_token

    check_repo_id(repo_id)
    if not (token or get_token()):
        raise InputError(f"{repo_id}: not logged in to the hub: {LOG_IN}, or set HF_TOKEN")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        share_checkpoint(path, folder, repo_id)
        absent = [name for name in SHARED_FILES if not (folder / name).exists()]
        with _hub_failures(repo_id, revision):
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
                allow_patterns=list(SHARED_FILES),
                delete_patterns=absent,
                commit_message=commit_message or "Upload a trained model with its card",
                revision=revision,
            )
    return str(commit.commit_url)


# ------------------------------------------------------------------ from the hub


def download_checkpoint(repo_id: str, revision: str | None = None) -> Path:
    """Return the place of a trained model of the hub in the cache, downloaded where it is not yet.

    Args:
        repo_id: ``user/name``.
        revision: branch, tag or commit; None takes ``main``.

    Returns:
        Stage 1's file, or the folder of stage 2 or 3.

    Raises:
        InputError: no such model or revision, no access, no connection and not in the cache, or
            not a model of this program.
    """
    from huggingface_hub import snapshot_download

    check_repo_id(repo_id)
    with _hub_failures(repo_id, revision):
        folder = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(SHARED_FILES))
        )
    if (folder / MODULE_WEIGHTS).is_file():
        return folder
    if (folder / TRAJECTORY_FILE).is_file():
        return folder / TRAJECTORY_FILE
    raise InputError(
        f"{_named(repo_id, revision)}: holds no model of this program: neither {MODULE_WEIGHTS} "
        f"nor {TRAJECTORY_FILE}"
    )


def find_checkpoint(checkpoint: str | os.PathLike[str], revision: str | None) -> Path:
    """Return the place of a trained model on the disk, or of its copy from the hub.

    Args:
        checkpoint: a path, or the id of a repository.
        revision: of the repository; a path has none.

    Raises:
        InputError: there is none, or a path has a revision.
    """
    path = Path(checkpoint)
    if os.path.lexists(path) or not HUB_REPOSITORY.fullmatch(os.fspath(checkpoint)):
        if revision is not None:
            raise InputError(f"{path}: is not of the hub: leave revision out")
        return path
    try:
        return download_checkpoint(os.fspath(checkpoint), revision)
    except InputError as error:
        raise InputError(f"no such file or folder here, and of the hub {error}") from error


# ------------------------------------------------------------------ failures


def check_repo_id(repo_id: str) -> None:
    """Check the form of a repository's id.

    Raises:
        InputError: not ``user/name``.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with contextlib.suppress(HFValidationError):
        validate_repo_id(repo_id)
        if "/" in repo_id:
            return
    raise InputError(f"{repo_id}: no such file or folder here, and not an id of the hub: user/name")


@contextlib.contextmanager
def _hub_failures(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn each failure of the hub, and of the way to the hub, into one line of advice."""
    logs = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "httpx2")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL)  # they show each request, and repeat what the one line says
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of HTTP, of the disk and of the library's own
        advice = hub_advice(repo_id, revision, error)
        raise InputError(f"{_named(repo_id, revision)}: {advice}") from error
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def hub_advice(repo_id: str, revision: str | None, error: Exception) -> str:
    """Return why the hub did not serve, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"ask for access at https://huggingface.co/{repo_id}, then {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision: name a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such model on the hub, or a private one: check the id, or {LOG_IN}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "not in the cache of this machine, and the hub cannot be reached: load it once where "
            "there is a network, without HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub cannot be reached while HF_HUB_OFFLINE is set"
    response: Any = getattr(error, "response", None)
    if getattr(response, "status_code", None) in (401, 403):
        return f"the hub refused the login: {LOG_IN} with a token that may write there"
    text = " ".join(str(error).split())[:200]
    return f"the hub did not serve ({type(error).__name__}: {text}): try again later"


def _named(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id}, revision {revision}"
