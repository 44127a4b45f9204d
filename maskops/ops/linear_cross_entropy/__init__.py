"""Cross-entropy of a linear layer whose logits are never whole in memory."""
