"""Checks of an emulator on random inputs: blocks must mix, outputs must differ, no gradient may copy one input.

Weights alone do not show every trap: a product of two innocent matrices may be the identity. So the blocks are run, and
each token's share in the gradients of the slots' layers is measured. The gradient of any adapter on a layer is a linear
map of the pairs (input, output gradient) that are measured here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offsite.adapter.targets import is_linear
from offsite.emulator.package.manifest import Manifest
from offsite.emulator.structure.geometry import slot_paths
from offsite.emulator.vetting.block_checks import block_checks, changes_of, quiet
from offsite.emulator.vetting.limits import Check, VettingThresholds
from offsite.emulator.vetting.random_inputs import EXAMPLES, Inputs, no_lasting_hooks, random_inputs
from offsite.emulator.vetting.weight_checks import SMALLEST, few, participation
from offsite.errors import UnsupportedModel

WITHOUT_LOGITS = ("encoder", "diffusion")  # kinds of models whose outputs do not score labels


@dataclass
class Pass:
    """One layer in one pass.

    Attributes:
      name: path of the layer.
      inputs: inputs of the layer, float32 (examples, tokens, in).
      gradients: gradients of the layer's outputs, float32 (examples, tokens, out).
    """

    name: str
    inputs: Tensor
    gradients: Tensor


def activation_checks(
    model: nn.Module, manifest: Manifest, blocks: tuple[str, ...], limits: VettingThresholds, generator: torch.Generator
) -> Iterator[Check]:
    """Yields the checks of blocks, outputs and gradients on random inputs; leaves the model unchanged.

    Args:
      model: the loaded emulator, before any adapter.
      manifest: the package's manifest.
      blocks: paths of the blocks that run.
      limits: the thresholds.
      generator: generator of the random inputs and labels.

    Raises:
      UnsupportedModel: the model does not run on its own kind of input.
    """
    inputs = random_inputs(model, generator)
    slots, tower = slot_paths(model, manifest.geometry)
    output, seen = _run(model, inputs, blocks)
    changes = changes_of(seen)
    yield from block_checks(seen, changes, limits)
    yield from _output_checks(output, limits)
    yield from _context_checks(model, inputs, tower, limits, quiet(seen, changes))
    yield from gradient_checks(
        _passes(model, inputs, slots, generator, logits=manifest.auto not in WITHOUT_LOGITS),
        limits,
        everywhere=output.dim() >= 3,
    )


def forward_checks(
    model: nn.Module,
    blocks: tuple[str, ...],
    tower: tuple[str, ...],
    limits: VettingThresholds,
    generator: torch.Generator,
) -> Iterator[Check]:
    """Yields the checks that need no gradient; they also hold for a model with an adapter at its start."""
    inputs = random_inputs(model, generator)
    output, seen = _run(model, inputs, blocks)
    changes = changes_of(seen)
    yield from block_checks(seen, changes, limits)
    yield from _output_checks(output, limits)
    yield from _context_checks(model, inputs, tower, limits, quiet(seen, changes))


def gradient_checks(passes: list[Pass], limits: VettingThresholds, *, everywhere: bool) -> Iterator[Check]:
    """Yields the checks of the slots' layers: one token's share of a gradient, and how mixed the inputs are."""
    if not passes:
        raise UnsupportedModel("vetting dense layers in slots=0: no gradient can be checked; use another model")
    norms = torch.stack([p.gradients.square().sum((1, 2)) * p.inputs.square().sum((1, 2)) for p in passes]).sqrt()
    for layer, norm in zip(passes, norms, strict=True):
        dead = float((norm == 0).float().mean()) if torch.isfinite(norm).all() else float("nan")
        yield Check("dead_gradients", layer.name, dead, limits.dead_gradients, "nothing but the trap would be trained")
    for layer in passes:
        yield from _layer_checks(layer, limits, everywhere=everywhere)


def _layer_checks(layer: Pass, limits: VettingThresholds, *, everywhere: bool) -> Iterator[Check]:
    inputs = layer.inputs.norm(dim=2)
    tokens = inputs * layer.gradients.norm(dim=2)
    if everywhere:  # an honest head that reads one pooled token gives this token the whole gradient
        share = tokens.amax(1) / tokens.sum(1).clamp_min(1e-30)
        yield Check(
            "token_share", layer.name, float(share.median()), limits.token_share, "its gradient is one token's copy"
        )
    # An output's row of the gradient is a sum over all tokens; in a bin or a latch the row holds a single token. In an
    # honest model a loud token drowns all rows now and then; a trap keeps many tokens, each in rows of its own.
    rows = inputs[:, :, None] * layer.gradients.abs()
    of_all = _sole(rows.flatten(0, 1)[None])
    alive = max(int(of_all.alive.sum()), 1)
    # A head that reads one token of each example leaves the gradient to as many tokens as there are examples.
    bound = max(limits.single_rows, (EXAMPLES + 0.5) / alive)
    alone = {"single_rows": (len(of_all.tokens.unique()) / alive, bound)}
    if everywhere:
        in_each = _sole(rows)
        share = float((in_each.alone.sum(1) / in_each.alive.sum(1).clamp_min(1)).median())
        alone["single_in_example"] = (share, limits.single_rows)
    for name, (value, limit) in alone.items():
        yield Check(name, layer.name, value, limit, "rows of the gradient hold one token each")
    for what, side in (("inputs", layer.inputs), ("gradients", layer.gradients)):
        flat = side.flatten(0, 1)
        flat = flat[flat.square().sum(1) > 0]
        if min(flat.shape) >= SMALLEST:
            mixed = float(participation(flat).median())
            bound = few(limits.least_mixed, flat)
            yield Check(f"least_mixed_{what}", layer.name, mixed, bound, "they are one-hot codes", least=True)


class _Sole(NamedTuple):
    """The rows of a gradient that hold a single token.

    Attributes:
      alive: True for a row that is not zero, bool (examples, rows).
      alone: True for a row that one token makes up, bool (examples, rows).
      tokens: number of that token, for each row that is alone, int64.
    """

    alive: Tensor
    alone: Tensor
    tokens: Tensor


def _sole(shares: Tensor) -> _Sole:
    """Returns the rows with a single token, from each token's share in each row, (examples, tokens, rows)."""
    whole = shares.sum(1)
    largest, which = shares.max(1)
    alive = whole > 0
    alone = (largest > 0.8 * whole) & alive
    return _Sole(alive, alone, which[alone])


