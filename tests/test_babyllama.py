"""The BabyLlama recipe: presets, settings by optimizer, output folders."""

import json
import math

import pytest
import torch

from hf_elra import ConfigurationError
from hf_elra.recipes import babyllama, image_classifier
from hf_elra.recipes.babyllama import FAMILIES, build_model, parse_arguments, settings_for
from hf_elra.recipes.command_line import default_settings, recorded_settings
from hf_elra.recipes.run_folder import (
    ALWAYS_WRITTEN,
    MARK,
    AlreadyFinished,
    check_run_folder,
    read_settings,
    start_run,
)
from hf_elra.report.names import LOG_FILE, METRICS, SETTINGS


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


def test_perplexity_of_a_loss_that_is_too_high_is_infinite():
    assert babyllama.perplexity(2.0) == math.exp(2.0)
    assert babyllama.perplexity(710.0) == math.inf


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


def test_of_a_flag_given_twice_the_last_one_counts():
    recipe, training = parse_arguments("--optim adamw_torch --optim=elra --preset 15m --preset tiny".split())
    _, elra = parse_arguments(["--optim", "elra"])
    assert recipe.preset == "tiny"
    for name in ("optim", "learning_rate", "lr_scheduler_type", "max_grad_norm", "output_dir", "elra_max_samples"):
        assert getattr(training, name) == getattr(elra, name)


def recorded(module, *words):
    recipe, training = module.parse_arguments(list(words))
    settings = recorded_settings(recipe, training, module.NOT_OF_THE_TRAJECTORY)
    defaults = module.defaults_of(recipe.preset, training.optim.value)
    return settings, default_settings(settings, recipe, training, defaults)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("adam_beta2", "0.9"),
        ("adam_epsilon", "1e-2"),
        ("warmup_steps", "0.5"),
        ("bf16", "true"),
        ("label_smoothing_factor", "0.3"),
        ("data_seed", "7"),
        ("lr_scheduler_kwargs", '{"num_cycles": 3}'),
        ("dataloader_drop_last", "true"),
        ("optim_args", "amsgrad=True"),
        ("train_sampling_strategy", "sequential"),
    ],
)
def test_what_decides_the_trajectory_is_written_down(tmp_path, flag, value):
    before, _ = recorded(babyllama, "--optim", "adamw_torch")
    after, _ = recorded(babyllama, "--optim", "adamw_torch", "--use_cpu", f"--{flag}", value)
    assert {name for name in after if after[name] != before[name]} == {flag}
    interrupted(tmp_path, settings=after)
    assert check(tmp_path, after, resume=True)  # as it was, read back from the file
    with pytest.raises(ConfigurationError, match=f"the settings it had to resume it.*changed: {flag} "):
        check(tmp_path, before, resume=True)


