"""The examples run, and what they print is true."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
LENGTHS = (3, 2, 4)


def printed_by(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What an example prints; in this process, which has imported what it imports."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


@pytest.fixture(scope="module")
def walkthrough() -> dict[int, str]:
    """What the walkthrough prints, by step; in a process of its own, as users run it."""
    result = subprocess.run(
        [sys.executable, EXAMPLES / "walkthrough.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        timeout=300,
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    text = result.stdout
    assert max(map(len, text.splitlines())) <= 120
    parts = re.split(r"^ ?(\d+)\. ", text, flags=re.MULTILINE)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


Row = tuple[str, list[float], list[float]]


def tables(text: str) -> list[list[Row]]:
    """The tables of a step: of each row its word and the numbers of the two ways, the row's sum last."""
    found: list[list[Row]] = []
    for line in text.splitlines():
        row = re.fullmatch(r" +(\S+)([ \d.|]+)\1([ \d.|]+)", line)
        if row is None:
            found.append([])
        else:
            theirs, ours = ([float(x) for x in side.replace("|", " ").split()] for side in row.groups()[1:])
            found[-1].append((row[1], theirs, ours))
    return [rows for rows in found if rows]


def differences(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"largest difference ([0-9.e+-]+)[).]", text)]


def test_walkthrough_has_all_steps(walkthrough: dict[int, str]) -> None:
    assert sorted(walkthrough) == list(range(1, 12))
    assert "[6, 7, 8, 9]" in walkthrough[1] and "'transformers': 8" in walkthrough[1]
    assert "[4, 5, 0, 0]   Hello world [PAD] [PAD]" in walkthrough[2] and "9 of 12 places" in walkthrough[2]
    assert "[1, 1, 0, 0]" in walkthrough[3]
    assert "(3, 4) -> is_word[:, None, :] (3, 1, 4)" in walkthrough[4]
    assert walkthrough[7].count("-1e9") == 3 + 4 * 1 + 4 * 2 + 1  # a title each, the columns of padding, the heading


def test_walkthrough_weights(walkthrough: dict[int, str]) -> None:
    """Rows of words agree and sum to 1; rows of padding sum to 1 there and are 0 here."""
    found = tables(walkthrough[8])
    assert len(found) == len(LENGTHS)
    for rows, length in zip(found, LENGTHS, strict=True):
        assert [name == "[PAD]" for name, _, _ in rows] == [False] * length + [True] * (4 - length)
        for name, (*their_weights, their_sum), (*our_weights, our_sum) in rows:
            assert len(their_weights) == len(our_weights) == 4 and their_sum == 1.0
            assert sum(their_weights) == pytest.approx(1.0, abs=2e-3)
            assert their_weights[length:] == [0.0] * (4 - length)
            if name == "[PAD]":
                assert our_weights == [0.0] * 4 and our_sum == 0.0
            else:
                assert our_weights == pytest.approx(their_weights, abs=1.1e-3) and our_sum == 1.0
    assert differences(walkthrough[8]) == [pytest.approx(0.0, abs=1e-6)]
    assert "[0.25, 0.25, 0.25, 0.25]" in walkthrough[8] and "[0.0, 0.0, 0.0, 0.0]" in walkthrough[8]


def test_walkthrough_context(walkthrough: dict[int, str]) -> None:
    assert differences(walkthrough[9]) == [pytest.approx(0.0, abs=1e-6)]
    padding = [line for line in walkthrough[9].splitlines() if line.lstrip().startswith("[PAD]")]
    assert len(padding) == 4 - LENGTHS[0] + 4 - LENGTHS[1]
    for line in padding:
        _, theirs, _, ours = re.findall(r"\[([^\]]*)\]", line)
        assert {float(x) for x in ours.split()} == {0.0} and 0.0 not in {float(x) for x in theirs.split()}


def test_walkthrough_wrong_shape(walkthrough: dict[int, str]) -> None:
    text = " ".join(walkthrough[10].split())
    assert "no error. The scores are (3, 3, 4, 4)" in text
    assert (
        "ValueError: mask has shape (3, 1, 1, 4), x has shape (3, 4, 4): a mask must broadcast to x without enlarging "
        "it, and these two give (3, 3, 4, 4). Use mask.squeeze(1), shape (3, 1, 4)"
    ) in text
    assert "shape (3, 4, 4), rows of words as in step 8: True" in text


def test_walkthrough_packed(walkthrough: dict[int, str]) -> None:
    text = walkthrough[11]
    assert "cu_seqlens = [0, 3, 5, 9]" in text
    bounds = [(int(a), int(b)) for a, b in re.findall(r"\[(\d+), (\d+)\)", text)]
    assert bounds == [(0, 3)] * 3 + [(3, 5)] * 2 + [(5, 9)] * 4
    assert re.findall(r"^ +([#.]{9})$", text, flags=re.MULTILINE) == [
        "." * start + "#" * (end - start) + "." * (9 - end) for start, end in bounds
    ]
    assert differences(text) == [pytest.approx(0.0, abs=1e-6)]
    assert "48 padded with -1e9, 29 packed" in text


def losses(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"^epoch \d+: loss ([0-9.]+)$", text, flags=re.MULTILINE)]


@pytest.mark.parametrize("name", ["train_language_model.py", "train_lstm.py"])
def test_the_way_from_sentences_to_a_step_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 60


def test_training_a_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_by("train_language_model.py", capsys)
    first, last = losses(text)
    assert first > 2.5 and last < 0.5 * first
    assert "6 documents in, 6 out as 6 sequences" in text and "6 BOS and 6 EOS added" in text
    assert "46 tokens" in text and re.search(r"^packed, balanced +95\.8% +48 ", text, flags=re.MULTILINE)
    assert re.search(r"^padded to 14 +54\.8% +84 ", text, flags=re.MULTILINE)


def test_training_an_lstm(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_by("train_lstm.py", capsys)
    first, last = losses(text)
    assert first > 2.5 and last < 0.5 * first
    found = re.search(r"6 sentences together or alone: difference up to ([0-9.e+-]+)$", text, flags=re.MULTILINE)
    assert found is not None and float(found[1]) < 1e-5


def test_attaching_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert len((EXAMPLES / "attach_model.py").read_text(encoding="utf-8").splitlines()) < 60
    pytest.importorskip("transformers", reason="transformers is an optional extra")
    text = printed_by("attach_model.py", capsys)
    stock = re.search(r"^packed as transformers takes it: off by ([0-9.e+-]+) ", text, flags=re.MULTILINE)
    assert stock is not None and float(stock[1]) > 0.1
    ours = [float(x) for x in re.findall(r"with maskops: largest difference ([0-9.e+-]+)$", text, flags=re.MULTILINE)]
    assert len(ours) == 2 and max(ours) < 1e-5
    assert "maskops is attached to Gemma2ForCausalLM (float32, cpu): proven" in text
    assert "model.layers.*.self_attn (2 layers)" in text and "WRONG" not in text and "detached: eager again" in text
    assert max(map(len, text.splitlines())) <= 140
