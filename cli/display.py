"""The display of a run that goes on: a live bar on a terminal, plain lines otherwise."""

import logging
import time
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from offsite.cli.heartbeat import Heartbeat
from offsite.coordinator.job.round_record import RoundRecord

logger = logging.getLogger("offsite")


def round_text(record: RoundRecord, planned: int) -> str:
    """Returns one line about a finished round."""
    verdict = "taken over" if record.accepted else "NOT taken over"
    loss = "not finite" if record.public_loss is None else f"{record.public_loss:.4f}"
    how = "sites' updates seen one by one" if record.individuals else "sites summed"
    return (
        f"round {record.round} of {planned}: {len(record.members)} {how}, "
        f"public loss {loss} nats, {verdict}, {record.seconds:.0f} s"
    )


class PlainDisplay(AbstractContextManager["PlainDisplay"]):
    """One log line per event, for files, pipes and CI, and a line now and then while nothing happens."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._heartbeat = Heartbeat("start", self._log)

    def __enter__(self) -> "PlainDisplay":
        """Begins to watch for long silences."""
        self._heartbeat.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leaves nothing behind."""
        self._heartbeat.__exit__(kind, error, trace)

    def step(self, text: str) -> None:
        """Logs the current step."""
        self._say(text)

    def call(self, stage: str, site: str) -> None:
        """Logs which site trains; the short stages pass in silence."""
        if stage == "train":
            self._say(f"train at {site}")

    def round(self, record: RoundRecord, planned: int) -> None:
        """Logs how a round ended."""
        self._say(round_text(record, planned))

    def notice(self, text: str) -> None:
        """Logs a sentence that a person should see at once."""
        self._say(text)

    def _say(self, text: str) -> None:
        self._log(text)
        self._heartbeat.now(text)

    def _log(self, text: str) -> None:
        logger.info("%6.0f s  %s", time.monotonic() - self._began, text)


class LiveDisplay(AbstractContextManager["LiveDisplay"]):
    """A rich progress bar over the rounds, with the current step beside it."""

    def __init__(self, console: Console, rounds: int) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("rounds"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("start", total=rounds)

    def __enter__(self) -> "LiveDisplay":
        """Starts drawing."""
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stops drawing and leaves the last state on the screen."""
        self._progress.stop()

    def step(self, text: str) -> None:
        """Shows the current step."""
        self._progress.update(self._task, description=text)

    def call(self, stage: str, site: str) -> None:
        """Shows which site is at which stage."""
        self._progress.update(self._task, description=f"{stage} at {site}")

    def round(self, record: RoundRecord, planned: int) -> None:
        """Moves the bar and prints the round's line above it."""
        self._progress.console.print(round_text(record, planned), highlight=False)
        self._progress.update(self._task, completed=record.round)

    def notice(self, text: str) -> None:
        """Prints a sentence above the bar, where it stays; a site wrote parts of it, so nothing in it is markup."""
        self._progress.console.print(text, highlight=False, markup=False)
