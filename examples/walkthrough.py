"""Attention over three sentences of different lengths, step by step: `python examples/walkthrough.py`.

The steps are done twice: the way that tutorials show it, with scores of -1e9 at the padding, and by maskops. Where the
two agree nothing changes but the work that is saved; where they differ the text says how. The last step packs the
batch, so that there is no padding at all.
"""

import io
import math
import textwrap

import torch
from torch import Tensor

import maskops
from maskops import masks

SENTENCES = ("The cat sat", "Hello world", "I love transformers models")
PAD = "[PAD]"
WIDTH = 5  # of an embedding; one head
HIDDEN = -1e9


def heading(number: int, text: str) -> None:
    print(f"\n{number:2d}. {text}\n{'-' * 100}")


def token_ids(sentences: tuple[str, ...]) -> tuple[dict[str, int], list[list[int]]]:
    """A vocabulary of the words in the order in which they appear, 0 for padding, and the sentences in its ids."""
    vocabulary = {PAD: 0}
    ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in sentence.split()] for sentence in sentences]
    return vocabulary, ids


def table(words: list[str], matrix: Tensor, row_sums: bool) -> list[str]:
    """The lines of a matrix with a word at each row and each column."""
    margin = max(map(len, words))
    widths = [max(len(word), 6) + 1 for word in words]

    def cell(value: float, width: int) -> str:
        shown = "." if math.isinf(value) else "-1e9" if value == HIDDEN else f"{value:.3f}"
        return shown.rjust(width)

    lines = [" " * margin + "".join(word.rjust(width) for word, width in zip(words, widths, strict=True))]
    for word, row in zip(words, matrix.tolist(), strict=True):
        lines.append(word.ljust(margin) + "".join(cell(x, width) for x, width in zip(row, widths, strict=True)))
    if row_sums:
        sums = ["| row sum", *(f"| {total:7.3f}" for total in matrix.sum(-1).tolist())]
        lines = [f"{line} {total}" for line, total in zip(lines, sums, strict=True)]
    return lines


def vectors(words: list[str], rows: Tensor) -> list[str]:
    """A line for each word with its vector."""
    margin = max(map(len, words))
    return [
        f"{word:{margin}} [{' '.join(f'{x:6.3f}' for x in row)}]"
        for word, row in zip(words, rows.tolist(), strict=True)
    ]


def beside(title: str, left: list[str], other_title: str, right: list[str]) -> None:
    width = max(map(len, [title, *left])) + 5
    for one, two in zip(["", title, *left], ["", other_title, *right], strict=True):
        print(f"   {one:{width}}{two}".rstrip())


def show(mask: masks.Mask, length: int) -> None:
    picture = io.StringIO()
    mask.show(length, length, file=picture)
    print(textwrap.indent(picture.getvalue(), "   "), end="")


