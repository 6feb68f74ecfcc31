"""What an emulator does with random inputs: its blocks mix, its outputs differ, no gradient is one input's copy.

Weights alone do not tell every trap: a product of two innocent matrices may be the identity. So the blocks are run, and
each token's share in the gradients of the slots' layers is measured; the gradient of any adapter on a layer is a linear
map of the pairs (input, output gradient) that are looked at here.
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
from offsite.emulator.structure import denoisers
from offsite.emulator.structure.geometry import slot_paths
from offsite.emulator.vetting.limits import Check, VettingThresholds
from offsite.emulator.vetting.weight_checks import SMALLEST, few, participation
from offsite.errors import UnsupportedModel

EXAMPLES, LENGTH = 8, 32
WITHOUT_LOGITS = ("encoder", "diffusion")  # kinds whose outputs are no scores of labels
Inputs = dict[str, Tensor]


@dataclass
class Pass:
    """One layer in one pass: inputs (examples, tokens, in) and the gradients of its outputs (examples, tokens, out)."""

    name: str
    inputs: Tensor
    gradients: Tensor


def random_inputs(model: Any, generator: torch.Generator) -> Inputs:
    """Returns 8 random inputs of the kinds a model takes: up to 32 ordinary tokens, an image of noise, or both.

    Raises:
      UnsupportedModel: it takes something else.
    """
    if denoisers.is_diffusion(model):
        return denoisers.random_inputs(model, generator, EXAMPLES)
    kind = getattr(model, "main_input_name", "")
    if kind == "pixel_values":
        return {kind: _images(model.config, generator)}
    if kind != "input_ids":
        raise UnsupportedModel(
            f"main_input_name={kind!r}: vetting knows no random input of this kind; use another model"
        )
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        names = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
        return {name: _tokens(model.config, generator) for name in names}
    pixels = _images(vision, generator)
    return {"input_ids": _beside_images(model, _tokens(model.config, generator), pixels), "pixel_values": pixels}


def activation_checks(
    model: nn.Module, manifest: Manifest, blocks: tuple[str, ...], limits: VettingThresholds, generator: torch.Generator
) -> Iterator[Check]:
    """Yields the checks of blocks, outputs and gradients on random inputs; the model is left as it was.

    Raises:
      UnsupportedModel: the model does not run on its own kind of input.
    """
    inputs = random_inputs(model, generator)
    slots, tower = slot_paths(model, manifest.geometry)
    output, seen = _run(model, inputs, blocks)
    yield from _block_checks(seen, limits)
    yield from _output_checks(output, limits)
    yield from _context_checks(model, inputs, tower, limits)
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
    """Yields those of the checks that need no gradient; they hold for a model with an adapter at its start, too."""
    inputs = random_inputs(model, generator)
    output, seen = _run(model, inputs, blocks)
    yield from _block_checks(seen, limits)
    yield from _output_checks(output, limits)
    yield from _context_checks(model, inputs, tower, limits)


def gradient_checks(passes: list[Pass], limits: VettingThresholds, *, everywhere: bool) -> Iterator[Check]:
    """Yields the checks of the slots' layers: how much of a gradient one token makes up, and how mixed inputs are."""
    if not passes:
        raise UnsupportedModel("vetting dense layers in slots=0: no gradient can be looked at; use another model")
    norms = torch.stack([p.gradients.square().sum((1, 2)) * p.inputs.square().sum((1, 2)) for p in passes]).sqrt()
    for layer, norm in zip(passes, norms, strict=True):
        dead = float((norm == 0).float().mean()) if torch.isfinite(norm).all() else float("nan")
        yield Check("dead_gradients", layer.name, dead, limits.dead_gradients, "nothing but the trap would be trained")
    for layer in passes:
        yield from _layer_checks(layer, limits, everywhere=everywhere)


