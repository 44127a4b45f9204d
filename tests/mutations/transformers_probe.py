"""Mutations of the probe of attach(): what it would miss, and what it would leave behind."""

from tests.mutations import Mutation

FOLDER = "maskops/integrations/transformers"
PROBE, REFUSALS = ("tests/test_attach_probe.py",), ("tests/test_attach_refusals.py",)

MUTATIONS = (
    Mutation(
        "probe: NaN counts as no error",
        f"{FOLDER}/probe.py",
        "errors.nan_to_num(nan=math.inf, posinf=math.inf)",
        "errors.nan_to_num(nan=0.0, posinf=math.inf)",
        PROBE,
    ),
    Mutation(
        "probe: only the outputs decide",
        f"{FOLDER}/probe.py",
        "if worst <= bound and not wrong:",
        "if worst <= bound:",
        PROBE,
    ),
    Mutation(
        "probe: modules go on from what the wrong ones before them gave",
        f"{FOLDER}/probe.py",
        "laid[row, column : column + length] = one.inputs[name][1][0, first : first + length]",
        "laid[row, column : column + length] = value[row, column : column + length]",
        PROBE,
    ),
    Mutation(
        "probe: scores stay as small as they are",
        f"{FOLDER}/probe_reference.py",
        "min(max(spread**-0.5, 1 / _WIDEST_FACTOR), _WIDEST_FACTOR) if spread else 1.0",
        "1.0",
        PROBE,
    ),
    Mutation(
        "probe: windows are not exceeded",
        f"{FOLDER}/probe_batches.py",
        "max(_LENGTHS[0], reached + 7)",
        "_LENGTHS[0]",
        PROBE,
    ),
    Mutation(
        "probe: instance attributes stay behind",
        f"{FOLDER}/probe_reference.py",
        "                module.__dict__.update(before)\n",
        "",
        PROBE,
    ),
    Mutation(
        "probe: special tokens are drawn",
        f"{FOLDER}/probe_batches.py",
        "if t not in special",
        "if t is not None",
        PROBE,
    ),
    Mutation(
        "refusals: a wrong layer of ours refuses packed batches only",
        f"{FOLDER}/refusals.py",
        "if not called or any(way not in PACKED for way in wrong) or any(not layer.recurrent for layer in ours):",
        "if not called:",
        PROBE,
    ),
    Mutation(
        "refusals: packed batches reach layers with a state",
        f"{FOLDER}/refusals.py",
        "if found is not None:",
        "if found is not None and batch < 0:",
        REFUSALS,
    ),
)
