"""Spreads compilations over processes: a compiler that crashes or hangs costs one kernel, not the run."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maskops.cli.bench.compilation.result import Result, from_json

Key = tuple[str, str]
"""Architecture and name of a compilation."""

LIMIT = 240.0
"""Seconds for one kernel."""

COMMAND = (sys.executable, "-m", "maskops.cli.bench.compilation.worker")


class WorkerError(Exception):
    """A worker process ended before it could say what there is to compile; the message is the end of what it said."""


class Worker:
    """One process.

    Attributes:
        greeting: Its first line: the version of Triton and the declared compilations.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._said: list[str] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        line = self._answer(LIMIT)
        if not line:
            raise WorkerError(self.last_words())
        self.greeting: dict[str, Any] = json.loads(line)

    def compile(self, key: Key, limit: float) -> Result | None:
        """The result, None if the process ended or was ended after `limit` seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(key) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._answer(limit)
        return from_json(json.loads(line)) if line else None

    def last_words(self) -> str:
        """The last line that it wrote to standard error, and its exit status."""
        self.close()
        said = next((line.strip() for line in reversed(self._said) if line.strip()), "nothing")
        return f"exit status {self._process.returncode}, it said: {said[:300]}"

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        # The end of its input ends it; what a broken pipe still holds is not wanted.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(10)
        self._process.stdout.close()

    def _answer(self, limit: float) -> str:
        assert self._process.stdout is not None
        # Ends the process when the time is over, so that reading its output ends too.
        guard = threading.Timer(limit, self._process.kill)
        guard.start()
        try:
            return self._process.stdout.readline()
        finally:
            guard.cancel()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._said = [*self._said[-50:], line]


def environment(triton: Path | None, cache: Path | None) -> dict[str, str]:
    """What a worker needs: kernels that are compiled, the Triton that was asked for, a place to keep what it makes."""
    path = os.pathsep.join(part for part in (str(triton or ""), os.environ.get("PYTHONPATH", "")) if part)
    found = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    if path:
        found["PYTHONPATH"] = path
    if cache is not None:
        found["TRITON_CACHE_DIR"] = str(cache)
    return found


def compile_all(
    chosen: Callable[[Key], bool],
    *,
    everyday: bool = False,
    environment: Mapping[str, str],
    processes: int,
    limit: float = LIMIT,
    command: Sequence[str] = COMMAND,
    on_result: Callable[[Result, int, int], None] = lambda result, done, total: None,
) -> tuple[str, list[Result]]:
    """Compiles what `chosen` accepts of what the ops declare.

    Args:
        chosen: Takes the architecture and the name of a compilation.
        everyday: Leave out what is not compiled for every change.
        environment: Added to that of this process.
        processes: Compilations at a time.
        limit: Seconds for one kernel.
        command: The worker.
        on_result: Called with each result, how many there are by now and how many there will be.

    Returns:
        The version of Triton, and the results in the order of declaration.

    Raises:
        WorkerError: The workers do not start.
    """
    first = Worker(command, environment)
    keys: list[Key] = [
        (architecture, name)
        for architecture, name, is_everyday in first.greeting["declared"]
        if (is_everyday or not everyday) and chosen((architecture, name))
    ]
    waiting: queue.SimpleQueue[Key] = queue.SimpleQueue()
    for key in keys:
        waiting.put(key)
    results: dict[Key, Result] = {}
    lock = threading.Lock()

    def serve(worker: Worker | None) -> None:
        while True:
            try:
                key = waiting.get_nowait()
            except queue.Empty:
                break
            worker = worker or Worker(command, environment)
            began = time.perf_counter()
            result = worker.compile(key, limit)
            if result is None:
                took = time.perf_counter() - began
                why = f"took more than {limit:.0f} s" if took >= limit else f"ended: {worker.last_words()}"
                worker.close()
                worker, result = None, Result(key[1], key[0], error=f"the compiler {why}", seconds=took)
            with lock:
                results[key] = result
                on_result(result, len(results), len(keys))
        if worker is not None:
            worker.close()

    threads = [threading.Thread(target=serve, args=(first if index == 0 else None,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return str(first.greeting["triton"]), [results[key] for key in keys if key in results]
