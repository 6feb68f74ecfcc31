"""Learned words and image prompts against longer prompts made by hand, and against diffusers' own IP-Adapter."""

import copy

import numpy as np
import pytest
import torch

from offsite.adapter.cross_attention import BLOCKED, is_image
from offsite.adapter.layout import Layout
from offsite.adapter.methods import attach
from offsite.adapter.methods.ip_adapter import CHILD
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.structure.towers import main_tower
from offsite.errors import ConfigError, UnsupportedModel
from offsite.privacy.probe import probe
from offsite.task import image_prompt
from offsite.task.image_prompt import ImagePromptToImage
from tests.families import spec_for, tiny
from tests.task import latents

TASK = ImagePromptToImage()
WORDS = 2
MAKERS = {"unet": latents.unet, "pixart": latents.pixart}
each = pytest.mark.parametrize("kind", MAKERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {kind: tmp_path_factory.mktemp(kind) for kind in MAKERS}
    for kind, path in paths.items():
        latents.folder(MAKERS[kind], path)
    return paths


@pytest.fixture
def opened(kind, folders):
    model = TASK.load(folders[kind], dtype=torch.float32)
    return model, lambda records: encoded(folders[kind], model, records)


def encoded(folder, model, records):
    processor = TASK.load_processor(folder)
    return TASK.encode(processor, records, length=8, split="truncate", model_config=model.config)


def spec(method, slots, **changes):
    return AdapterSpec(method, **{"rank": WORDS, "alpha": 4.0, "slots": tuple(slots), "seed": 3} | changes)


def ends(model):
    blocks = main_tower(model).blocks
    return blocks[0], blocks[-1]


def moved(model, chosen, scale=0.5):
    model = attach(model, chosen)
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + np.random.default_rng(1).normal(scale=scale, size=layout.size))
    return model


def losses(model, batch):
    with torch.no_grad():
        return TASK.losses(model, batch)


def test_learned_words_are_a_longer_prompt(folders):
    """The tokens are the same in every block, so the plain model's unpadded prompts can be made longer by hand."""
    model = TASK.load(folders["unet"], dtype=torch.float32)
    plain = copy.deepcopy(model)
    model = moved(model, spec("concept_tokens", main_tower(model).blocks))
    tokens = [p for name, p in model.named_parameters() if p.requires_grad]
    assert {tuple(one.shape) for one in tokens} == {(WORDS, latents.WIDTH)}
    with torch.no_grad():
        for one in tokens[1:]:
            one.copy_(tokens[0])
    batch = encoded(folders["unet"], plain, latents.with_images(3, 0))
    for row in range(3):
        prompt = batch.conditions["encoder_hidden_states"][row][batch.conditions["encoder_attention_mask"][row] == 1]
        noisy, step = batch.noisy[row, :1], batch.steps[row, :1]
        with torch.no_grad():
            wanted = plain(noisy, timestep=step, encoder_hidden_states=torch.cat([prompt, tokens[0]])[None]).sample
            before = plain(noisy, timestep=step, encoder_hidden_states=prompt[None]).sample
            conditions = {name: one[row : row + 1] for name, one in batch.conditions.items()}
            found = model(noisy, timestep=step, **conditions).sample
        assert torch.allclose(found, wanted, atol=1e-5)
        assert not torch.allclose(found, before, atol=1e-3)


@each
def test_an_image_is_attended_as_diffusers_own_adapter_does(kind, opened):
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    model, _ = opened
    chosen = spec("ip_adapter", ends(model))
    model = moved(model, chosen)
    generator = torch.Generator().manual_seed(0)
    for slot in chosen.slots:
        mine = model.get_submodule(f"{slot}.attn2")
        maps, width, inner = mine.get_submodule(CHILD), mine.to_k.in_features, mine.to_k.out_features
        theirs = copy.deepcopy(mine)
        theirs._forward_hooks.clear()
        processor = IPAdapterAttnProcessor2_0(inner, width, num_tokens=(3,), scale=1.0)
        factor = chosen.alpha / chosen.rank
        with torch.no_grad():
            processor.to_k_ip[0].weight.copy_(mine.to_k.weight + factor * maps.keys_up.weight @ maps.keys_down.weight)
            processor.to_v_ip[0].weight.copy_(factor * maps.values_up.weight @ maps.values_down.weight)
            if mine.to_k.bias is not None:  # PixArt has biases; diffusers' adapter has no biases
                processor.to_k_ip[0].bias = mine.to_k.bias
        theirs.set_processor(processor)
        hidden, text = torch.randn(2, 9, inner, generator=generator), torch.randn(2, 4, width, generator=generator)
        image, padding = torch.randn(2, 3, width, generator=generator), torch.full((2, 2, width), 50.0)
        scores = torch.tensor([0.0] * 4 + [2 * BLOCKED] * 3 + [BLOCKED] * 2).expand(2, 1, 9)
        with torch.no_grad():
            found = mine(
                hidden, encoder_hidden_states=torch.cat([text, image, padding], dim=1), attention_mask=scores.clone()
            )
            wanted = theirs(hidden, encoder_hidden_states=(text, [image[:, None]]))
        assert torch.allclose(found, wanted, atol=1e-5)


