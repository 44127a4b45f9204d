"""What the batches share: their tensors move together, and torch sees them as a tree of tensors."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Context = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]
"""Names of the tensors that are there, and the other fields."""

_Batch = TypeVar("_Batch", bound="Batch")


class Batch:
    """Base of frozen dataclasses of tensors and host numbers. Subclasses become trees of torch's pytree."""

    TENSORS: ClassVar[tuple[str, ...]]
    """Fields that hold a tensor or None; the others are numbers and words, the same on every device."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda leaves, context: _unflatten(cls, leaves, context),
            serialized_type_name=f"maskops.{cls.__name__}",
            to_dumpable_context=lambda context: [list(context[0]), [list(pair) for pair in context[1]]],
            from_dumpable_context=lambda context: (tuple(context[0]), tuple((name, x) for name, x in context[1])),
            flatten_with_keys_fn=_flatten_with_keys,
        )
        # Tensors, numbers and words: torch.load takes them with weights_only as well.
        torch.serialization.add_safe_globals([cls])

    def to(self: _Batch, device: torch.device | str, non_blocking: bool = False) -> _Batch:
        """The same batch on ``device``."""
        moved: _Batch = pytree.tree_map(lambda tensor: tensor.to(device, non_blocking=non_blocking), self)
        return moved

    def pin_memory(self: _Batch) -> _Batch:
        """The same batch in page-locked memory; what a DataLoader with ``pin_memory=True`` calls."""
        pinned: _Batch = pytree.tree_map(Tensor.pin_memory, self)
        return pinned


def _flatten(batch: Batch) -> tuple[list[Any], Context]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}  # type: ignore[arg-type]
    present = tuple(name for name in batch.TENSORS if values[name] is not None)
    rest = tuple((name, value) for name, value in values.items() if name not in batch.TENSORS)
    return [values[name] for name in present], (present, rest)


def _flatten_with_keys(batch: Batch) -> tuple[list[tuple[pytree.KeyEntry, Any]], Context]:
    leaves, context = _flatten(batch)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(context[0], leaves, strict=True)], context


def _unflatten(cls: type[_Batch], leaves: Any, context: Context) -> _Batch:
    # Past the checks: what is mapped over a tree need not give tensors.
    batch = object.__new__(cls)
    values = dict.fromkeys(cls.TENSORS) | dict(zip(context[0], leaves, strict=True)) | dict(context[1])
    for name, value in values.items():
        object.__setattr__(batch, name, value)
    return batch
