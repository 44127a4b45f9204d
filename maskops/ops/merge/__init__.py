"""Exact merge of attention over parts of the keys."""
