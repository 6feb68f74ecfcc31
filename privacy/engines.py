"""The table of engines: ways to get one gradient per example, in the order in which `choose_engine` tries them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from functools import partial

from torch import nn

from offsite.privacy.bookkeeping import BookkeepingEngine
from offsite.privacy.hooks import HooksEngine
from offsite.privacy.loop import LoopEngine
from offsite.privacy.per_example import Engine


def _opened(make: Callable[[nn.Module], Engine]) -> Callable[[nn.Module], AbstractContextManager[Engine]]:
    """Returns a function that opens an engine on a model until the end of a `with` block."""
    return lambda model: closing(make(model))


ENGINES: dict[str, Callable[[nn.Module], AbstractContextManager[Engine]]] = {
    "bookkeeping": _opened(partial(BookkeepingEngine, recompute=False)),
    "slot": _opened(partial(BookkeepingEngine, recompute=True)),
    "hooks": _opened(HooksEngine),
    "loop": _opened(LoopEngine),
}
