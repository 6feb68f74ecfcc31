"""How an emulator lies in a site's memory: forms of frozen weights, and recomputation; this file needs no torch."""

WIDENED, STORED = "widened", "stored"
WEIGHT_FORMS = {WIDENED: False, STORED: False, "int8": True, "nf4": True}
"""Form -> whether the form needs bitsandbytes."""
AUTO, ALWAYS, NEVER = "auto", "always", "never"
RECOMPUTATIONS = {
    AUTO: "where the kept activations of one physical batch would take more memory than the emulator's weights",
    ALWAYS: "in every job",
    NEVER: "in no job",
}
