"""Methods that tune parameters a model already has: its biases, or its norms.

The base model's own tensors are never written: a bias is tuned as a shift that is added, a norm as a copy by peft.
"""

from typing import Any

import torch
from peft import LNTuningConfig
from torch import nn
from torch.func import functional_call

from offsite.adapter.inject import ADAPTER, inject, task_type, train_only
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import choose, has_bias, in_slots, is_norm, leaf_names
from offsite.errors import UnsupportedModel

SHIFT = "offsite_bias"


class Shift(nn.Module):
    """A learned shift of a layer's output, zero at the start: the update of the layer's bias."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(like.shape, dtype=torch.float32, device=like.device))

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        """Returns output + shift in the output's dtype, shape (..., features)."""
        return (output + self.shift).to(output.dtype)


class CastNorm(nn.Module):
    """A copy of a norm with float32 parameters that computes in the dtype of the plain norm.

    A float32 weight in a bfloat16 norm would make the block's output float32. The parameters keep their plain names,
    and `forward` rounds them exactly as `PeftModel.from_pretrained` does when it loads the export.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self._plain = (plain,)  # in a tuple: a reference, and not a child module with parameter names of its own
        for name, parameter in plain.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().float().clone()))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the normalised hidden states, same shape (..., features) and dtype."""
        plain = self._plain[0]
        rounded = {name: getattr(self, name).to(p.dtype) for name, p in plain.named_parameters()}
        output: torch.Tensor = functional_call(plain, rounded, (hidden,))
        return output


def attach_bitfit(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Tunes every bias in the slots, or the biases of the targets. Ben Zaken et al. 2022, arXiv 2106.10199.

    Raises:
      UnsupportedModel: the slots have no bias.
    """
    candidates = in_slots(model, spec.slots, has_bias)
    if not candidates:
        raise UnsupportedModel("biases=0 in the slots, must be at least 1 for method 'bitfit'; take method 'norm'")
    for module in choose(candidates, spec, leaf_names(candidates)).values():
        module.add_module(SHIFT, Shift(module.bias))
        module.register_forward_hook(_add_shift)
    train_only(model, lambda name: f".{SHIFT}." in name)
    return model


def attach_norm(model: nn.Module, spec: AdapterSpec) -> nn.Module:
    """Tunes weight and bias of every LayerNorm and RMSNorm in the slots. Zhao et al. 2023, arXiv 2312.11420.

    Raises:
      UnsupportedModel: the slots have no norm with a weight.
    """
    candidates = in_slots(model, spec.slots, is_norm)
    if not candidates:
        raise UnsupportedModel(
            "norms=0 with a weight in the slots, must be at least 1 for method 'norm'; take method 'ffa_lora'"
        )
    norms = choose(candidates, spec, leaf_names(candidates))
    wrapped = inject(model, LNTuningConfig(target_modules=sorted(norms), task_type=task_type(model)))
    for name in norms:
        copies = wrapped.base_model.model.get_submodule(name).ln_tuning_layers
        if any(p.dtype != torch.float32 for p in copies.parameters()):
            copies[ADAPTER] = CastNorm(copies[ADAPTER])
    train_only(wrapped, lambda name: ".ln_tuning_layers." in name)
    return wrapped


def _add_shift(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Forward hook; a module-level function, so that a deep copy of the model shifts by its own parameters."""
    result: torch.Tensor = module.get_submodule(SHIFT)(output)
    return result
