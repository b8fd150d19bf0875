"""Every rule of a verdict is triggered by one run and not by its neighbour."""

import math
from pathlib import Path

import pytest

from hf_elra.report import verdicts
from hf_elra.report.runs import Run
from tests.test_runs import history_of

END = {"train_runtime": 1.0, "train_loss": 1.0, "step": 40}


def run(entries=None, *, finished=True, **more):
    entries = history_of(**more) if entries is None else entries
    return Run(Path("run"), [*entries, END] if finished else entries)


def restarts_at(*steps, updates=40):
    told = [{"elra": "restart", "loss_of_update": 9.0, "taken_back": True, "step": step} for step in steps]
    return run([*told, *history_of(updates)])


def evaluations(*losses):
    told = [{"eval_loss": loss, "step": 40 * (i + 1) / len(losses)} for i, loss in enumerate(losses)]
    return run([*(entry for entry in history_of() if "eval_loss" not in entry), *told])


def wave(size):
    """A loss that falls by 0.5 in the second half and jumps by ``size`` from log to log."""
    return run(updates=160, loss=lambda step: 3 - step / 160 + size * (-1) ** (step // 2))


def moved(share, **facts):
    return Run(Path("run"), history_of(drift=lambda step: share * step / 40), facts)


ADAMW = Run(Path("adamw"), [{"loss": 1.0, "step": 1}])
GREW = {"change": "grow", "condition": "noise", "batch_size": 12, "step": 30}
CASES = [
    ("how_far", run(finished=False, share=lambda step: step / 80), run(), "The log ends at update 40, 50% of the run"),
    ("diverged", run(loss=lambda step: math.nan if step == 40 else 1.0), run(), "not a finite number"),
    ("diverged", run(loss=lambda step: 1 + step), run(loss=lambda step: 50 - step), "has not fallen: it began at 3"),
    ("rose_again", run(loss=lambda step: abs(step - 20)), run(loss=lambda step: 50 - step), "loss rose again"),
    ("not_finite", run(non_finite=lambda step: 2), run(non_finite=lambda step: 0), "In 2 of 40 updates"),
    ("skipped", run(skipped=lambda step: 2), run(skipped=lambda step: 0), "2 batches had no information"),
    ("accepted_levels", run(accepted_levels=lambda step: 1), run(), "above their level once"),
    ("restarts", restarts_at(2, 3), ADAMW, "2 of 40 updates were taken back, all in the first tenth"),
    ("restarts", run(), ADAMW, "No update was taken back"),
    ("rate_at_the_end", run(updates=80, learning_rate=lambda step: 1.05**step), run(), "still rising at the end"),
    ("limited", run(at_floor=lambda step: 2), run(at_floor=lambda step: 1), "The floor decided the rate of 100%"),
    ("noise", wave(1.0), wave(0.01), "The loss is noisier than its fall"),
    ("overfitting", evaluations(3.0, 1.0, 1.5, 2.0), evaluations(3.0, 2.0, 1.5, 1.0), "20 (1) and rose to 2"),
    ("still_falling", evaluations(5, 4, 3, 2, 1), evaluations(5, 1, 1, 1, 1), "still falling at the end, by 1"),
    ("drift", moved(0.38, pretrained=True), moved(0.01, pretrained=True), "have moved by 38% of their size"),
    ("drift", moved(0.38, pretrained=True), moved(0.38, pretrained=False), "measure it, if it matters"),
    (
        "batch",
        run([*history_of(batch_size=lambda step: 12 if step > 30 else 8), GREW]),
        run(),
        "The batch went from 8 to 12 samples in one change (noise 1×)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "triggers", "does_not", "text"), CASES)
def test_a_rule_says_something_of_one_run_and_nothing_of_the_other(rule, triggers, does_not, text):
    assert text in getattr(verdicts, rule)(triggers).text
    assert getattr(verdicts, rule)(does_not) is None


def test_every_rule_has_a_case():
    assert {rule for rule, *_ in CASES} == {rule.__name__ for rule in verdicts.RULES}


def test_restarts_are_told_by_when_and_how_many():
    assert (
        verdicts.restarts(restarts_at(1)).text == "1 of 40 updates was taken back, all in the first tenth of the run."
    )
    assert verdicts.restarts(restarts_at(38, 39, 5)).text.endswith("most of them in the last tenth of the run.")
    first_cycle = run([{"cycle": 1, "change": "keep", "step": 20}, *restarts_at(3, 15).history])
    assert verdicts.restarts(first_cycle).text.endswith("all in the first cycle.")
    kinds = [verdicts.restarts(restarts_at(*range(1, count + 1))).kind for count in (1, 4, 20)]
    assert kinds == ["good", "note", "bad"]


def test_a_run_that_was_stopped_is_finished_and_says_so():
    assert verdicts.how_far(run(share=lambda step: step / 160)).text == (
        "Training was stopped at update 40, 25% of what was planned."
    )


def test_nothing_is_said_of_a_trend_in_a_few_logs():
    few = run(updates=6, loss=lambda step: step + 1.0, learning_rate=lambda step: 2.0**step)
    assert [verdict.text for verdict in verdicts.verdicts(few)] == ["No update was taken back."]
