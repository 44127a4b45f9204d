"""Mutations of the pad doctor and of the padding report."""

from __future__ import annotations

from tests.mutations import Mutation

DOCTOR = "maskops/data/doctor.py"
REPORT = "maskops/data/report.py"
DOCTOR_TESTS = ("tests/test_doctor.py",)
REPORT_TESTS = ("tests/test_padding_report.py",)

MUTATIONS = (
    Mutation("doctor: ids with gaps", DOCTOR, " and names.pad not in _ids_of(tokenizer)", "", DOCTOR_TESTS),
    Mutation("doctor: the last row of an embedding", DOCTOR, "names.pad >= rows", "names.pad > rows + 1", DOCTOR_TESTS),
    Mutation("doctor: one EOS of several", DOCTOR, "and ours not in several:", "and ours != theirs:", DOCTOR_TESTS),
    Mutation(
        "doctor: an encoder with a decoder generates",
        DOCTOR,
        'return able and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)',
        "return able",
        DOCTOR_TESTS,
    ),
    Mutation("doctor: EOS never learns", DOCTOR, "None if pad == eos else pad", "pad", DOCTOR_TESTS),
    Mutation(
        "doctor: untrained rows in the mean",
        DOCTOR,
        "for row in others if row < rows",
        "for row in range(rows)",
        DOCTOR_TESTS,
    ),
    Mutation(
        "doctor: the output layer is forgotten", DOCTOR, 'yield "output layer", output.weight', "pass", DOCTOR_TESTS
    ),
    Mutation(
        "doctor: only the first embedding", DOCTOR, "for module in modules:", "for module in modules[:1]:", DOCTOR_TESTS
    ),
    Mutation(
        "doctor: a token that means something",
        DOCTOR,
        "and known[text] not in used), _ADDED",
        "), _ADDED",
        DOCTOR_TESTS,
    ),
    Mutation(
        "report: the tail of a row is free",
        REPORT,
        "attention + linear * total",
        "attention + linear * sum(sequences)",
        REPORT_TESTS,
    ),
    Mutation(
        "report: lengths that are not cut",
        REPORT,
        "[min(length, max_length) for length in given]",
        "given",
        REPORT_TESTS,
    ),
    Mutation(
        "report: documents are not shuffled",
        REPORT,
        "random.Random(seed).sample(kept, len(kept))",
        "list(kept)",
        REPORT_TESTS,
    ),
)
