"""Tiny causal models of many families, and the comparison of losses in chunks with losses from all logits."""

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from offsite.privacy.batches import trainable
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples

V = 97
PLAIN = CausalLM(chunk=None)
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OLD = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = OLD | {"intermediate_size": 48}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Families that run in chunks -> settings of the tiny model.
CHUNKED = {
    "Llama": LLAMA,
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "Qwen2": LLAMA,
    "Qwen3": LLAMA | {"head_dim": 8},
    "Mistral": LLAMA,
    "Mixtral": LLAMA | EXPERTS,
    "Olmo2": LLAMA,
    "Phi": LLAMA,
    "Phi3": LLAMA | {"pad_token_id": 0},
    "GPTNeoX": WIDE,
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4},
    "OPT": OLD | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": OLD | {"new_decoder_architecture": False},
    "Mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "StableLm": LLAMA,
    "Gemma": LLAMA | {"head_dim": 8},
}
# Families that need all logits at once, because the model changes its logits after the head.
CHANGED = {
    "Gemma2": LLAMA | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Granite": LLAMA | {"logits_scaling": 3.0},
    "Cohere": LLAMA | {"logit_scale": 0.3},
}


def build(family, **changes):
    settings = (CHUNKED | CHANGED)[family] | {"vocab_size": V, "use_cache": False} | changes
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(getattr(hf, f"{family}Config")(**special | settings))
    with torch.no_grad():
        for parameter in model.parameters():  # also biases of heads, so that logits are not nearly 0
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def train_inside(model, *, tables=False):
    """Makes all parameters trainable except those of the head and the input embedding, unless asked."""
    model.requires_grad_(True)
    if not tables:
        model.get_output_embeddings().requires_grad_(False)
        model.get_input_embeddings().requires_grad_(False)
    return model


def llama(**changes):
    return train_inside(build("Llama", **changes))


def batch(lengths=(8, 5, 2), width=8, dtype=torch.long):
    ids = torch.randint(1, V, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    return Examples(ids, (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).to(dtype))


def gradient(model, losses):
    """Returns the gradient of a weighted sum of losses, with another weight for each example."""
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype)
    parameters = list(trainable(model).values())
    found = torch.autograd.grad((losses * weights).sum(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([one.flatten() for one in found])


def close(found, expected, tolerance):
    return float((found - expected).detach().norm()) <= tolerance * float(expected.detach().norm())


def compare(model, examples, tolerance, chunk=3):
    task = CausalLM(chunk)
    found, expected = task.losses(model, examples), PLAIN.losses(model, examples)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert close(found, expected, max(tolerance, 1e-7))  # both are returned as float32
    if len(examples):
        assert close(gradient(model, found), gradient(model, expected), tolerance)
    return task


def lora(**settings):
    torch.manual_seed(0)
    model = get_peft_model(
        build("Llama"), LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["v_proj"]} | settings)
    )
    return model.eval()
