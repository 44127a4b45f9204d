"""Triton's interpreter without the work that it does in vain: the suite spends most of its time in there.

Nothing that a kernel computes changes:

- sums and products of integers are computed once more in 64 bits to notice an overflow, and without the debug option
  (which the interpreter never has) nobody looks at the result;
- each call of a function of a kernel replaces the functions of ``triton.language`` once more, as the launch has done;
- the dtypes of numpy are put into a dictionary anew for each look into it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any


def hasten() -> None:
    """Does so from now on, in this process; without Triton, or where kernels are not interpreted, nothing."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton

    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)


def _by_name(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``interpreter._get_np_dtype``, which looks at nothing but the type of an element."""
    known: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = dtype_of(dtype)
        return known[name]

    return look_up


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``interpreter._patch_lang``, which a launch calls first and restores last, and functions call in between."""
    patched: set[int] = set()  # modules of the running launch, triton.language and triton.language.core
    modules: dict[int, frozenset[int]] = {}

    def modules_of(function: Any) -> frozenset[int]:
        # By the dictionary of globals, which lives as long as its module.
        if (found := modules.get(id(function.__globals__))) is None:
            import triton.language as tl

            found = frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
            modules[id(function.__globals__)] = found
        return found

    def patch_once(function: Any) -> Any:
        wanted = modules_of(function)
        if patched and wanted <= patched:
            return None  # a function within a launch, which does not look at the scope
        scope = patch(function)
        if not patched:
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        patched.update(wanted)
        return scope

    return patch_once
