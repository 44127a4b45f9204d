"""Mutations of the leak test: what it would miss, and what it would report though it is right."""

from tests.mutations import Mutation

FOLDER = "maskops/testing/leak"
TESTS = ("tests/test_audit.py",)

MUTATIONS = (
    Mutation(
        "audit: a jump of positions over a hole begins a document",
        f"{FOLDER}/documents.py",
        " & (step != place - before)",
        "",
        TESTS,
    ),
    Mutation(
        "audit: places after the last offset are a document",
        f"{FOLDER}/documents.py",
        "torch.where(ids < offsets.numel() - 1, ids, _PADDING)",
        "ids",
        TESTS,
    ),
    Mutation(
        "audit: special tokens are replaced",
        f"{FOLDER}/perturb.py",
        "free = ~torch.isin(tokens.cpu().long(), self.special)",
        "free = torch.ones(tokens.shape, dtype=torch.bool)",
        TESTS,
    ),
    Mutation(
        "audit: a token is replaced by itself",
        f"{FOLDER}/perturb.py",
        "torch.where(ids[index] == old, ids[(index + 1) % len(ids)], ids[index])",
        "old",
        TESTS,
    ),
    Mutation(
        "audit: a set of documents misses a pair",
        f"{FOLDER}/perturb.py",
        "math.comb(count, count // 2) >= items",
        "2**count >= items",
        TESTS,
    ),
    Mutation(
        "audit: padding is not a source",
        f"{FOLDER}/measure.py",
        'sources.append("padding")',
        "pass",
        TESTS,
    ),
    Mutation(
        "audit: layers get what those before them changed",
        f"{FOLDER}/layers.py",
        "entries[place] = self._whole.replaced(value, self._restored[(*key, place)], key[0])",
        "pass",
        TESTS,
    ),
    Mutation(
        "audit: NaN beside a number is no change",
        f"{FOLDER}/outputs.py",
        "difference.nan_to_num(nan=torch.inf)",
        "difference.nan_to_num(nan=0.0)",
        TESTS,
    ),
    Mutation(
        "audit: modules stay in eval mode",
        f"{FOLDER}/outputs.py",
        "module.training = training",
        "pass",
        TESTS,
    ),
    Mutation(
        "audit: positions that go on are those of a piece",
        f"{FOLDER}/alone.py",
        " and not is_continued",
        "",
        TESTS,
    ),
)
