"""The choice of a backend: order, reasons, warnings, preferences, and what the package says when parts are missing."""

import dataclasses
import importlib.metadata
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import maskops
from maskops import backend, checks, origin
from maskops.backend import BACKENDS, Call, choose


@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test meets each fallback for the first time."""
    monkeypatch.setattr(backend, "_warned", set())


@pytest.fixture(autouse=True)
def a_backend_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a lack is told does not depend on whether this release has one."""
    cpu = BACKENDS["cpu"]
    features = {"bias": "bias", "sinks": "sinks", "dropout": "dropout_p > 0", "dense mask": "masks.dense"}
    lacks = {feature: f"{name} has no CPU kernel in this release" for feature, name in features.items()}
    ops = {**cpu.ops, "attention": dataclasses.replace(cpu.ops["attention"], lacks=lacks)}
    monkeypatch.setitem(BACKENDS, "cpu", dataclasses.replace(cpu, ops=ops))


@pytest.fixture
def with_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the extension is built."""
    monkeypatch.setattr("maskops.extension.reason", lambda: None)


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not."""
    monkeypatch.setattr("maskops.extension.reason", lambda: "the C++ extension was not built: no compiler")
    monkeypatch.setattr("maskops.extension._emulation", None)


def pick(*features: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **keywords: object) -> str:
    return choose("attention", device, dtype, features, **keywords)  # type: ignore[arg-type]


@pytest.mark.usefixtures("with_extension")
def test_order() -> None:
    assert pick() == "cpu"
    assert pick(requested="auto") == "cpu"
    assert pick(requested="reference") == "reference"
    with maskops.use_backend("reference"):
        assert pick() == "reference"
        assert pick(requested="cpu") == "cpu"
        with maskops.use_backend("cpu"):
            assert pick() == "cpu"
        assert pick() == "reference"
    assert pick() == "cpu"


@pytest.mark.usefixtures("with_extension")
def test_fallback_warns_once_per_reason() -> None:
    text = (
        "maskops.attention runs on the reference, plain PyTorch (about 12 MiB). cpu: bias has no CPU kernel in this "
        "release. maskops.use_backend('reference') accepts it silently, use_backend(fallback='error') makes it an "
        "error."
    )
    with pytest.warns(maskops.BackendFallbackWarning, match=f"^{re.escape(text)}$") as caught:
        assert pick("bias", reference_bytes=12 * 2**20) == "reference"
    assert caught[0].filename == __file__
    assert pick("bias", reference_bytes=12 * 2**20) == "reference"
    with pytest.warns(maskops.BackendFallbackWarning, match=r"cpu: it takes float32, bfloat16, float16, not float64\."):
        pick(dtype=torch.float64, reference_bytes=lambda: 100)
    with pytest.warns(maskops.BackendFallbackWarning, match=r"\(about 3 KiB\). cpu: bias has .*, sinks has no CPU"):
        pick("bias", "sinks", reference_bytes=lambda: 3000)
    with pytest.warns(maskops.BackendFallbackWarning, match=r"materialises.*no other backend runs on mps tensors"):
        pick(device="mps")


def test_the_size_is_asked_for_only_when_it_is_said() -> None:
    def never() -> int:
        raise AssertionError("nobody reads this")

    assert pick(requested="reference", reference_bytes=never) == "reference"
    with maskops.use_backend("reference"):
        assert pick("bias", reference_bytes=never) == "reference"


@pytest.mark.usefixtures("with_extension")
def test_named_backend_serves_or_raises() -> None:
    with pytest.raises(
        ValueError,
        match=r"^backend 'cpu' cannot run maskops\.attention: it takes float32, bfloat16, float16, not float64; sinks "
        r"has no CPU kernel in this release$",
    ):
        pick("sinks", dtype=torch.float64, requested="cpu")
    with pytest.raises(ValueError, match=r"it runs on cpu tensors, these are on cuda$"):
        pick(device="cuda", requested="cpu")
    with pytest.raises(ValueError, match=r"cannot run maskops.convolution: it has no convolution$"):
        choose("convolution", "cpu", torch.float32, requested="cpu")


