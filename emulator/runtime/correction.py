"""Correction of a tuned adapter before plug-in: takes away what the adapter learnt to repair in the emulator.

An adapter trained on a parallel emulator partly makes up for what compression broke in its own layers. In the full
model nothing is broken there, and that part does harm. For low-rank adapters that part is known in closed form.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from offsite.adapter.layout import Layout
from offsite.emulator.structure.ends import PARALLEL
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.replacements import weight_of

LIMIT = 1.0
STRENGTHS = (0.0, 0.5, 1.0)
LOW_RANK = ("lora", "ffa_lora")  # methods whose correction is known in closed form


def correctable(geometry: Geometry, method: str) -> bool:
    """Returns whether a method's adapters sit in compressed layers, and can be corrected in closed form."""
    return geometry.shape == PARALLEL and method in LOW_RANK


def repaired(full: nn.Module, emulator: nn.Module, strength: float) -> Tensor:
    """Returns the full model's adapter without what it learnt to repair, as one float vector in its layout's order.

    The factors are B A, the full weight is W and the emulated weight E. The adapted emulator maps an input x in the
    span of A to E x + s B A x. The same map from W needs B - strength (W - E) A^+ / s in the place of B, with A^+ the
    pseudo-inverse and s = alpha / rank. The step's norm is bounded by the norm of B, as in Lin et al. 2025 (EMLoC).

    Args:
      full: the full model with the tuned low-rank adapter in it, float32; left unchanged.
      emulator: the loaded package, float32, with or without an adapter.
      strength: share of the correction, in 0..1; 0 changes nothing.
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
    return torch.cat([part.reshape(-1) for part in parts]).cpu() if changes else vector


def _change(path: str, layer: LoraLayer, emulated: nn.Module, strength: float) -> dict[str, Tensor]:
    changes = {}
    for name in layer.lora_B:
        up, down = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
        # A block of the full model may rest elsewhere than it computes.
        apart = _matrix(layer).to(up.device) - _matrix(emulated).to(up.device)
        step = apart @ torch.linalg.pinv(down) / layer.scaling[name]
        room = LIMIT * up.norm() / step.norm().clamp_min(1e-30)
        changes[f"{path}.lora_B.{name}.weight"] = -strength * step * room.clamp(max=1.0)
    return changes


def _matrix(layer: nn.Module) -> Tensor:
    plain = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    return weight_of(plain).detach().float()


def _plain(path: str) -> str:
    """Returns a module's path without the prefix that peft puts before it."""
    return path.removeprefix("base_model.model.")
