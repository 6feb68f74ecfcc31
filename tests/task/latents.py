"""Tiny denoisers with their noise schedule, and latents with a structure to learn."""

import json

import numpy as np
import pytest
import torch

from offsite.emulator.structure.towers import SCATTERED
from offsite.task.diffusion import ClassToImage, TextToImage

CLASSES, CHANNELS, SIDE, WIDTH = 5, 4, 8, 12
SIZES = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 4, "sample_size": SIDE}
SCHEDULE = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "num_train_timesteps": 1000}


def diffusers():
    return pytest.importorskip("diffusers", reason="needs the optional extra: pip install 'offsite[diffusion]'")


def dit():
    return diffusers().DiTTransformer2DModel(**SIZES, num_embeds_ada_norm=CLASSES, out_channels=2 * CHANNELS)


def pixart():
    return diffusers().PixArtTransformer2DModel(**SIZES, cross_attention_dim=32, caption_channels=WIDTH)


def unet():
    """Returns a U-net with four transformer blocks: width 16 at the ends, width 32 in the middle."""
    return diffusers().UNet2DConditionModel(
        sample_size=SIDE,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )


def folder(make, path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(path)
    schedule(path)


def schedule(path):
    (path / "scheduler_config.json").write_text(json.dumps(SCHEDULE))


def latents(count, seed):
    """Returns records of latents that are waves of their class, with the class as a number and as a text."""
    generator = np.random.default_rng(seed)
    down, across = np.mgrid[0:SIDE, 0:SIDE]
    names = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    records = []
    for label in generator.integers(0, CLASSES, count).tolist():
        wave = np.sin(down * label + across * (CLASSES - label))
        image = wave[None] * np.array([1.5, -1, 0.5, 1])[:, None, None] + generator.normal(
            0, 0.1, (CHANNELS, SIDE, SIDE)
        )
        text = names[label] + generator.normal(0, 0.1, (int(generator.integers(1, 7)), WIDTH))
        records.append({"latents": image.astype(np.float32), "label": label, "prompt_embeds": text.astype(np.float32)})
    return records


def with_images(count, seed):
    """Returns the records of `latents` with another image of the same class, as four tokens."""
    generator = np.random.default_rng(seed + 1000)
    names = np.random.default_rng(1).normal(size=(CLASSES, 4, WIDTH))
    records = latents(count, seed)
    for record in records:
        image = names[record["label"]] + generator.normal(0, 0.1, (4, WIDTH))
        record["image_embeds"] = image.astype(np.float32)
    return records


def toned(count, seed):
    """Returns records that differ only in their images: for an odd seed each has one tone, which the image holds.

    For an even seed the records are noise, from which a model learns only not to average over a record.
    """
    generator = np.random.default_rng(seed)
    records = []
    for _ in range(count):
        tone = 2 * generator.normal(size=(CHANNELS, 1, 1))
        noise = 2 * generator.normal(size=(CHANNELS, SIDE, SIDE))
        image = np.zeros((2, WIDTH), np.float32)
        image[:, :CHANNELS] = tone[:, 0, 0]
        shown = np.broadcast_to(tone, noise.shape) if seed % 2 else noise
        text = np.ones((1, WIDTH), np.float32)
        records.append({"latents": shown.astype(np.float32), "prompt_embeds": text, "image_embeds": image})
    return records


LENGTH = 8
LEAVES = ("to_q", "to_v", "proj")
# name -> task, maker of its tiny model, leaf modules that an adapter tunes
TASKS = {
    "class_to_image": (ClassToImage(), dit, LEAVES),
    "text_to_image": (TextToImage(), pixart, LEAVES),
    "text_to_image-unet": (TextToImage(), unet, LEAVES),
}
TOWERS = {name: SCATTERED if make is unet else "transformer_blocks" for name, (_, make, _) in TASKS.items()}