def _layer_checks(layer: Pass, limits: VettingThresholds, *, everywhere: bool) -> Iterator[Check]:
    inputs = layer.inputs.norm(dim=2)
    tokens = inputs * layer.gradients.norm(dim=2)
    if everywhere:  # a head that reads one pooled token gives that token the whole gradient, honestly
        share = tokens.amax(1) / tokens.sum(1).clamp_min(1e-30)
        yield Check(
            "token_share", layer.name, float(share.median()), limits.token_share, "its gradient is one token's copy"
        )
    # An output's row of the gradient is a sum over all tokens; in a bin or a latch it holds one of them. A loud token
    # drowns all rows of an honest model now and then: a trap keeps many tokens, each in rows of its own.
    rows = inputs[:, :, None] * layer.gradients.abs()
    of_all = _sole(rows.flatten(0, 1)[None])
    alone = {"single_rows": len(of_all.tokens.unique()) / max(int(of_all.alive.sum()), 1)}
    if everywhere:
        in_each = _sole(rows)
        alone["single_in_example"] = float((in_each.alone.sum(1) / in_each.alive.sum(1).clamp_min(1)).median())
    for name, value in alone.items():
        yield Check(name, layer.name, value, limits.single_rows, "rows of the gradient hold one token each")
    for what, side in (("inputs", layer.inputs), ("gradients", layer.gradients)):
        flat = side.flatten(0, 1)
        flat = flat[flat.square().sum(1) > 0]
        if min(flat.shape) >= SMALLEST:
            mixed = float(participation(flat).median())
            least = few(limits.least_mixed, flat)
            yield Check(f"least_mixed_{what}", layer.name, mixed, least, "they are one-hot codes", least=True)


class _Sole(NamedTuple):
    """Which rows of a gradient are not zero, which of those hold one token alone, (examples, rows), and which token."""

    alive: Tensor
    alone: Tensor
    tokens: Tensor


def _sole(shares: Tensor) -> _Sole:
    """Looks for rows with one token, from each token's share in each row, (examples, tokens, rows)."""
    whole = shares.sum(1)
    largest, which = shares.max(1)
    alive = whole > 0
    alone = (largest > 0.8 * whole) & alive
    return _Sole(alive, alone, which[alone])


def _block_checks(seen: dict[str, tuple[Tensor, Tensor]], limits: VettingThresholds) -> Iterator[Check]:
    for path, (before, after) in seen.items():
        change = float(((after - before).norm(dim=-1) / before.norm(dim=-1).clamp_min(1e-30)).median())
        growth = float(after.norm() / before.norm().clamp_min(1e-30))
        yield Check(
            "least_change", path, change, limits.least_change, "the block is the identity, undeclared", least=True
        )
        yield Check("growth", path, growth, limits.growth, "the block is saturated")


def _output_checks(output: Tensor, limits: VettingThresholds) -> Iterator[Check]:
    flat = output.float().flatten(1)
    finite = float(torch.isfinite(flat).all())
    yield Check("least_finite", "output", finite, 1.0, "an activation is not finite", least=True)
    scale = flat.norm(dim=1).mean().clamp_min(1e-30)
    distances = torch.cdist(flat, flat) + torch.eye(len(flat)) * scale
    apart = float(distances.min() / scale)
    yield Check("least_apart", "output", apart, limits.least_apart, "different inputs give one output", least=True)
    if output.shape[-1] >= SMALLEST:
        sure = float(output.float().softmax(-1).amax(-1).median())
        yield Check("sureness", "output", sure, limits.sureness, "it is sure of noise, and its gradients are one-hot")


def _context_checks(
    model: nn.Module, inputs: Inputs, tower: tuple[str, ...], limits: VettingThresholds
) -> Iterator[Check]:
    """Changes the first half of the tokens: what stands for the unchanged half must move.

    It is not asked of images. Where they come beside tokens, what enters the tower tells whether tokens reach it.
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
    value = float(moved.amax(1).median())
    yield Check(
        "least_context", ends[1], value, limits.least_context, "tokens do not mix: each stands alone", least=True
    )


def _run(model: Any, inputs: Inputs, blocks: tuple[str, ...]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Returns the model's first output, and hidden states before and after each block that was called."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            seen[path] = (before.detach().float(), after.detach().float())

        return hook

    handles = [model.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True) for path in blocks]
    try:
        with torch.no_grad():  # not around a yield, where it would reach whoever takes the checks
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
    """Returns the layers of the slots with the gradients of a cross-entropy against random labels."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}
    inside = tuple(f"{slot}." for slot in slots)
    layers = {path: m for path, m in model.named_modules() if path.startswith(inside) and is_linear(m)}
    with _watching(layers, caught), torch.enable_grad():
        output = _call(model, inputs).float()
        loss = _loss(output.reshape(-1, output.shape[-1]), generator, logits=logits)
        gradients = torch.autograd.grad(loss, [own for _, own in caught.values()], allow_unused=True)
    found = zip(caught.items(), gradients, strict=True)
    return [
        Pass(path, seen.float(), torch.zeros_like(own) if gradient is None else gradient.float())
        for (path, (seen, own)), gradient in found
        if own.dim() == 3 and len(own) == EXAMPLES
    ]


