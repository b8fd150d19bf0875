"""The light loop walks the Trainer's path step for step, and the tables made with it keep and count their runs."""

import json

import pytest
import torch

from hf_elra import ELRA, ConfigurationError, ElraTrainer
from hf_elra.control.batch_size import BatchSizeController
from hf_elra.recipes.image_data import ImageDataset, as_batch, load_images
from hf_elra.recipes.image_models import SmallImageClassifier, SmallImageClassifierConfig
from lib import light_loop, paper_tables
from tests.conftest import arguments, logged, weights
from tests.trainer.test_averaging import Points


def digits(train=203, test=100):
    data = load_images("digits")
    part = ImageDataset(data.train.images[:train], data.train.labels[:train])
    rest = ImageDataset(data.test.images[:test], data.test.labels[:test], mean=part.mean, std=part.std)
    return part, rest


class Precise(SmallImageClassifier):
    """In float64: on these few images paths part by rounding alone."""

    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values.double(), labels)


def classifier(architecture):
    torch.manual_seed(0)
    config = SmallImageClassifierConfig(architecture=architecture, image_size=8, num_channels=1, num_labels=10)
    return Precise(config).double()


def order(epoch):
    return torch.randperm(203, generator=torch.Generator().manual_seed(epoch))


class Ordered(torch.utils.data.Sampler):
    epoch = -1

    def __len__(self):
        return 203

    def __iter__(self):
        self.epoch += 1
        return iter(order(self.epoch).tolist())


class OrderedTrainer(ElraTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return Ordered()


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("optim", ["elra", "adamw_torch"])
@pytest.mark.parametrize("architecture", ["mnist-mlp", "fashion-cnn"])
def test_the_path_is_the_trainers(tmp_path, architecture, optim, decay):
    epochs, train, test = 8, *digits()
    model = classifier(architecture)
    own = optim == "elra"  # growth skips the incomplete group of an epoch; other optimizers use it
    args = arguments(
        tmp_path,
        optim=optim,
        optim_args="max_relative_step=none" if own else None,  # so that the batch grows
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        per_device_train_batch_size=8,
        max_steps=-1,
        num_train_epochs=epochs,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        elra_batch_control="elra" if own else "off",
        elra_initial_accumulation=2 if own else None,
        elra_max_micro_batch="100000",
        elra_gradient_decay=decay and own,
        per_device_eval_batch_size=100,
        elra_boost=True,
        elra_boost_every=3,
        eval_strategy="epoch",
    )
    run = OrderedTrainer(
        model,
        args,
        data_collator=as_batch,
        train_dataset=train,
        eval_dataset=test,
        callbacks=[points := Points()],
    )
    run.train()

    light = classifier(architecture)
    optimizer = ELRA(light.parameters(), lr=1e-2, max_relative_step=None)
    if not own:
        optimizer = torch.optim.AdamW(light.parameters(), lr=1e-2, weight_decay=0.0)
    controller = BatchSizeController(2) if own else None
    results = list(
        light_loop.train(
            Logits(light),
            train,
            test,
            optimizer,
            epochs=epochs,
            micro_batch=8,
            controller=controller,
            gradient_decay=decay,
            boost_every=3,
            order=order,
        )
    )
    decisions = [entry for entry in run.state.log_history if "condition" in entry]
    assert results[-1].updates == run.state.global_step
    torch.testing.assert_close(weights(light), points.points[-1], rtol=1e-6, atol=1e-7)
    if own:
        assert [d.accumulation for d in controller.decisions] == [d["accumulation"] for d in decisions]
        assert len({d["accumulation"] for d in decisions}) > 1
        assert [d.condition for d in controller.decisions] == [d["condition"] for d in decisions]
        assert [r.train_loss for r in results] == pytest.approx([d["mean"] for d in decisions], rel=1e-6)
        assert results[-1].alpha == pytest.approx(logged(run, "alpha")[-1], rel=1e-5)
        assert results[-1].restarts == logged(run, "restarts")[-1]
    if architecture == "mnist-mlp":  # with BatchNorm the mean's statistics come from other samples
        losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
        assert [r.boosted_loss for r in results] == pytest.approx(losses, rel=1e-5)


class Logits(torch.nn.Module):
    """The classifier as the light loop takes it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


def test_data_that_are_less_than_a_micro_batch_are_refused():
    train, test = digits(20)
    model = Logits(classifier("mnist-mlp"))
    with pytest.raises(ConfigurationError, match="micro_batch=32 is more than the 20 training images"):
        next(light_loop.train(model, train, test, ELRA(model.parameters()), epochs=1))


def test_a_tables_runs_are_kept_and_not_repeated(tmp_path):
    data = load_images("digits")
    path = tmp_path / "elra-seed0.jsonl"
    configuration = paper_tables.TABLES["mnist"].columns[0]
    said = []
    given = dict(seed=0, path=path, header={"command": "test"}, show=said.append)
    paper_tables.run("mnist", configuration, data, epochs=2, **given)
    before = path.read_text()
    paper_tables.run("mnist", configuration, data, epochs=2, **given)
    assert path.read_text() == before
    assert len(said) == 2  # its progress and its end, once
    header, epochs = paper_tables.read(path)
    assert header["seed"] == 0
    assert [entry["epoch"] for entry in epochs] == [1, 2]
    path.write_text("\n".join(before.splitlines()[:2]) + "\n")  # cut short
    assert not paper_tables.is_finished(path, 2, "digits")
    assert paper_tables.summarise([path]) is None
    paper_tables.run("mnist", configuration, data, epochs=2, **given)
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == epochs
    summary = paper_tables.summarise([path, tmp_path / "missing.jsonl"])
    for epochs_now, images in ((3, "digits"), (2, "mnist")):
        with pytest.raises(ConfigurationError, match="holds a finished run of 2 epochs on digits, not of"):
            paper_tables.is_finished(path, epochs_now, images)
    assert summary.seeds == 1
    assert summary.best[0] == pytest.approx(100 * max(e["boosted_accuracy"] for e in epochs))


def test_sgd_follows_the_papers_schedule(tmp_path, monkeypatch):
    rates = []

    def train(model, data, test, optimizer, *, epochs, **given):
        for epoch in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            yield light_loop.EpochResult(epoch + 1, epoch + 1, 128, 1.0, 1.0, 0.5, None, None, None, None)

    monkeypatch.setattr(light_loop, "train", train)
    configuration = next(c for c in paper_tables.TABLES["cifar10-resnet18"].columns if c.name == "sgd")
    paper_tables.run(
        "mnist",
        configuration,
        load_images("digits"),
        seed=0,
        epochs=200,
        path=tmp_path / "a.jsonl",
        header={},
        show=print,
    )
    assert [rates[e] for e in (0, 59)] == [0.1, 0.1]
    assert [rates[e] for e in (60, 119, 120, 159, 160, 199)] == pytest.approx([2e-2, 2e-2, 4e-3, 4e-3, 8e-4, 8e-4])
    summary = paper_tables.summarise([tmp_path / "a.jsonl"])
    assert (summary.best, summary.lossy_copy) == ((50.0, 0.0), False)
