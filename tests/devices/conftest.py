"""Tests on a second device that is none; in a process of their own, since PyTorch counts its devices only once."""

import os

import pytest

from tests import fake_device

# Only `make test` gives these tests a process of their own; in any other, a backward pass may have come first.
ASKED = os.environ.get("OFFSITE_FAKE_DEVICE") or fake_device.REAL
collect_ignore_glob = [] if ASKED else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """Registers the device before the first backward pass of this process."""
    fake_device.register()
