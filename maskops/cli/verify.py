"""`python -m maskops verify`: runs the public cases on every backend of this machine."""

import argparse
import sys

import maskops
from maskops import testing
from maskops.backend import BACKENDS


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declares the options."""
    parser = commands.add_parser("verify", help="check every backend that runs here against the float64 oracle")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--backend", choices=tuple(BACKENDS), help="one backend alone, also one that is emulated here")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints one line a backend and every failed check; 0 if there is none."""
    failures: list[str] = []
    for name in BACKENDS if options.backend is None else (options.backend,):
        state = maskops.backends()[name]
        if options.backend is None and state == "available" and not BACKENDS[name].is_at_home(options.device):
            state = f"emulated on {options.device} tensors, which takes minutes: --backend {name}"
        print(f"{name}: {state if state != 'available' else _verify(name, options.device, failures)}")
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def _verify(backend: str, device: str, failures: list[str]) -> str:
    cases = testing.cases("attention", features=True)
    served = [case for case in cases if not testing.refusals(backend, case, device)]
    checks = 0
    for case in served:
        report = testing.check(testing.attention_on(backend, case), case, device=device)
        checks += len(report.findings)
        if not report.passed:
            failures.append(str(report))
    refused = len(cases) - len(served)
    return f"{len(served)} cases of attention, {checks} checks, {refused} cases refused with a reason"
