"""Samples are rows that the sampler drew: counts, positions, and data whose length is no number of rows."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, SequentialSampler
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from hf_elra import ElraTrainer
from hf_elra.trainer.rows import number_of_rows, rows_of
from lib.ready import together
from tests import workers
from tests.conftest import arguments, llama, logged, token_rows, trainer, weights


def flattened(count, workers=0):
    rows = [{"input_ids": row["input_ids"][: 3 + i % 5].tolist()} for i, row in enumerate(token_rows(count))]
    return dict(rows=rows, data_collator=DataCollatorWithFlattening(), dataloader_num_workers=workers)


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("optim", ["elra", "elra_spectral"])
@pytest.mark.parametrize("workers", [0, 1])
def test_padding_free_batches_count_their_rows(tmp_path, optim, workers):
    """400 rows, two epochs, as many batches of 8 rows in one row of tokens."""
    run = trainer(tmp_path, optim=optim, max_steps=-1, num_train_epochs=2, **flattened(80, workers))
    metrics = run.train().metrics
    assert run.elra_callback.samples == 160
    assert run.elra_callback.tokens == 2 * sum(3 + i % 5 for i in range(80))
    assert metrics["train_samples_per_second"] == pytest.approx(160 / metrics["train_runtime"], rel=1e-2)
    assert run.state.epoch == 2


def test_budgets_and_cycles_of_padding_free_batches(tmp_path):
    given = flattened(80)
    run = trainer(tmp_path / "map", elra_max_samples=96, elra_control_cycle="32sp", max_steps=-1,
                  elra_batch_conditions="noise", **given)  # fmt: skip
    run.train()
    assert (run.state.global_step, run.elra_callback.samples) == (12, 96)
    cycles = [entry for entry in run.state.log_history if "condition" in entry]
    assert [entry["step"] for entry in cycles] == [4, 8, 12]
    assert cycles[-1]["batch_tokens"] == pytest.approx(8 * run.elra_callback.tokens / 96, abs=1)
    given["rows"] = Stream(given["rows"][:44])  # five whole batches a pass, and one that is skipped
    run = trainer(tmp_path / "stream", elra_max_samples=96, max_steps=-1, **given)
    run.train()
    assert (run.state.global_step, run.elra_callback.samples) == (12, 96)


class Patches(torch.nn.Module):
    """As Qwen2-VL: the patches of all images of a batch in the first dimension, the images' sizes beside them."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, pixel_values, image_grid_thw, input_ids, labels):
        images = torch.stack([part.mean(0) for part in pixel_values.split(image_grid_thw.prod(1).tolist())])
        return {"loss": (self.linear(images).squeeze(1) - labels[:, 0]).square().mean()}


def patched(rows):
    return {
        "pixel_values": torch.cat([torch.full((10, 4), float(row["input_ids"][0])) / 64 for row in rows]),
        "image_grid_thw": torch.tensor([[1, 2, 5]] * len(rows)),
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.stack([row["labels"] / 64 for row in rows]),
    }


@pytest.mark.parametrize("data", [token_rows(40), Stream(token_rows(40))], ids=["map-style", "stream"])
@pytest.mark.parametrize("merged", [None, "16"])
def test_patches_are_no_samples(tmp_path, data, merged):
    run = trainer(
        tmp_path, Patches(), data, data_collator=patched, remove_unused_columns=False, max_steps=10,
        gradient_accumulation_steps=1 if merged is None else 2, per_device_train_batch_size=8 if merged is None else 4,
        elra_max_micro_batch=merged,
    )  # fmt: skip
    run.train()
    assert run.elra_callback.samples == 80


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ({"pixel_values": torch.ones(30, 4), "labels": torch.ones(3)}, 3),
        ({"pixel_values": torch.ones(3, 1, 8, 8), "labels": [{"boxes": torch.ones(7, 4)}] * 3}, 3),
        ([{"prompt": "a"}, {"prompt": "b"}], 2),
        ((torch.ones(5, 2), torch.ones(5)), 5),
        ({"input_ids": torch.ones(1, 6), "cu_seq_lens_q": torch.tensor([0, 2, 5, 6])}, 3),
        ({"input_ids": torch.ones(1, 4), "seq_idx": torch.tensor([[0, 0, 1, 2]])}, 3),
        ({"input_ids": torch.ones(1, 5), "position_ids": torch.tensor([[2, 3, 2, 3, 4]])}, 2),
        ({"input_ids": torch.ones(1, 4), "position_ids": torch.tensor([[[0, 1, 0, 1]]] * 3)}, 2),
        (
            {
                "input_ids": torch.ones(1, 4),
                "position_ids": torch.tensor([[1, 1, 0, 1]]),
                "attention_mask": torch.tensor([[0, 0, 1, 1]]),
            },
            1,
        ),
        ({"x": torch.ones(())}, None),
    ],
)
def test_what_the_contents_of_a_batch_tell(batch, rows):
    assert rows_of(batch) == rows


