"""The Trainer mixin: tells the optimizer the loss, counts what was seen, logs what ELRA did.

``ElraTrainer`` and ``ElraSeq2SeqTrainer`` are stock trainers with the mixin. ``with_elra`` puts it in front of any
other subclass; ``registry.py`` uses that for trainers built by code that does not know this package. Arguments and
their checks are in ``arguments.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, cast

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import has_length

from hf_elra.errors import ConfigurationError
from hf_elra.optim import ELRASpectral, LossAwareOptimizer
from hf_elra.optim.directions import KINDS
from hf_elra.optim.tensors import accumulates_in
from hf_elra.trainer.arguments import (
    OPTIMIZERS,
    ElraSettings,
    control_of,
    optimizer_name,
    parse_optim_args,
    prepare_arguments,
    uses_elra,
)
from hf_elra.trainer.boosting import BoostingMixin
from hf_elra.trainer.callbacks import ElraCallback, unwrap_optimizer
from hf_elra.trainer.checkpoints import explained, last_whole_checkpoint
from hf_elra.trainer.groups import DynamicBatchMixin, MicroBatchGroup
from hf_elra.trainer.rows import number_of_rows, rows_of

logger = logging.getLogger(__name__)


def trains_with_elra(trainer: Trainer) -> bool:
    """Whether a Trainer's arguments name one of our optimizers, or one was passed to it."""
    given = trainer.optimizer_cls_and_kwargs
    return (
        uses_elra(trainer.args)
        or isinstance(trainer.optimizer, LossAwareOptimizer)
        or (given is not None and isinstance(given[0], type) and issubclass(given[0], LossAwareOptimizer))
    )