def _loss(output: Tensor, generator: torch.Generator, *, logits: bool) -> Tensor:
    if logits and output.shape[1] > 1:
        labels = torch.randint(output.shape[1], (len(output),), generator=generator)
        return functional.cross_entropy(output, labels, reduction="sum")
    return (output * torch.randn(output.shape, generator=generator)).sum()


@contextmanager
def _watching(layers: dict[str, nn.Module], caught: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Adds a zero that requires a gradient to each layer's output: its gradient is the output's, and no flag moves."""

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


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """Takes back what transformers hooks in for good when hidden states are first asked for, as LLaVA does."""
    before = {module: (set(module._forward_hooks), set(vars(module))) for module in model.modules()}
    try:
        yield
    finally:
        for module, (hooks, names) in before.items():
            for key in module._forward_hooks.keys() - hooks:
                del module._forward_hooks[key]
            for name in vars(module).keys() - names:
                delattr(module, name)


def _call(model: Any, inputs: Inputs) -> Tensor:
    try:
        with _no_trace(model):
            output: Tensor = model(**inputs)[0]
    except Exception as error:  # a configuration from outside may fail in any way; none of them is trained on
        raise UnsupportedModel(
            f"vetting model={type(model).__name__}: it does not run on random input ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason'}); refuse this emulator"
        ) from error
    return output


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    text = config.get_text_config()
    settings = {**vars(config), **vars(text)}
    found = [value for key, value in settings.items() if key.endswith(("_token_id", "_token_index"))]
    special = {one for value in found for one in (value if isinstance(value, list | tuple) else (value,))}
    ordinary = torch.tensor([i for i in range(text.vocab_size) if i not in special])
    length = min(LENGTH, getattr(text, "max_position_embeddings", None) or LENGTH)
    if len(ordinary) < 2:
        raise UnsupportedModel(f"vocab_size={text.vocab_size}: fewer than two ordinary tokens; use another model")
    return ordinary[torch.randint(len(ordinary), (EXAMPLES, length), generator=generator)]


def _images(config: Any, generator: torch.Generator) -> Tensor:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if size is None or channels is None:
        raise UnsupportedModel(f"image_size={size} num_channels={channels}: vetting needs both; use another model")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(EXAMPLES, channels, height, width, generator=generator)


def _beside_images(model: Any, ids: Tensor, pixels: Tensor) -> Tensor:
    """Returns the tokens with one placeholder for each feature of an image in their midst, or with an end where due.

    In the midst, so that the first half has tokens to change and the second has others that must notice.
    """
    text = model.config.get_text_config()
    holder = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
    if holder is None:  # two towers side by side: that of texts is read at their end
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < text.vocab_size:
            ids[:, -1] = end
        return ids
    try:
        with torch.no_grad(), _no_trace(model):
            found = model.get_image_features(pixel_values=pixels[:1])
        features: Tensor = getattr(found, "pooler_output", found)[0]
        count = features.shape[-2]
    except Exception as error:  # families whose images come in tiles or grids, and hostile configurations
        raise UnsupportedModel(
            f"vetting model={type(model).__name__}: it gives no features for a plain image ({type(error).__name__}); "
            "use a model that takes input_ids and pixel_values alone"
        ) from error
    half = ids.shape[1] // 2
    return torch.cat([ids[:, :half], torch.full((EXAMPLES, count), holder), ids[:, half:]], 1)
