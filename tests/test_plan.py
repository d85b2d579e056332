"""A plan of runs in the workers of a user's joblib backend: the same results, nothing of ours."""

import joblib
import pandas as pd
import pytest
from joblib.parallel import MultiprocessingBackend

from conftest import SAMPLE
from medgemma_clinical.commands import plan
from medgemma_clinical.files import InputError
from medgemma_trainer import cross_validate

pytestmark = pytest.mark.slow

FLAGS = {"folds": 2, "trajectory_epochs": 1, "max_samples": 120, "log_file": "none"}


def results_of(folder):
    """Predictions by file, which name the model by its weights."""
    found = folder.rglob("predictions_*.csv")
    return {path.relative_to(folder): path.read_bytes() for path in found}


def test_a_dask_cluster_finds_to_the_byte_what_this_machine_does(tmp_path, caplog):
    distributed = pytest.importorskip("distributed")
    rows = pd.read_csv(SAMPLE)
    with joblib.parallel_config("sequential"):
        cross_validate(rows, output_dir=tmp_path / "here", **FLAGS)
    assert "travel" not in caplog.text
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        cross_validate(rows, output_dir=tmp_path / "there", **FLAGS)
    assert "rows of patients travel" in caplog.text
    found = results_of(tmp_path / "there")
    assert len(found) == 5
    assert found == results_of(tmp_path / "here")


@pytest.mark.parametrize("name", plan.OWN_BACKENDS)
def test_the_backends_of_one_machine_keep_our_workers(name):
    with joblib.parallel_config(name):
        assert plan.active_cluster() == ""


def test_a_cluster_whose_backend_is_built_on_one_of_joblib_is_no_machine_of_ours():
    class RayBackend(MultiprocessingBackend):
        """As Ray's is."""

    with joblib.parallel_config(RayBackend()):
        assert plan.active_cluster() == "Ray"
        with pytest.raises(InputError, match="output_dir"):
            cross_validate(pd.read_csv(SAMPLE, nrows=300), folds=2, trajectory_epochs=1)
