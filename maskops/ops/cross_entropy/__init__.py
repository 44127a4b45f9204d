"""Masked cross-entropy over logits."""
