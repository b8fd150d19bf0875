"""Boosting: evaluation, prediction and saving use the mean of a cycle's points, training the last one."""

import json

import datasets
import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_elra import ConfigurationError
from hf_elra.optim.averaging import WeightAverage
from hf_elra.recipes.image_models import SmallImageClassifier, SmallImageClassifierConfig
from tests.conftest import llama, token_rows, trainer, weights
from tests.trainer.test_micro_batches import StopAt


class Points(TrainerCallback):
    def __init__(self):
        self.points = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.points.append(weights(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mean_of_points(dtype):
    p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    mean = WeightAverage({"p": p})
    for value in (1.0, 2.0, 6.0):
        p.data.fill_(value)
        mean.add()
    torch.testing.assert_close(mean.mean["p"].double(), torch.full((3,), 3.0, dtype=torch.float64))
    with mean.in_place():
        assert p[0] == 3
    assert p[0] == 6
    mean.end_cycle()
    assert mean.count == 3
    p.data.fill_(8.0)
    mean.add()
    assert mean.mean["p"][0] == 8


def test_without_points_there_is_no_mean_to_put_in_place():
    p = torch.nn.Parameter(torch.zeros(3))
    mean = WeightAverage({"p": p}, power=8)
    p.data.fill_(4.0)
    with mean.in_place():
        assert p[0] == 4


@pytest.mark.parametrize(
    ("parameters", "power", "message"),
    [
        ([torch.nn.Parameter(torch.zeros(3))], 8, "must be a model, or a dict of its parameters by name, not list"),
        (torch.nn.ReLU(), 8, "nothing of this model is trained"),
        ({}, 8, "not an empty dict"),
        ({"p": torch.nn.Parameter(torch.zeros(3))}, -3, "power=-3 must be a whole number >= 0"),
        ({"p": torch.nn.Parameter(torch.zeros(3))}, 2.5, "power=2.5 must be a whole number >= 0"),
    ],
)
def test_what_cannot_be_averaged_is_refused(parameters, power, message):
    with pytest.raises(ConfigurationError, match=message):
        WeightAverage(parameters, power)


@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
def test_evaluation_prediction_and_saving_use_the_mean_and_training_does_not(tmp_path, optim):
    points = Points()
    given = dict(optim=optim, learning_rate=1e-2, eval_dataset=token_rows(8), elra_control_cycle="5ba", max_steps=10)
    run = trainer(tmp_path, callbacks=[points], elra_boost=True, elra_boost_every=1, **given)
    run.train()
    plain = trainer(tmp_path / "plain", **given)
    plain.train()
    assert torch.equal(points.points[-1], weights(plain.model))

    mean = torch.stack(points.points[5:]).mean(0)
    boosted = llama()
    torch.nn.utils.vector_to_parameters(mean, boosted.parameters())
    by_hand = trainer(tmp_path / "hand", model=boosted, **given)
    assert run.evaluate()["eval_loss"] == pytest.approx(by_hand.evaluate()["eval_loss"], rel=1e-5)
    assert run.evaluate()["eval_loss"] != plain.evaluate()["eval_loss"]
    one, other = (t.predict(token_rows(4)).predictions for t in (run, by_hand))
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-5)
    run.save_model(str(tmp_path / "saved"))
    saved = type(run.model).from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(weights(saved), mean)
    torch.testing.assert_close(weights(run.model), mean)  # what a user of trainer.model gets


def test_points_are_sampled_every_k_updates(tmp_path):
    points = Points()
    run = trainer(
        tmp_path, callbacks=[points], elra_boost=True, elra_boost_every=3, elra_control_cycle="20ba", max_steps=10
    )
    run.train()
    assert run.weight_average.count == 3
    mean = torch.cat([t.flatten() for t in run.weight_average.mean.values()])
    torch.testing.assert_close(mean, torch.stack([points.points[i] for i in (2, 5, 8)]).mean(0))


def test_every_cycle_has_points_of_its_own(tmp_path):
    points = Points()
    run = trainer(
        tmp_path, callbacks=[points], elra_boost=True, elra_boost_every=7, elra_control_cycle="2ba", max_steps=6
    )
    run.train()
    mean = torch.cat([t.flatten() for t in run.weight_average.mean.values()])
    torch.testing.assert_close(mean, points.points[-1])


@pytest.mark.parametrize(("cycle", "every"), [("100ba", 2), ("1ep", 1), ("1600sp", 4), ("12800tok", 2), ("3ba", 1)])
def test_by_default_a_cycle_has_about_fifty_points(tmp_path, cycle, every):
    run = trainer(tmp_path, elra_boost=True, elra_control_cycle=cycle, max_steps=1)
    run.train()
    assert run.elra.averaging.every == every


@pytest.mark.parametrize(("cycle", "every"), [("1600sp", 2), ("200ba", 4)])
def test_as_batches_grow_a_cycle_keeps_its_fifty_points(tmp_path, cycle, every):
    run = trainer(tmp_path, elra_boost=True, elra_control_cycle=cycle, max_steps=1)
    run.train()
    assert run.elra.averaging.every == 4
    run.elra.size.controller.exact = 2.0
    assert run.elra.accounting.accumulation == 2
    assert run.elra.averaging.every == every


def test_checkpoints_hold_both_points_and_say_which_is_which(tmp_path):
    points = Points()
    given = dict(elra_boost=True, elra_boost_every=1, elra_control_cycle="6ba", max_steps=10)
    run = trainer(tmp_path, callbacks=[points, StopAt(8)], **given)
    run.train()
    folder = tmp_path / "checkpoint-8"
    saved = type(run.model).from_pretrained(folder)
    assert torch.equal(weights(saved), points.points[-1])
    boosted = load_file(folder / "boosted.safetensors")
    torch.testing.assert_close(
        torch.cat([boosted[n].flatten() for n, _ in run.model.named_parameters()]),
        torch.stack(points.points[6:8]).mean(0),
    )
    told = json.loads((folder / "boosting.json").read_text())
    assert told["model.safetensors"] == "the point that training goes on from"
    assert told["boosted.safetensors"] == "the mean of 2 points of the control cycle"

    whole = trainer(tmp_path / "whole", **given)
    whole.train()
    second = trainer(tmp_path, model=llama(seed=9), **given)
    second.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole.model), weights(second.model))
    for one, other in zip(whole.weight_average.mean.values(), second.weight_average.mean.values(), strict=True):
        assert torch.equal(one, other)
    assert whole.weight_average.count == second.weight_average.count == 4


