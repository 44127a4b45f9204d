"""What maskops does inside other libraries. Importing this imports none of them."""

from maskops.integrations.api import attach, packed_prefill
from maskops.integrations.pooling import pool

__all__ = ["attach", "packed_prefill", "pool"]
