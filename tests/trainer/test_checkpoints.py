"""hf_elra.trainer.checkpoints: checkpoints that were cut short while they were written."""

import logging
import os
import pickle
import resource
import shutil

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_elra.errors import CheckpointError, ConfigurationError
from hf_elra.recipes.run_folder import check_run_folder
from hf_elra.trainer.checkpoints import damage_of, last_whole_checkpoint
from tests.conftest import arguments, llama, token_rows, trainer, weights


def trained(folder, model=None, resume=None):
    run = trainer(folder, model, token_rows(32), max_steps=6, save_strategy="steps", save_steps=2)
    run.train(resume_from_checkpoint=resume)
    return run


def cut(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_found(tmp_path, share):
    trained(tmp_path / "run")
    whole = tmp_path / "run" / "checkpoint-6"
    assert damage_of(whole) is None
    for file in sorted(whole.iterdir()):
        if file.suffix in (".safetensors", ".pt", ".pth") or file.name == "trainer_state.json":
            copy = tmp_path / "copy"
            shutil.copytree(whole, copy)
            cut(copy / file.name, share)
            assert damage_of(copy) == f"{file.name} is cut short"
            shutil.rmtree(copy)


def test_training_goes_on_from_the_one_before(tmp_path, caplog):
    through = trained(tmp_path / "through")
    trained(tmp_path / "cut")
    cut(tmp_path / "cut" / "checkpoint-6" / "optimizer.pt", 0.7)
    (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").unlink()
    with caplog.at_level(logging.WARNING):
        again = trained(tmp_path / "cut", resume=True)
    assert "checkpoint-6 is not whole (optimizer.pt is cut short)" in caplog.text
    assert "checkpoint-4 is not whole (trainer_state.json is missing)" in caplog.text
    assert torch.equal(weights(through.model), weights(again.model))


def test_folders_without_checkpoints(tmp_path):
    assert last_whole_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    assert last_whole_checkpoint(tmp_path) is None
    with pytest.raises(ConfigurationError, match="holds no whole checkpoint; leave it out"):
        trained(tmp_path / "empty", resume=True)


@pytest.mark.parametrize("control", ["elra", "off"])
def test_a_run_that_had_reached_its_end_makes_no_further_update(tmp_path, control):
    given = dict(max_steps=6, save_strategy="steps", save_steps=2, elra_batch_control=control)
    first = trainer(tmp_path, None, token_rows(80), **given)
    first.train()
    again = trainer(tmp_path, None, token_rows(80), **given)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert torch.equal(weights(first.model), weights(again.model))


class FillDisk(TrainerCallback):
    """From the second checkpoint on, files may not grow beyond a size: errors as on a full disk."""

    def __init__(self, size):
        self.size = size
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_save(self, *args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(tmp_path, file):
    through = trained(tmp_path / "through")
    folder = tmp_path / "full"
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "through" / "checkpoint-4").iterdir()}
    full = FillDisk(min(size for name, size in sizes.items() if name == file) - 1)
    run = trainer(folder, None, token_rows(32), max_steps=6, save_strategy="steps", save_steps=2, callbacks=[full])
    try:
        with pytest.raises(CheckpointError) as error:
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, full.before)
    message = str(error.value)
    assert "checkpoint-4 could not be written into" in message
    assert "MiB are free" in message
    assert "checkpoint-2 is whole: make room, then resume from it." in message
    again = trained(folder, resume=True)
    assert torch.equal(weights(through.model), weights(again.model))


class Payload:
    """What a pickle may do."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_checkpoint_cannot_run_code(tmp_path, file):
    trained(tmp_path / "run")
    torch.save(Payload(str(tmp_path / "harm")), tmp_path / "run" / "checkpoint-6" / file)
    (tmp_path / "run" / "checkpoint-6" / "trainer_state.json").write_text(
        (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text()
    )
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trained(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-6"))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("holds_a_run", [False, True])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch, holds_a_run):
    """The tests may run as a user who may write anywhere: the system's answer is replaced."""
    if holds_a_run:
        (tmp_path / "settings.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for folder in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(ConfigurationError, match="cannot be written; choose another folder"):
            check_run_folder(str(folder), {}, resume=holds_a_run, overwrite=False)


def test_a_stock_optimizer_is_told_whose_state_it_is_to_go_on_from(tmp_path):
    def run(optim, max_steps):
        made = arguments(
            tmp_path, TrainingArguments, optim=optim, max_steps=max_steps, save_strategy="steps", save_steps=2
        )
        return Trainer(llama(), made, train_dataset=token_rows(50))

    run("elra_spectral", 2).train()
    for given in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(ConfigurationError, match="Spectral, EndSlopes.*which optim=adamw_torch cannot read"):
            run("adamw_torch", 4).train(resume_from_checkpoint=given)
    run("elra_spectral", 4).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut short")
    with pytest.raises(Exception, match="(?i)pickle|zip|central directory|load"):  # torch tells
        run("adamw_torch", 6).train(resume_from_checkpoint=True)
