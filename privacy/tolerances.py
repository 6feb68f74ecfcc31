"""How far two gradients of one example may differ by rounding alone, from the number format of the model.

u is the format's unit round-off: 2^-8 in bfloat16, 2^-11 in float16, 2^-24 in float32.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

SMALLEST = 1e-4  # of every tolerance; far above what float32 rounds, and far below what any known fault does
# Roundings of other order differ by about u each and add like a random walk, over the modules on a gradient's way. The
# factor leaves room: 12.8 u were seen at 273 modules, of which the rule allows 33 u.
WALK, LARGEST = 2.0, 0.3
MODULE = 8.0  # roundings within one module, in units of u; a norm's rule was seen to differ by 0.7 u


@dataclass(frozen=True)
class Tolerances:
    """Relative differences, as shares of a gradient's norm or of the losses' mean.

    Attributes:
      size: for an example among more or fewer others, where products have another shape and so are rounded otherwise:
        2 u sqrt(modules with weights), at least 1e-4 and at most 0.3.
      module: for an engine's gradient beside plain autograd's in the same batch, where only the product that makes a
        parameter's gradient may be rounded otherwise: 8 u, at least 1e-4.
      company: for an example beside others in a batch of one shape, where every number of its own is rounded alike:
        1e-4 in every format.
    """

    size: float
    module: float
    company: float = SMALLEST

    @classmethod
    def of(cls, model: nn.Module) -> "Tolerances":
        """Returns the tolerances of a model, by the least precise of its weights."""
        formats = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        unit = max((torch.finfo(dtype).eps / 2 for dtype in formats), default=0.0)
        owners = sum(any(True for _ in module.parameters(recurse=False)) for module in model.modules())
        walked = min(LARGEST, WALK * unit * math.sqrt(owners))
        return cls(size=max(SMALLEST, walked), module=max(SMALLEST, MODULE * unit))

    @property
    def narrow(self) -> bool:
        """Whether the format rounds so much that an example beside other others needs a test of its own."""
        return self.size > self.company