@pytest.mark.usefixtures("with_extension")
def test_fallback_as_an_error() -> None:
    with maskops.use_backend(fallback="error"):
        assert pick() == "cpu"
        with pytest.raises(
            ValueError, match=r"^no fast backend can run maskops\.attention, .* cpu: dropout_p > 0 has no"
        ):
            pick("dropout")
    with maskops.use_backend("cpu", fallback="error"), pytest.raises(ValueError, match=r"cpu: masks.dense has no CPU"):
        pick("dense mask")
    with maskops.use_backend("cpu"), pytest.warns(maskops.BackendFallbackWarning, match=r"cpu: masks.dense has no CPU"):
        assert pick("dense mask") == "reference"


@pytest.mark.usefixtures("without_extension")
def test_without_the_extension() -> None:
    reason = "the C++ extension was not built: no compiler"
    states = maskops.backends()
    assert (states["cpu"], states["cuda"], states["reference"]) == (reason, reason, "available")
    with pytest.warns(maskops.BackendFallbackWarning, match=f"cpu: {re.escape(reason)}"):
        assert pick() == "reference"
    with pytest.raises(ValueError, match=re.escape(reason)):
        pick(requested="cpu")
    # And the call itself works.
    q = torch.randn(1, 2, 5, 4)
    backend._warned.clear()
    with pytest.warns(maskops.BackendFallbackWarning, match=r"\(about [^)]*\)"):
        out = maskops.attention(q, q, q, maskops.masks.causal())
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True), atol=1e-6)


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match=r"^backend is 'gpu': expected one of 'auto', 'cpu', 'triton', 'cuda', 'reference'$"
    ):
        pick(requested="gpu")
    with pytest.raises(ValueError, match=r"^name is 'gpu': expected one of"), maskops.use_backend("gpu"):
        pass
    with pytest.raises(ValueError, match=r"^fallback is 'never': expected 'warn' or 'error'$"):
        with maskops.use_backend(fallback="never"):  # type: ignore[arg-type]
            pass


@pytest.mark.usefixtures("with_extension")
def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    backend._environment.cache_clear()
    selected: list[str] = []
    monkeypatch.setattr("maskops.extension.select_instruction_set", selected.append)
    monkeypatch.setenv("MASKOPS_BACKEND", "reference")
    assert pick() == "reference"
    with maskops.use_backend("cpu"):
        assert pick() == "cpu"
    monkeypatch.setenv("MASKOPS_BACKEND", "cpu:avx2")
    assert pick() == "cpu" and pick() == "cpu"
    assert selected == ["avx2"]
    monkeypatch.setenv("MASKOPS_BACKEND", "reference:avx2")
    with pytest.raises(
        ValueError, match=r"^the environment variable MASKOPS_BACKEND is 'reference:avx2': only cpu takes"
    ):
        pick()
    monkeypatch.setenv("MASKOPS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^the environment variable MASKOPS_BACKEND is 'fast': expected one of"):
        pick()
    backend._environment.cache_clear()


def test_preferences_stay_in_their_thread() -> None:
    seen: list[object] = []

    def look() -> None:
        seen.extend([backend._preference.get(), backend.validating()])

    with maskops.use_backend("reference"), maskops.validate():
        assert backend.validating()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [None, False] and not backend.validating()


@maskops.use_backend("reference")
def decorated() -> str:
    return pick("bias")


def test_as_a_decorator() -> None:
    assert decorated() == "reference" and decorated() == "reference"


def test_every_declaration_has_its_reference() -> None:
    reference = BACKENDS["reference"]
    assert list(BACKENDS)[-1] == "reference" and not reference.devices
    for other in BACKENDS.values():
        for op, declaration in other.ops.items():
            assert set(declaration.dtypes) <= set(reference.ops[op].dtypes)
            assert not reference.refusals(Call(op, "cuda", declaration.dtypes[0], tuple(declaration.lacks)))
            assert all(declaration.lacks.values())


# ---- the package -----------------------------------------------------------------------------------------------------


