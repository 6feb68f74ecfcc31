"""Tests on a second device that is none; in a process of their own, since PyTorch counts its devices only once."""

from collections.abc import Iterator

import pytest
import torch

from tests import fake_device


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """Registers the device before the first backward pass of this process."""
    fake_device.register()


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The fake device, for one test."""
    with fake_device.fake_device() as found:
        yield found
