"""The Trainer mixin: hooks of the Trainer, in the order in which its loop calls them, and nothing else.

Each hook calls a collaborator that does one thing, most often with the stock hook as an argument. The collaborators are
plain objects, made together in :class:`Collaborators`; the module of each says what it does. ``ElraTrainer`` and
``ElraSeq2SeqTrainer`` are stock Trainers with the mixin. ``with_elra`` puts it in front of any other subclass;
``registry.py`` uses that for trainers built by code that does not know this package.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from hf_elra.control.progress import TrainingProgress
from hf_elra.optim import ELRASpectral, WeightAverage
from hf_elra.optim.spectral import OF_A_MODEL
from hf_elra.trainer import checks
from hf_elra.trainer.accounting import Accounting, ElraCallback, put_first
from hf_elra.trainer.arguments import ElraSettings, set_meanwhile
from hf_elra.trainer.averaging import Averaging
from hf_elra.trainer.batch_control import BatchControl, control_for
from hf_elra.trainer.cards import create_card
from hf_elra.trainer.checkpoints import explained
from hf_elra.trainer.display import suit_display
from hf_elra.trainer.drift import Drift
from hf_elra.trainer.logs import Logs
from hf_elra.trainer.loss_scale import LossScale
from hf_elra.trainer.micro_batches import MicroBatches, micro_batches_of
from hf_elra.trainer.trials import LineLosses, Trials
from hf_elra.trainer.update_size import UpdateSize
from hf_elra.trainer.upstream import unwrap_optimizer

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class Collaborators:
    """The objects that the hooks of a Trainer call; each keeps its own numbers from one hook to the next.

    Args:
        trainer: their Trainer. Nothing of it is read here, so it need not be complete yet.
    """

    def __init__(self, trainer: Any) -> None:
        self.size = UpdateSize()
        self.accounting = Accounting(trainer, self.size)
        self.loss_scale = LossScale(trainer)
        self.trials = Trials(trainer)
        self.micro_batches = MicroBatches(trainer, self.size, self.accounting, self.loss_scale, self.trials)
        self.line_losses = LineLosses(trainer, self.accounting, self.micro_batches, self.trials)
        self.averaging = Averaging(trainer, self.size, self.accounting)
        self.drift = Drift()
        self.logs = Logs(trainer, self.size, self.accounting, self.micro_batches, self.trials, self.drift)


class ElraTrainerMixin(_Base):
    """Put in front of ``Trainer`` or a subclass of it: ``class MyTrainer(ElraTrainerMixin, SomeTrainer)``.

    An optimizer of ours gets the true mean loss of every update: over all micro-batches of the group
    and, through one all-reduce, over all processes. Logs get ``alpha``, ``step_norm``, ``restarts`` and ``cosine``, and
    their ``learning_rate`` is α times the factor of a scheduler. With any other optimizer only the counting is added.

    Attributes:
        elra: the collaborators.
        elra_settings: the ``--elra_*`` flags in force.
        elra_active: whether the optimizer is one of ours.
        average_over: the points that are averaged: ``"off"``, ``"cycle"`` or ``"run"``.
        replaced_defaults: values that are used in place of stock defaults that would work against ELRA.
    """

    elra: Collaborators
    elra_settings: ElraSettings
    elra_active = False
    average_over = "off"
    replaced_defaults: Mapping[str, Any] = types.MappingProxyType({})
    _prepared_for: tuple[list[Any], list[Any]] | None = None

    # ---- attributes for users ----

    @property
    def elra_optimizer(self) -> Any:
        """The loss-aware optimizer inside Accelerate's wrapper, or None."""
        optimizer = unwrap_optimizer(self.optimizer)
        return optimizer if hasattr(optimizer, "observe_loss") else None

    @property
    def elra_callback(self) -> ElraCallback:
        """The callback that counts; looked up because resuming may replace callback objects."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, ElraCallback))

    @property
    def weight_average(self) -> WeightAverage | None:
        """The mean of the points of training, or None."""
        return self.elra.averaging.mean

    @property
    def batch_control(self) -> BatchControl | None:
        """What the batch flags ask for; None if updates are those of the stock Trainer."""
        return self.elra.size.control

    @property
    def progress(self) -> TrainingProgress:
        """How far the run is."""
        return self.elra.accounting.progress

    # ---- before the loop ----

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.elra = Collaborators(self)
        super().__init__(*args, **kwargs)
        self.prepare_elra()

    def prepare_elra(self) -> None:
        """Take over what the Trainer holds. The arguments of the optimizer were checked before it was made."""
        self._prepared_for = None
        if "elra" not in vars(self):  # the class was changed after the Trainer was made
            self.elra = Collaborators(self)
        ours = checks.optimizer_of_ours(self)
        self.elra_settings, self.elra_active = ElraSettings.of(self.args), ours is not None
        self.average_over = self.elra_settings.average_over(ours)
        self.replaced_defaults = {}
        self.replaced_defaults = checks.check_trainer(self, ours, self.elra_settings)
        self.elra.accounting.prepare()
        control = control_for(self, self.elra_settings, checks.suiting_control(self, ours))
        self.elra.size.prepare(control)
        suit_display(self, self.elra_settings.elra_display, control is not None and control.asked_for)
        self.elra.averaging.prepare(self.average_over)
        put_first(self, ElraCallback(self.elra_settings.control_cycle(self.train_dataset)))
        self._prepared_for = checks.decided_by(self)

    @property
    def is_prepared(self) -> bool:
        """Whether :meth:`prepare_elra` has seen what the Trainer holds now, which may change between trainings."""
        return checks.are_the_same(self._prepared_for, checks.decided_by(self))

    def begin_training(self, resume_from_checkpoint: Any) -> Any:
        """Return the checkpoint to resume from, or None; ``train`` calls this with its argument."""
        checkpoint = checks.checkpoint_to_resume(self, resume_from_checkpoint)
        self.elra.averaging.go_on(checkpoint or None)
        self.elra.drift.begin(cast(nn.Module, self.model))
        return checkpoint

    def get_train_dataloader(self):
        """The stock hook, without the last incomplete batch of an epoch (paper, section 3.5)."""
        return self.elra.accounting.train_loader(super().get_train_dataloader)

    def set_initial_training_values(self, args, dataloader):
        """The stock counts, for updates that may change in size."""
        return self.elra.accounting.initial_values(super().set_initial_training_values, args, dataloader)

    def _init_training_state(self, *args, **kwargs):
        """The stock hook; the position in the data is that of the checkpoint, exact to the sample."""
        position = super()._init_training_state(*args, **kwargs)
        put_first(self)  # a checkpoint may have brought its own
        self.elra.loss_scale.forget()
        self.elra.micro_batches.begin()
        return self.elra.accounting.begin(position)

    def create_optimizer(self, *args, **kwargs):
        """Stock; a class of ours that was passed in is told what parameters are in the model, if it was not yet."""
        given, model = self.optimizer_cls_and_kwargs, cast(nn.Module, self.model)
        if self.optimizer is None:
            checks.check_trainable(model)
        if given is not None and isinstance(given[0], type) and issubclass(given[0], ELRASpectral):
            found = {kind: find(model) for kind, find in OF_A_MODEL.items()} | given[1]
            if "outputs" not in given[1]:  # those that the user takes for embeddings, too
                marked = {id(p) for p in found["embeddings"]}
                found["outputs"] = [p for p in found["outputs"] if id(p) in marked]
            self.optimizer_cls_and_kwargs = given[0], found
        try:
            made = super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = given  # the next model has embeddings of its own
        if self.elra_settings.guards_stock_steps and self.elra_optimizer is None:
            self.optimizer = made = checks.guarded(made, self.elra_settings)
        checks.check_made(self, made)
        return made

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The stock schedule over updates of the first size; a constant one in place of a harmful default."""
        with set_meanwhile(self.args, **self.replaced_defaults):
            return super().create_scheduler(self.elra.accounting.schedule_length(num_training_steps), optimizer)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.elra.accounting.skip_rows(train_dataloader)
        self.elra.averaging.begin(resume_from_checkpoint)
        return prepared

    # ---- the loop, which also calls ElraCallback between these hooks ----

    def _run_epoch(self, *args, **kwargs):
        """The stock hook; meanwhile the loop takes an update for one batch, which is a group."""
        with self.elra.accounting.an_update_is_a_batch():
            super()._run_epoch(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Return the micro-batches of one update, as one group."""
        data = self.elra.line_losses.watch(epoch_iterator)
        return self.elra.micro_batches.take(super().get_batch_samples, data, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Run over micro-batches; after the last ones of an update, give the optimizer the mean loss of the update."""
        accounting, stock_step = self.elra.accounting, super().training_step
        samples, tokens = accounting.count(micro_batches_of(inputs))
        self.elra.line_losses.before_pass(stock_step, model, num_items_in_batch)
        loss = self.elra.micro_batches.step(stock_step, model, inputs, num_items_in_batch)
        accounting.add(loss, samples, tokens)
        if self.accelerator.sync_gradients:
            self.elra.logs.add_loss(accounting.end_update())
            self.elra.line_losses.offer()
        return loss

    def floating_point_ops(self, inputs):
        """The stock number, summed over a group."""
        return self.elra.micro_batches.floating_point_ops(super().floating_point_ops, inputs)

    def _track_num_input_tokens(self, inputs):
        for batch in micro_batches_of(inputs):
            super()._track_num_input_tokens(batch)

    def _clip_grad_norm(self, model):
        """The stock hook, but without clipping by default with ELRA."""
        return None if "max_grad_norm" in self.replaced_defaults else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        """The stock norm of the gradient; ELRA computes it anyway, and :meth:`log` shows that one."""
        if grad_norm is None and self.elra_optimizer is not None and not self.is_deepspeed_enabled:
            return None
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _get_learning_rate(self) -> float:
        """With an optimizer of ours: α times the factor of a scheduler."""
        return self.elra.logs.learning_rate(super()._get_learning_rate)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Stock, with the settings that the user made."""
        with self.elra.accounting.as_the_user_set_it():
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        """The stock hook, with the numbers of the optimizer beside the training loss."""
        self.elra.logs.complete(logs)
        super().log(logs, *args, **kwargs)

    # ---- evaluation, checkpoints, and the end ----

    def evaluate(self, *args, **kwargs):
        """The stock evaluation, of the mean if there is one."""
        with self.elra.averaging.in_use():
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        """The stock hook; if a checkpoint cannot be written, the error says from where training can go on."""
        with explained(str(self.args.output_dir), self.state.global_step):
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        """Save the mean if there is one; a checkpoint gets both points."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            self.elra.averaging.save_beside_last_point(str(output_dir or self.args.output_dir))
            return
        with self.elra.averaging.in_use():
            super().save_model(output_dir, _internal_call)

    def _load_best_model(self):
        """The stock hook; with boosting the best point is the mean in that checkpoint, which was evaluated."""
        super()._load_best_model()
        self.elra.averaging.take_best(str(self.state.best_model_checkpoint))

    def predict(self, *args, **kwargs):
        """The stock prediction, by the mean if there is one."""
        with self.elra.averaging.in_use():
            return super().predict(*args, **kwargs)

    def create_model_card(self, *args, **kwargs):
        """Stock, with what the optimizer did; a card of ``hf-elra card`` in the output folder stays."""
        create_card(self, super().create_model_card, *args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        """The stock upload, of the mean if there is one."""
        with self.elra.averaging.in_use():
            return super().push_to_hub(*args, **kwargs)


class ElraTrainer(ElraTrainerMixin, Trainer):
    """A ``transformers.Trainer`` that tells our optimizers the loss; use it with :class:`ElraTrainingArguments`."""


class ElraSeq2SeqTrainer(ElraTrainerMixin, Seq2SeqTrainer):
    """As :class:`ElraTrainer`, for ``transformers.Seq2SeqTrainer``; it takes :class:`ElraSeq2SeqTrainingArguments`."""


@functools.cache
def with_elra(trainer_class: type) -> type:
    """Return a subclass of ``trainer_class`` with :class:`ElraTrainerMixin` in front, under the same name."""
    if issubclass(trainer_class, ElraTrainerMixin):
        return trainer_class
    names = {k: getattr(trainer_class, k) for k in ("__module__", "__qualname__", "__doc__")}
    return type(trainer_class.__name__, (ElraTrainerMixin, trainer_class), names)
