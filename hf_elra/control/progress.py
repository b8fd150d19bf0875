"""How far a training run is and how much of it is left, where updates differ in size. Plain Python.

A run ends after a number of epochs, updates, samples or tokens. Everything that shows or uses progress (the progress
bar, the number of updates to come, learning-rate and batch schedules) asks here. The Trainer counts samples and
tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class TrainingProgress:
    """The position of a run in its data.

    As in the Trainer, a limit in updates overrides the number of epochs. Limits in samples and tokens do so too. If
    there are several limits, the first one that is reached counts.

    Args:
        num_epochs: epochs to train, if nothing else limits the run.
        max_updates, max_samples, max_tokens: limits, None for none.
        samples_per_batch: samples of a whole micro-batch, over all processes.
        samples_per_epoch: samples that an epoch draws; None for data of unknown length.
        tokens_per_sample: a first estimate, until tokens have been seen.
        drops_last: the incomplete micro-batch at the end of an epoch is left out.
        skips_incomplete: the incomplete group of micro-batches at the end of an epoch is left out too.
    """

    num_epochs: float = 1.0
    max_updates: int | None = None
    max_samples: int | None = None
    max_tokens: int | None = None
    samples_per_batch: int = 1
    samples_per_epoch: int | None = None
    tokens_per_sample: float = 1.0
    drops_last: bool = False
    skips_incomplete: bool = False
    # The position: epochs that are over, and samples taken in the running one. Then totals over the run.
    epoch: int = 0
    taken: int = 0
    updates: int = 0
    samples: int = 0
    tokens: int = 0

    @property
    def limited(self) -> bool:
        """Whether something other than the number of epochs ends the run."""
        return any(limit is not None for limit in (self.max_updates, self.max_samples, self.max_tokens))

    @property
    def batches_per_epoch(self) -> int | None:
        """Micro-batches in a whole epoch; None for data of unknown length."""
        return None if self.samples_per_epoch is None else self._batches_after(0)

    def _batches_after(self, taken: int) -> int:
        """Return the micro-batches that an epoch has after its first ``taken`` samples."""
        left = max(0, (self.samples_per_epoch or self.samples_per_batch) - taken)
        return left // self.samples_per_batch if self.drops_last else -(-left // self.samples_per_batch)

    def restart(self, epoch: int = 0, taken: int = 0) -> None:
        """Go to a position in the data; :meth:`count` sets the totals."""
        self.epoch, self.taken = epoch, taken

    def take(self, batches: int) -> int:
        """Move on by so many micro-batches and return their samples; only an epoch's last one may be incomplete."""
        samples = batches * self.samples_per_batch
        if self.samples_per_epoch is not None:
            samples = min(samples, self.samples_per_epoch - self.taken)
        self.taken += samples
        return samples

    def count(self, *, updates: int, samples: int, tokens: int) -> None:
        """Set the totals of the run."""
        self.updates, self.samples, self.tokens = updates, samples, tokens

    def epoch_is_over(self, accumulation: int) -> bool:
        """Return whether the running epoch has no further update of ``accumulation`` micro-batches."""
        if self.samples_per_epoch is None:
            return False
        left = self._batches_after(self.taken)
        return left == 0 or (left < accumulation and self.skips_incomplete)

    def epochs(self, accumulation: int) -> float | None:
        """Epochs of data seen; None for data of unknown length."""
        if not self.batches_per_epoch:
            return None
        over = self.epoch_is_over(accumulation)
        return self.epoch + (1.0 if over else self.taken / self._epoch_length)

    @property
    def _epoch_length(self) -> int:
        """Samples in the micro-batches of an epoch; an incomplete micro-batch counts as a whole one."""
        return (self.batches_per_epoch or 1) * self.samples_per_batch

    def fraction(self, accumulation: int = 1) -> float:
        """Return the share of the run that is done, in [0, 1], if the next update has this ``accumulation``."""
        shares = [
            seen / limit
            for seen, limit in (
                (self.updates, self.max_updates),
                (self.samples, self.max_samples),
                (self.tokens, self.max_tokens),
            )
            if limit
        ]
        if not self.limited and self.batches_per_epoch:
            shares.append((self.epochs(accumulation) or 0.0) / self.num_epochs)
        return min(1.0, max(shares, default=0.0))

    def updates_left(self, accumulation: int) -> int:
        """Return the updates to come if each has ``accumulation`` micro-batches; 0 exactly when the run is over."""
        if not self.limited:
            return self._plan(accumulation)[0]
        return max(0, min(self._left_by_limit(accumulation).values()))

    def unit(self, accumulation: int) -> str:
        """Return the unit to show progress in: that of the limit that ends the run, or samples if epochs end it."""
        if not self.limited:
            return "samples"
        left = self._left_by_limit(accumulation)
        return min(left, key=left.__getitem__)

    def _left_by_limit(self, accumulation: int) -> dict[str, int]:
        left = {}
        size = accumulation * self.samples_per_batch
        if self.max_tokens is not None:
            per_sample = self.tokens / self.samples if self.tokens else self.tokens_per_sample
            left["tokens"] = math.ceil((self.max_tokens - self.tokens) / (size * per_sample))
        if self.max_samples is not None:
            left["samples"] = math.ceil((self.max_samples - self.samples) / size)
        if self.max_updates is not None:
            left["updates"] = self.max_updates - self.updates
        return left

    def total(self, unit: str, accumulation: int) -> int:
        """Return the size of the whole run in the unit of :meth:`unit`, at least what is done."""
        if unit == "samples" and not self.limited:
            return self.samples + self._plan(accumulation)[1]
        limit = {"tokens": self.max_tokens, "samples": self.max_samples, "updates": self.max_updates}[unit]
        return max(limit or 0, getattr(self, unit))

    def total_epochs(self, accumulation: int) -> int:
        """Return the epochs of the whole run, begun ones included; at least 1."""
        if not self.limited:
            return math.ceil(self.num_epochs)
        seen, done = self.epochs(accumulation), self.fraction()
        return max(1, math.ceil(seen / done - 1e-9)) if seen and done else 1

    def _plan(self, accumulation: int) -> tuple[int, int]:
        """Return the updates and samples to come in a run of ``num_epochs`` epochs."""
        per_epoch, per_batch = self.batches_per_epoch or 1, self.samples_per_batch
        end = math.ceil(self.num_epochs * per_epoch)
        epoch, taken = self.epoch, self.taken
        updates = left_samples = 0
        while (wanted := -((taken - (end - epoch * per_epoch) * per_batch) // per_batch)) > 0:
            in_epoch = self._batches_after(taken)
            left = min(in_epoch, wanted)
            whole, rest = divmod(left, accumulation)
            # Only at the end of an epoch may an incomplete group be skipped.
            if rest and not (left == in_epoch and self.skips_incomplete):
                whole += 1
            updates += whole
            samples = min(in_epoch, whole * accumulation) * per_batch
            left_samples += min(samples, (self.samples_per_epoch or 0) - taken) if self.samples_per_epoch else 0
            epoch, taken = epoch + 1, 0
        return updates, left_samples

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, as plain JSON values.

        It is in samples, so that a run can go on with batches of another size.
        """
        return {"epoch": self.epoch, "taken": self.taken}
