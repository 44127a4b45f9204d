"""A progress bar on stderr, without a dependency; silent when stderr is not a terminal."""

import sys
import time
from types import TracebackType
from typing import TextIO

_WIDTH = 28


class Progress:
    """Counts the estimated seconds of a run, so that the bar moves evenly whatever the steps cost.

    Args:
        total: Seconds that the whole run is expected to take.
        stream: Where to draw; standard error by default.
        enabled: Draw or not; by default only on a terminal.
    """

    def __init__(self, total: float, stream: TextIO | None = None, enabled: bool | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._enabled = self._stream.isatty() if enabled is None else enabled
        self._total = max(total, 1e-9)
        self._done = 0.0
        self._label = ""
        self._started = time.perf_counter()
        self._drawn = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def expect(self, seconds: float) -> None:
        """Corrects the expected total, once more is known."""
        self._total = max(seconds, 1e-9)

    def stage(self, label: str) -> None:
        """Names what is running now."""
        self._label = label
        self._draw(force=True)

    def advance(self, seconds: float) -> None:
        """Adds `seconds` of the expected total to what is done."""
        self._done += seconds
        self._draw(force=False)

    def _draw(self, force: bool) -> None:
        now = time.perf_counter()
        if not self._enabled or not (force or now - self._drawn > 0.1):
            return
        self._drawn = now
        share = min(self._done / self._total, 1.0)
        filled = round(share * _WIDTH)
        elapsed = now - self._started
        self._stream.write(
            f"\r\x1b[K{'█' * filled}{'░' * (_WIDTH - filled)} {100 * share:3.0f} %  {elapsed:4.0f} s  {self._label}"
        )
        self._stream.flush()
