"""The BabyLlama recipe: presets, settings by optimizer, output folders."""

import json

import pytest
import torch

from hf_elra import ConfigurationError
from hf_elra.recipes.babyllama import FAMILIES, build_model, parse_arguments, settings_for
from hf_elra.recipes.run_folder import METRICS, SETTINGS, AlreadyFinished, check_run_folder, start_run


class Pieces:
    bos_token_id, eos_token_id = 1, 2

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def parameters(*words):
    recipe, _ = parse_arguments(list(words))
    with torch.device("meta"):
        return build_model(recipe, Pieces(recipe.vocab_size)).num_parameters()


def test_15m_is_stories15m_to_the_parameter():
    assert parameters("--preset", "15m") == 15_191_712


def test_tiny_is_the_default_and_has_about_a_million():
    assert 0.9e6 < parameters() < 1.2e6


def test_what_needs_no_setting_is_the_default():
    _, training = parse_arguments([])
    assert (training.optim, training.output_dir) == ("elra_spectral", "runs/babyllama-tiny")
    assert training.elra_min_step_norm is None
    assert training.elra_control_cycle == "400sp"


def test_every_value_can_be_overridden():
    words = "--preset=15m --hidden_size 64 --num_heads 4 --block_size 32 --max_steps 7"
    recipe, training = parse_arguments([*words.split(), "--optim=elra", "--elra_min_step_norm", "0.05"])
    assert (recipe.hidden_size, recipe.num_heads, recipe.block_size, recipe.num_layers) == (64, 4, 32, 6)
    assert (training.max_steps, training.elra_min_step_norm) == (7, 0.05)
    assert training.elra_control_cycle == "45000sp"
    assert training.output_dir == "runs/babyllama-15m-elra"
    for flag in ("--num_train_epochs", "--max_steps", "--elra_max_tokens"):  # another length takes the preset's place
        assert parse_arguments([flag, "2"])[1].elra_max_samples is None
    assert parse_arguments(["--optim", "sgd"])[1].elra_max_samples == 19_200
    batches = [parse_arguments(["--optim", optim])[1].per_device_train_batch_size for optim in ("elra", "sgd")]
    assert batches == [4, 8]  # ELRA's grows
    assert parse_arguments(["--optim", "sgd"])[1].elra_min_step_norm is None  # the preset's floor is ELRA's alone


@pytest.mark.parametrize(
    ("optim", "family"),
    [
        ("elra", "elra"),
        ("adamw_torch", "adamw"),
        ("adamw_torch_fused", "adamw"),
        ("lion_32bit", "lion"),
        ("paged_lion_8bit", "lion"),
        ("sgd", "sgd"),
        ("schedule_free_adamw", "schedule_free"),
        ("galore_adamw", "adamw"),
        ("grokadamw", "adamw"),
    ],
)
def test_stock_optimizers_get_settings_of_their_own(optim, family):
    assert settings_for(optim) is FAMILIES[family]


def test_adamw_is_set_as_usual():
    _, training = parse_arguments(["--optim", "adamw_torch"])
    assert (training.learning_rate, training.max_grad_norm, training.weight_decay) == (3e-3, 1.0, 0.1)
    assert training.lr_scheduler_type == "cosine"
    assert training.output_dir == "runs/babyllama-tiny-adamw_torch"
    assert parse_arguments(["--preset", "15m", "--optim", "adamw_torch"])[1].learning_rate == 5e-4
    assert parse_arguments(["--optim", "adamw_torch", "--learning_rate", "1e-3"])[1].learning_rate == 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset tinny", "--preset tinny is unknown. Did you mean 'tiny'"),
        ("--optim erla", "--optim erla is unknown. Did you mean 'elra'"),
        ("--optim adamw-torch", "Did you mean 'adamw_torch'"),
        ("--hidden_size 100 --num_heads 3", "hidden_size=100 must be an even multiple of num_heads=3"),
        ("--block_size 0", "block_size=0 must be at least 1"),
        ("--max_steps many", "invalid int value: 'many'"),
        ("--fp16", "fp16=True cannot be used with ELRA"),
        ("--deepspeed ds.json", "deepspeed cannot be used with ELRA"),
        ("--max_step 1", "unknown argument --max_step. Did you mean '--max_steps'"),
    ],
)
def test_wrong_flags(words, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_arguments(words.split())


# ---- the output folder ----

SOME = {"optim": "elra", "seed": 1, "max_steps": 10}


def interrupted(folder, checkpoint=True):
    start_run(str(folder), SOME, None)
    if checkpoint:
        (folder / "checkpoint-3").mkdir()
        (folder / "checkpoint-3" / "trainer_state.json").write_text("{}")
    return str(folder)


def finished(folder):
    interrupted(folder)
    (folder / METRICS).write_text("{}")
    return str(folder)


def check(folder, settings=SOME, *, resume=False, overwrite=False):
    return check_run_folder(str(folder), settings, resume=resume, overwrite=overwrite)


def test_new_folder(tmp_path):
    assert check(tmp_path / "a" / "b") is None
    with pytest.raises(ConfigurationError, match="nothing to resume"):
        check(tmp_path / "a", resume=True)
    assert check(tmp_path / "a", resume=True, overwrite=True) is None
    start_run(str(tmp_path / "a" / "b"), SOME, None)
    assert json.loads((tmp_path / "a" / "b" / SETTINGS).read_text()) == SOME


def test_foreign_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for given in ({}, {"overwrite": True}, {"resume": True, "overwrite": True}):
        with pytest.raises(ConfigurationError, match="no run of this script"):
            check(tmp_path, **given)
    with pytest.raises(ConfigurationError, match="is a file"):
        check(tmp_path / "thesis.tex")


def test_interrupted_run(tmp_path):
    folder = interrupted(tmp_path / "run")
    with pytest.raises(ConfigurationError, match="an interrupted run; pass --resume to go on with it"):
        check(folder)
    assert check(folder, resume=True).endswith("checkpoint-3")
    assert check(folder, resume=True, overwrite=True).endswith("checkpoint-3")
    assert check(folder, overwrite=True) is None
    with pytest.raises(ConfigurationError, match="changed: seed 1 -> 2"):
        check(folder, {**SOME, "seed": 2}, resume=True)
    assert check(folder, {**SOME, "max_steps": 20}, resume=True).endswith("checkpoint-3")  # longer is no other run
    assert check(folder, {**SOME, "seed": 2}, resume=True, overwrite=True) is None
    early = interrupted(tmp_path / "early", checkpoint=False)
    with pytest.raises(ConfigurationError, match="pass no --resume, as it was interrupted before its first checkpoint"):
        check(early, resume=True)
    assert check(early) is None
    assert check(early, {**SOME, "seed": 2}) is None


def test_finished_run(tmp_path):
    folder = finished(tmp_path / "run")
    for given in ({}, {"resume": True}):
        with pytest.raises(ConfigurationError, match="a finished run; pass --overwrite"):
            check(folder, **given)
    with pytest.raises(AlreadyFinished, match="holds this run, finished"):
        check(folder, resume=True, overwrite=True)
    assert check(folder, {**SOME, "max_steps": 20}, resume=True, overwrite=True) is None
    assert check(folder, overwrite=True) is None
    start_run(folder, SOME, None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [SETTINGS]
