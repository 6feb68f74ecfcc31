"""Measures how far the gradients of the end blocks turn when other modules replace blocks of the middle."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from offsite.emulator.calibration.middle import Middle
from offsite.emulator.structure.identity_block import skipped
from offsite.errors import RangeError

# Sampled entries of one matrix, evenly spaced: a cosine over hundreds of thousands is accurate to three digits.
SAMPLE = 1 << 18


class SlotGradients:
    """The full model's gradient of the public loss with respect to the end blocks' matrices, as a reference.

    The principle is GradOT's (ACL 2025): what an adapter in a block learns follows from the gradient at the block.

    Args:
      middle: the full model's middle, with losses on public examples.
    """

    def __init__(self, middle: Middle) -> None:
        self._middle = middle
        self._ends = middle.geometry.ends(middle.source.model)
        middle.source.keep(self._ends)
        self._full = self._gradient()

    def damage(self, gone: tuple[str, ...]) -> float:
        """Returns 1 - cosine of the gradient without some blocks, in 0..2; 0 is no change, 2 the opposite."""
        model, forms = self._middle.source.model, self._middle.stream.forms
        return self.damage_of({path: skipped(model.get_submodule(path), forms[path]) for path in gone})

    def damage_of(self, stand_ins: Mapping[str, nn.Module]) -> float:
        """Returns 1 - cosine of the gradient with stand-ins for some blocks, by path; 2 for a gradient of 0 or NaN."""
        with _standing(self._middle.source.model, stand_ins):
            try:
                return 1 - float(self._full @ self._gradient())
            except RangeError:
                return 2.0

    def _gradient(self) -> Tensor:
        """Returns the gradient as one float32 vector of length 1."""
        model = self._middle.source.model
        blocks = [model.get_submodule(path) for path in self._ends]
        trained = [p for block in blocks for p in block.parameters() if p.dim() >= 2]
        total: list[Tensor | None] = [None] * len(trained)
        with _requiring(trained), self._middle.source.passing(), torch.enable_grad():
            chunks = self._middle.losses(model)
            for loss in (chunks,) if isinstance(chunks, Tensor) else chunks:
                pieces = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
                sampled = [piece.reshape(-1)[:: max(1, piece.numel() // SAMPLE)].float() for piece in pieces]
                total = [new if old is None else old + new for old, new in zip(total, sampled, strict=True)]
        flat = torch.cat([part for part in total if part is not None])
        norm = float(flat.norm())
        if not 0 < norm < float("inf"):
            raise RangeError(
                f"gradient_norm={norm}: it must be finite and above 0; check the loss and the public examples"
            )
        return flat / norm


@contextmanager
def _standing(model: nn.Module, stand_ins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Lets other modules stand in the places of some blocks within the context."""
    originals = {path: model.get_submodule(path) for path in stand_ins}
    try:
        for path, module in stand_ins.items():
            _hand_on_hooks(originals[path], module)
            model.set_submodule(path, module)
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)


def _hand_on_hooks(block: nn.Module, stand_in: nn.Module) -> None:
    """Gives a stand-in the forward hooks of its block, by which transformers collects hidden states for other parts."""
    if not stand_in._forward_hooks:
        for hook in block._forward_hooks.values():
            stand_in.register_forward_hook(hook)


@contextmanager
def _requiring(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Lets the parameters require a gradient within the context."""
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