def main() -> None:
    torch.manual_seed(0)

    heading(1, "Token ids: a vocabulary of the words that occur")
    vocabulary, ids = token_ids(SENTENCES)
    print(f"   {vocabulary}")
    for sentence, row in zip(SENTENCES, ids, strict=True):
        print(f"   {sentence!r:30} -> {row}")

    heading(2, "Padding: every sentence as long as the longest, so that they fit into one tensor")
    lengths = torch.tensor([len(row) for row in ids])
    batch, longest = len(ids), int(lengths.max())
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    words = [[list(vocabulary)[token] for token in row] for row in padded.tolist()]
    for row, sentence_words in zip(padded.tolist(), words, strict=True):
        print(f"   {row}   {' '.join(sentence_words)}")
    print(f"   shape (B, S) = {tuple(padded.shape)}; {int(lengths.sum())} of {padded.numel()} places are words")

    heading(3, "The mask: True = a word, False = padding. For maskops the lengths say it all")
    is_word = padded != 0
    mask = masks.padding(lengths)
    for row in is_word.int().tolist():
        print(f"   {row}")
    print(f"   maskops: masks.padding(torch.tensor({lengths.tolist()}))")

    heading(4, "Its broadcast shape: scores are (B, S queries, S keys), so the mask of keys is (B, 1, S)")
    key_mask = is_word[:, None, :]
    print(f"   is_word {tuple(is_word.shape)} -> is_word[:, None, :] {tuple(key_mask.shape)} -> each query row has it")
    print("   maskops: a mask knows queries from keys and needs no shape. For scores of 3 sentences it allows")
    show(mask, longest)

    heading(5, "Embeddings, and queries, keys and values from them: (B, S, D)")
    embedding = torch.nn.Embedding(len(vocabulary), WIDTH)
    to_qkv = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
    with torch.no_grad():
        q, k, v = to_qkv(embedding(padded)).chunk(3, dim=-1)
    print(f"   q, k, v: {tuple(q.shape)} each. {PAD} has an embedding like any word: nothing marks it from here on")

    heading(6, "Scores before masking: q @ k.T / sqrt(D), rows are queries, columns are keys")
    scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH)
    for sentence_words, matrix in zip(words, scores, strict=True):
        print("\n" + "\n".join(f"   {line}" for line in table(sentence_words, matrix, row_sums=False)))

    heading(7, "Scores after masking: -1e9 in the columns of padding; maskops leaves out its rows too ('.')")
    filled = scores.masked_fill(~key_mask, HIDDEN)
    allowed = mask.to_dense(longest, longest)[:, 0]
    for b in range(batch):
        seen = scores[b].masked_fill(~allowed[b], -math.inf)
        beside("-1e9", table(words[b], filled[b], False), "maskops (never read: .)", table(words[b], seen, False))

    heading(8, "Softmax weights: how much of each key a query takes, with the sums of the rows")
    theirs = torch.softmax(filled, dim=-1)
    ours = maskops.masked_softmax(scores, mask)
    for b in range(batch):
        beside("-1e9", table(words[b], theirs[b], True), "maskops", table(words[b], ours[b], True))
    apart = float((theirs - ours)[is_word].abs().max())
    print(f"\n   Rows of words: the same (largest difference {apart:.1e}).")
    print(f"   Rows of {PAD}: with -1e9 they sum to 1, as if padding asked something; with maskops they are exactly 0.")
    print("   Nothing behind them has to remember to drop them: no loss, mean or gradient can pick them up.")
    print("   (masks.padding hides the queries of padding with its keys; masks.key_padding would hide its keys alone.)")
    nobody = torch.zeros(longest, dtype=torch.bool)
    uniform = torch.softmax(scores[0, 0].masked_fill(~nobody, HIDDEN), -1).tolist()
    nothing = maskops.masked_softmax(scores[0, 0], nobody).tolist()
    print("   A query that may see no key at all:")
    print(f"     -1e9     {uniform}: an average over everything that was to be hidden")
    print(f"     maskops  {nothing}")

    heading(9, "Context vectors: weights @ v")
    context = theirs @ v
    heads = (x[:, None] for x in (q, k, v))  # (B, 1 head, S, D)
    fused = maskops.attention(*heads, mask)[:, 0]  # steps 6 to 9 in one kernel: no (S, S) matrix is ever stored
    for b in range(batch):
        beside("-1e9", vectors(words[b], context[b]), "maskops.attention", vectors(words[b], fused[b]))
    apart = float((context - fused)[is_word].abs().max())
    print(
        f"\n   Words: the same (largest difference {apart:.1e}). {PAD}: a mixture of words with -1e9, 0 with maskops."
    )

    heading(10, "A mask of the wrong shape: (B, 1, 1, S), meant for scores with heads, on scores (B, S, S)")
    four = is_word[:, None, None, :]
    wrong = scores.masked_fill(~four, HIDDEN)
    print(f"   -1e9: no error. The scores are {tuple(wrong.shape)} now: every sentence under the mask of every other.")
    try:
        maskops.masked_softmax(scores, four)
    except ValueError as error:
        print("   maskops raises ValueError:")
        print(textwrap.fill(str(error), 97, initial_indent=" " * 6, subsequent_indent=" " * 6))
    fixed = maskops.masked_softmax(scores, four.squeeze(1))
    same = torch.allclose(fixed[is_word], ours[is_word], atol=1e-6)
    print(f"   With that fix: shape {tuple(fixed.shape)}, rows of words as in step 8: {same}")

    heading(11, "The same batch packed: one row of words, no padding; a query sees the span of its own sentence")
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(cu_seqlens[-1])
    packed_mask = masks.documents(cu_seqlens=cu_seqlens)
    spans = packed_mask.spans(total, total)
    print(f"   cu_seqlens = {cu_seqlens.tolist()}: where each sentence begins, and where the last one ends")
    print("\n   word            query row   keys [start, end)")
    packed_words = [word for row, n in zip(words, lengths.tolist(), strict=True) for word in row[:n]]
    bounds = zip(spans.start[0, 0].tolist(), spans.end[0, 0].tolist(), strict=True)
    for row, (word, (start, end)) in enumerate(zip(packed_words, bounds, strict=True)):
        print(f"   {word:14}  {row:9d}   [{start}, {end})")
    print()
    show(packed_mask, total)
    packed_q, packed_k, packed_v = (x[is_word][:, None] for x in (q, k, v))  # (total, 1 head, D)
    packed = maskops.varlen_attention(packed_q, packed_k, packed_v, cu_seqlens)[:, 0]
    apart = float((packed - fused[is_word]).abs().max())
    print(f"\n   Packed equals padded: largest difference {apart:.1e}.")
    print(f"   Scores computed: {batch * longest * longest} padded with -1e9, {int(spans.cost())} packed.")


if __name__ == "__main__":
    main()
