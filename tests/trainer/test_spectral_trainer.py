"""``--optim elra_spectral`` in a Trainer: what it is given, the mean of the run, resuming, wrong settings."""

import os
import traceback

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_elra import ConfigurationError, ELRASpectral, ElraTrainer, embeddings_of, outputs_of
from hf_elra.control import batch_size
from hf_elra.optim.averaging import WeightAverage
from hf_elra.trainer import averaging
from tests.conftest import arguments, llama, logged, token_rows, trainer, weights
from tests.trainer.test_averaging import Points
from tests.trainer.test_micro_batches import StopAt


def spectral(folder, **given):
    return trainer(folder, rows=token_rows(256), **{"optim": "elra_spectral", "max_steps": 40, **given})


def test_it_trains_a_stock_trainer(tmp_path):
    run = Trainer(
        llama(), arguments(tmp_path, TrainingArguments, optim="elra_spectral", max_steps=40, logging_steps=1),
        train_dataset=token_rows(256),
    )  # fmt: skip
    run.train()
    optimizer = run.elra_optimizer
    assert isinstance(optimizer, ELRASpectral)
    embedding = run.model.model.embed_tokens.weight
    marked = [p for g in optimizer.param_groups for p, t in zip(g["params"], g["embeddings"], strict=True) if t]
    assert [id(p) for p in marked] == [id(embedding)]
    assert logged(run, "loss")[-1] < 1.0
    assert run.batch_control.mode == "off"  # the batch stays as it is
    assert logged(run, "alpha")[-1] == pytest.approx(logged(run, "learning_rate")[-1])


def test_the_logged_rate_counts_the_schedule(tmp_path):
    schedule = {"lr_scheduler_type": "linear", "logging_steps": 1, "max_steps": 20}
    run = spectral(tmp_path, **schedule)
    run.train()
    stock = spectral(tmp_path / "stock", optim="adamw_torch", learning_rate=1.0, **schedule)
    stock.train()
    shares = [rate / alpha for rate, alpha in zip(logged(run, "learning_rate"), logged(run, "alpha"), strict=True)]
    assert shares == pytest.approx(logged(stock, "learning_rate"))
    assert shares[15] < 0.5


def test_evaluation_and_the_saved_model_are_the_mean_of_the_run(tmp_path):
    points, seen = Points(), Evaluated()
    run = spectral(
        tmp_path, eval_dataset=token_rows(32, seed=1), eval_strategy="steps", eval_steps=40, callbacks=[points, seen]
    )
    run.train()
    assert run.weight_average.count == 40
    last, mean = points.points[-1], weights(run.model)
    assert not torch.equal(mean, last)
    assert torch.equal(seen.points[0], mean)
    assert run.evaluate()["eval_loss"] == next(
        entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry
    )
    off = spectral(tmp_path / "off", elra_boost_mean="off")
    off.train()
    assert off.weight_average is None
    assert torch.equal(weights(off.model), last)  # the training step never sees it


def test_mean_of_the_run_weights_points_by_a_power_of_their_number(tmp_path):
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    mean = WeightAverage({"x": parameter}, power=2)
    points = [1.0, 5.0, -2.0, 7.0]
    for point in points:
        parameter.data.fill_(point)
        mean.add()
        mean.end_cycle()  # cycles do not matter
    # The recursion's weights: t(t + 1) for power 2, rising factorials that go as t².
    factors = [t * (t + 1) for t in range(1, 5)]
    expected = sum(f * p for f, p in zip(factors, points, strict=True)) / sum(factors)
    assert mean.mean["x"].item() == pytest.approx(expected)
    mean.save(str(tmp_path / "new" / "folder"))
    again = WeightAverage({"x": parameter}, power=2)
    assert again.load(str(tmp_path / "new" / "folder"))
    assert (again.count, again.mean["x"].item()) == (4, mean.mean["x"].item())


