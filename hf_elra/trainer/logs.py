"""What the logs of a run say beside the stock numbers, and the warnings about updates that went wrong.

The numbers are the optimizer's own, the sizes of updates, decisions about them, true speeds, and passes forward and
back. What is counted is in ``accounting.py`` and ``trials.py``; the file of the log history, in ``log_file.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
import time
from collections import Counter
from typing import Any

from hf_elra.control import BatchDecision, LossLevels
from hf_elra.optim import ELRA
from hf_elra.optim.base import LastUpdate
from hf_elra.trainer.accounting import LOSSES_ON_DEVICE, Accounting, finite_values
from hf_elra.trainer.drift import Drift
from hf_elra.trainer.log_file import LogFile
from hf_elra.trainer.micro_batches import MicroBatches
from hf_elra.trainer.trials import Trials
from hf_elra.trainer.update_size import UpdateSize

logger = logging.getLogger(__name__)

COUNTED = {
    "non_finite": "loss or gradient was not finite in %d of the updates since the last log; ELRA took the step before "
    "back and tried a shorter one, or made none.",
    "skipped": "%d batches since the last log said nothing: their loss was not finite, and they had no gradient. They "
    "were skipped. Are there batches without labels?",
    "accepted_levels": "losses stayed far above their level before, however short the step (so often since the last "
    "log: %d); ELRA takes it that the data have changed, and goes on from there.",
}
"""What an optimizer may count, and what it means."""
TITLES = {"non_finite": "not finite", "skipped": "batches skipped", "accepted_levels": "a new level"}
"""The same, of an alert."""
FEW = 3
"""So many updates taken back in a row are nothing to be told of."""
LIMITS = {"floor": "at_floor", "crop": "cropped", "ceiling": "at_ceiling"}
"""What decided α in place of the rule, and the log that counts such updates since the last one."""
FIRST_UPDATES = 20
"""So many updates at the beginning have an entry of their own: α finds itself in them."""
MOST_TOLD = 1000
"""So many updates that were taken back have an entry of their own; later ones are in the count alone."""


class Logs:
    """Completes the logs of a Trainer.

    Args:
        trainer (Trainer): a Trainer with :class:`~hf_elra.trainer.mixin.ElraTrainerMixin`.
        size, accounting, micro_batches, trials, drift: its collaborators.
    """

    def __init__(
        self,
        trainer: Any,
        size: UpdateSize,
        accounting: Accounting,
        micro_batches: MicroBatches,
        trials: Trials,
        drift: Drift,
    ) -> None:
        self._trainer = trainer
        self._size = size
        self._accounting = accounting
        self._micro_batches = micro_batches
        self._trials = trials
        self._drift = drift
        self._file = LogFile(trainer)
        self._began, self._seconds_before = time.perf_counter(), 0.0
        self._limits: Counter[str] = Counter()  # updates at each limit since the last log
        self._unread: list[tuple[int, float]] = []  # updates, and epochs, of which the device knows
        self._factor = 1.0  # of a scheduler, in the last update
        self._told_accumulation: int | None = None
        self._counts_told: tuple[int, dict[str, float]] = (0, {})  # update number and counts at the last log
        self._levels: LossLevels | None = LossLevels()  # since training began or went on; None after a warning
        self._losses: list[Any] = []  # losses until the next log, which may be on the device

    def begin(self) -> None:
        """Begin or resume a training; warnings do not mention what was counted before."""
        self._told_accumulation = None if self._size.control is None else self._accounting.accumulation
        self._levels, self._losses = LossLevels(), []
        state, optimizer = self._trainer.state, self._trainer.elra_optimizer
        self._began, self._limits = time.perf_counter(), Counter()
        self._seconds_before = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._file.begin()
        if optimizer is None:
            return
        self._unread = []
        optimizer.read_updates()
        self._counts_told = state.global_step, optimizer.metrics

    # ---- an update ----

    def add_loss(self, loss: Any) -> None:
        """Take the mean loss of an update, which may be on the device."""
        optimizer = self._trainer.elra_optimizer
        if optimizer is None or self._levels is None:
            return
        self._losses.append(loss)
        if len(self._losses) >= LOSSES_ON_DEVICE:
            self._judge_losses()

    def take_update(self) -> None:
        """Note what the optimizer did in this update; where that would wait for the device, with the next log.

        The first updates of a run, and those that were taken back, are entries of the log history, whatever the
        interval of logs is; limits on the step are counted.
        """
        optimizer, place = (
            self._trainer.elra_optimizer,
            (self._trainer.state.global_step, self._accounting.true_epoch()),
        )
        if optimizer is None:
            return
        if optimizer.last_update is not None:
            self._tell_update(optimizer.last_update, optimizer.alpha, optimizer.restarts, *place)
        elif optimizer.unread_updates:
            self._unread = [*self._unread, place][-optimizer.unread_updates :]

    def _read_updates(self, optimizer: Any) -> None:
        """Tell of updates on the device since the last log."""
        told, places, self._unread = optimizer.read_updates(), self._unread, []
        number = min(len(told), len(places))
        for (last, alpha, restarts), place in zip(
            told[len(told) - number :], places[len(places) - number :], strict=True
        ):
            if last is not None:
                self._tell_update(last, alpha, restarts, *place)

    def _tell_update(self, last: LastUpdate, alpha: float, restarts: int, step: int, epoch: float) -> None:
        """Count limits; add an entry to the log history for one of the first updates, or for a restart."""
        if last.limit is not None:
            self._limits[LIMITS[last.limit]] += 1
        entry: dict[str, Any] | None = None
        if step <= FIRST_UPDATES:
            ratio = None if last.ratio is None else float(last.ratio)
            entry = {"elra": "first", "tried": last.tried, "ratio": ratio, "rate": alpha}
        elif last.taken_back and restarts <= MOST_TOLD:
            entry = {"elra": "restart"}
        if entry is None:
            return
        is_finite = last.loss is not None and math.isfinite(last.loss)
        entry["loss_of_update"] = last.loss if is_finite else None
        entry["taken_back"] = last.taken_back
        self._trainer.state.log_history.append({**entry, "epoch": epoch, "step": step})
        self._file.follow()

    # ---- a log ----

    def learning_rate(self, stock_rate: Any) -> float:
        """α times what a scheduler makes of it, as the update took it.

        The loop asks after every update. Where the answer would wait for the device it is NaN, and :meth:`complete`
        puts the number in its place.
        """
        optimizer = self._trainer.elra_optimizer
        if optimizer is None:
            return float(stock_rate())
        group = optimizer.param_groups[0]
        self._factor = float(group["lr"]) / group["base_lr"]
        return math.nan if optimizer.reading_waits else self._rate_of(optimizer)

    def _rate_of(self, optimizer: Any) -> float:
        return float(optimizer.alpha * self._factor)  # exactly α without a scheduler

    def complete(self, logs: dict[str, Any]) -> None:
        """Add our numbers to what the stock Trainer logs."""
        if "loss" in logs:
            if (optimizer := self._trainer.elra_optimizer) is not None:
                self._read_updates(optimizer)
                metrics = optimizer.metrics
                if math.isnan(logs.get("learning_rate", 0.0)):
                    logs["learning_rate"] = self._rate_of(optimizer)
                logs.update({name: value for name, value in metrics.items() if name not in logs})
                logs.update(self._limits)
                self._limits = Counter(dict.fromkeys(self._limits, 0))  # one that was seen is logged from now on
                self.warn_of_updates(metrics)
                self._warn_of_a_rise(metrics["alpha"])
            asked_for = self._size.control is not None and self._size.control.asked_for
            if self._trainer.elra_active or asked_for:
                logs.update(dataclasses.asdict(self._trials.counts))
                if (drift := self._drift.measure(self._trainer.model)) is not None:
                    logs["drift"] = drift
            if asked_for:
                batches = self._micro_batches.in_last_update or self._accounting.accumulation
                logs["batch_size"] = float(batches * self._accounting.progress.samples_per_batch)
                if (scale := self._noise_scale()) is not None:
                    logs["noise_scale"] = scale
        if seconds := logs.get("train_runtime"):  # the stock speed assumes updates of one size
            seen, update = self._trainer.elra_callback, self._trainer.state.global_step
            logs["train_samples_per_second"] = round((seen.samples - seen.samples_before) / seconds, 3)
            logs["train_steps_per_second"] = round((update - seen.updates_before) / seconds, 3)

    def complete_entry(self) -> None:
        """Add to the newest entry of the log history how far the run is; the entry is written to the file.

        That is no metric: it is what logs are drawn over.
        """
        trainer = self._trainer
        entry, seen = trainer.state.log_history[-1], trainer.elra_callback
        if "share" not in entry and ("loss" in entry or "train_loss" in entry):
            seconds = self._seconds_before + time.perf_counter() - self._began
            entry["seconds"], entry["samples_seen"] = round(seconds, 3), seen.samples
            if seen.tokens:
                entry["tokens_seen"] = seen.tokens
            entry["share"] = round(self._accounting.share(), 6)
        self._file.follow()

    def _noise_scale(self) -> float | None:
        return None if self._size.noise_scale is None else self._size.noise_scale.value

    def warn_of_updates(self, metrics: dict[str, float]) -> None:
        """Warn of updates since the last log that were taken back in a row, and of batches that were skipped."""
        last_update, before = self._counts_told
        update = self._trainer.state.global_step
        self._counts_told = update, metrics
        if not self._trainer.is_world_process_zero():
            return
        updates = update - last_update
        since = {n: int(metrics.get(n, 0) - before.get(n, 0)) for n in (*COUNTED, "restarts")}
        for name, text in COUNTED.items():
            if since[name] > 0:
                logger.warning("Update %d: " + text, update, since[name])
                self._alert(TITLES[name], text % since[name], name)
        taken_back = since["restarts"] - since["non_finite"]
        if taken_back > 0:
            were = "was" if taken_back == 1 else "were"
            self._alert("updates taken back", f"{taken_back} of the last {updates} updates {were} taken back.")
        now = int(metrics.get("consecutive_restarts", 0))
        if now > FEW or (taken_back > FEW and 2 * taken_back > updates):
            logger.warning(
                "Update %d: %d of the last %d updates were taken back for a loss far above the ones before%s. Either "
                "the data of these batches are other ones, or no step as long as allowed lowers their loss.",
                update,
                taken_back,
                updates,
                f", the last {now} in a row" if now > FEW else "",
            )

    def _alert(self, title: str, text: str, cause: str = "restarts") -> None:
        """Tell trackio, where it is used: it shows alerts beside the curves, and hands them on."""
        trackio = sys.modules.get("trackio")
        if "trackio" not in (self._trainer.args.report_to or ()) or not hasattr(trackio, "alert"):
            return
        level = trackio.AlertLevel.ERROR if cause == "non_finite" else trackio.AlertLevel.WARN  # type: ignore[union-attr]
        with contextlib.suppress(RuntimeError):  # its run has not begun, or is over
            trackio.alert(title, f"Update {self._trainer.state.global_step}: {text}", level)  # type: ignore[union-attr]

    def _warn_of_a_rise(self, alpha: float) -> None:
        """Warn once if losses have risen again in small steps, none of which was taken back."""
        self._judge_losses()
        levels = self._levels
        if levels is None or levels.risen is None or levels.lowest is None:
            return
        self._levels = None
        if not self._trainer.is_world_process_zero():
            return
        remedy = "--optim elra, or a larger batch"
        if isinstance(self._trainer.elra_optimizer, ELRA):
            remedy = "--optim_args max_step_norm=0.1 (2 otherwise), or a larger batch"
        self._alert("the loss has risen again", f"to {levels.risen.mean:.4g} from {levels.lowest.mean:.4g}.")
        logger.warning(
            "Update %d: the loss has risen again, to a mean of %.4g over %d updates, which was %.4g at its lowest. "
            "Unless the data have become harder, the steps are too long here, at a learning rate of %.2g; try %s.",
            self._trainer.state.global_step,
            levels.risen.mean,
            levels.risen.count,
            levels.lowest.mean,
            alpha,
            remedy,
        )

    def _judge_losses(self) -> None:
        losses, self._losses = self._losses, []
        if self._levels is not None:
            for loss in finite_values(losses):
                self._levels.add(loss)

    # ---- decisions about the batch ----

    def tell_decision(self, decision: BatchDecision, mean: float, std: float) -> None:
        """Log what was decided at the end of a control cycle, and the ``mean`` and ``std`` of its losses."""
        entry, numbers = dataclasses.asdict(decision), {"cycle_loss": mean, "cycle_std": std}
        if (scale := self._noise_scale()) is not None:
            entry["noise_scale"] = numbers["noise_scale"] = scale
        self._log_decision(entry, numbers)

    def tell_new_batch(self) -> None:
        """Log that the batch changes with the next update, if it follows the data."""
        control = self._size.control
        if control is None or not control.follows_the_data:
            return
        before, now = self._told_accumulation, self._accounting.accumulation
        if now == before or self._accounting.progress.updates_left(now) == 0:
            return
        self._told_accumulation = now
        change = "grow" if before is None or now > before else "shrink"
        self._log_decision({"condition": control.mode, "change": change, "accumulation": now}, {})

    def _log_decision(self, entry: dict[str, Any], numbers: dict[str, float]) -> None:
        """Write a decision about the batch to the log history, and its numbers to all logs."""
        trainer, seen = self._trainer, self._trainer.elra_callback
        size = entry["accumulation"] * self._accounting.progress.samples_per_batch
        more = {"accumulation": entry["accumulation"], "batch_size": size}
        if seen.tokens:
            more["batch_tokens"] = round(size * seen.tokens / seen.samples)
        if self._size.control is not None and self._size.control.max_pass is not None:
            more["micro_batches_per_pass"] = self._micro_batches.per_pass
        trainer.state.log_history.append({**entry, **more, "step": trainer.state.global_step})
        trainer.log({name: float(value) for name, value in {**numbers, **more}.items()})
