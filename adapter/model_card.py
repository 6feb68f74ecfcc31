"""The README of an exported adapter: which base model it belongs to, and the lines of Python that load both."""

_PEFT = """from peft import PeftModel
from transformers import AutoModel  # or the class of the task, as AutoModelForCausalLM

base = AutoModel.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {here!r})"""
_OWN = """from offsite.adapter.export import load
from transformers import AutoModel  # or the class of the task, as AutoModelForCausalLM

base = AutoModel.from_pretrained({base!r})
model = load(base, {here!r})"""
_NOWHERE = """
`{base}` is the folder of the base model on the machine where the adapter was made, without the folder's own place,
which is private to that machine. Give the path of your own copy in its place. `AutoPeftModel` takes no such path: it
finds the base only where `{base}` leads to it from the working directory, and never asks a hub. To record a name that
works everywhere, set `base` in the table [model] of the federation file, for example to the name on a hub.
"""


def base_name(folder: str, given: str) -> str:
    """Returns the name of the base model for an adapter's config.

    A bare name of a folder would make every library ask a hub for a model of that name, so it becomes a path.

    Args:
      folder: name of the model's folder, without its place.
      given: name under which others load the model; empty where nobody gave one.
    """
    return given or f"./{folder}"


def model_card(base: str, *, method: str, peft: bool, here: str) -> str:
    """Returns the README of an adapter's folder, in Markdown, with the metadata that hubs read.

    Args:
      base: name of the base model, from `base_name`.
      method: name of the adapter's method.
      peft: whether the files are in PEFT's format.
      here: name of the adapter's folder.
    """
    local = base.startswith("./")
    facts = ([] if local else [f"base_model: {base}"]) + (["library_name: peft"] if peft else [])
    head = ["---", *facts, "---", ""] if facts else []
    code = (_PEFT if peft else _OWN).format(base=base, here=here)
    text = [*head, f"# Adapter for {base}", "", f"Method: `{method}`.", "", "```python", code, "```"]
    return "\n".join(text) + "\n" + (_NOWHERE.format(base=base) if local else "")