@pytest.mark.parametrize(
    ("begins", "again"),
    [("trained,max_correction=4", 2), ("trained", 8), ("new", 8)],  # the second is far from its goal
)
def test_where_a_trained_model_sees_its_data_again_more_points_are_in_the_mean(tmp_path, begins, again, monkeypatch):
    points, asked, fine_tunes = Points(), [], ELRASpectral.fine_tunes
    monkeypatch.setattr(ELRASpectral, "fine_tunes", property(lambda self: asked.append(self) or fine_tunes.fget(self)))
    run = spectral(tmp_path, optim_args=f"weights={begins}", callbacks=[points])
    run.train()
    fresh = run.elra_optimizer.updates_per_epoch
    assert 10 <= fresh <= 32
    assert len(asked) == 1  # on a GPU it waits
    mean = points.points[0].double()
    for count, point in enumerate(points.points[1:], 1):
        power = again if count >= fresh else 8
        mean += (point - mean) * (power + 1) / (count + power + 1)
    assert run.weight_average.power == 8
    torch.testing.assert_close(weights(run.model), mean.to(weights(run.model)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("at", "begins"), [(5, "auto"), (20, "auto"), (35, "trained,max_correction=4")])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, at, begins, monkeypatch):
    settings = {"optim_args": f"weights={begins}"}
    whole = spectral(tmp_path / "whole", **settings)
    whole.train()
    part = spectral(tmp_path / "part", callbacks=[StopAt(at)], **settings)
    part.train()
    again = spectral(tmp_path / "part", **settings)
    if at > 32:  # in the second pass it was known already
        monkeypatch.setattr(averaging, "power_after_first_pass", lambda optimizer: pytest.fail("asked again"))
    again.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{at}"))
    assert torch.equal(weights(again.model), weights(whole.model))
    for name, tensor in whole.weight_average.mean.items():
        assert torch.equal(again.weight_average.mean[name], tensor)


@pytest.mark.parametrize("passed", ["name", "class", "optimizer"])
def test_without_momentum_the_batch_grows(tmp_path, passed, monkeypatch, caplog_warnings):
    monkeypatch.setattr(batch_size, "UPDATES_PER_GROWTH", 5)
    model = llama()
    settings, how = {
        "name": ({"optim": "elra_spectral", "optim_args": "momentum=0"}, {}),
        "class": ({}, {"optimizer_cls_and_kwargs": (ELRASpectral, {"momentum": 0.0})}),
        "optimizer": ({}, {"optimizers": (ELRASpectral(model.parameters(), momentum=0.0), None)}),
    }[passed]
    settings.update(per_device_train_batch_size=2, max_steps=24, logging_steps=1)
    run = ElraTrainer(model, arguments(tmp_path, **settings), train_dataset=token_rows(512), **how)
    run.train()
    sizes = [*[2] * 5, *[4] * 5, *[6] * 5, *[8] * 5, *[10] * 4]
    assert [e["batch_size"] for e in run.state.log_history if "loss" in e] == sizes
    told = [(e["step"], e["condition"], e["change"], e["batch_size"]) for e in run.state.log_history if "change" in e]
    assert told == [(step, "linear", "grow", size) for step, size in ((5, 4), (10, 6), (15, 8), (20, 10))]
    assert "The batch grows by its first size every 5 updates, as there is no momentum" in caplog_warnings.text
    for given in ({"elra_batch_control": "off"}, {"optim_args": "momentum=0.5"}):
        assert spectral(tmp_path / "off", **{"optim_args": "momentum=0", **given}).batch_control.mode == "off"


def test_a_growing_batch_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_size, "UPDATES_PER_GROWTH", 5)
    given = dict(optim_args="momentum=0", per_device_train_batch_size=2, max_steps=24, save_strategy="steps")
    whole = spectral(tmp_path / "whole", save_steps=24, **given)
    whole.train()
    for at in (10, 13):
        part = spectral(tmp_path / str(at), save_steps=at, **given)
        part.train()
        again = spectral(tmp_path / str(at), save_steps=at, **given)
        again.train(resume_from_checkpoint=str(tmp_path / str(at) / f"checkpoint-{at}"))
        assert torch.equal(weights(again.model), weights(whole.model))
        assert [e for e in again.state.log_history if "change" in e] == [
            e for e in whole.state.log_history if "change" in e
        ]


