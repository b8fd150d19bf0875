"""Concatenates several micro-batches, so that a larger batch is one forward pass instead of accumulation.

It works on what collators return: tensors whose first dimension is the sample, lists with one entry per sample, and
nested mappings of these. If micro-batches cannot be concatenated without a change of meaning, :class:`CannotMerge` is
raised and the caller accumulates. :func:`plan_passes` decides which micro-batches go into one pass;
``micro_batches.py`` decides how large a pass may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_elra.trainer.rows import is_padding_free, rows_of

LABEL_PADDING = -100


class CannotMerge(Exception):
    """Raised where micro-batches cannot be concatenated; the message says why."""


def plan_passes(sizes: Sequence[tuple[int, int]], limit: float, *, padded: bool = False) -> list[int]:
    """Return how many consecutive micro-batches go into each forward pass.

    Args:
        sizes: rows and row width (elements, before padding) of every micro-batch.
        limit: most rows of a pass; with ``padded`` most elements, where every row is padded to the widest. A
            micro-batch larger than the limit is a pass of its own.
        padded: whether ``limit`` counts elements.
    """
    passes: list[int] = []
    rows = width = 0
    for number, wide in sizes:
        rows, width = rows + number, max(width, wide)
        if passes and (rows * width if padded else rows) <= limit:
            passes[-1] += 1
        else:
            passes.append(1)
            rows, width = number, wide
    return passes


def merge_micro_batches(batches: Sequence[Any], *, pad_token_id: int = 0, add_attention_mask: bool = False) -> Any:
    """Concatenate micro-batches along the sample dimension; rows of tokens are padded on the right to the longest.

    Labels are padded with -100, token ids with ``pad_token_id``, masks and similar tensors with 0. Padding on the right
    shifts no position, whichever side the collator pads on.

    Args:
        batches: mappings of equal structure.
        pad_token_id: id that fills up rows of tokens.
        add_attention_mask: whether to add a mask if rows differ in length and there is none; without it such
            micro-batches cannot be merged.

    Raises:
        CannotMerge: the parts differ in structure, or their meaning would change.
    """
    if len(batches) == 1:
        return batches[0]
    first = batches[0]
    if not all(isinstance(batch, Mapping) for batch in batches):
        raise CannotMerge(f"the collator returns {type(first).__name__}, not a mapping")
    rows = [_rows(batch) for batch in batches]
    packed = any(is_padding_free(batch) for batch in batches)
    if packed or ("position_ids" in first and 1 in rows):
        raise CannotMerge("one row of tokens with positions may be packed sequences, which are not padded")
    lengths = [batch["input_ids"].shape[1:2] for batch in batches if isinstance(batch.get("input_ids"), torch.Tensor)]
    if len(set(lengths)) > 1 and "attention_mask" not in first:
        if not add_attention_mask:
            raise CannotMerge("rows differ in length and there is no attention_mask")
        batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    merged = _merge_mappings(batches, rows, pad_token_id)
    return merged if type(first) is dict else _like(first, merged)


def _rows(batch: Mapping[str, Any]) -> int:
    if (rows := rows_of(batch)) is None:
        raise CannotMerge("a micro-batch holds no tensor")
    return rows


def _like(first: Any, merged: dict[str, Any]) -> Any:
    """Return the merged values in the collator's own kind of mapping, e.g. ``BatchEncoding``."""
    try:
        return type(first)(merged)
    except TypeError:
        return merged


def _merge_mappings(batches: Sequence[Mapping[str, Any]], rows: list[int], pad_token_id: int) -> dict[str, Any]:
    keys = list(batches[0])
    if any(set(batch) != set(keys) for batch in batches):
        raise CannotMerge("the micro-batches have different keys")
    return {key: _merge_values(key, [batch[key] for batch in batches], rows, pad_token_id) for key in keys}


def _merge_values(key: str, values: list[Any], rows: list[int], pad_token_id: int) -> Any:
    first = values[0]
    if all(isinstance(value, torch.Tensor) for value in values):
        if all(value.dim() and value.shape[0] == number for value, number in zip(values, rows, strict=True)):
            return torch.cat(_padded(key, values, pad_token_id))
        if all(value.shape == first.shape and torch.equal(value, first) for value in values):
            return first
        raise CannotMerge(f"{key!r} has no sample dimension and differs between micro-batches")
    if all(isinstance(value, Mapping) for value in values):
        return _merge_mappings(values, rows, pad_token_id)
    if all(isinstance(value, list | tuple) for value in values):
        parts_hold_samples = all(
            isinstance(part, torch.Tensor) and part.dim() and part.shape[0] == number
            for value, number in zip(values, rows, strict=True)
            for part in value
        )
        if parts_hold_samples and len({len(value) for value in values}) == 1:
            parts = zip(*values, strict=True)
            return type(first)(_merge_values(key, list(part), rows, pad_token_id) for part in parts)
        if [len(value) for value in values] == rows:
            return type(first)(entry for value in values for entry in value)
        raise CannotMerge(f"the lists in {key!r} are neither one entry per sample nor tensors of samples")
    if all(not isinstance(value, torch.Tensor) and value == first for value in values):
        return first
    raise CannotMerge(f"{key!r} ({type(first).__name__}) differs between micro-batches")


def _padded(key: str, tensors: list[torch.Tensor], pad_token_id: int) -> list[torch.Tensor]:
    if len({tensor.shape[1:] for tensor in tensors}) == 1:
        return tensors
    fill = _padding_of(key, pad_token_id)
    if fill is None or any(tensor.dim() != 2 or tensor.is_floating_point() for tensor in tensors):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:2])
        raise CannotMerge(f"{key!r} has shapes {shapes} and it is not known how to pad it")
    longest = max(tensor.shape[1] for tensor in tensors)
    return [torch.nn.functional.pad(tensor, (0, longest - tensor.shape[1]), value=fill) for tensor in tensors]


def _padding_of(key: str, pad_token_id: int) -> int | None:
    if key.endswith("labels"):
        return LABEL_PADDING
    if key.endswith("input_ids"):
        return pad_token_id
    return 0 if key.endswith(("_mask", "token_type_ids", "position_ids")) else None
