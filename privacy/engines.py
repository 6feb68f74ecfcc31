"""The table of engines: ways to get one gradient per example, in the order in which they are tried."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from privacy.bookkeeping import BookkeepingEngine
from privacy.hooks import HooksEngine
from privacy.loop import LoopEngine
from privacy.per_example import Engine

Opened = Callable[[nn.Module], AbstractContextManager[Engine]]


@contextmanager
def _bookkeeping(model: nn.Module) -> Iterator[Engine]:
    engine = BookkeepingEngine(model, recompute=False)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _slot(model: nn.Module) -> Iterator[Engine]:
    engine = BookkeepingEngine(model, recompute=True)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _hooks(model: nn.Module) -> Iterator[Engine]:
    engine = HooksEngine(model)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _loop(model: nn.Module) -> Iterator[Engine]:
    engine = LoopEngine(model)
    try:
        yield engine
    finally:
        engine.close()


ENGINES: dict[str, Opened] = {"bookkeeping": _bookkeeping, "slot": _slot, "hooks": _hooks, "loop": _loop}