class Evaluated(TrainerCallback):
    """Notes at which updates a Trainer evaluated and saved, and at which weights."""

    def __init__(self):
        self.evaluated, self.saved, self.points = [], [], []

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated.append(state.global_step)
        self.points.append(weights(model))

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)


def test_warnings_name_the_optimizer(tmp_path, caplog_warnings):
    spectral(tmp_path, max_grad_norm=0.5, lr_scheduler_type="cosine")
    assert "Use 0; a step of elra_spectral does not grow with the gradient." in caplog_warnings.text
    assert "multiplies elra_spectral's own learning rate, which then is not corrected by slopes" in caplog_warnings.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"elra_min_step_norm": 0.1}, "elra_min_step_norm=0.1 is a setting of optim=elra; elra_spectral needs no"),
        ({"optim_args": "momentum=2"}, "momentum=2.0 must be a number in"),
        ({"optim_args": "embeddings=1"}, "'embeddings' is not an argument of ELRASpectral"),
        ({"optim_args": "experts=1"}, "'experts' is not an argument of ELRASpectral"),
        ({"optim_args": "lr=1e-3"}, "lr=1e-3 is the Trainer's learning_rate; pass --learning_rate 1e-3"),
        ({"optim_args": "step_rule=bb2"}, "'step_rule' is not an argument of ELRASpectral. It is one of --optim elra"),
        ({"optim_args": "max_drift=0.2", "optim": "elra"}, "argument of ELRA. It is one of --optim elra_spectral"),
        ({"optim_args": "weights=trained max_drift=0.2"}, 'between them, as in "weights=trained,max_drift=0.2"'),
        ({"elra_max_step_norm": 1.0}, "cannot be used with optim=elra_spectral; leave it out, as the size of the"),
        ({"elra_boost_mean": "all"}, "elra_boost_mean='all' must be one of off, cycle, run"),
        ({"elra_boost_mean": "off", "elra_boost_every": 2}, "elra_boost_every=2 does nothing"),
    ],
)
def test_wrong_settings_are_named(tmp_path, given, message):
    with pytest.raises(ConfigurationError, match=message):
        spectral(tmp_path, **given)


def test_one_that_is_passed_in_gets_tables_and_mean_too(tmp_path):
    model = llama()
    made = ELRASpectral(model.parameters(), embeddings=embeddings_of(model), outputs=outputs_of(model))
    stock = arguments(tmp_path, TrainingArguments, max_steps=14)
    runs = [
        Trainer(model, stock, train_dataset=token_rows(), optimizers=(made, None)),
        Trainer(llama(), stock, train_dataset=token_rows(), optimizer_cls_and_kwargs=(ELRASpectral, {})),
        trainer(tmp_path, optim="elra_spectral", max_steps=14),
    ]
    for run in runs:
        run.train()
        assert run.weight_average.power == 8
        assert run.weight_average.count == 14
    assert runs[1].optimizer_cls_and_kwargs == (ELRASpectral, {})
    assert torch.equal(weights(runs[1].model), weights(runs[2].model))
    assert torch.equal(weights(runs[0].model), weights(runs[2].model))
    of_his_own = Trainer(llama(), stock, train_dataset=token_rows(), optimizer_cls_and_kwargs=(
        ELRASpectral, {"embeddings": []},
    ))  # fmt: skip
    group = of_his_own.create_optimizer().param_groups[0]
    assert not any(group["embeddings"])
    assert not any(group["outputs"])


