"""The Trainer mixin: tells the optimizer the loss, counts what was seen, logs what ELRA did.

``ElraTrainer`` and ``ElraSeq2SeqTrainer`` are stock trainers with the mixin. ``with_elra`` puts it in front of any
other subclass; ``registry.py`` uses that for trainers built by code that does not know this package. Arguments and
their checks are in ``arguments.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import types
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import has_length

from hf_elra.errors import ConfigurationError
from hf_elra.optim import ELRASpectral, LossAwareOptimizer
from hf_elra.optim.directions.spectral import KINDS
from hf_elra.optim.tensors import accumulates_in
from hf_elra.trainer.arguments import (
    OPTIMIZERS,
    ElraSettings,
    control_of,
    optimizer_name,
    parse_optim_args,
    replaced_defaults,
    set_meanwhile,
)
from hf_elra.trainer.boosting import BoostingMixin
from hf_elra.trainer.callbacks import ElraCallback, unwrap_optimizer
from hf_elra.trainer.checkpoints import explained, last_whole_checkpoint
from hf_elra.trainer.groups import DynamicBatchMixin, MicroBatchGroup
from hf_elra.trainer.rows import number_of_rows, rows_of

logger = logging.getLogger(__name__)


SETTINGS = (
    *(field.name for field in dataclasses.fields(ElraSettings)),
    *("optim", "optim_args", "learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "fp16", "deepspeed", "fsdp"),
)
"""The arguments that :meth:`ElraTrainerMixin.prepare_elra` decides by."""


COUNTED = {
    "non_finite": "loss or gradient was not finite in %d of the updates since the last log; ELRA took the step before "
    "back and tried a shorter one, or made none.",
    "skipped": "%d batches since the last log said nothing: their loss was not finite, and they had no gradient. They "
    "were skipped. Are there batches without labels?",
    "accepted_levels": "losses stayed far above their level before, however short the step (so often since the last "
    "log: %d); ELRA takes it that the data have changed, and goes on from there.",
}
"""What an optimizer may count, and what it means."""
FEW = 3
"""So many updates taken back in a row are nothing to be told of."""


def optimizer_of_ours(trainer: Trainer) -> type[LossAwareOptimizer] | None:
    """The class of the optimizer that a Trainer has or will make, if it is one of ours.

    As in the stock Trainer one that is there already, made or passed in, goes before a class that was passed in, and
    that before the name in the arguments; with a ``model_init`` every training makes its own.
    """
    there = None if trainer.model_init is not None else unwrap_optimizer(trainer.optimizer)
    given = trainer.optimizer_cls_and_kwargs
    found: Any = OPTIMIZERS.get(optimizer_name(trainer.args))
    if there is not None:
        found = type(there)
    elif given is not None:
        found = given[0]
    return found if isinstance(found, type) and issubclass(found, LossAwareOptimizer) else None


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
    _counts_told: tuple[int, dict[str, float]] = (0, {})  # update and numbers of the last log
    _prepared_for: tuple[list[Any], list[Any]] | None = None
    replaced_defaults: Mapping[str, Any] = types.MappingProxyType({})
    _put_off: frozenset[str] = frozenset()  # what was due in the search: "should_evaluate", "should_save"
    _made_up_for: tuple[int, frozenset[str]] = (0, frozenset())  # at which update, and what

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prepare_elra()

    def prepare_elra(self) -> None:
        """Hook in; called at the end of ``__init__``. The optimizer's own arguments were checked at its beginning."""
        self._prepared_for = None
        self.elra_settings = ElraSettings.of(self.args)
        ours = optimizer_of_ours(self)
        self.elra_active = ours is not None
        self.average_over = self.elra_settings.average_over(ours)
        self.replaced_defaults = {}
        if ours is not None:
            fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)  # also set by Accelerate's own configuration
            self.replaced_defaults = replaced_defaults(
                self.args,
                deepspeed=self.is_deepspeed_enabled,
                fsdp_version=getattr(fsdp, "fsdp_version", None),
                ours="elra_spectral" if issubclass(ours, ELRASpectral) else "ELRA",
            )
            if self.is_fsdp_enabled and not ours.takes_shards:
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
        control = "off" if ours is None else self._suiting_control(ours)
        self.prepare_batch_control(self.elra_settings, control, keeps_position=self.elra_active)
        self.check_boosting()
        # First in the row, so that every other callback sees the corrected state.
        self.callback_handler.pop_callback(ElraCallback)
        self.callback_handler.callbacks.insert(0, ElraCallback(self.elra_settings.control_cycle(self.train_dataset)))
        self._prepared_for = self._seen()

    @property
    def is_prepared(self) -> bool:
        """Whether :meth:`prepare_elra` has seen what the Trainer holds now; anyone may change it between trainings."""
        if self._prepared_for is None:
            return False
        (values, objects), (values_now, objects_now) = self._prepared_for, self._seen()
        return values == values_now and all(one is other for one, other in zip(objects, objects_now, strict=True))

    def _seen(self) -> tuple[list[Any], list[Any]]:
        """What :meth:`prepare_elra` decides by: values, and objects that may be changed for others."""
        values = [getattr(self.args, name, None) for name in SETTINGS]
        return values, [type(self.args), optimizer_of_ours(self), self.optimizer_cls_and_kwargs, self.train_dataset]

    def create_optimizer(self, *args, **kwargs):
        """Stock; a class of ours that was passed in is told the model's embeddings and experts, if it was not yet."""
        given, model = self.optimizer_cls_and_kwargs, cast(nn.Module, self.model)
        if self.optimizer is None and not any(p.requires_grad for p in model.parameters()):
            raise ConfigurationError(
                f"model: no parameter of this {type(model).__name__} has requires_grad=True, so that there is nothing "
                "to train; unfreeze some of them, or add adapters."
            )
        if given is not None and isinstance(given[0], type) and issubclass(given[0], ELRASpectral):
            kinds = {kind: find(model) for kind, find in KINDS.items()}
            self.optimizer_cls_and_kwargs = given[0], {**kinds, **given[1]}
        try:
            made = super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = given  # the next model has embeddings of its own
        if self.elra_active and self.elra_optimizer is None:
            raise ConfigurationError(
                f"optim={optimizer_name(self.args)} is not what {type(self).__name__}.create_optimizer makes, which is "
                f"{type(unwrap_optimizer(made)).__name__}: name that one, or let create_optimizer make the one that is "
                "named (super().create_optimizer() does)."
            )
        return made

    def create_scheduler(self, num_training_steps, optimizer=None):
        """Stock, but where a default schedule would work against ELRA a constant one."""
        with set_meanwhile(self.args, **self.replaced_defaults):
            return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model):
        """Stock, but no clipping by default with ELRA."""
        return None if "max_grad_norm" in self.replaced_defaults else super()._clip_grad_norm(model)

    def _suiting_control(self, ours: type[LossAwareOptimizer]) -> str:
        """The batch control that suits an optimizer of ours."""
        if self.optimizer is not None and self.model_init is None:
            settings = self.optimizer.param_groups[0]
        elif self.optimizer_cls_and_kwargs is not None:
            settings = self.optimizer_cls_and_kwargs[1]
        else:
            settings = parse_optim_args(self.args.optim_args, ours)
        return control_of(ours, settings.get("momentum"))

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

    def begin_training(self, resume_from_checkpoint: Any) -> Any:
        """Called by ``train``, with its argument; returns the checkpoint to resume from, or None.

        ``resume_from_checkpoint=True`` takes the newest checkpoint that was written to its end.
        """
        if number_of_rows(self.train_dataset) == 0:
            raise ConfigurationError("train_dataset is empty; give it samples to train on.")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ConfigurationError(
                    f"resume_from_checkpoint=True: output_dir={self.args.output_dir!r} holds no whole checkpoint; "
                    "leave it out to begin anew."
                )
        self.go_on(resume_from_checkpoint or None)
        return resume_from_checkpoint

    # ---- evaluations and checkpoints during a search, whose points are taken back ----

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Stock, but what is due at a point that will be taken back is put off to the search's end, or the run's.

        Early stopping and the choice of the best checkpoint would go by points that nobody can have.
        """
        update, names = self.state.global_step, ("should_evaluate", "should_save")
        due = frozenset(name for name in names if getattr(self.control, name))
        optimizer = self.elra_optimizer
        if optimizer is not None and not optimizer.search_finished and not self.control.should_training_stop:
            if due and not self._put_off:
                self._tell_that_it_is_put_off(due, optimizer.search_updates_left)
            self._put_off |= due
            due = frozenset()
        elif self._put_off:
            due, self._put_off = due | self._put_off, frozenset()
            self._made_up_for = update, due
        elif self._made_up_for[0] == update:  # an epoch that ends with the search
            due -= self._made_up_for[1]
        for name in names:
            setattr(self.control, name, name in due)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _tell_that_it_is_put_off(self, due: frozenset[str], updates: int) -> None:
        words = [word for name, word in (("evaluate", "evaluation"), ("save", "checkpoint")) if f"should_{name}" in due]
        if self.is_world_process_zero():
            logger.warning(
                "Update %d: the %s that %s due %s put off to the end of the search for a learning rate, which takes "
                "its points back: update %d, if it ends as planned.",
                self.state.global_step,
                " and the ".join(words),
                *(["are"] * 2 if len(words) > 1 else ["is"] * 2),
                self.state.global_step + updates,
            )

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
        with set_meanwhile(self.args, dataloader_drop_last=True):
            return super().get_train_dataloader()

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
        self._put_off, self._made_up_for = frozenset(), (0, frozenset())
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
        return optimizer.alpha * (float(group["lr"]) / group["base_lr"] if optimizer.search_finished else 1.0)

    def log(self, logs, *args, **kwargs):
        """Log, with the optimizer's own numbers beside the training loss."""
        optimizer = self.elra_optimizer
        if "loss" in logs and optimizer is not None:
            metrics = optimizer.metrics
            logs.update({name: value for name, value in metrics.items() if name not in logs})
            self._warn_of_updates(metrics)
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

    def remember_counts(self) -> None:
        """Training begins: what was counted before it is not told again."""
        if (optimizer := self.elra_optimizer) is not None:
            self._counts_told = self.state.global_step, optimizer.metrics

    def _warn_of_updates(self, metrics: dict[str, float]) -> None:
        """Warn of updates since the last log that were taken back in a row, and of batches that were skipped."""
        last_update, before = self._counts_told
        update = self.state.global_step
        self._counts_told = update, metrics
        if not self.is_world_process_zero():
            return
        updates = update - last_update
        since = {n: int(metrics.get(n, 0) - before.get(n, 0)) for n in (*COUNTED, "restarts")}
        for name, text in COUNTED.items():
            if since[name] > 0:
                logger.warning("Update %d: " + text, update, since[name])
        taken_back = since["restarts"] - since["non_finite"]
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
