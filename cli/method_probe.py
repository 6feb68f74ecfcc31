"""The live probe of `offsite methods --probe`: each method is attached to a tiny model and measured there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from offsite.adapter.layout import Layout
from offsite.adapter.methods import METHODS, attach, dummy_tensors
from offsite.adapter.methods.task_head import HEAD
from offsite.adapter.refused_methods import REFUSED
from offsite.adapter.spec import AdapterSpec
from offsite.adapter.targets import is_linear, lengths
from offsite.cli.method_table import MethodFacts, MethodFinding, MethodTable
from offsite.errors import ConfigError, PrivacyRefusal, UnsupportedModel
from offsite.privacy.probe import choose_engine
from offsite.secagg.ring import BITS

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
WORDS, CLASSES, EXAMPLES, TOKENS = 97, 3, 3, 8


@dataclass(frozen=True)
class Family:
    """A kind of model to probe on.

    Attributes:
      tower: path of the list of blocks.
      images: whether the model reads images and not tokens.
    """

    tower: str
    images: bool = False


FAMILIES = {
    "llama": Family("model.layers"),
    "gpt2": Family("transformer.h"),
    "bert": Family("bert.encoder.layer"),
    "vit": Family("vit.layers", images=True),
}


@dataclass(frozen=True)
class ProbeBatch:
    """Examples that anybody may know: arguments of a model's forward pass, and classes."""

    values: dict[str, Tensor]
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def select(self, indices: Any) -> "ProbeBatch":
        """Returns the batch of the examples at these integer indices."""
        rows = torch.as_tensor(indices, dtype=torch.long)
        return ProbeBatch({name: value[rows] for name, value in self.values.items()}, self.classes[rows])


def losses(model: nn.Module, batch: ProbeBatch) -> Tensor:
    """Returns one cross entropy per example, (B,): of its class, or the mean over its words behind the first."""
    logits = model(**batch.values).logits
    if logits.ndim == 2:
        return nn.functional.cross_entropy(logits, batch.classes, reduction="none")
    words = batch.values["input_ids"][:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), words, reduction="none").mean(1)


def probe(method: str, family: str) -> MethodFinding:
    """Returns the measurements of a method on the first and last block of a tiny model, or why it is refused."""
    plain = _model(family)
    paths = {path for path, _ in plain.named_modules()}
    tower = FAMILIES[family].tower
    spec = AdapterSpec(method, slots=(f"{tower}.0", f"{tower}.{SIZES['num_hidden_layers'] - 1}"))
    try:
        model = attach(plain, spec, dummy_tensors(plain, spec)).eval()
    except (UnsupportedModel, ConfigError) as refusal:
        return MethodFinding(method, refused=str(refusal))
    layout = Layout.of(model)
    finding = MethodFinding(method, layout.size, layout.size * BITS // 8, _gap(model, family, paths))
    try:
        return replace(finding, engine=choose_engine(model, losses, _batch(family)))
    except PrivacyRefusal as refusal:
        return replace(finding, no_privacy=str(refusal))


def probe_table(family: str) -> MethodTable:
    """Returns the findings of every method on a family, with the facts of the table of methods."""
    return described(family, {method: probe(method, family) for method in METHODS})


def described(family: str, findings: Mapping[str, MethodFinding]) -> MethodTable:
    """Returns findings by method in the order of the table of methods, with the facts of that table."""
    facts = {method.name: MethodFacts(method.why, method.peft, method.options) for method in METHODS.values()}
    ordered = tuple(findings[method] for method in METHODS)
    return MethodTable(family, SIZES["hidden_size"], ordered, facts, REFUSED, HEAD)


@contextmanager
def _drawn() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        yield


def _model(family: str) -> nn.Module:
    with _drawn():
        if family == "llama":
            model: nn.Module = LlamaForCausalLM(
                LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=WORDS, use_cache=False)
            )
        elif family == "gpt2":
            ends = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
            shape = {"n_embd": SIZES["hidden_size"], "n_layer": SIZES["num_hidden_layers"], "n_positions": 2 * TOKENS}
            model = GPT2LMHeadModel(GPT2Config(**shape, n_head=4, vocab_size=WORDS, **ends))
        elif family == "bert":
            model = BertForSequenceClassification(BertConfig(**SIZES, vocab_size=WORDS, num_labels=CLASSES))
        else:
            model = ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=CLASSES))
    return model.eval()


def _batch(family: str) -> ProbeBatch:
    with _drawn():
        classes = torch.arange(EXAMPLES) % CLASSES
        if FAMILIES[family].images:
            return ProbeBatch({"pixel_values": torch.randn(EXAMPLES, 3, 8, 8)}, classes)
        return ProbeBatch({"input_ids": torch.randint(1, WORDS, (EXAMPLES, TOKENS))}, classes)


def _gap(model: nn.Module, family: str, paths: set[str]) -> float:
    """Returns the relative distance of the effect of a mean from the mean of effects, over three random adapters.

    Effects are seen from outside, as outputs of the layers that carry trained numbers. The adapter is at its start
    again afterwards.
    """
    layout, draw = Layout.of(model), np.random.default_rng(0)
    start = layout.read(model)
    vectors = [start + draw.normal(scale=0.3, size=layout.size) for _ in range(3)]
    effects = []
    for vector in (*vectors, np.mean(vectors, axis=0), start):
        layout.write(model, vector)
        effects.append(_outputs(model, family, paths))
    *single, of_mean, before = effects
    moved = (torch.stack(single).mean(0) - of_mean).norm() / (of_mean - before).norm()
    return float(moved)


def _outputs(model: nn.Module, family: str, paths: set[str]) -> Tensor:
    """Returns outputs of the adapted layers on random inputs, or of the first block on a batch where blocks train."""
    outputs: list[Tensor] = []
    with _drawn(), torch.no_grad():
        for path in sorted({_host(name, paths) for name in Layout.of(model).names}):
            layer: Any = model.get_submodule(path)
            inner = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
            if not hasattr(inner, "weight"):
                return _first_block(model, family)
            width = lengths(inner)[0] if is_linear(inner) else len(inner.weight)  # otherwise a norm
            outputs.append(layer(torch.randn(4, width)).flatten())
    return torch.cat(outputs)


def _host(name: str, paths: set[str]) -> str:
    """Returns the path of the plain model's innermost module that a parameter's name lies in."""
    parts = name.split(".")
    wrapped = 2 if parts[:2] == ["base_model", "model"] else 0
    for end in range(len(parts) - 1, wrapped, -1):
        if ".".join(parts[wrapped:end]) in paths:
            return ".".join(parts[:end])
    raise UnsupportedModel(f"parameter={name!r} lies in no module of the plain model; report this as a fault")


def _first_block(model: nn.Module, family: str) -> Tensor:
    outputs: list[Any] = []
    wrapped = "base_model.model." if hasattr(model, "peft_config") else ""
    block = model.get_submodule(f"{wrapped}{FAMILIES[family].tower}.0")
    handle = block.register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        model(**_batch(family).values)
    finally:
        handle.remove()
    output: Tensor = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    return output.flatten()
