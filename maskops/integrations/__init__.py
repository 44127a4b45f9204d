"""What maskops does inside other libraries. Importing this imports none of them."""

from maskops.integrations.attaching import attach
from maskops.integrations.pooling import pool

__all__ = ["attach", "pool"]
