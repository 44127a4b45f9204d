"""Lowering of masks to RowSpans in one call."""
