"""The README of an exported adapter: which base model it belongs to, and the lines of Python that load both."""

from torch import nn

LIBRARIES = ("transformers", "diffusers")  # libraries whose classes load a model's folder by `from_pretrained`
_PEFT = """from peft import PeftModel
from {library} import {name}

base = {name}.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {here!r})"""
_OWN = """from offsite.adapter.export import load
from {library} import {name}

base = {name}.from_pretrained({base!r})
model = load(base, {here!r})"""
_NOWHERE = """
`{base}` is the folder of the base model on the machine where the adapter was made, without the folder's own place,
which is private to that machine. Give the path of your own copy in its place. `AutoPeftModel` takes no such path: it
finds the base only where `{base}` leads to the base from the working directory, and asks no hub for a model of that
name. It does ask the hub whether the adapter's own path has a tokenizer there, unless `HF_HUB_OFFLINE=1` stands in the
environment; `PeftModel` asks nobody. To record a name that works everywhere, set `base` in the table [model] of the
federation file, for example to the name on a hub.
"""


def base_name(folder: str, given: str) -> str:
    """Returns the name of the base model for an adapter's config.

    A bare name of a folder would make every library ask a hub for a model of that name, so it becomes a path.

    Args:
      folder: name of the model's folder, without its place.
      given: name under which others load the model; empty where nobody gave one.
    """
    return given or f"./{folder}"


def class_of(model: nn.Module) -> tuple[str, str]:
    """Returns library and name of the class that loads a model's folder, without an adapter.

    An adapter fits the class of the task only: in the bare model of `AutoModel` every layer has another name, and peft
    would load nothing into it.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    for kind in type(inner).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in LIBRARIES:
            return library, kind.__name__
    return "transformers", "AutoModel"


def model_card(base: str, *, method: str, peft: bool, here: str, loader: tuple[str, str]) -> str:
    """Returns the README of an adapter's folder, in Markdown, with the metadata that hubs read.

    Args:
      base: name of the base model, from `base_name`.
      method: name of the adapter's method.
      peft: whether the files are in PEFT's format.
      here: name of the adapter's folder.
      loader: library and name of the class that loads the base model, from `class_of`.
    """
    local = base.startswith("./")
    facts = ([] if local else [f"base_model: {base}"]) + (["library_name: peft"] if peft else [])
    head = ["---", *facts, "---", ""] if facts else []
    code = (_PEFT if peft else _OWN).format(base=base, here=here, library=loader[0], name=loader[1])
    text = [*head, f"# Adapter for {base}", "", f"Method: `{method}`.", "", "```python", code, "```"]
    return "\n".join(text) + "\n" + (_NOWHERE.format(base=base) if local else "")
