"""The names of the adapter methods, for checks that load no model library; `adapter.methods.METHODS` holds the code."""

from offsite.adapter.refused_methods import REFUSED
from offsite.errors import UnsupportedModel, lookup

# Methods that need more than their name: tensors beside the spec, or records of one task.
NEEDING = ("masked", "madx", "fusion", "ip_adapter")
# In the order of `METHODS`.
OFFERED = (
    *("lora", "ffa_lora", "fed_sb", "ia3", "miss", "bitfit", "norm", "masked", "blocks", "head", "bottleneck"),
    *("houlsby", "parallel", "clip_adapter", "madx", "fusion", "soft_prompt", "concept_tokens", "ip_adapter"),
    *("rslora", "dora", "vera", "randlora", "fourierft", "waveft", "c3a", "oft", "hra", "hira", "loha", "lokr"),
    *("delora", "deft", "glora", "gralora", "peanut", "tinylora", "unilora", "vblora", "road", "shira"),
    *("supertuning", "miss_bat", "beft"),
)


def check_name(method: str) -> None:
    """Refuses a method that is not offered.

    Raises:
      UnknownName: there is no such method.
      UnsupportedModel: the method is known but not offered; the message says why.
    """
    if method in REFUSED:
        raise UnsupportedModel(f"method={method!r} is not offered: {REFUSED[method]}")
    lookup(dict.fromkeys(OFFERED), method, "method")
