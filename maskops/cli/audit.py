"""`python -m maskops audit`: does a model of transformers keep the documents of a batch apart?"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import maskops
from maskops.testing.leak import ARRIVALS

_STANDARD_STREAM = "-"
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AUTO_CLASSES = {  # by the end of the name of the architecture
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
_EXIT = "Exit status: 0 clean, 1 something is wrong, 2 it could not be run."


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the options."""
    parser = commands.add_parser(
        "audit",
        help="test a model of transformers for leaks between the documents of a batch",
        description="Gives one document of a batch other tokens and looks for changes in the others, for every way in "
        f"which a batch can arrive; says how much leaks, and in which layer. {_EXIT}",
    )
    parser.add_argument(
        "model", metavar="PATH_OR_NAME", help="folder of a model of transformers, a .gguf file, or a name"
    )
    parser.add_argument("--attach", action="store_true", help="after maskops.attach(model)")
    parser.add_argument("--implementation", metavar="NAME", help="attention: eager, sdpa, flash_attention_2, ...")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32", help="(default: float32)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    documents = parser.add_mutually_exclusive_group()
    documents.add_argument(
        "--lengths", type=_lengths, metavar="7,5,9", help="documents of so many random tokens (default: 11,5,17)"
    )
    documents.add_argument("--text", metavar="FILE", help="a document a line; - reads the standard input")
    parser.add_argument(
        "--batches",
        type=_names,
        metavar="NAME,NAME",
        help=f"how they arrive, of: {'; '.join(ARRIVALS)} (default: most)",
    )
    parser.add_argument("--tolerance", type=float, metavar="X", help="largest change of an output that is no leak")
    parser.add_argument("--seed", type=int, default=0, help="of random tokens")
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STANDARD_STREAM,
        metavar="FILE",
        help="write the report as JSON; without a file, print that instead of the table",
    )
    parser.set_defaults(run=run)


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers between commas, got {text!r}") from None
    if len(lengths) < 2 or min(lengths) < 1:
        raise argparse.ArgumentTypeError(f"expected two lengths or more, of one token or more, got {text!r}")
    return lengths


def _names(text: str) -> list[str]:
    """Names of arrivals, some of which have commas in them."""
    names: list[str] = []
    rest = text.strip()
    while rest:
        fitting = [name for name in ARRIVALS if rest == name or rest.startswith(f"{name},")]
        if not fitting:
            raise argparse.ArgumentTypeError(f"{rest!r}: expected some of: {'; '.join(ARRIVALS)}")
        names.append(max(fitting, key=len))
        rest = rest[len(names[-1]) + 1 :].strip()
    return names


def run(options: argparse.Namespace) -> int:
    """Prints the report; 1 if something is wrong, 2 if the model cannot be loaded or run."""
    if options.json not in (None, _STANDARD_STREAM) and not Path(options.json).parent.is_dir():
        print(f"--json {options.json}: there is no folder {Path(options.json).parent}", file=sys.stderr)
        return 2
    if options.json is not None and Path(options.json).is_dir():
        print(f"--json {options.json}: expected a file, this is a folder", file=sys.stderr)
        return 2
    try:
        model = _load(options).to(options.device)
        documents, special = (None, []) if options.text is None else _read(options)
        if options.attach:
            maskops.attach(model)
        report = maskops.audit(
            model,
            documents,
            lengths=options.lengths,
            arrivals=options.batches,
            tolerance=options.tolerance,
            special_ids=special,
            seed=options.seed,
        )
    except Exception as error:  # whatever it is, it is no finding: a status of 1 would say so
        print(f"{options.model}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if options.json == _STANDARD_STREAM:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report)
        if options.json is not None:
            Path(options.json).write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if all(batch.refused is not None for batch in report.batches):
        print(f"{options.model}: the model takes none of these batches", file=sys.stderr)
        return 2
    return 1 if report.findings else 0


def _load(options: argparse.Namespace) -> Any:
    """The model that the options name, with the head that it was saved with."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is not installed: pip install transformers") from error
    source, extra = _source(options.model)
    if options.implementation is not None:
        extra["attn_implementation"] = options.implementation
    config = _from_pretrained(transformers.AutoConfig, options.model, source, _only(extra, "gguf_file"))
    architecture = next(iter(getattr(config, "architectures", None) or []), "")
    found = next((auto for end, auto in _AUTO_CLASSES.items() if architecture.endswith(end)), None)
    if found is None:
        # T5ForConditionalGeneration and its kin, and what has no head at all.
        knows = type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        found = "AutoModelForSeq2SeqLM" if knows and "ForConditionalGeneration" in architecture else "AutoModel"
    kwargs = {"dtype": _DTYPES[options.dtype], **extra}
    return _from_pretrained(getattr(transformers, found), options.model, source, kwargs)


def _source(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds the model: a .gguf file is named beside its folder."""
    if name.endswith(".gguf"):
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    return name, {}


def _only(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in names}


def _from_pretrained(auto: Any, name: str, source: str, kwargs: dict[str, Any]) -> Any:
    if Path(name).exists():
        return auto.from_pretrained(source, local_files_only=True, **kwargs)
    try:
        # What was downloaded before needs no network, for which attempts may go on for minutes.
        return auto.from_pretrained(source, local_files_only=True, **kwargs)
    except OSError:
        pass
    try:
        return auto.from_pretrained(source, **kwargs)
    except OSError as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise OSError(
            "neither a folder with a model of transformers, nor a name that was downloaded before, and it cannot be "
            f"downloaded now ({first}). Give a folder that save_pretrained wrote, or download it where there is a "
            "network"
        ) from error


def _read(options: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """The documents of a file as token ids, and the ids that its tokenizer calls special."""
    import transformers

    text = sys.stdin.read() if options.text == _STANDARD_STREAM else Path(options.text).read_text(encoding="utf-8-sig")
    source, extra = _source(options.model)
    tokenizer = _from_pretrained(transformers.AutoTokenizer, options.model, source, extra)
    documents = [tokenizer(line)["input_ids"] for line in text.splitlines() if line.strip()]
    documents = [ids for ids in documents if ids]
    if len(documents) < 2:
        raise ValueError(f"--text {options.text}: expected two lines of text or more, got {len(documents)}")
    return documents, list(tokenizer.all_special_ids)
