"""The key/value cache on Triton: the operators ``append_kv_triton`` and ``decode_forward_triton``."""

from maskops.ops.decode.triton_kernels.append import append_kv
from maskops.ops.decode.triton_kernels.forward import decode_forward

__all__ = ["append_kv", "decode_forward"]
