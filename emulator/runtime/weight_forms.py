"""The forms in which frozen weights may lie in a site's memory, by name; this file needs no torch."""

WEIGHT_FORMS = {"widened": False, "stored": False, "int8": True, "nf4": True}
"""Form -> whether the form needs bitsandbytes."""