@pytest.mark.parametrize("optim", ["elra_spectral", "elra", "adamw_torch", "sgd", "lion_32bit", "adafactor"])
@pytest.mark.parametrize("module", [babyllama, image_classifier])
def test_runs_from_before_a_setting_was_written_down_go_on(tmp_path, module, optim):
    settings, defaults = recorded(module, "--optim", optim)
    assert {name for name in settings if settings[name] != defaults[name]} <= {"optim"}
    interrupted(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps({name: settings[name] for name in ALWAYS_WRITTEN}))
    given = {"resume": True, "overwrite": False, "defaults": defaults}
    assert check_run_folder(str(tmp_path), settings, **given).endswith("checkpoint-3")
    changed, defaults = recorded(module, "--optim", optim, "--adam_beta2", "0.5")
    with pytest.raises(ConfigurationError, match=r"changed: adam_beta2 0.\d+ -> 0.5"):
        check_run_folder(str(tmp_path), changed, **{**given, "defaults": defaults})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset tinny", "--preset tinny is unknown. Did you mean 'tiny'"),
        ("--optim erla", "--optim erla is unknown. Did you mean 'elra'"),
        ("--optim adamw-torch", "Did you mean 'adamw_torch'"),
        ("--optim adamw", "Did you mean 'adamw_torch'"),
        ("--hidden_size 100 --num_heads 3", "hidden_size=100 must be an even multiple of num_heads=3"),
        ("--block_size 0", "block_size=0 must be at least 1"),
        ("--max_steps many", "invalid int value: 'many'"),
        ("--optim sls --fp16", "fp16=True cannot be used with SLS"),
        ("--deepspeed ds.json", "deepspeed cannot be used with ELRA"),
        ("--max_step 1", "unknown argument --max_step. Did you mean '--max_steps'"),
    ],
)
def test_wrong_flags(words, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_arguments(words.split())


# ---- the output folder ----

SOME = {"optim": "elra", "seed": 1, "max_steps": 10}


def interrupted(folder, checkpoint=True, settings=SOME):
    start_run(str(folder), settings, None)
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
    assert json.loads((tmp_path / "a" / "b" / SETTINGS).read_text()) == {**MARK, **SOME}
    assert read_settings(tmp_path / "a" / "b" / SETTINGS) == SOME


def test_foreign_folder_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for given in ({}, {"overwrite": True}, {"resume": True, "overwrite": True}):
        with pytest.raises(ConfigurationError, match="not a run of this script"):
            check(tmp_path, **given)
    with pytest.raises(ConfigurationError, match="is a file"):
        check(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    "content", ['{"editor": 1, "seed": 1}', "// no JSON\n{}", '["a", "b"]', "", b"\xff\xfe", "[" * 100_000, None]
)
def test_settings_of_another_program_do_not_make_a_run(tmp_path, content):
    (tmp_path / "thesis.tex").write_text("years of work")
    if content is None:
        (tmp_path / SETTINGS).mkdir()
    else:
        (tmp_path / SETTINGS).write_bytes(content if isinstance(content, bytes) else content.encode())
    for given in ({}, {"overwrite": True}, {"resume": True}, {"resume": True, "overwrite": True}):
        with pytest.raises(ConfigurationError, match="not a run of this script"):
            check(tmp_path, **given)


def test_only_what_was_begun_and_holds_nothing_else_is_taken_over_unasked(tmp_path):
    folder = tmp_path / "run"
    interrupted(folder, checkpoint=False)
    (folder / (SETTINGS + ".part")).write_text("{")
    assert check(folder) is None
    for name in ("notes.txt", "checkpoint-500"):  # a checkpoint that is not whole is no reason to lose it unasked
        (folder / name).mkdir()
        with pytest.raises(ConfigurationError, match="an interrupted run; pass --overwrite to replace it, or"):
            check(folder)
        with pytest.raises(ConfigurationError, match="--overwrite instead of --resume to replace it"):
            check(folder, resume=True)
        assert check(folder, overwrite=True) is None
        assert check(folder, resume=True, overwrite=True) is None  # make train
        (folder / name).rmdir()


def test_runs_from_before_the_mark_are_recognised(tmp_path):
    (tmp_path / SETTINGS).write_text(json.dumps(dict.fromkeys(ALWAYS_WRITTEN, 1)))
    assert check(tmp_path) is None
    assert read_settings(tmp_path / SETTINGS) == dict.fromkeys(ALWAYS_WRITTEN, 1)


def test_emptying_leaves_the_folder_and_what_links_point_to(tmp_path):
    """The folder may be a link or a mount point."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept.txt").write_text("kept")
    (tmp_path / "real").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "real")
    folder = interrupted(tmp_path / "run")
    (tmp_path / "real" / "link").symlink_to(elsewhere)
    assert check(folder, overwrite=True) is None
    start_run(folder, SOME, None)
    assert [file.name for file in (tmp_path / "real").iterdir()] == [SETTINGS]
    assert (tmp_path / "run").is_symlink()
    assert (elsewhere / "kept.txt").read_text() == "kept"


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
    (tmp_path / "early" / LOG_FILE).write_text("{}")
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
