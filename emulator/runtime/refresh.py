"""Refresh between rounds: a bias at each block's end aligns the middle to the full model with the tuned adapter.

Two streams of the same public examples run side by side, as in `emulator/calibration/draft.py`, so that each block sees
the error of the block before and makes up for it.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from offsite.emulator.calibration.least_squares import centred, rows, weighted_error
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.calibration.stream import Hidden, Run, Stream, begin
from offsite.emulator.runtime.refresh_state import Frame, Refresh, Refreshable
from offsite.emulator.structure.identity_block import bind


def plain_of(model: Any) -> nn.Module:
    """Returns a model under its own module names; an attached adapter stays inside."""
    plain: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    return plain


def refreshed(full: nn.Module, emulator: nn.Module, frame: Frame, biases: Refreshable, run: Run) -> Refresh:
    """Moves an emulator's biases in place, each only if that lessens its segment's error, and returns their values.

    A bias moves by the weighted mean of the segment's error (`least_squares.centred`). The emulator's stream begins at
    its own embeddings, as at a site, so that the error of the embeddings is corrected as well.

    Args:
      full: the full model with the adapter plugged in, float32.
      emulator: the emulator with the adapter that was tuned on it and the biases of the last refresh, float32.
      frame: the package's frame.
      biases: the emulator's biases that may move.
      run: function that calls a model with public examples, the same examples each time and nothing else between them,
        so that both streams consist of the same calls.

    Raises:
      UnsupportedModel: the public examples never call a block.
    """
    original, student = plain_of(full), plain_of(emulator)
    stream = begin(MemorySource(original), frame.tower, frame.alone, lambda _: run(full))
    signature = inspect.signature(type(original.get_submodule(frame.tower[0])).forward)
    entered = _entering(student.get_submodule(frame.tower[0]), signature, lambda: run(emulator))
    target = _through(stream, original, frame.before, stream.inputs)
    hidden = _through(stream, student, frame.before, entered)
    for segment in frame.segments:
        target = _through(stream, original, segment.paths, target)
        leaving = partial(_through, stream, student, segment.paths, hidden)
        hidden = leaving()
        inside = [bias for name, bias in biases.tensors.items() if name.startswith(f"{segment.head}.")]
        for bias in inside:
            before = bias.detach().clone()
            moved = centred(before, rows(target), rows(hidden)).half().float()  # as it will be sent
            bias.data.copy_(moved)
            after = leaving()
            if torch.isfinite(moved).all() and _less(target, after, hidden):
                hidden = after
            else:
                bias.data.copy_(before)
    return biases.values()


def _less(target: Hidden, after: Hidden, before: Hidden) -> bool:
    return bool(weighted_error(rows(target), rows(after)) < weighted_error(rows(target), rows(before)))


def _through(stream: Stream, model: nn.Module, paths: tuple[str, ...], hidden: Hidden) -> Hidden:
    for path in paths:
        hidden = stream.run(model.get_submodule(path), path, hidden)
    return hidden


def _entering(block: nn.Module, signature: inspect.Signature, run: Callable[[], object]) -> Hidden:
    """Returns the hidden states that enter a block, one float32 tensor for each call of the model."""
    seen: Hidden = []

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next(iter(bind(signature, block, args, kwargs).values()))
        seen.append(hidden.detach().float())

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return seen