class ElraTrainerMixin(BoostingMixin, DynamicBatchMixin):
    """Put in front of ``Trainer`` or a subclass of it: ``class MyTrainer(ElraTrainerMixin, SomeTrainer)``.

    With ``optim="elra"`` the optimizer is told the true mean loss of every update: over all micro-batches of the group
    and, through one all-reduce, over all processes. Logs get ``alpha``, ``step_norm``, ``restarts`` and ``cosine``, and
    ``learning_rate`` there is α times a scheduler's factor. With any other optimizer only the counting is added.
    """

    _group_loss: Any = 0.0
    _group_samples = 0
    _group_tokens = 0
    _told_accumulation: int | None = None
    non_finite_before = 0  # restarts for that reason up to the last log

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prepare_elra()

    def prepare_elra(self) -> None:
        """Hook in; called at the end of ``__init__``. The optimizer's own arguments were checked at its beginning."""
        self.elra_settings = ElraSettings.of(self.args)
        self.elra_active = trains_with_elra(self)
        self.mean_of_points = self.elra_settings.mean_of_points(self._optimizer_class() if self.elra_active else None)
        if self.elra_active:
            fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)  # also set by Accelerate's own configuration
            prepare_arguments(
                self.args,
                deepspeed=self.is_deepspeed_enabled,
                fsdp_version=getattr(fsdp, "fsdp_version", None),
                ours="elra_spectral" if issubclass(self._optimizer_class(), ELRASpectral) else "ELRA",
            )
            if self.is_fsdp_enabled and not self._optimizer_class().takes_shards:
                raise ConfigurationError(
                    f"fsdp cannot be used with optim={optimizer_name(self.args)}, which needs whole matrices. Use DDP, "
                    "or optim=elra."
                )
        elif without_effect := self.elra_settings.idle_without_elra():
            logger.warning(
                "%s has no effect with optim=%s.",
                ", ".join(without_effect),
                getattr(self.args.optim, "value", self.args.optim),
            )
        control = self._suiting_control() if self.elra_active else "off"
        self.prepare_batch_control(self.elra_settings, control, keeps_position=self.elra_active)
        self.check_boosting()
        # First in the row, so that every other callback sees the corrected state.
        self.callback_handler.pop_callback(ElraCallback)
        self.callback_handler.callbacks.insert(0, ElraCallback(self.elra_settings.control_cycle(self.train_dataset)))

    def _hp_search_setup(self, trial):
        """Stock; what a trial sets of ours, or of the accumulation, is taken as if the Trainer were new."""
        if trial is None or self.hp_search_backend is None:
            super()._hp_search_setup(trial)
            return
        self.args.gradient_accumulation_steps = self._accumulation_of_user
        super()._hp_search_setup(trial)
        self.prepare_elra()
        self.take_over_accumulation()

    def _optimizer_class(self) -> Any:
        """Class of the optimizer that was passed in, else of the one that will be made."""
        if self.optimizer is not None:
            return type(unwrap_optimizer(self.optimizer))
        given = self.optimizer_cls_and_kwargs
        return given[0] if given is not None else OPTIMIZERS[optimizer_name(self.args)]

    def create_optimizer(self, *args, **kwargs):
        """Stock; a class of ours that was passed in is told the model's tables and stacks, if it was not yet."""
        given, model = self.optimizer_cls_and_kwargs, cast(nn.Module, self.model)
        if given is not None and isinstance(given[0], type) and issubclass(given[0], ELRASpectral):
            kinds = {kind: find(model) for kind, find in KINDS.items()}
            self.optimizer_cls_and_kwargs = given[0], {**kinds, **given[1]}
        try:
            return super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = given  # the next model has tables of its own

    def _suiting_control(self) -> str:
        """The batch control that suits that optimizer."""
        if self.optimizer is not None:
            settings = self.optimizer.param_groups[0]
        elif self.optimizer_cls_and_kwargs is not None:
            settings = self.optimizer_cls_and_kwargs[1]
        else:
            settings = parse_optim_args(self.args.optim_args, self._optimizer_class())
        return control_of(self._optimizer_class(), settings.get("momentum"))

    @property
    def elra_callback(self) -> ElraCallback:
        """The callback that counts; looked up because resuming may replace callback objects."""
        callbacks = self.callback_handler.callbacks
        callback = next(c for c in callbacks if isinstance(c, ElraCallback))
        if callbacks[0] is not callback:
            callbacks.remove(callback)
            callbacks.insert(0, callback)
        callback.trainer = self
        return callback

    @property
    def elra_optimizer(self) -> Any:
        """The loss-aware optimizer inside Accelerate's wrapper, or None."""
        optimizer = unwrap_optimizer(self.optimizer)
        return optimizer if hasattr(optimizer, "observe_loss") else None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train; ``resume_from_checkpoint=True`` takes the newest checkpoint that was written to its end."""
        if number_of_rows(self.train_dataset) == 0:
            raise ConfigurationError("train_dataset is empty; give it samples to train on.")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ConfigurationError(
                    f"resume_from_checkpoint=True: output_dir={self.args.output_dir!r} holds no whole checkpoint; "
                    "leave it out to begin anew."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        """Stock, but a checkpoint that cannot be written is an error that says where training can go on."""
        with explained(str(self.args.output_dir), self.state.global_step):
            super()._save_checkpoint(*args, **kwargs)

    # ---- the loss ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run a micro-batch; after the last one of an update tell the optimizer the update's mean loss."""
        micro_batches = inputs if isinstance(inputs, MicroBatchGroup) else [inputs]
        counts = [self._count(batch) for batch in micro_batches]
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Every micro-batch's loss is already divided by the group's size (or its number of target tokens): the sum is
        # the mean.
        self._group_loss = self._group_loss + loss.detach().float()
        self._group_samples += sum(samples for samples, _ in counts)
        self._group_tokens += sum(tokens for _, tokens in counts)
        if self.accelerator.sync_gradients:
            self._finish_group()
        return loss

    def _count(self, batch: Any) -> tuple[int, int]:
        """Samples, as far as its contents tell, and tokens of a micro-batch."""
        main_input = batch.get(getattr(self.model, "main_input_name", "input_ids")) if hasattr(batch, "get") else None
        tokens = 0
        if isinstance(main_input, torch.Tensor) and not main_input.is_floating_point():
            tokens = main_input.numel()
        return rows_of(batch) or 0, tokens

    def _start_group(self) -> None:
        self._group_loss = 0.0
        self._group_samples = self._group_tokens = 0

    def _finish_group(self) -> None:
        loss, samples, tokens = self._group_loss, self._group_samples, self._group_tokens
        self._start_group()
        processes = self.accelerator.num_processes
        if (optimizer := self.elra_optimizer) is not None:
            optimizer.observe_loss(loss)  # of this process: the optimizer itself takes the mean
            if processes > 1:
                optimizer.process_group = torch.distributed.group.WORLD
        if processes > 1:
            wide = accumulates_in(loss.device)
            told = torch.cat([loss.to(wide).view(1), loss.new_tensor([samples, tokens], dtype=wide)])
            total = self.accelerator.reduce(told, reduction="sum").tolist()
            loss, samples, tokens = total[0] / processes, round(total[1]), round(total[2])
        self.elra_callback.count(samples if self._rows_drawn is None else self._rows_drawn, tokens, loss)

    # ---- the last batch of an epoch ----

    def get_train_dataloader(self):
        """The stock data loader, without the last incomplete batch of an epoch (paper, section 3.5)."""
        if not self._skips_last_batch():
            if self.elra_active and self.elra_settings.elra_skip_last_batch and self.train_dataset is not None:
                logger.warning(
                    "The training data are less than one batch of %d: the incomplete batch is used all the same.",
                    self._samples_of(self._train_batch_size),
                )
            return super().get_train_dataloader()
        kept = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = True
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = kept

    def _skips_last_batch(self) -> bool:
        if not self.elra_active or not self.elra_settings.elra_skip_last_batch:
            return False
        rows = number_of_rows(self.train_dataset)
        return rows is None or rows >= self._samples_of(self._train_batch_size)

    def set_initial_training_values(self, args, dataloader):
        """Stock counts, without the incomplete group of micro-batches at the end of an epoch."""
        values = super().set_initial_training_values(args, dataloader)
        if self.batch_control is not None:
            return values
        epochs, _, examples, _, batch, micro_batches, max_steps = values
        accumulation = args.gradient_accumulation_steps
        whole = micro_batches // accumulation
        if not self._skips_last_batch() or not has_length(dataloader) or whole == 0:
            return values
        if args.max_steps > 0:
            epochs = -(-max_steps // whole)
        else:
            max_steps = -int(-args.num_train_epochs * whole // 1)
        return epochs, whole, examples, max_steps * batch, batch, whole * accumulation, max_steps

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Stock micro-batches of one update; an incomplete last group of an iterable data set is skipped.

        None at all where a run is resumed that had reached its end: the stock Trainer makes one more update then.
        """
        self._start_group()  # whatever an interrupted group left behind
        batches, num_items = self._next_batches(epoch_iterator, num_batches, device)
        if not batches:  # the loop would ask again for every update that it expects
            self.control.should_epoch_stop = True
        return batches, num_items

    def _next_batches(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        if self._has_ended():
            return [], None
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if number_of_rows(self.train_dataset) is not None or not batches or not self._skips_last_batch():
            return batches, num_items
        in_group = isinstance(batches[0], MicroBatchGroup)
        sizes = [rows_of(batch) or 0 for batch in (batches[0] if in_group else batches)]
        seen = self.elra_callback
        seen.full_batch = max(*sizes, seen.full_batch)
        at_the_end = self.accelerator.gradient_state.end_of_dataloader
        if at_the_end and (len(batches) < num_batches or sizes[-1] < seen.full_batch):
            return [], None
        return batches, num_items

    def _has_ended(self) -> bool:
        if self.batch_control is not None:
            return not self.progress.updates_left(self.accumulation)
        return 0 < self.state.max_steps <= self.state.global_step

    # ---- control cycles ----

    def finish_cycle(self, mean: float, std: float) -> None:
        """A control cycle is over: let the batch-size controller decide, and log what it decided."""
        decision = self.end_batch_cycle(mean, std)
        if decision is None:
            return
        entry = dataclasses.asdict(decision)
        numbers = {"cycle_loss": mean, "cycle_std": std}
        if self.noise_scale is not None and (scale := self.noise_scale.value) is not None:
            entry["noise_scale"] = numbers["noise_scale"] = scale
        self._log_decision(entry, numbers)

    def begin_batches(self) -> None:
        """Remember the batch that training begins or goes on with."""
        self._told_accumulation = None if self.batch_control is None else self.accumulation

    def tell_new_batch(self) -> None:
        """Where the batch follows the data, log that it changes with the next update."""
        if self.batch_control is None or not self.batch_control.follows_the_data:
            return
        before, now = self._told_accumulation, self.accumulation
        if now == before or self.progress.updates_left(now) == 0:
            return
        self._told_accumulation = now
        change = "grow" if before is None or now > before else "shrink"
        self._log_decision({"condition": self.batch_control.mode, "change": change, "accumulation": now}, {})

    def _log_decision(self, entry: dict[str, Any], numbers: dict[str, float]) -> None:
        """Write a decision about the batch to the log history, and what of it is a number to all logs."""
        seen = self.elra_callback
        size = entry["accumulation"] * self.progress.samples_per_batch
        more = {"accumulation": entry["accumulation"], "batch_size": size}
        if seen.tokens:
            more["batch_tokens"] = round(size * seen.tokens / seen.samples)
        if self.batch_control is not None and self.batch_control.max_pass is not None:
            more["micro_batches_per_pass"] = self._micro_batches_per_pass
        self.state.log_history.append({**entry, **more, "step": self.state.global_step})
        self.log({name: float(value) for name, value in {**numbers, **more}.items()})

    def _init_training_state(self, *args, **kwargs):
        position = super()._init_training_state(*args, **kwargs)
        self.elra_callback  # noqa: B018 - tells the callback, which may be a new one, its Trainer
        return position

    # ---- logs ----

    def _get_grad_norm(self, model, grad_norm=None):
        """Stock norm of the gradient; ELRA computes it anyway, and :meth:`log` shows that one."""
        if grad_norm is None and self.elra_optimizer is not None and not self.is_deepspeed_enabled:
            return None
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _get_learning_rate(self) -> float:
        """α times what a scheduler makes of it, as the update took it: during a search schedulers do not count."""
        optimizer = self.elra_optimizer
        if optimizer is None:
            return super()._get_learning_rate()
        group = optimizer.param_groups[0]
        return optimizer.alpha * (float(group["lr"]) / group["base_lr"] if optimizer.settled else 1.0)

    def log(self, logs, *args, **kwargs):
        """Log, with the optimizer's own numbers beside the training loss."""
        optimizer = self.elra_optimizer
        if "loss" in logs and optimizer is not None:
            metrics = optimizer.metrics
            logs.update({name: value for name, value in metrics.items() if name not in logs})
            if (number := metrics["non_finite"] - self.non_finite_before) > 0 and self.is_world_process_zero():
                logger.warning(
                    "Update %d: loss or gradient was not finite in %d of the updates since the last log; ELRA took "
                    "the step before back, or made none, and went on with a smaller learning rate.",
                    self.state.global_step,
                    number,
                )
            self.non_finite_before = metrics["non_finite"]
        if "loss" in logs and self.batch_control is not None and self.batch_control.asked_for:
            batches = self._last_accumulation or self.accumulation
            logs["batch_size"] = float(batches * self.progress.samples_per_batch)
            if self.noise_scale is not None and (scale := self.noise_scale.value) is not None:
                logs["noise_scale"] = scale
        if seconds := logs.get("train_runtime"):  # the stock speed assumes updates of one size
            done = self.elra_callback.samples - self.elra_callback.samples_before
            logs["train_samples_per_second"] = round(done / seconds, 3)
            logs["train_steps_per_second"] = round(
                (self.state.global_step - self.elra_callback.updates_before) / seconds, 3
            )
        super().log(logs, *args, **kwargs)


class ElraTrainer(ElraTrainerMixin, Trainer):
    """``transformers.Trainer`` that tells ELRA the loss; use it with :class:`ElraTrainingArguments`."""


class ElraSeq2SeqTrainer(ElraTrainerMixin, Seq2SeqTrainer):
    """``transformers.Seq2SeqTrainer`` that tells ELRA the loss; use it with :class:`ElraSeq2SeqTrainingArguments`."""


@functools.cache
def with_elra(trainer_class: type) -> type:
    """Return a subclass of ``trainer_class`` with :class:`ElraTrainerMixin` in front, under the same name."""
    if issubclass(trainer_class, ElraTrainerMixin):
        return trainer_class
    names = {k: getattr(trainer_class, k) for k in ("__module__", "__qualname__", "__doc__")}
    return type(trainer_class.__name__, (ElraTrainerMixin, trainer_class), names)
