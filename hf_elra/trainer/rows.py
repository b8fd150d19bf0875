"""Rows of the training data: how many there are, how many a micro-batch drew, and how to go on after some of them.

A sample is a row that the sampler drew. The first dimension of a tensor does not always say how many there are:
padding-free collators make one row of a whole micro-batch, image processors put all patches into one dimension, and a
mapping of data sets has the length of its keys. The counts over a run are in ``accounting.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, IterableDataset, Sampler
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import has_length

_TEXT = ("input_ids", "labels", "label", "decoder_input_ids")


def number_of_rows(data: Any) -> int | None:
    """Return the rows of training data, of all data sets of a mapping together; None if that is not known."""
    if isinstance(data, Mapping):
        rows = [number_of_rows(part) for part in data.values()]
        return None if None in rows else sum(number for number in rows if number is not None)
    return len(data) if data is not None and has_length(data) else None


def splits_batches(args: Any) -> bool:
    """Return whether a batch of the loader is split between processes, instead of one batch for each."""
    return bool(getattr(args.accelerator_config, "split_batches", False))


def samples_per_micro_batch(args: Any, batch_size: int) -> int:
    """Return the samples of a micro-batch over all processes, from the ``batch_size`` of the loader."""
    return batch_size if splits_batches(args) else batch_size * args.world_size


def plain_batch_sampler(loader: Any) -> BatchSampler | None:
    """Return the batch sampler of a loader whose batches all have one size, except the last of an epoch; else None."""
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    sampler = getattr(loader, "batch_sampler", None)
    if isinstance(sampler, BatchSamplerShard):
        sampler = sampler.batch_sampler
    return sampler if type(sampler) is BatchSampler and has_length(sampler.sampler) else None


class RowsSkipped(Sampler):
    """A sampler whose next pass leaves out its first rows."""

    def __init__(self, sampler: Any, rows: int) -> None:
        self.sampler = sampler
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        rows, self.rows = self.rows, 0
        for position, row in enumerate(self.sampler):
            if position >= rows:
                yield row

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.rows)

    def __getattr__(self, name: str) -> Any:  # set_epoch and others
        if name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)


def rows_of(batch: Any) -> int | None:
    """Return the rows that a micro-batch was made of, if its contents tell; used if the sampler does not tell."""
    if isinstance(batch, list | tuple) and batch and not any(isinstance(part, torch.Tensor) for part in batch):
        return len(batch)
    if not isinstance(batch, Mapping):
        return find_batch_size(batch)
    if (sequences := _packed_sequences(batch)) is not None:
        return sequences
    for name in _TEXT:
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and value.dim():
            return value.shape[0]
        if isinstance(value, list | tuple):
            return len(value)
    return find_batch_size(batch)


def is_padding_free(batch: Any) -> bool:
    """Return whether a micro-batch is one row of tokens with several sequences, which their positions tell apart."""
    if not isinstance(batch, Mapping) or batch.get("attention_mask") is not None:
        return False
    tokens = batch.get("input_ids")
    marked = any(name in batch for name in ("position_ids", "cu_seq_lens_q", "seq_idx"))
    return marked and isinstance(tokens, torch.Tensor) and tokens.dim() == 2 and tokens.shape[0] == 1


def _packed_sequences(batch: Mapping[str, Any]) -> int | None:
    """Return the sequences in a padding-free micro-batch; None for any other."""
    if not is_padding_free(batch):
        return None
    if (ends := batch.get("cu_seq_lens_q")) is not None:
        return len(ends.flatten()) - 1
    if (numbers := batch.get("seq_idx")) is not None:
        return int(numbers.unique().numel())
    positions = batch["position_ids"].reshape(-1, batch["input_ids"].shape[1])[0]  # alike in all dimensions
    return int(positions.eq(positions.min()).sum())
