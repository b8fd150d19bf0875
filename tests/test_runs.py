"""Runs as they are found on disk: finished, running, copied, checkpoints, several at once."""

import json
import math

import pytest
from transformers import Trainer, TrainingArguments

from hf_elra import ConfigurationError
from hf_elra.report.runs import find_runs, grouped, median_and_band, running_mean
from tests.conftest import trainer

RUN = {"elra": "run", "optim": "elra", "seed": 1, "model": "LlamaForCausalLM", "parameters": 1234, "averaged": "cycle"}


def history_of(updates=40, every=2, loss=lambda step: 1 + 2 / step, **more):
    """Training logs with an evaluation at every fifth of them; ``more`` are functions of the update."""
    entries = []
    for step in range(every, updates + 1, every):
        entry = {
            "loss": loss(step),
            "learning_rate": 0.1,
            "alpha": 0.1,
            "step_norm": 0.5,
            "cosine": -0.1,
            "restarts": 0,
        }
        entry |= {"forwards": step, "backwards": step, "epoch": step / 20, "step": step}
        entry |= {"seconds": step * 0.5, "samples_seen": 8 * step, "tokens_seen": 128 * step, "share": step / updates}
        entries.append(entry | {name: value(step) for name, value in more.items()})
        if step % (5 * every) == 0:
            entries.append(
                {"eval_loss": loss(step) + 0.1, "eval_accuracy": 1 - 1 / step, "eval_runtime": 1.0, "step": step}
            )
    return entries


def first(step, tried, ratio, rate, loss, **more):
    """One of the first updates."""
    told = {"elra": "first", "tried": tried, "ratio": ratio, "rate": rate, "loss_of_update": loss, "step": step}
    return {**told, "taken_back": False, **more}


FIRST = [
    first(1, 0.0, None, 0.001, 3.0),
    first(2, 0.001, 0.9, 0.01, 2.9),
    first(3, 0.01, -4.0, 0.004, 9.0, taken_back=True),
    first(4, 0.004, 0.1, 0.005, 2.0),
]
GROWN = [{"cycle": 2, "condition": "noise", "change": "grow", "accumulation": 3, "batch_size": 12, "step": 20}]
END = {"train_runtime": 20.0, "train_loss": 1.2}


