"""Lines in a long silence, under a short first pause; no test waits for more than the lines that it asks for."""

import queue
import threading
from itertools import count

import pytest

from offsite.cli.display import PlainDisplay
from offsite.cli.heartbeat import Heartbeat

SECONDS = 60.0  # a bound against hanging


def test_a_silence_is_filled_with_what_goes_on() -> None:
    said, seconds = queue.Queue[str](), count(0, 10)
    with Heartbeat("read the records", said.put, first=0.001, clock=lambda: float(next(seconds))) as heartbeat:
        assert said.get(timeout=SECONDS) == "still: read the records (10 s so far)"
        assert said.get(timeout=SECONDS) == "still: read the records (20 s so far)"
        heartbeat.now("train at north")
        while "north" not in (line := said.get(timeout=SECONDS)):
            assert "read the records" in line
        assert line.startswith("still: train at north (")
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_lines_become_rarer() -> None:
    said = queue.Queue[str]()
    with Heartbeat("wait for the sites", said.put, first=0.001) as heartbeat:
        for _ in range(3):
            said.get(timeout=SECONDS)
        assert heartbeat._pause >= 0.004
        heartbeat.now("round 1")
        assert heartbeat._text == "round 1"


def test_an_error_ends_the_lines() -> None:
    with pytest.raises(ValueError, match="broken"), Heartbeat("read", lambda line: None):
        raise ValueError("broken")
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_a_plain_display_says_each_step_and_watches_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "offsite")
    with PlainDisplay() as display:
        display.step("load the full model")
        assert display._heartbeat._text == "load the full model"
        display.call("train", "north")
        assert display._heartbeat._text == "train at north"
    assert [line.split(" s  ")[1] for line in caplog.messages] == ["load the full model", "train at north"]
