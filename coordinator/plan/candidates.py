"""The emulators that a plan compares, from the most faithful to the smallest."""

from offsite.coordinator.plan.paper_package import Design
from offsite.emulator.structure.ends import PARALLEL, SANDWICH

WIDTHS = ("0.5", "0.33", "0.2")
_SANDWICH = (
    ("int8:128",),
    ("gptq4:64",),
    *((f"narrow:{width}", "gptq4:64") for width in WIDTHS),
    ("lowrank:0.15", "int4:64"),
    ("skip_importance:0.75", "refit", "gptq4:64"),
)


def candidates(first: int, last: int, embedding: str) -> tuple[Design, ...]:
    """Returns the designs to compare: one parallel emulator, and sandwiches of falling size.

    Args:
      first: number of blocks shipped verbatim at the input end.
      last: number of blocks shipped verbatim at the output end.
      embedding: storage of the embedding tables.
    """
    parallel = Design(first, last, PARALLEL, ("gptq4:128",), embedding)
    return (parallel, *(Design(first, last, SANDWICH, recipe, embedding) for recipe in _SANDWICH))
