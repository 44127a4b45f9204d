"""What maskops does inside other libraries. Importing this imports none of them."""

from maskops.integrations.pooling import pool

__all__ = ["pool"]