def test_a_batch_sampler_of_its_own_is_asked_by_contents(tmp_path):
    class Uneven(BatchSampler):
        def __init__(self):
            pass

        def __iter__(self):
            return iter([[0, 1, 2], [3], [4, 5], [6, 7, 8, 9]])

        def __len__(self):
            return 4

    class Own(Trainer):
        def get_train_dataloader(self):
            loader = DataLoader(self.train_dataset, batch_sampler=Uneven(), collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    run = Own(llama(), arguments(tmp_path, optim="elra", max_steps=6), train_dataset=token_rows(10))
    run.train()
    assert run.elra_callback.samples == 14
    assert run.state.epoch == 1.5


def test_batches_that_are_split_between_processes(tmp_path):
    found = together(workers.split_batches, 2, folder=str(tmp_path))
    assert found == {"samples": 80, "batch_size": [8.0] * 10, "epoch": 10 / 8, "per_process": 4}


# ---- a mapping of data sets ----


class OfSeveral(Trainer):
    """Takes a mapping of data sets and makes a loader of them, as sentence-transformers does."""

    def get_train_dataloader(self):
        data = ConcatDataset(list(self.train_dataset.values()))
        sampler = BatchSampler(SequentialSampler(data), 8, drop_last=self.args.dataloader_drop_last)
        return self.accelerator.prepare(DataLoader(data, batch_sampler=sampler, collate_fn=self.data_collator))


@pytest.mark.parametrize("cycle", [None, "64tok", "8sp"])
@pytest.mark.parametrize("optim", ["elra", "elra_spectral"])
def test_a_mapping_of_data_sets(tmp_path, optim, cycle, caplog_warnings):
    rows = [{name: tensor.tolist() for name, tensor in row.items()} for row in token_rows(44)]
    data = DatasetDict(a=Dataset.from_list(rows[:20]), b=Dataset.from_list(rows[20:]))
    given = dict(optim=optim, max_steps=-1, num_train_epochs=2, elra_control_cycle=cycle)
    run = OfSeveral(llama(), arguments(tmp_path, **given), train_dataset=data)
    run.train()
    assert (run.elra_callback.samples, run.state.epoch) == (80, 2)
    assert "less than one batch" not in caplog_warnings.text


def test_rows_of_data_sets():
    assert number_of_rows({"a": token_rows(3), "b": token_rows(4)}) == 7
    assert number_of_rows({"a": token_rows(3), "b": Stream([])}) is None
    assert number_of_rows(token_rows(3)) == 3
    assert number_of_rows(Stream([])) is number_of_rows(None) is None


def test_a_row_is_not_read_for_nothing(tmp_path):
    """It may draw random numbers, or count how often it was read."""

    class Noted(list):
        reads = 0

        def __getitem__(self, index):
            Noted.reads += 1
            return super().__getitem__(index)

    run = trainer(tmp_path, rows=Noted(token_rows(16)), max_steps=2)
    assert Noted.reads == 0
    run.train()
    assert Noted.reads == 16


# ---- positions ----


class Seen(TrainerCallback):
    """Stops after an update; what rows were trained on is noted by :class:`Noting`."""

    def __init__(self, stop=None):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop:
            control.should_training_stop = control.should_save = True


class Noting(ElraTrainer):
    """Notes the rows that it trains on."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen += inputs["labels"][:, 0].tolist()
        return model(input_ids=inputs["input_ids"], labels=inputs["input_ids"]).loss


def numbered(count):
    rows = token_rows(count, length=4)
    return [{"input_ids": row["input_ids"].tolist(), "labels": [i] * 4} for i, row in enumerate(rows)]


CONSTANT = dict(elra_batch_control="schedule", elra_batch_schedule="0:1")


@pytest.mark.parametrize("optim", ["elra", "elra_spectral"])
@pytest.mark.parametrize(("batch", "accumulation", "kept"), [(16, 1, 192), (4, 1, 200), (8, 1, 200), (4, 3, 192)])
def test_a_run_goes_on_after_the_same_rows_whatever_the_batch(tmp_path, optim, batch, accumulation, kept):
    """Saved at 25 x 8 of 400 rows of a second epoch; whole batches of the same permutation are left."""
    given = dict(rows=numbered(400), trainer_class=Noting, optim=optim, max_steps=-1, num_train_epochs=2, **CONSTANT)
    whole = trainer(tmp_path / "whole", llama(), per_device_train_batch_size=8, **given)
    whole.train()
    part = trainer(tmp_path / "part", llama(), per_device_train_batch_size=8, callbacks=[Seen(75)], **given)
    part.train()
    assert part.seen == whole.seen[:600]
    again = trainer(
        tmp_path / "part", llama(), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **given
    )
    again.train(resume_from_checkpoint=True)
    assert again.seen == whole.seen[600 : 600 + kept]
    assert again.elra_callback.samples == 600 + kept
    epochs = [entry["epoch"] for entry in again.state.log_history if entry["step"] > 75 and "loss" in entry]
    step = batch * accumulation / 400
    assert epochs[:-1] == pytest.approx([1.5 + step * (k + 1) for k in range(len(epochs) - 1)])
    assert again.state.epoch == epochs[-1] == 2
    assert again.state.max_steps == again.state.global_step == 75 + kept // (batch * accumulation)


def test_a_run_with_another_batch_goes_on_from_the_next_epoch_with_all_rows(tmp_path):
    given = dict(rows=numbered(40), trainer_class=Noting, max_steps=-1, num_train_epochs=3, **CONSTANT)
    whole = trainer(tmp_path / "whole", llama(), **given)
    whole.train()
    trainer(tmp_path / "part", llama(), callbacks=[Seen(3)], **given).train()
    again = trainer(tmp_path / "part", llama(), per_device_train_batch_size=10, callbacks=[Seen(7)], **given)
    again.train(resume_from_checkpoint=True)
    assert again.seen == whole.seen[24:34] + whole.seen[40:70]  # six rows are no whole batch
    last = trainer(tmp_path / "part", llama(), per_device_train_batch_size=5, **given)
    last.train(resume_from_checkpoint=True)
    assert last.seen == whole.seen[70:]


@pytest.mark.parametrize("optim", ["elra", "elra_spectral"])
@pytest.mark.parametrize("stop", [3, 5, 6, 10, 13])
def test_a_finite_stream_resumed_in_a_later_pass(tmp_path, optim, stop):
    """Five whole batches a pass."""
    given = dict(
        rows=Stream(numbered(44)), trainer_class=Noting, optim=optim, max_steps=16, elra_batch_control="off",
    )  # fmt: skip
    whole = trainer(tmp_path / "whole", llama(), **given)
    whole.train()
    part = trainer(tmp_path / "part", llama(), callbacks=[Seen(stop)], **given)
    part.train()
    again = trainer(tmp_path / "part", llama(seed=1), **given)
    again.train(resume_from_checkpoint=True)
    assert part.seen + again.seen == whole.seen == 3 * list(range(40)) + list(range(8))
    assert torch.equal(weights(again.model), weights(whole.model))
    assert logged(again, "loss") == logged(whole, "loss")
    assert again.elra_callback.samples == 128


def test_a_stream_goes_on_at_the_beginning_of_a_batch_of_the_new_size(tmp_path):
    given = dict(rows=Stream(numbered(44)), trainer_class=Noting, max_steps=8, **CONSTANT)
    trainer(tmp_path, llama(), callbacks=[Seen(3)], **given).train()
    again = trainer(tmp_path, llama(), per_device_train_batch_size=16, **given)
    again.train(resume_from_checkpoint=True)
    assert again.seen == [*range(16, 32), *range(32), *range(32)]  # row 24 was the next one


@pytest.mark.parametrize("stop", [3, 7])
def test_a_shuffled_stream_goes_on_in_its_order(tmp_path, stop):
    """Of ``datasets``, whose order depends on the pass."""

    def run(folder, **given):
        data = Dataset.from_list(numbered(40)).to_iterable_dataset().shuffle(seed=0, buffer_size=16)
        return trainer(tmp_path / folder, rows=data, trainer_class=Noting, max_steps=12, **given)

    whole, part = run("whole"), run("part", callbacks=[Seen(stop)])
    whole.train()
    part.train()
    again = run("part")
    again.train(resume_from_checkpoint=True)
    assert whole.seen[:40] != whole.seen[40:80]
    assert part.seen + again.seen == whole.seen


def test_the_controlled_batch_stays_the_same_number_of_samples(tmp_path):
    given = dict(rows=numbered(400), trainer_class=Noting, max_steps=12, elra_control_cycle="100ba")
    part = trainer(tmp_path, llama(), per_device_train_batch_size=4, callbacks=[Seen(6)], **given)
    begin, size = part.elra.size.begin, part.elra.size
    size.begin = lambda *given: (begin(*given), setattr(size.controller, "exact", 6.0))
    part.train()
    again = trainer(tmp_path, llama(), per_device_train_batch_size=8, **given)
    again.train(resume_from_checkpoint=True)
    assert logged(again, "batch_size") == [24.0] * 12


@pytest.mark.skipif(
    not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="this Transformers cannot resume on several CPU processes"
)
def test_two_processes_go_on_in_the_order_of_a_later_epoch(tmp_path):
    found = together(workers.rows_of_a_resumed_run, 2, folder=str(tmp_path))
    assert found["before"] + found["after"] == found["whole"]
    assert found["other"][:24] == found["after"][:24]
    assert sorted(found["other"][24:]) == sorted(found["whole"][80:116])
