"""Span attention: one kernel for every mask that is a span of keys per query row."""