@pytest.fixture
def namesake(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution called maskops that owns the folder maskops."""
    site = tmp_path_factory.mktemp("site")
    info = site / "maskops-2.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: maskops\nVersion: 2.1.0\n")
    (info / "RECORD").write_text("maskops/__init__.py,,\nmaskops-2.1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.usefixtures("namesake")
def test_namesake_is_detected() -> None:
    repair = f"pip uninstall -y maskops && {origin.reinstall_command()}"
    with pytest.warns(UserWarning, match=re.escape(repair)):
        maskops._warn_about_namesake()


@pytest.mark.parametrize(
    ("direct_url", "requirement"),
    [
        (None, "torch-maskops"),
        ('{"url": "file:///a/check%20out", "dir_info": {}}', "'/a/check out'"),
        ('{"url": "file:///checkout", "dir_info": {"editable": true}}', "--editable /checkout"),
        ('{"url": "ssh://host/maskops.git"}', "ssh://host/maskops.git"),
    ],
)
def test_repairs_install_from_where_the_package_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_url: str | None, requirement: str
) -> None:
    info = tmp_path / "torch_maskops-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-maskops\nVersion: 0.1.0\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert origin.reinstall_command().endswith(f"--no-cache-dir {requirement}")


def test_no_namesake_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        maskops._warn_about_namesake()


def test_old_torch_is_refused() -> None:
    with pytest.raises(
        ImportError, match=r"^maskops needs torch >= 2.10, this is torch 2.9.1\+cu128: pip install --upg"
    ):
        maskops._check_torch("2.9.1+cu128")
    for version in ("2.10.0", "2.13.0a0+git1234", "3.0.0"):
        maskops._check_torch(version)


@pytest.mark.parametrize("missing", ["triton", "numpy"])
def test_imports_without(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None\nimport maskops; print(sorted(maskops.backends()))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "['cpu', 'cuda', 'reference', 'triton']", result.stderr


def test_an_import_leaves_dynamo_alone() -> None:
    """It takes three times as long as everything else together."""
    program = "import torch, sys; before = 'torch._dynamo' in sys.modules; import maskops\nprint(before)\n"
    program += "print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    before, after = result.stdout.split()
    assert after == before, result.stderr


def test_constants_have_the_mark_that_torch_gives_them() -> None:
    def ours() -> int:
        return 1

    def torchs() -> int:
        return 1

    checks.constant_when_compiling(ours)
    torch.compiler.assume_constant_result(torchs)
    assert vars(ours) == vars(torchs) != {}


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_for_devices_never_serves_processors_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = dataclasses.replace(
        BACKENDS["cpu"], name=name, devices=("cuda",), unavailable=lambda: None, on_host=lambda: True
    )
    monkeypatch.setitem(BACKENDS, name, there)
    assert pick() == "cpu"
    monkeypatch.setitem(BACKENDS, name, dataclasses.replace(there, on_host=lambda: False))
    with pytest.raises(ValueError, match="it runs on cuda tensors, these are on cpu"):
        pick(requested=name)


def test_triton_is_refused_by_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may have cards of two generations: what is known of one says nothing of the other."""
    backend._capability_reason.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backend, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (7, 5))[device])
    found = []
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        found.append(BACKENDS["triton"].unavailable())
    backend._capability_reason.cache_clear()
    assert found == [None, "its kernels need compute capability 8.0, this device has 7.5", None]


def test_public_names() -> None:
    assert all(getattr(maskops, name, None) is not None for name in maskops.__all__)
    assert {"attention", "varlen_attention", "masks", "testing", "use_backend", "validate", "backends"} <= set(
        maskops.__all__
    )


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [("3.6.0", "2.3.9", True), ("3.6.0", "2.4.0", False), ("3.9.0", "2.5.5", True), ("3.6.0+git1", "2.5.5", False)],
)
def test_an_interpreter_that_does_not_run_says_so(
    triton: str, numpy: str, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    reason = backend.interpreter_problem.__wrapped__()
    assert reason == (None if works else f"the interpreter of Triton {triton} needs numpy < 2.4, this is numpy {numpy}")
