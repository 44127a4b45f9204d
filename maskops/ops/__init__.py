"""The ops, one folder each: api, registration, reference, kernels."""
