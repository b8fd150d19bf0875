"""Every private name of Transformers and Accelerate that this package uses, in one table, and how it is reached.

A name is private if it has an underscore, or if no documentation says what we rely on. All were checked with the
versions in ``CHECKED``. ``tests/trainer/test_upstream.py`` has one test per name, so that a new release of either
library shows at once which of them has moved. If one access serves several modules, or a name needs care, there is a
function for it here.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

CHECKED = {"transformers": ("5.8.0", "5.23.0"), "accelerate": ("1.15.0",)}
"""The oldest and the newest version of each library that the table was checked with."""


@dataclass(frozen=True)
class Upstream:
    """A private name.

    Args:
        name: dotted name in a module, or, beginning with ``trainer.``, an attribute of a Trainer that has trained.
        room: the module that reads it; ``trainer.upstream`` if others call the functions below.
        why: what it is used for.
        parameters: parameters of a function that we pass or read, in this order.
    """

    name: str
    room: str
    why: str
    parameters: tuple[str, ...] | None = None

    def find(self, trainer: Any) -> Any:
        """Return what the name stands for.

        Args:
            trainer: a Trainer that has trained.

        Raises:
            AttributeError: the name is gone.
        """
        first, *rest = self.name.split(".")
        found: Any = trainer
        if first != "trainer":
            found = importlib.import_module(first)
            while rest:
                try:
                    found = importlib.import_module(f"{found.__name__}.{rest[0]}")
                except (ImportError, AttributeError):
                    break
                del rest[0]
        for part in rest:
            found = getattr(found, part)
        return found

    def check(self, trainer: Any) -> None:
        """Raise an AttributeError or TypeError that names what has moved."""
        found = self.find(trainer)
        if self.parameters is None:
            return
        present = tuple(name for name in inspect.signature(found).parameters if name != "self")
        if present[: len(self.parameters)] != self.parameters:
            raise TypeError(f"{self.name} begins with the parameters {present}, not with {self.parameters}")


_HOOK = "trainer.mixin"
_TRAINER = "transformers.Trainer."
UPSTREAM = (
    # Hooks of the Trainer, in the order in which it calls them.
    Upstream(f"{_TRAINER}_hp_search_setup", "trainer.registry", "a trial's arguments are checked", ("trial",)),
    Upstream(
        f"{_TRAINER}set_initial_training_values", _HOOK, "seven counts in a fixed order", ("args", "dataloader")
    ),
    Upstream(
        f"{_TRAINER}_init_training_state", _HOOK, "returns the epochs, and the batches of the next one, to skip",
        ("max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"),
    ),
    Upstream(
        f"{_TRAINER}_prepare_for_training", _HOOK, "there are a model and a loader",
        ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    ),
    Upstream(f"{_TRAINER}_run_epoch", _HOOK, "reads gradient_accumulation_steps, asks for micro-batches"),
    Upstream(
        f"{_TRAINER}get_batch_samples", _HOOK, "is called once an update", ("epoch_iterator", "num_batches", "device")
    ),
    Upstream(
        f"{_TRAINER}training_step", _HOOK, "scales the loss as it does", ("model", "inputs", "num_items_in_batch")
    ),
    Upstream(f"{_TRAINER}_prepare_inputs", "trainer.loss_scale", "overridden or not", ("inputs",)),
    Upstream(f"{_TRAINER}floating_point_ops", _HOOK, "gets what get_batch_samples returned", ("inputs",)),
    Upstream(f"{_TRAINER}_track_num_input_tokens", _HOOK, "gets what get_batch_samples returned", ("inputs",)),
    Upstream(f"{_TRAINER}_clip_grad_norm", _HOOK, "clips gradients", ("model",)),
    Upstream(f"{_TRAINER}_get_grad_norm", _HOOK, "computes a norm that ELRA has already", ("model", "grad_norm")),
    Upstream(f"{_TRAINER}_get_learning_rate", _HOOK, "is what the logs show", ()),
    Upstream(f"{_TRAINER}_maybe_log_save_evaluate", _HOOK, "acts on control.should_evaluate and should_save"),
    Upstream(f"{_TRAINER}_save_checkpoint", _HOOK, "writes a checkpoint", ("model", "trial")),
    Upstream(f"{_TRAINER}save_model", _HOOK, "_internal_call is for checkpoints", ("output_dir", "_internal_call")),
    Upstream(f"{_TRAINER}_load_best_model", _HOOK, "loads the best checkpoint", ()),
    # Functions that are called.
    Upstream(
        f"{_TRAINER}_remove_unused_columns", "trainer.averaging", "batches as in training", ("dataset", "description")
    ),
    Upstream(
        f"{_TRAINER}_get_collator_with_removed_columns", "trainer.averaging", "batches as in training",
        ("data_collator", "description"),
    ),
    Upstream(f"{_TRAINER}compute_loss_context_manager", "trainer.averaging", "autocast", ()),
    Upstream(
        f"{_TRAINER}get_total_train_batch_size", "trainer.accounting", "knows what processes share data", ("args",)
    ),
    Upstream(
        f"{_TRAINER}_get_num_items_in_batch", "trainer.trials", "targets of an update", ("batch_samples", "device")
    ),
    Upstream(f"{_TRAINER}get_tp_size", "trainer.loss_scale", "processes that share a batch", ()),
    Upstream("transformers.trainer_utils.has_length", "trainer.rows", "data of unknown length", ("dataset",)),
    Upstream("transformers.trainer_pt_utils.find_batch_size", "trainer.rows", "rows of a batch", ("tensors",)),
    # Attributes of a Trainer.
    Upstream("trainer._train_batch_size", "trainer.accounting", "also what auto_find_batch_size makes of it"),
    Upstream("trainer._created_lr_scheduler", "trainer.accounting", "whether the schedule is the Trainer's"),
    Upstream("trainer.current_gradient_accumulation_steps", "trainer.micro_batches", "divides a mean loss"),
    Upstream("trainer.model_accepts_loss_kwargs", "trainer.loss_scale", "whether num_items_in_batch is passed"),
    Upstream("trainer.compute_loss_func", "trainer.loss_scale", "is taken to divide by num_items_in_batch"),
    Upstream("trainer.optimizer_cls_and_kwargs", _HOOK, "a class that was passed in"),
    Upstream("trainer.hp_search_backend", "trainer.registry", "whether a trial has set arguments"),
    Upstream("trainer.is_fsdp_enabled", "trainer.checks", "what shards parameters"),
    Upstream("trainer.is_deepspeed_enabled", "trainer.averaging", "what shards parameters"),
    Upstream("trainer.callback_handler.callbacks", "trainer.accounting", "callbacks in the order of their calls"),
    Upstream("trainer.callback_handler.pop_callback", "trainer.accounting", "takes a class", ("callback",)),
    Upstream(
        "trainer.callback_handler.on_substep_end", "trainer.micro_batches", "between passes",
        ("args", "state", "control"),
    ),
    Upstream("trainer.state.stateful_callbacks", "trainer.accounting", "what checkpoints keep, by class"),
    Upstream("trainer.args.train_batch_size", "trainer.batch_control", "of a device, times n_gpu"),
    Upstream("trainer.args.fsdp_plugin_args", "trainer.registry", "the version of FSDP"),
    Upstream("trainer.args.accelerator_config.split_batches", "trainer.rows", "whether processes share a batch"),
    Upstream("trainer.accelerator.gradient_state.end_of_dataloader", "trainer.upstream", "the last batch is out"),
    Upstream("trainer.accelerator.sync_gradients", _HOOK, "whether this pass ends an update"),
    Upstream("trainer.accelerator.backward", "trainer.trials", "is called by the stock step", ("loss",)),
    Upstream("trainer.accelerator.state", "trainer.upstream", "its fsdp_plugin, where there is one"),
    # Modules.
    Upstream("transformers.trainer_optimizer._OPTIMIZER_HANDLERS", "trainer.upstream", "from --optim to a class"),
    Upstream("transformers.training_args.OptimizerNames._value2member_map_", "trainer.upstream", "of enum.Enum"),
    Upstream("transformers.training_args.OptimizerNames._member_map_", "trainer.upstream", "of enum.Enum"),
    Upstream("transformers.training_args.OptimizerNames._member_names_", "trainer.upstream", "of enum.Enum"),
    Upstream("transformers.trainer_callback.ExportableState", "trainer.accounting", "state() is kept in checkpoints"),
    Upstream("transformers.trainer_callback.ProgressCallback", "trainer.callbacks", "its training_bar is ours"),
    *(
        Upstream(
            f"transformers.models.auto.modeling_auto.MODEL_FOR_{task}_MAPPING_NAMES", "trainer.arguments",
            "classes of language models",
        )
        for task in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
    ),
    Upstream("accelerate.data_loader.BatchSamplerShard", "trainer.rows", "its batch_sampler is that of the data"),
    Upstream("trainer.optimizer.optimizer", "trainer.upstream", "what Accelerate has wrapped"),
    Upstream("accelerate.utils.memory.should_reduce_batch_size", "trainer.micro_batches", "was it memory?"),
    Upstream("accelerate.utils.memory.clear_device_cache", "trainer.micro_batches", "after running out of memory"),
)  # fmt: skip
"""All private names but ``loss_is_scaled_for_ga``, which older versions of the Trainer do not have."""


def optimizer_handlers() -> dict[Any, Any]:
    """Return the table in which Transformers looks up the function that makes an optimizer."""
    handlers: dict[Any, Any] = trainer_optimizer._OPTIMIZER_HANDLERS
    return handlers


def optimizer_names() -> list[str]:
    """Return every ``--optim`` name that Transformers knows, ours among them once they are registered."""
    return [str(value) for value in OptimizerNames._value2member_map_]


def add_enum_member(enumeration: Any, name: str, value: str) -> None:
    """Add a member to an existing enumeration of strings, as the ``class`` statement would have."""
    if value in enumeration._value2member_map_:
        return
    member = str.__new__(enumeration, value)
    member._name_, member._value_ = name, value
    member._sort_order_ = len(enumeration._member_names_)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[value] = member
    if hasattr(enumeration, "_hashable_values_"):  # Python >= 3.13
        enumeration._hashable_values_.append(value)
    # If it is read from a file, such as training_args.bin, this package is imported.
    member.__reduce_ex__ = lambda protocol: (member_of, (enumeration, value))
    type.__setattr__(enumeration, name, member)


def member_of(enumeration: Any, value: str) -> Any:
    """Return the member with this value; pickled members that were added here are read by this function."""
    return enumeration(value)


def unwrap_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside Accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def fsdp_version(trainer: Any) -> int | None:
    """Return the version of FSDP in use, or None; the configuration of Accelerate can set it, too."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    version: int | None = getattr(plugin, "fsdp_version", None)
    return version


def data_are_at_their_end(trainer: Any) -> bool:
    """Return whether the latest batch of the training data is the last one of their pass."""
    return bool(trainer.accelerator.gradient_state.end_of_dataloader)


def says_loss_is_scaled(trainer: Any) -> bool | None:
    """Return whether a Trainer itself says that its loss is scaled for accumulation; None if it says nothing."""
    says: bool | None = getattr(trainer, "loss_is_scaled_for_ga", None)
    return says


def stock_step_reads_what_a_trainer_says(trainer_class: Any) -> bool:
    """Return whether the training step of this version uses :func:`says_loss_is_scaled`."""
    return hasattr(trainer_class, "loss_is_scaled_for_ga")
