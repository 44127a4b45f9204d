"""maskops inside models of transformers; imported by ``maskops.attach`` and its kin, never by ``import maskops``."""