def _output_checks(output: Tensor, limits: VettingThresholds) -> Iterator[Check]:
    flat = output.float().flatten(1)
    finite = float(torch.isfinite(flat).all())
    yield Check("least_finite", "output", finite, 1.0, "an activation is not finite", least=True)
    scale = flat.norm(dim=1).mean().clamp_min(1e-30)
    distances = torch.pdist(flat)
    # Among 8 single numbers two are alike by chance, in one draw of a hundred; a quarter of the pairs only in a trap.
    nearest = len(distances) // 4 if flat.shape[1] < SMALLEST else 1
    apart = float(distances.kthvalue(nearest).values / scale)
    yield Check("least_apart", "output", apart, limits.least_apart, "different inputs give one output", least=True)
    if output.shape[-1] >= SMALLEST:
        sure = float(output.float().softmax(-1).amax(-1).median())
        yield Check("sureness", "output", sure, limits.sureness, "it is sure of noise, and its gradients are one-hot")


def _context_checks(
    model: nn.Module, inputs: Inputs, tower: tuple[str, ...], limits: VettingThresholds, scale: float
) -> Iterator[Check]:
    """Changes the first half of the tokens: the hidden states of the unchanged half must move.

    What they move is measured against the model's own changes, from `quiet`, since attention is a part of a change.
    Images are not checked. If images come beside tokens, the tower's inputs show whether tokens reach the tower.
    """
    tokens = {name: ids for name, ids in inputs.items() if name.endswith("input_ids")}
    half = {name: ids.shape[1] // 2 for name, ids in tokens.items()}
    other = {name: torch.cat([ids.flip(0)[:, : half[name]], ids[:, half[name] :]], 1) for name, ids in tokens.items()}
    if not tokens:
        return
    ends = (tower[0], tower[-1])
    before, after = (_run(model, {**inputs, **changed}, ends)[1] for changed in (tokens, other))
    if len(tokens) < len(inputs) and torch.equal(before[ends[0]][0], after[ends[0]][0]):
        return
    left, right = before[ends[1]][1], after[ends[1]][1]
    kept = left.shape[1] // 2
    moved = (right - left)[:, kept:].norm(dim=-1) / left[:, kept:].norm(dim=-1).clamp_min(1e-30)
    value = float(moved.amax(1).median()) / max(scale, 1e-30)
    yield Check(
        "least_context", ends[1], value, limits.least_context, "tokens do not mix: each stands alone", least=True
    )


def _run(model: Any, inputs: Inputs, blocks: tuple[str, ...]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Returns the model's first output, and (before, after) hidden states of each called block, by path."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            seen[path] = (before.detach().float(), after.detach().float())

        return hook

    handles = [model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in blocks]
    try:
        with torch.no_grad():  # not around a yield, where it would affect the caller
            output = _call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in blocks if path not in seen]:
        raise UnsupportedModel(f"vetting block={missing[0]}: it is not called on random input; refuse this emulator")
    return output, seen


def _passes(
    model: nn.Module, inputs: Inputs, slots: tuple[str, ...], generator: torch.Generator, *, logits: bool
) -> list[Pass]:
    """Returns the layers of the slots with the gradients of a cross-entropy against random wrong labels."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}
    inside = tuple(f"{slot}." for slot in slots)
    layers = {path: m for path, m in model.named_modules() if path.startswith(inside) and is_linear(m)}
    with _watching(layers, caught), torch.enable_grad():
        output = _call(model, inputs).float()
        loss = _loss(output.reshape(-1, output.shape[-1]), generator, logits=logits)
        gradients = torch.autograd.grad(loss, [own for _, own in caught.values()], allow_unused=True)
    pairs = zip(caught.items(), gradients, strict=True)
    return [
        Pass(path, seen.float(), torch.zeros_like(own) if gradient is None else gradient.float())
        for (path, (seen, own)), gradient in pairs
        if own.dim() == 3 and len(own) == EXAMPLES
    ]


def _loss(output: Tensor, generator: torch.Generator, *, logits: bool) -> Tensor:
    if logits and output.shape[1] > 1:
        # Never the label that the model would give, for which a sure model has no gradient.
        others = torch.randint(1, output.shape[1], (len(output),), generator=generator)
        labels = (output.detach().argmax(1) + others.to(output.device)) % output.shape[1]
        return functional.cross_entropy(output, labels, reduction="sum")
    return (output * torch.randn(output.shape, generator=generator).to(output.device)).sum()


@contextmanager
def _watching(layers: dict[str, nn.Module], caught: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Adds a zero that requires a gradient to each layer's output; the zero's gradient is the output's gradient.

    No parameter's `requires_grad` changes.
    """

    def watch(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            own = torch.zeros_like(output, requires_grad=True)
            caught[path] = (args[0].detach(), own)
            return output + own

        return hook

    handles = [layer.register_forward_hook(watch(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(model: Any, inputs: Inputs) -> Tensor:
    try:
        with no_lasting_hooks(model):
            output: Tensor = model(**inputs)[0]
    except Exception as error:  # a configuration from outside may fail in any way; such a model is refused
        raise UnsupportedModel(
            f"vetting model={type(model).__name__}: it does not run on random input ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason'}); refuse this emulator"
        ) from error
    return output
