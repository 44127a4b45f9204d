"""A cache of keys and values: appending to it in place, and attention of new queries over it."""
