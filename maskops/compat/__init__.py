"""Drop-ins: the signatures of torch and flash-attn 2, argument for argument, on maskops."""

from maskops.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from maskops.compat.kv_cache import flash_attn_with_kvcache
from maskops.compat.replace import ReplacementReport, replace_sdpa
from maskops.compat.sdpa import scaled_dot_product_attention
from maskops.packing import pad_input, unpad_input

__all__ = [
    "ReplacementReport",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "pad_input",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "unpad_input",
]
