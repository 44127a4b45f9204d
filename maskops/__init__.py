"""Attention and loss over ragged batches that never compute padding, with the same answer on every backend."""

import importlib.metadata
import warnings

import torch

from maskops.origin import reinstall_command

__version__ = "0.1.0"

_OLDEST_TORCH = (2, 10)


def _check_torch(version: str) -> None:
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < _OLDEST_TORCH:
        raise ImportError(f"maskops needs torch >= 2.10, this is torch {version}: pip install --upgrade torch")


def _warn_about_namesake() -> None:
    """The package index has another package, called maskops, that installs the same folder over this one."""
    try:
        files = importlib.metadata.distribution("maskops").files or []
    except importlib.metadata.PackageNotFoundError:
        return
    if any(file.parts[0] == "maskops" for file in files):
        warnings.warn(
            "another distribution, called maskops, has installed its files into the folder of torch-maskops. Repair "
            f"with: pip uninstall -y maskops && {reinstall_command()}",
            stacklevel=3,
        )


_check_torch(torch.__version__)
_warn_about_namesake()

from maskops import data, masks, testing  # noqa: E402
from maskops.backend import BackendFallbackWarning, backends, use_backend, validate  # noqa: E402
from maskops.compat import (  # noqa: E402
    ReplacementReport,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    replace_sdpa,
    scaled_dot_product_attention,
)
from maskops.data import PackedBatch, PaddedBatch, check_tokenizer, ensure_pad_token, padding_report  # noqa: E402
from maskops.integrations import attach, packed_prefill  # noqa: E402
from maskops.ops.attention.api import attention, varlen_attention  # noqa: E402
from maskops.ops.cross_entropy.api import CrossEntropyOutput, cross_entropy  # noqa: E402
from maskops.ops.decode.api import append_kv, decode_attention  # noqa: E402
from maskops.ops.linear_cross_entropy.api import linear_cross_entropy  # noqa: E402
from maskops.ops.merge.api import merge_attention  # noqa: E402
from maskops.ops.softmax.api import masked_softmax  # noqa: E402
from maskops.packing import pad_input, unpad_input  # noqa: E402
from maskops.spans import RowSpans  # noqa: E402
from maskops.testing.leak import AuditReport, audit  # noqa: E402

__all__ = [
    "AuditReport",
    "BackendFallbackWarning",
    "CrossEntropyOutput",
    "PackedBatch",
    "PaddedBatch",
    "ReplacementReport",
    "RowSpans",
    "__version__",
    "append_kv",
    "attach",
    "attention",
    "audit",
    "backends",
    "check_tokenizer",
    "cross_entropy",
    "data",
    "decode_attention",
    "ensure_pad_token",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "linear_cross_entropy",
    "masked_softmax",
    "masks",
    "merge_attention",
    "packed_prefill",
    "pad_input",
    "padding_report",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "testing",
    "unpad_input",
    "use_backend",
    "validate",
    "varlen_attention",
]
