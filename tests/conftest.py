"""Session settings: memory that was never written holds NaN, numbers are seeded, skips are counted by reason."""

import ctypes
import gc
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator

import numpy
import pytest
import torch

from maskops import extension
from maskops.backend import planner
from tests import interpreter, placement, served
from tools import emulation

_M_PERTURB = -6


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares where the tests that are for every device make their tensors."""
    parser.addoption("--device", default="cpu", help="run the tests marked `devices`, and no others, on this device")
    parser.addoption("--no-emulation", action="store_true", help="leave out the CUDA kernels as host code")
    parser.addoption("--precompile", action="store_true", help="on a device: compile Triton kernels, launch none")


def pytest_configure(config: pytest.Config) -> None:
    """Makes mistakes loud."""
    # Outputs that a kernel does not write hold NaN (or the largest integer) instead of what happened to be there.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    # What the extension allocates, through torch's stable interface or itself, is beyond that switch. glibc fills what
    # it hands out with the complement of the low byte of this number (which must not be 0 as a whole): 0xff, NaN.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_PERTURB, 0x100)
    # Inductor compiles in this process: its pool of workers would import torch once more for a handful of kernels.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Triton's interpreter computes with numpy, which warns of infinities and NaN that are meant.
    numpy.seterr(all="ignore")
    interpreter.hasten()
    _keep_constants_of_sources_out_of_examples()
    # Compilers make many objects that stay: by default each of them is looked at again and again.
    gc.set_threshold(20_000, 20, 100)
    # On the small shapes of tests a second thread costs more than it brings; what depends on threads sets their number.
    torch.set_num_threads(1)
    placement.configure(config)
    # On processors the CUDA kernels run as host code. Workers load what the process that started them has built.
    is_wanted = config.getoption("device") == "cpu" and not config.getoption("no_emulation")
    if is_wanted and extension.reason() is None:
        reason = None if hasattr(config, "workerinput") else emulation.build()
        if reason is None and emulation.library().exists():
            extension.load_cuda_emulation(emulation.library())


def _keep_constants_of_sources_out_of_examples() -> None:
    """Hypothesis parses all of the package for the numbers in it, and again whenever a module is imported.

    That takes seconds in each process, and would make the examples of a test depend on what ran before it.
    """
    if importlib.util.find_spec("hypothesis") is not None:
        from hypothesis.internal.conjecture import providers

        providers._get_local_constants = lambda: providers._local_constants


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The numbers of a test are the same in every run, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """On the kernels of the processor, and nothing else."""
    with served.running_on("cpu"):
        yield


@pytest.fixture(params=["torch", "op"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """For tests of plans: by torch operations and by the operator, which state the same meaning twice."""
    if request.param == "torch":
        monkeypatch.setattr("maskops.lowering.planner", lambda device: None)
    elif planner("cpu") is None:
        pytest.skip("the C++ extension is not built, so there is no operator")
    return str(request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Chooses the tests of another device."""
    placement.place(config, items)


def pytest_collection_finish() -> None:
    """Benchmarks collect garbage before they measure: not, each time, all that a session has imported."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same of what the tests of a file have imported and compiled, which benchmarks of the next would look at."""
    if nextitem is not None and nextitem.path != item.path:
        gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # libraries complain about what is alive when Python ends


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many tests each reason has skipped."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("skips by reason")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5d}  {reason}")


@pytest.fixture(params=extension.instruction_sets() if extension.reason() is None else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of this machine, with its kernels for the length of a test."""
    before = extension.instruction_set()
    extension.select_instruction_set(request.param)
    yield str(request.param)
    extension.select_instruction_set(str(before))
