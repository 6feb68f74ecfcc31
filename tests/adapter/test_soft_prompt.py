"""Soft prompts by another route: the longer sequence, its mask and its positions written entry by entry."""

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.prompted_call import named_arguments, prompted
from offsite.adapter.spec import AdapterSpec
from offsite.errors import ConfigError, UnsupportedModel
from tests.families import IDS, MASK, TOWERS, inputs, logits, spec_for, tiny

COUNT = 3
BLOCKED = torch.finfo(torch.float32).min
TEXT = ("llama", "gpt2", "bert")


def moved(family, **changes):
    model = attach(tiny(family), spec_for("soft_prompt", family, rank=COUNT, **changes))
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + np.random.default_rng(1).normal(scale=0.5, size=layout.size))
    return model, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def written_out(causal, mask):
    """Returns the additive mask (B, 1, COUNT + T, COUNT + T), 0 for a visible token, of learned and real tokens.

    Here learned tokens see other tokens than under `prompted`, without effect, since their outputs are dropped.
    """
    length = mask.shape[1]
    found = torch.full((len(mask), 1, COUNT + length, COUNT + length), BLOCKED)
    for row in range(len(mask)):
        for q in range(COUNT + length):
            for k in range(COUNT + length):
                learned = k < COUNT
                seen = bool(learned or mask[row, k - COUNT])
                if causal and k > q:
                    seen = False
                if seen:
                    found[row, 0, q, k] = 0.0
    return found


def by_hand(family, tokens, mask):
    """Calls the slots' blocks of the plain model with the longer sequence, its mask and its positions."""
    model = tiny(family)
    model.set_attn_implementation("eager")
    long_mask = written_out(family != "bert", mask)
    for slot in spec_for("soft_prompt", family).slots:
        block = model.get_submodule(slot)

        def forward(hidden, *args, plain=block.forward, own=tokens[f"{slot}.offsite_prompt.tokens"], **kwargs):
            longer = torch.stack([torch.cat([own, example]) for example in hidden])
            positions = torch.tensor([[0] * COUNT + list(range(hidden.shape[1]))])
            call = {"attention_mask": long_mask}
            if family == "llama":
                call["position_embeddings"] = model.model.rotary_emb(longer, positions)
            return plain(longer, **call)[:, COUNT:]

        block.forward = forward
    return model


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("padded", [False, True])
def test_the_longer_sequence_is_the_one_written_out(family, padded):
    mask = MASK if padded else torch.ones_like(MASK)
    model, tokens = moved(family)
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=mask).logits
        expected = by_hand(family, tokens, mask)(input_ids=IDS, attention_mask=mask).logits
    real = mask.bool() if found.ndim == 3 else slice(None)
    assert torch.allclose(found[real], expected[real], atol=1e-5)


def test_images_have_no_mask_and_no_positions():
    model, tokens = moved("vit")
    plain = tiny("vit")
    for slot in spec_for("soft_prompt", "vit").slots:
        block = plain.get_submodule(slot)

        def forward(hidden, *args, plain=block.forward, own=tokens[f"{slot}.offsite_prompt.tokens"], **kwargs):
            return plain(torch.stack([torch.cat([own, example]) for example in hidden]))[:, COUNT:]

        block.forward = forward
    assert torch.allclose(logits(model, "vit"), logits(plain, "vit"), atol=1e-5)
    assert not torch.allclose(logits(model, "vit"), logits(tiny("vit"), "vit"), atol=1e-2)


@pytest.mark.parametrize("family", TEXT)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_example_is_the_same_alone_and_padded_among_others(family, attention):
    model, _ = moved(family)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        among = model(input_ids=IDS, attention_mask=MASK).logits[1:2]
        alone = model(input_ids=IDS[1:2, :5]).logits
    assert torch.allclose(among[:, :5] if among.ndim == 3 else among, alone, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_token_sees_a_later_one_through_the_prompt(family):
    model, _ = moved(family)
    other = IDS.clone()
    other[:, 5:] = 90
    with torch.no_grad():
        first, second = model(input_ids=IDS).logits, model(input_ids=other).logits
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:], atol=1e-2)


@pytest.mark.parametrize("family", TOWERS)
def test_a_shallow_prompt_is_in_the_first_slot_alone(family):
    model = attach(tiny(family), spec_for("soft_prompt", family, rank=COUNT, options=(("depth", "shallow"),)))
    assert Layout.of(model).names == (f"{TOWERS[family]}.0.offsite_prompt.tokens",)
    assert not torch.equal(logits(model, family), logits(tiny(family), family))


