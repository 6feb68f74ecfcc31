"""What the coordinator does to a tuned adapter before plug-in: it takes away what the adapter learnt to repair.

An adapter trained on a parallel emulator partly makes good for what compression broke in its own layers; in the full
model nothing is broken there, and that part does harm. For low-rank adapters it is known in closed form.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from offsite.adapter.layout import Layout
from offsite.emulator.structure.geometry import PARALLEL, Geometry
from offsite.emulator.structure.replacements import weight_of

LIMIT = 1.0
STRENGTHS = (0.0, 0.5, 1.0)
LOW_RANK = ("lora", "ffa_lora")  # methods whose correction is known in closed form


def correctable(geometry: Geometry, method: str) -> bool:
    """Whether adapters sit in layers that compression broke, and are of a kind that can be corrected."""
    return geometry.shape == PARALLEL and method in LOW_RANK


def repaired(full: nn.Module, emulator: nn.Module, strength: float) -> Tensor:
    """Returns the adapter of the full model without what it learnt to repair, as one vector in its layout's order.

    With the factors B A and the full and emulated weight W and E, the adapted emulator maps an input x in the span of A
    to E x + s B A x. The same from W needs B - strength (W - E) A^+ / s in the place of B; A^+ is the pseudo-inverse
    and s = alpha / rank. As in Lin et al. 2025 (EMLoC), the step is bounded: its norm by that of B.

    Args:
      full: the full model with the tuned low-rank adapter in it, float32; left as it was.
      emulator: the loaded package, float32, with or without an adapter.
      strength: 0 changes nothing, 1 is the whole correction.
    """
    layout = Layout.of(full)
    vector = torch.from_numpy(layout.read(full))
    named = dict(full.named_parameters())
    changes: dict[str, Tensor] = {}
    emulated = {_plain(path): module for path, module in emulator.named_modules()}
    for path, layer in full.named_modules():
        if isinstance(layer, LoraLayer):
            changes |= _change(path, layer, emulated[_plain(path)], strength)
    parts = [named[name].detach() + changes.get(name, 0.0) for name in layout.names]
    return torch.cat([part.reshape(-1) for part in parts]) if changes else vector


def _change(path: str, layer: LoraLayer, emulated: nn.Module, strength: float) -> dict[str, Tensor]:
    found = {}
    for name in layer.lora_B:
        up, down = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
        apart = _matrix(layer) - _matrix(emulated)
        step = apart @ torch.linalg.pinv(down) / layer.scaling[name]
        room = LIMIT * up.norm() / step.norm().clamp_min(1e-30)
        found[f"{path}.lora_B.{name}.weight"] = -strength * step * room.clamp(max=1.0)
    return found


def _matrix(layer: nn.Module) -> Tensor:
    plain = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    return weight_of(plain).detach().float()


def _plain(path: str) -> str:
    """Returns a module's path without what peft puts before it."""
    return path.removeprefix("base_model.model.")
