"""Reports as data that JSON knows, which has no number for NaN and infinity."""

from __future__ import annotations

import math
from typing import Any


def json_data(value: Any) -> Any:
    """Nested dicts, lists and tuples with the text ``nan``, ``inf`` or ``-inf`` in the place of those numbers.

    ``float`` reads the texts back. ``json.dumps`` would write words that are no JSON and stop other parsers.
    """
    if isinstance(value, dict):
        return {key: json_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_data(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