def image_model(seed=0):
    torch.manual_seed(seed)
    return SmallImageClassifier(
        SmallImageClassifierConfig(architecture="fashion-cnn", image_size=8, num_channels=1, num_labels=4)
    )


def image_rows(count=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": int(4 * image.mean()) % 4} for image in images]


class AtTheMean(TrainerCallback):
    """Notes the statistics of the first BatchNorm layer, and the model before, at and after the mean of its points."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == args.max_steps:
            self.before = {name: value.clone() for name, value in model.state_dict().items()}
            random = torch.get_rng_state()
            with self.run.elra.averaging.in_use():
                self.at = model.network[1].running_mean.clone()
                with torch.no_grad():
                    first = model.network[0](torch.stack([row["pixel_values"] for row in image_rows()]))
                self.expected = first.mean(dim=(0, 2, 3))
            assert torch.equal(random, torch.get_rng_state())
            self.after = {name: value.clone() for name, value in model.state_dict().items()}


def test_batch_norm_statistics_are_those_of_the_mean_and_come_back(tmp_path):
    seen = AtTheMean()
    run = seen.run = trainer(
        tmp_path, model=image_model(), rows=image_rows(), eval_dataset=image_rows(16), elra_boost=True,
        elra_boost_every=1, elra_control_cycle="4ba", max_steps=8, callbacks=[seen],
    )  # fmt: skip
    run.train()
    torch.testing.assert_close(seen.at, seen.expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(seen.at, seen.before["network.1.running_mean"])
    for name, value in seen.after.items():
        assert torch.equal(value, seen.before[name])
    assert torch.equal(run.model.network[1].running_mean, seen.at)  # there to stay when training is over
    assert run.model.state_dict()["network.1.num_batches_tracked"] > 0


@pytest.mark.parametrize("optim", ["elra", "elra_spectral", "adamw_torch"])
@pytest.mark.parametrize("model", [llama, image_model], ids=["llama", "with BatchNorm"])
def test_training_that_goes_on_goes_on_from_the_last_point(tmp_path, optim, model):
    """The mean in the model when training is over does not come into the way of a second one."""
    paths = []
    for boosted in (False, True):
        points = Points()
        run = trainer(
            tmp_path / str(boosted), model=model(), rows=image_rows() if model is image_model else None, optim=optim,
            max_steps=14, callbacks=[points], elra_boost_mean="cycle" if boosted else "off", elra_control_cycle="3ba",
            optim_args="warmup=0" if optim == "elra_spectral" else None,
        )  # fmt: skip
        run.train()
        assert torch.equal(weights(run.model), points.points[-1]) != boosted
        run.train()
        paths.append((points.points, dict(run.model.named_buffers()) if boosted else {}))
    assert len(paths[0][0]) == 28
    for one, other in zip(paths[0][0], paths[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_model_that_was_changed_between_trainings_is_taken_as_it_is(tmp_path):
    class Begin(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.point = weights(model)

    begin, rows = Begin(), token_rows(16)
    run = trainer(tmp_path, optim="elra_spectral", max_steps=14, callbacks=[begin])
    run.train()
    with torch.no_grad():
        run.model.model.norm.weight.mul_(2)
    other = trainer(tmp_path / "other", model=run.model, optim="adamw_torch")
    assert run.evaluate(rows)["eval_loss"] == other.evaluate(rows)["eval_loss"]  # of what is there, not of the mean
    given = weights(run.model)
    run.train()
    assert torch.equal(begin.point, given)


def test_adapters_that_are_merged_are_the_mean(tmp_path):
    from peft import LoraConfig, get_peft_model

    points = Points()
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    run = trainer(
        tmp_path, model=model, optim="elra_spectral", max_steps=16, eval_dataset=token_rows(8), callbacks=[points]
    )
    run.train()
    assert not torch.equal(points.points[-1], weights(run.model))
    loss = run.evaluate()["eval_loss"]
    merged = run.model.merge_and_unload()
    other = trainer(tmp_path / "merged", model=merged, eval_dataset=token_rows(8))
    assert other.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_best_model_at_the_end_is_the_mean_that_was_evaluated(tmp_path):
    run = trainer(
        tmp_path,
        eval_dataset=token_rows(8),
        elra_boost=True,
        elra_boost_every=1,
        elra_control_cycle="5ba",
        max_steps=10,
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        load_best_model_at_end=True,
    )
    run.train()
    best = load_file(f"{run.state.best_model_checkpoint}/boosted.safetensors")
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.detach(), best[name])
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)


def test_a_best_checkpoint_without_points_is_taken_as_it_is(tmp_path, monkeypatch):
    """An evaluation before the first point is of the weights themselves."""
    run = trainer(
        tmp_path, optim="adamw_torch", elra_boost=True, elra_boost_every=8, eval_dataset=token_rows(8),
        eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=5, max_steps=15,
        load_best_model_at_end=True,
    )  # fmt: skip
    losses, evaluate = iter([1.0, 2.0, 3.0]), type(run).evaluate
    monkeypatch.setattr(run, "evaluate", lambda *a, **k: {**evaluate(run, *a, **k), "eval_loss": next(losses)})
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-5")
    best = type(run.model).from_pretrained(run.state.best_model_checkpoint)
    assert torch.equal(weights(run.model), weights(best))
    assert not (tmp_path / "checkpoint-5" / "boosted.safetensors").exists()
    assert (tmp_path / "checkpoint-15" / "boosted.safetensors").exists()
    with run.elra.averaging.in_use():
        assert torch.equal(weights(run.model), weights(best))


def test_what_is_pushed_is_the_mean(tmp_path, monkeypatch):
    uploaded = {}

    class Hub:
        def create_repo(self, *args, **kwargs):
            return type("Repo", (), {"repo_id": "user/model"})()

        def upload_folder(self, folder_path, **kwargs):
            uploaded.update(load_file(f"{folder_path}/model.safetensors"))

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    for name, stand_in in {
        "hf_api": lambda: Hub(), "create_repo": Hub().create_repo, "upload_folder": Hub().upload_folder,
    }.items():  # fmt: skip
        if hasattr(transformers.trainer, name):
            monkeypatch.setattr(transformers.trainer, name, stand_in)
    run = trainer(tmp_path, optim="elra_spectral", max_steps=20)
    run.train()
    run.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    run.push_to_hub()
    name = "model.embed_tokens.weight"
    assert torch.equal(uploaded[name], saved[name])
    assert torch.equal(uploaded[name], run.weight_average.mean[name])
    assert torch.equal(uploaded[name], run.model.model.embed_tokens.weight)
    assert not (tmp_path / "boosted.safetensors").exists()


class SizedStream(torch.utils.data.IterableDataset):
    def __len__(self):
        return 64

    def __iter__(self):
        return iter(image_rows())


@pytest.mark.parametrize(
    "rows",
    [
        [{**row, "id": number} for number, row in enumerate(image_rows())],
        datasets.Dataset.from_list(
            [{"pixel_values": row["pixel_values"].tolist(), "labels": row["labels"], "id": 1} for row in image_rows()]
        ).with_format("torch"),
        SizedStream(),
    ],
    ids=["list", "Dataset", "iterable with a length"],
)
def test_batch_norm_statistics_from_data_as_the_trainer_takes_them(tmp_path, rows):
    """With columns that are not the model's, and of data that cannot be shuffled."""
    seen = AtTheMean()
    run = seen.run = trainer(
        tmp_path, model=image_model(), rows=rows, elra_boost=True, elra_boost_every=2, max_steps=4, callbacks=[seen]
    )
    run.train()
    assert not torch.equal(seen.at, seen.before["network.1.running_mean"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"elra_boost": True, "elra_boost_mean": "off"}, "elra_boost=True and elra_boost_mean='off' contradict"),
        ({"elra_boost": True, "elra_boost_every": 0}, "elra_boost_every=0 must be at least 1"),
        ({"elra_boost_every": 5, "elra_boost": False}, "elra_boost_every=5 does nothing without --elra_boost"),
    ],
)
def test_wrong_flags_are_named(tmp_path, given, message):
    with pytest.raises(ConfigurationError, match=message):
        trainer(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_second_stage_that_trains_more_goes_on_with_the_mean_of_the_first(tmp_path):
    """Resumed from a checkpoint without the optimizer's state, which knows fewer parameters."""
    given = dict(optim="adamw_torch", elra_boost=True, elra_boost_mean="run", save_only_model=True)
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    trainer(tmp_path, model=model, save_strategy="steps", save_steps=4, max_steps=4, **given).train()
    run = trainer(tmp_path, model=llama(), max_steps=6, **given)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    mean = run.weight_average
    assert mean.count == 6
    assert mean._joined == {"model.embed_tokens.weight": 4}
    assert mean.mean.keys() == {name for name, _ in run.model.named_parameters()}
    assert torch.isfinite(torch.tensor(run.evaluate(token_rows(8))["eval_loss"]))
