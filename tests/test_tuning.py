"""The table of tile configurations: complete, honest about where rows come from, within the limits of the machine."""

import dataclasses
import itertools

import pytest

from maskops import tuning
from maskops.tuning import ARCHITECTURES, ELEMENTS, SHARED_MEMORY, TABLE, WIDTHS, Config, Key, config

ATTENTION = (
    "attention_forward",
    "attention_forward_per_pair",
    "attention_backward_dq",
    "attention_backward_dkdv",
    "decode",
)
STREAMS = ("cross_entropy", "masked_softmax")
ROWS = [pytest.param(key, row, id="-".join(map(str, key))) for key, row in TABLE.items()]
ITEM_ROWS, ITEM_KEYS = 128, 64
"""Granularity of the work list; kernels with smaller tiles subdivide its items."""


def test_every_kernel_has_a_row_for_everything() -> None:
    assert set(ATTENTION + STREAMS) <= set(tuning.kernels())
    for kernel in tuning.kernels():
        widths = (0,) if Key(kernel, *[ARCHITECTURES[0], ELEMENTS[0], 0]) in TABLE else WIDTHS
        wanted = {Key(kernel, *rest) for rest in itertools.product(ARCHITECTURES, ELEMENTS, widths)}
        assert {key for key in TABLE if key.kernel == kernel} == wanted
    declared = len(tuning._ATTENTION) + len(tuning._ROWS)
    assert len(TABLE) == declared, "two rows have the same key"


@pytest.mark.parametrize("key, row", ROWS)
def test_row(key: Key, row: Config) -> None:
    sizes = (*row.blocks.values(), row.num_warps)
    assert sizes and all(size > 0 and size & (size - 1) == 0 for size in sizes), "Triton takes powers of two only"
    assert row.num_warps <= 32 and 1 <= row.num_stages <= 5
    assert row.provenance.startswith(("compiled", "model", "measured on "))
    assert shared_memory(key, row) <= SHARED_MEMORY[key.architecture]
    if "BLOCK_N" in row.blocks:
        assert min(row.blocks.values()) >= 16, "tl.dot takes no side below 16"
    if key.kernel in ATTENTION[:-1]:
        assert ITEM_ROWS % row.blocks["BLOCK_M"] == 0
        assert row.blocks["BLOCK_N"] % ITEM_KEYS == 0 or ITEM_KEYS % row.blocks["BLOCK_N"] == 0


def shared_memory(key: Key, row: Config) -> int:
    """Bytes of the tiles that a kernel keeps in shared memory: what it holds, and what its stages prefetch."""
    size = 2 if key.element == "half" else 4
    if key.kernel not in ATTENTION:
        # Columns of one row, streamed.
        return row.num_stages * size * row.blocks["BLOCK_V"]
    rows, keys = (size * key.width * row.blocks[name] for name in ("BLOCK_M", "BLOCK_N"))
    held, streamed = {
        "attention_forward": (rows, 2 * keys),
        "attention_forward_per_pair": (rows, 2 * keys),
        "decode": (rows, 2 * keys),
        "attention_backward_dq": (2 * rows, 2 * keys),
        "attention_backward_dkdv": (2 * keys, 2 * rows),
    }[key.kernel]
    return held + max(row.num_stages - 1, 1) * streamed


def test_a_width_between_two_takes_the_larger() -> None:
    for kernel, architecture, element in itertools.product(ATTENTION, ARCHITECTURES, ELEMENTS):
        for width in range(1, WIDTHS[-1] + 1):
            bucket = min(known for known in WIDTHS if known >= width)
            assert config(kernel, architecture, element, width) is TABLE[Key(kernel, architecture, element, bucket)]
    assert config("cross_entropy", "sm_90", "half") is config("cross_entropy", "sm_90", "half", 50257)


@pytest.mark.parametrize(
    "arguments",
    [
        ("attention_sideways", "sm_90", "half", 64),
        ("attention_forward", "sm_70", "half", 64),
        ("attention_forward", "sm_90", "double", 64),
        ("attention_forward", "sm_90", "half", 257),
    ],
)
def test_an_unknown_row_is_refused_by_name(arguments: tuple[str, str, str, int]) -> None:
    kernel, architecture, element, width = arguments
    message = f"no configuration for kernel '{kernel}', '{architecture}', '{element}', width {width}"
    with pytest.raises(ValueError, match=message):
        config(*arguments)


def test_devices_take_the_rows_that_fit_them() -> None:
    capabilities = {
        (8, 0): "sm_80",
        (8, 6): "sm_80",
        (8, 9): "sm_80",
        (9, 0): "sm_90",
        (10, 0): "sm_90",
        (12, 0): "sm_80",
    }
    assert {capability: tuning.architecture(*capability) for capability in capabilities} == capabilities
    with pytest.raises(ValueError, match=r"7\.5: the Triton kernels need 8\.0"):
        tuning.architecture(7, 5)


def test_rows_cannot_be_changed() -> None:
    row = config("attention_forward", "sm_90", "half", 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.num_warps = 16  # type: ignore[misc]
    with pytest.raises(TypeError):
        row.blocks["BLOCK_M"] = 256  # type: ignore[index]
    with pytest.raises(TypeError):
        TABLE[Key("attention_forward", "sm_90", "half", 64)] = row  # type: ignore[index]
    assert row.launch() == {**row.blocks, "num_warps": row.num_warps, "num_stages": row.num_stages}
