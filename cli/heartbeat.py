"""Lines that say what a command still does, so that a long silence does not look like a program that hangs."""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

import typer

FIRST_SECONDS = 15.0  # silence after which the first line comes; each further line takes twice as long
MOST_SECONDS = 600.0


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)


class Heartbeat(AbstractContextManager["Heartbeat"]):
    """Says again what goes on, as long as nothing else is said.

    Args:
      text: what goes on now, for example `read the records`.
      say: function that shows one line.
      first: silence in seconds before the first line; above 0.
      clock: function that returns seconds that only go up.
    """

    def __init__(
        self,
        text: str,
        say: Callable[[str], None] = _to_stderr,
        *,
        first: float = FIRST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text, self._say, self._first, self._clock = text, say, first, clock
        self._pause, self._since, self._over = first, clock(), False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Begins to watch."""
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends; no line comes after this."""
        with self._news:
            self._over = True
            self._news.notify()
        self._thread.join()

    def now(self, text: str) -> None:
        """Takes what goes on from now on; the silence begins anew."""
        with self._news:
            self._text, self._pause, self._since = text, self._first, self._clock()
            self._news.notify()

    def _watch(self) -> None:
        with self._news:
            while not self._over:
                if self._news.wait(self._pause):
                    continue
                self._say(f"still: {self._text} ({self._clock() - self._since:.0f} s so far)")
                self._pause = min(2 * self._pause, MOST_SECONDS)