def test_a_depth_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="deep, shallow"):
        attach(tiny("vit"), spec_for("soft_prompt", "vit", options=(("depth", "deeper"),)))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cache_may_be_filled_and_not_read(family):
    model, _ = moved(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        with_cache = model(input_ids=IDS, use_cache=True, past_key_values=cache).logits
        assert torch.allclose(with_cache, model(input_ids=IDS).logits, atol=1e-6)
        with pytest.raises(UnsupportedModel, match="use_cache=True"):
            model(input_ids=IDS[:, :1], use_cache=True, past_key_values=cache)


def test_arguments_that_are_not_known_are_refused():
    block = tiny("llama").model.layers[0]
    hidden = torch.zeros(2, 4, 32)
    with pytest.raises(UnsupportedModel, match="argument='bias'"):
        prompted(block, {"bias": torch.zeros(2, 4)}, 4, 2)
    with pytest.raises(UnsupportedModel, match="argument='position_embeddings'"):
        prompted(block, {"position_embeddings": {"local": (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8))}}, 4, 2)
    with pytest.raises(UnsupportedModel, match="attention mask shape"):
        prompted(block, {"attention_mask": torch.zeros(2, 1, 4, 7)}, 4, 2)
    with pytest.raises(UnsupportedModel, match="does not read hidden states"):
        named_arguments(block, (hidden[0],), {})


def test_a_block_that_hands_its_positions_on_is_refused():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 97}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    attach(model, AdapterSpec("soft_prompt", slots=("encoder.block.0",)))
    with pytest.raises(UnsupportedModel, match="hands more than hidden states"):
        model(input_ids=IDS, decoder_input_ids=IDS)


def test_a_decoder_looks_at_its_encoder_as_before():
    """A record alone equals the same record padded among others, with learned tokens before a decoder's block."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 97}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads)).eval()
    model = attach(model, AdapterSpec("soft_prompt", slots=("model.decoder.layers.0", "model.encoder.layers.1")))
    with torch.no_grad():
        among = model(input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :6]).logits[1]
        alone = model(input_ids=IDS[1:2, :5], decoder_input_ids=IDS[1:2, :6]).logits[0]
        other = model(input_ids=IDS[1:2, :4], decoder_input_ids=IDS[1:2, :6]).logits[0]
    assert torch.allclose(among, alone, atol=1e-5)
    assert not torch.allclose(among, other, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_window_of_attention_is_kept_and_the_prompt_is_always_seen(window):
    """A token's output depends on the learned tokens, but not on real tokens before the window."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = MistralConfig(**sizes, num_key_value_heads=2, vocab_size=97, sliding_window=window)
    model = attach(MistralForCausalLM(config).eval(), AdapterSpec("soft_prompt", slots=("model.layers.0",)))
    other = IDS.clone()
    other[:, 0] = 90
    with torch.no_grad():
        first, second = model(input_ids=IDS).logits[:, 6], model(input_ids=other).logits[:, 6]
        model.model.layers[0].offsite_prompt.tokens.add_(torch.linspace(-1, 1, 32))
        moved = model(input_ids=IDS).logits[:, 6]
    assert torch.equal(first, second) == (window is not None)
    assert not torch.allclose(first, moved, atol=1e-3)


def test_a_mask_of_one_row_and_a_boolean_one_are_extended_too():
    block = tiny("bert").bert.encoder.layer[0]
    row = torch.tensor([[[[0.0, 0.0, BLOCKED]]]])
    assert prompted(block, {"attention_mask": row}, 3, 2)["attention_mask"].tolist() == [[[[0, 0, 0, 0, BLOCKED]]]]
    flat = torch.tensor([[1, 1, 0]])
    assert prompted(block, {"attention_mask": flat}, 3, 2)["attention_mask"].tolist() == [[1, 1, 1, 1, 0]]
    causal = torch.ones(1, 1, 2, 2, dtype=torch.bool).tril()
    found = prompted(tiny("llama").model.layers[0], {"attention_mask": causal}, 2, 2)["attention_mask"]
    assert found[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_gradients_have_no_batch_dimension_to_mix():
    """The gradient of an example alone equals the gradient of its loss among other examples."""
    model, _ = moved("llama")
    tokens = [p for p in model.parameters() if p.requires_grad]

    def of(rows, pick):
        output = model(input_ids=inputs("llama")["input_ids"][rows]).logits[pick]
        return torch.autograd.grad(output.square().mean(), tokens)

    for alone, among in zip(of([1], 0), of([0, 1, 2], 1), strict=True):
        assert torch.allclose(alone, among, atol=1e-6)