@pytest.mark.parametrize("passed_in", [False, True])
def test_the_experts_of_a_mixture_are_told_apart(tmp_path, passed_in):
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    given = {"optimizer_cls_and_kwargs": (ELRASpectral, {})} if passed_in else {}
    settings = arguments(tmp_path, TrainingArguments, max_steps=14, **({} if passed_in else {"optim": "elra_spectral"}))
    run = Trainer(model, settings, train_dataset=token_rows(), **given)
    run.train()
    groups = run.elra_optimizer.param_groups
    marked = {id(p) for g in groups for p, stack in zip(g["params"], g["experts"], strict=True) if stack}
    assert marked == {id(p) for p in model.model.layers[0].mlp.experts.parameters()}
    assert len(marked) == 2


def test_without_a_model_there_is_nothing_to_depend_on(tmp_path):
    with pytest.raises(ConfigurationError, match="model=None: optim=elra_spectral depends on the model"):
        Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="elra_spectral"))


def test_nothing_of_ours_reads_a_number_between_two_logs_where_decisions_are_on_the_device(tmp_path, monkeypatch):
    """But for the first update, which looks at the weights; a control cycle ends in between."""
    read = []

    def noting(name):
        stock = getattr(torch.Tensor, name)

        def reads(tensor, *args):
            frames = [f.filename for f in traceback.extract_stack()[:-1] if f"{os.sep}torch{os.sep}" not in f.filename]
            if f"{os.sep}hf_elra{os.sep}" in frames[-1]:
                read.append((run.state.global_step, frames[-1]))
            return stock(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, reads)

    given = dict(max_steps=6, logging_steps=6, elra_control_cycle="3ba", lr_scheduler_type="linear", save_strategy="no")
    on_host = spectral(tmp_path / "host", optim_args="on_device=false", **given)
    on_host.train()
    run = spectral(tmp_path, optim_args="on_device=true", **given)
    for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__"):
        noting(name)
    run.train()
    assert run.elra_optimizer._device_update.in_force
    assert {step for step, _ in read} == {0, 6}, {(step, file) for step, file in read if step}
    for name in ("learning_rate", "alpha", "restarts"):  # of the last update, before the schedule went on
        assert logged(run, name) == pytest.approx(logged(on_host, name), rel=1e-4)
    told, told_on_host = ([e for e in r.state.log_history if e.get("elra") == "first"] for r in (run, on_host))
    assert [e["step"] for e in told] == [e["step"] for e in told_on_host] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(told, told_on_host, strict=True):
        for name in one.keys() | other.keys():
            assert one[name] == (
                pytest.approx(other[name], rel=1e-4) if isinstance(other[name], float) else other[name]
            )


@pytest.mark.parametrize(("repeats", "per_epoch"), [(1, 5), (3, 15)])
def test_a_pass_over_the_data_is_as_long_as_the_sampler_makes_it(tmp_path, repeats, per_epoch):
    """Samplers of reinforcement learning draw every prompt several times."""

    class Repeating(ElraTrainer):
        def _get_train_sampler(self, *args):
            rows = range(len(self.train_dataset))
            return [row for row in rows for _ in range(repeats)] if repeats > 1 else super()._get_train_sampler(*args)

    settings = dict(optim="elra_spectral", per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    run = trainer(tmp_path, rows=token_rows(21), trainer_class=Repeating, **settings)
    run.train()
    assert run.elra_optimizer.updates_per_epoch == per_epoch


def test_an_optimizer_that_was_not_told_of_tables_is_told_of(tmp_path, caplog_warnings):
    model = llama()
    for told in ({}, {"embeddings": embeddings_of(model), "outputs": outputs_of(model)}):
        optimizer = ELRASpectral(model.parameters(), **told)
        settings = arguments(tmp_path, max_steps=1)
        ElraTrainer(model, settings, train_dataset=token_rows(8), optimizers=(optimizer, None)).train()
        warned = "was not told which parameters are embeddings" in caplog_warnings.text
        assert warned is (not told)
        caplog_warnings.clear()


def test_the_length_of_the_run_is_told(tmp_path):
    run = trainer(tmp_path, optim="elra_spectral", max_steps=7)
    run.train()
    assert run.elra_optimizer.total_updates == 7