def write_run(folder, entries=None, *, finished=True, **facts):
    """A run's log file; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = history_of() if entries is None else entries
    if finished:
        entries = [*entries, {**END, "step": max(entry["step"] for entry in entries)}]
    text = "".join(json.dumps(entry) + "\n" for entry in [{**RUN, **facts}, *entries])
    (folder / "elra_log.jsonl").write_text(text)
    return folder


def only(folder):
    (run,) = find_runs([str(folder)])
    return run


def test_a_finished_run(tmp_path):
    run = only(write_run(tmp_path / "run", [*FIRST, *history_of()]))
    assert (run.name, run.optimizer, run.updates, run.finished, run.share) == ("run", "elra", 40, True, 1)
    assert run.metrics == ["eval_accuracy"]
    assert run.beginning == FIRST
    assert run.taken_back == [3]
    assert run.last("loss") == pytest.approx(1.05)
    assert run.axis("tokens")(15) == pytest.approx(15 * 128)
    assert run.axis("hours")(40) == pytest.approx(20 / 3600)
    assert [round(speed) for _, speed in run.speed("samples")[:2]] == [16, 16]


def test_updates_that_were_taken_back_are_told_by_their_count_where_they_have_no_entries(tmp_path):
    run = only(write_run(tmp_path, history_of(restarts=lambda step: 3 if step > 20 else 1)))
    assert run.taken_back == [2, 22, 22]


def test_stretches_where_a_limit_was_in_force(tmp_path):
    counts = {2: 1, 4: 1, 6: 2, 10: 2}
    run = only(write_run(tmp_path / "short", history_of(12, cropped=lambda step: counts.get(step, 0))))
    assert run.limits == {"crop": [(0, 4, 0.5), (4, 6, 1), (8, 10, 1)]}
    run = only(write_run(tmp_path / "long", history_of(2000, at_floor=lambda step: 1 + (step % 4 == 0))))
    assert 90 < len(run.limits["floor"]) < 110
    assert all(share == pytest.approx(0.75, abs=0.1) for _, _, share in run.limits["floor"])


def test_a_run_that_goes_on_ends_in_a_line_that_is_cut_short(tmp_path):
    folder = write_run(tmp_path, history_of(20, share=lambda step: step / 80), finished=False)
    with (folder / "elra_log.jsonl").open("a") as file:
        file.write('{"loss": 0.5, "st')
    run = only(folder)
    assert (run.updates, run.finished, run.share) == (20, False, 0.25)


def test_a_runtime_in_every_log_is_no_end(tmp_path):
    """As Transformers logs it where tokens are counted."""
    assert not only(write_run(tmp_path, history_of(train_runtime=lambda step: step), finished=False)).finished


def test_of_a_stock_run_the_state_of_its_newest_checkpoint_is_read(tmp_path):
    """As copied from elsewhere, or one of them alone; numbers that were not logged are missing, not wrong."""
    entries = [
        {"loss": 5 / step, "grad_norm": math.nan, "learning_rate": 1e-3, "epoch": step / 9, "step": step}
        for step in range(1, 10)
    ]
    for steps in (3, 9):
        folder = tmp_path / "run" / f"checkpoint-{steps}"
        folder.mkdir(parents=True)
        state = {"log_history": entries[:steps], "max_steps": 18, "global_step": steps}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "run" / "settings.json").write_text(json.dumps({"optim": "adamw_torch", "seed": 7}))
    for path, name, updates in (("run", "run", 9), ("run/checkpoint-3", "run/checkpoint-3", 3)):
        run = only(tmp_path / path)
        assert (run.name, run.updates, run.share) == (name, updates, updates / 18)
        assert (run.optimizer, run.facts["seed"]) == ("adamw_torch", 7)
        assert run.axis("samples") is None
        assert run.axis("epochs")(updates) == pytest.approx(updates / 9)
        assert not run.is_ours
        assert run.taken_back == []
    (folder / "trainer_state.json").write_text("{")  # cut short
    assert only(tmp_path / "run").updates == 3
    with pytest.raises(ConfigurationError, match="has logged nothing yet"):
        find_runs([str(folder)])


def test_a_stock_trainer_tells_its_optimizer_and_seed_in_its_arguments(tmp_path):
    given = {"trainer_class": Trainer, "arguments_class": TrainingArguments, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, optim="adamw_torch", seed=5, max_steps=4, learning_rate=1e-2, **given).train()
    run = only(tmp_path)
    assert (run.optimizer, run.facts["seed"], run.facts["learning_rate"]) == ("adamw_torch", 5, 0.01)
    assert run.finished
    assert not only(tmp_path / "checkpoint-2").finished
    (tmp_path / "checkpoint-4" / "training_args.bin").write_bytes(b"PK cut short")
    assert only(tmp_path).optimizer == "?"


def test_of_several_logs_the_one_that_covers_most_is_read(tmp_path):
    folder = write_run(tmp_path, history_of(20), finished=False)
    (folder / "checkpoint-30").mkdir()
    state = {"log_history": history_of(30), "max_steps": 60}
    (folder / "checkpoint-30" / "trainer_state.json").write_text(json.dumps(state))
    run = only(folder)
    assert run.updates == 30
    assert run.facts["parameters"] == 1234  # of the file that covers less


def test_a_folder_of_runs_is_all_of_them_once(tmp_path):
    for name in ("a/one", "a/two", "b"):
        write_run(tmp_path / name)
    found = find_runs([str(tmp_path), str(tmp_path / "b")])
    assert [run.name for run in found] == ["one", "two", "b"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; name the output folder"),
        (lambda path: path.mkdir(), "holds no run: there is no elra_log.jsonl and no trainer_state.json"),
        (lambda path: path.write_text("x"), "is a file; name the folder"),
        (lambda path: (path.mkdir(), (path / "elra_log.jsonl").touch()), "has logged nothing yet"),
    ],
)
def test_wrong_input_is_one_line(tmp_path, command_here, make, message):
    make(tmp_path / "run")
    code, output, error = command_here("report", str(tmp_path / "run"))
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert error.startswith("error: ")
    assert message in error


def test_runs_that_differ_in_their_seed_alone_are_a_group(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path / f"elra-{seed}", seed=seed)
        write_run(tmp_path / f"adamw-{seed}", seed=seed, optim="adamw_torch", learning_rate=0.01)
    groups = grouped(find_runs([str(tmp_path)]))
    assert [(group.label, len(group.runs)) for group in groups] == [("adamw_torch", 3), ("elra", 3)]
    write_run(tmp_path / "adamw-high", seed=1, optim="adamw_torch", learning_rate=0.1)
    labels = [group.label for group in grouped(find_runs([str(tmp_path)]))]
    assert labels == ["adamw_torch, learning_rate 0.01", "adamw_torch, learning_rate 0.1", "elra"]


def test_a_label_names_only_what_tells_groups_apart(tmp_path):
    for name, optim, rate, model in (("a", "elra", 1, "Llama"), ("b", "sgd", 2, "Llama"), ("c", "sgd", 2, "Bert")):
        write_run(tmp_path / name, optim=optim, learning_rate=rate, model=model)
    assert [g.label for g in grouped(find_runs([str(tmp_path)]))] == ["elra, Llama", "sgd, Llama", "sgd, Bert"]


def test_median_and_band_span_what_all_curves_reach():
    curves = [[(0, 0.0), (10, 10.0)], [(0, 2.0), (5, 7.0), (10, 12.0)], [(2, 8.0), (8, math.nan), (9, 8.0)]]
    band = median_and_band(curves)
    assert (band[0][0], band[-1][0]) == (2, 9)
    assert band[0] == (2, 2, 4, 8)
    assert median_and_band([[], []]) == []


def test_a_running_mean_keeps_a_trend_in_its_place():
    line = [(float(x), 2.0 * x) for x in range(30)]
    assert running_mean(line) == line
    assert running_mean([(1, math.nan)]) == []
    assert running_mean([]) == []
    spike = [(float(x), 1e30 if x == 500 else 1.0) for x in range(5000)]
    means = running_mean(spike)
    assert len(means) < 700
    assert means[-1] == (4999, 1.0)
    assert max(mean for _, mean in means[-300:]) == 1


def test_what_a_trainer_really_writes_is_read(tmp_path):
    run = trainer(tmp_path / "run", max_steps=8, logging_steps=2, eval_strategy="steps", eval_steps=4,
                  eval_dataset=trainer(tmp_path / "other").train_dataset, elra_control_cycle="4ba")  # fmt: skip
    run.train()
    read = only(tmp_path / "run")
    assert (read.optimizer, read.updates, read.finished) == ("elra", 8, True)
    assert len(read.series("loss")) == 4
    assert len(read.series("eval_loss")) == 2
    assert all(read.axis(name) for name in ("updates", "epochs", "samples", "tokens", "hours"))
    assert read.axis("samples")(8) == run.elra_callback.samples
