"""Moving rows between padded and packed tensors on a device."""
