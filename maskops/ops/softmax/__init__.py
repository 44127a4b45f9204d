"""Masked softmax along any dimension."""
