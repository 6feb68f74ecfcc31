"""Similarity of emulator and full model, block by block: how much an observer of the emulator learns of the model."""

from torch import nn
from torch.nn import functional

from offsite.emulator.calibration.least_squares import rows
from offsite.emulator.calibration.middle import Middle
from offsite.emulator.calibration.source import MemorySource
from offsite.emulator.calibration.stream import begin, private


def similarity(middle: Middle, emulator: nn.Module) -> dict[str, float]:
    """Returns the mean cosine of each block's outputs in the emulator and in the full model.

    Args:
      middle: the full model's middle, with public examples.
      emulator: the loaded package, float32.

    Returns:
      The cosine by block path, in -1..1; with 1 the emulator computes the same as the model up to this block. Hidden
      states are centred first, since most of them share a large part that says nothing.
    """
    cosines: dict[str, float] = {}
    mine = theirs = middle.stream.inputs
    student = middle.stream
    if middle.apart and middle.calibration is not None:
        student = begin(MemorySource(emulator), middle.tower, (), middle.calibration.run, apart=True)
    for path in middle.tower:
        mine, theirs = student.entering(path, mine), middle.stream.entering(path, theirs)
        with middle.source.open(path) as block:
            theirs = middle.stream.run(private(block), path, theirs)
        mine = student.run(emulator.get_submodule(path), path, mine)
        left, right = rows(mine), rows(theirs)
        left, right = left - left.mean(0), right - right.mean(0)
        cosines[path] = float(functional.cosine_similarity(left, right, dim=-1).mean())
    return cosines