@each
def test_a_model_alone_sees_no_image_and_a_new_adapter_changes_no_bit(kind, opened):
    model, encode = opened
    records = latents.with_images(3, 0)
    other = [one | {"image_embeds": 9 * one["image_embeds"]} for one in records]
    first = encode(records)
    before = losses(model, first)
    second = encode(other)
    second.noisy.copy_(first.noisy), second.steps.copy_(first.steps), second.wanted.copy_(first.wanted)
    assert torch.allclose(losses(model, second), before, atol=1e-6)
    model = attach(model, spec("ip_adapter", ends(model)))
    assert torch.equal(losses(model, first), before)
    layout = Layout.of(model)
    layout.write(model, layout.read(model) + np.random.default_rng(1).normal(scale=0.5, size=layout.size))
    found = losses(model, first)
    assert not torch.allclose(found, before, atol=1e-4)
    assert not torch.allclose(losses(model, second), found, atol=1e-4)


@each
@pytest.mark.parametrize(
    ("method", "engine"), [("concept_tokens", "slot"), ("ip_adapter", "bookkeeping"), ("ip_adapter", "loop")]
)
def test_gradients_can_be_told_apart_by_example(kind, method, engine, opened):
    model, encode = opened
    model = attach(model, spec(method, ends(model)))
    probe(model, TASK.losses, TASK.dummy_batch(model, 8, seed=3), engine)
    records = latents.with_images(3, 0)
    records[1]["image_embeds"] = records[1]["image_embeds"][:1]  # a smaller image
    probe(model, TASK.losses, encode(records), engine)


def test_an_adapter_learns_what_only_the_image_tells(folders):
    """Two records that differ only in their images have opposite targets; without images the error is at least 1."""
    model = TASK.load(folders["unet"], dtype=torch.float32)
    model = attach(model, spec("ip_adapter", main_tower(model).blocks, rank=4, alpha=8.0))
    record = latents.with_images(1, 0)[0]
    batch = encoded(folders["unet"], model, [record, record | {"image_embeds": -record["image_embeds"]}])
    for one in (batch.noisy, batch.steps):
        one[1] = one[0]
    batch.wanted[0], batch.wanted[1] = 1.0, -1.0
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    assert losses(model, batch).mean() > 1
    for _ in range(60):
        optimizer.zero_grad()
        TASK.losses(model, batch).mean().backward()
        optimizer.step()
    assert losses(model, batch).mean() < 0.75


def test_marks_are_read_as_they_are_written():
    marks = torch.tensor([[1, image_prompt.UNSEEN, image_prompt.IMAGE]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        added = ((1 - marks.to(dtype)) * BLOCKED)[:, None]  # as diffusers computes it
        assert is_image(added).tolist() == [[False, False, True]]


def test_what_it_is_not_for_is_refused(folders):
    with pytest.raises(UnsupportedModel, match="no cross attention"):
        attach(tiny("llama"), spec_for("ip_adapter", "llama"))
    with pytest.raises(UnsupportedModel, match="no cross attention"):
        attach(latents.dit(), spec("concept_tokens", ["transformer_blocks.0"]))
    model = TASK.load(folders["unet"], dtype=torch.float32)
    with pytest.raises(ConfigError, match="leave targets empty"):
        attach(model, spec("ip_adapter", ends(model), targets=("to_k",)))
    model = attach(model, spec("ip_adapter", ends(model)))
    batch = encoded(folders["unet"], model, latents.with_images(2, 0))
    mask = batch.conditions["encoder_attention_mask"]
    mask.clamp_(min=0)
    with pytest.raises(UnsupportedModel, match="image_prompt_to_image"):
        TASK.losses(model, batch)
