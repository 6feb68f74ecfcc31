"""Tiny models of six families, with inputs, logits and losses for tests of adapters."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from offsite.adapter.methods import attach, dummy_tensors
from offsite.adapter.spec import AdapterSpec
from tests.task import latents

IDS = torch.arange(24).reshape(3, 8) % 97
IMAGES = torch.linspace(-1, 1, 3 * 3 * 8 * 8).reshape(3, 3, 8, 8).sin()
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0  # a short text among full ones
LABELS = torch.tensor([0, 2, 1])
TOWERS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer", "vit": "vit.layers"}
FEW = {"clip": "vision_model.encoder.layers", "pixart": "transformer_blocks"}  # families for a few methods
PROMPTS = torch.tensor(
    [[96, 5, 1, 1], [96, 7, 9, 1], [96, 3, 1, 1], [96, 8, 8, 1]]
)  # prompts of classes, the same for all images
# Noisy images, each with a text of up to four words, followed by an image of up to three tokens.
NOISED = {
    "hidden_states": torch.linspace(-1, 1, 3 * 4 * 8 * 8).reshape(3, 4, 8, 8).sin(),
    "timestep": torch.tensor([3, 500, 900]),
    "encoder_hidden_states": torch.linspace(0, 40, 3 * 7 * latents.WIDTH).reshape(3, 7, latents.WIDTH).sin(),
    "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, -1, -1, -1], [1, 0, 0, 0, -1, 0, 0], [1, 1, 0, 0, -1, -1, 0]]),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
LOUD = {"initializer_range": 0.3}  # with smaller weights a change would hardly show after so narrow a classifier


def _plain(family):
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, vocab_size=97, use_cache=False)
        )
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=97, bos_token_id=0, eos_token_id=0, use_cache=False))
    if family == "bert":
        return BertForSequenceClassification(
            BertConfig(**SIZES, **LOUD, intermediate_size=48, vocab_size=97, max_position_embeddings=32, num_labels=3)
        )
    if family == "clip":
        text = {**SIZES, "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 8, "eos_token_id": 1}
        image = {**SIZES, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=image, projection_dim=24))
    if family == "pixart":
        return latents.pixart()
    return ViTForImageClassification(
        ViTConfig(**SIZES, **LOUD, intermediate_size=48, image_size=8, patch_size=4, num_labels=3)
    )


def tiny(family, dtype=torch.float32):
    """Returns a tiny model of a family, the same every time, with no vector at its trivial initial value."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = _plain(family)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    return model.to(dtype).eval()


def spec_for(method, family, seed=11, **changes):
    """Returns a spec of a method for the first and the last block of a tiny model."""
    tower = (TOWERS | FEW)[family]
    facts = {"slots": (f"{tower}.0", f"{tower}.3"), "seed": seed}
    return AdapterSpec(method, **facts | changes)


def attach_any(model, spec):
    """Attaches the adapter of any method, with dummy auxiliary tensors that are the same every time."""
    return attach(model, spec, dummy_tensors(model, spec))


def inputs(family, dtype=torch.float32):
    """Returns keyword arguments of a model's forward pass on three examples."""
    if family in ("vit", "clip"):
        images = {"pixel_values": IMAGES.to(dtype)}
        return images if family == "vit" else {**images, "input_ids": PROMPTS}
    if family == "pixart":
        return {name: one.to(dtype) if one.is_floating_point() else one for name, one in NOISED.items()}
    return {"input_ids": IDS, "attention_mask": MASK} if family == "bert" else {"input_ids": IDS}


def logits(model, family):
    """Returns the logits of the three examples."""
    with torch.no_grad():
        return scores(model(**inputs(family, next(model.parameters()).dtype)))


def scores(output):
    """Returns the logits of a model's output; for CLIP those of images over prompts, for PixArt the prediction."""
    if "sample" in output:
        return output.sample.flatten(1)
    return output.logits_per_image if "logits_per_image" in output else output.logits


def loss(model, family):
    """Returns the mean loss of the three examples, differentiable."""
    found = scores(model(**inputs(family)))
    if family in ("llama", "gpt2"):
        return torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    return torch.nn.functional.cross_entropy(found, LABELS)
