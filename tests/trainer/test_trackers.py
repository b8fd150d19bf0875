"""Numbers and alerts as trackers really keep them, read back from their stores."""

import math

import pytest

from tests.conftest import logged, trainer
from tests.trainer.test_log_file import spiking


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The store of trackio, which reads where to put it when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        pytest.importorskip("trackio", reason="trackio is not installed")
        from trackio.sqlite_storage import SQLiteStorage

        yield SQLiteStorage


def train(tmp_path, **given):
    run = trainer(tmp_path, report_to="trackio", run_name="one", elra_batch_control="off", max_steps=8, **given)
    run.train()
    return run


def test_trackio_gets_the_numbers_and_no_alert_without_a_cause(tmp_path, store):
    run = train(tmp_path, project="quiet")
    logs = [entry for entry in store.get_logs("quiet", "one") if "train/loss" in entry]
    for key in ("loss", "alpha", "learning_rate", "step_norm", "restarts", "cropped"):
        assert [entry[f"train/{key}"] for entry in logs if f"train/{key}" in entry] == pytest.approx(logged(run, key))
    assert store.get_alerts("quiet", "one") == []


def test_trackio_is_alerted_of_restarts_and_of_what_is_not_finite(tmp_path, store):
    train(tmp_path, project="spike", compute_loss_func=spiking(6))
    (alert,) = store.get_alerts("spike", "one")
    assert (alert["level"], alert["title"]) == ("warn", "updates taken back")
    assert "Update 6: 1 of the last 1 updates was taken back" in alert["text"]
    train(tmp_path, project="nan", compute_loss_func=spiking(6, by=math.nan))
    (alert,) = store.get_alerts("nan", "one")
    assert (alert["level"], alert["title"]) == ("error", "not finite")
    assert "Update 6: loss or gradient was not finite in 1 of the updates" in alert["text"]
