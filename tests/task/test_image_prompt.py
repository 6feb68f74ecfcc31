"""task.image_prompt: records with an image and a text, and faulty records."""

import numpy as np
import pytest
import torch

from offsite.errors import DataError
from offsite.task.image_prompt import MAX_TOKENS, ImagePromptToImage, places
from offsite.task.records import LenientRecords
from tests.task import latents

TASK = ImagePromptToImage()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pixart")
    latents.folder(latents.pixart, path)
    return path


def encoded(folder, records):
    config = TASK.load(folder, dtype=torch.float32).config
    return TASK.encode(TASK.load_processor(folder), records, length=8, split="truncate", model_config=config)


def test_images_stand_behind_texts_and_are_marked(folder):
    records = latents.with_images(3, 0)
    records[1]["image_embeds"] = records[1]["image_embeds"][:2]
    batch = encoded(folder, records)
    states, mask = batch.conditions["encoder_hidden_states"], batch.conditions["encoder_attention_mask"]
    for row, record in enumerate(records):
        text, image = record["prompt_embeds"], record["image_embeds"]
        assert torch.equal(states[row][mask[row] == 1], torch.from_numpy(text[:8]))
        assert torch.equal(states[row][mask[row] == -1], torch.from_numpy(image))
        assert not states[row][mask[row] == 0].any()
        assert mask[row, 8 : 8 + len(image)].tolist() == [-1] * len(image)
    assert mask.shape == (3, 16)  # whatever the largest image is
    assert (places(8), places(77), places(1000)) == (8, 77, MAX_TOKENS)


def test_another_image_is_other_noise(folder):
    """Noise follows from the whole content of a record."""
    record = latents.with_images(1, 0)[0]
    other = record | {"image_embeds": record["image_embeds"] + 1}
    batch = encoded(folder, [record, record, other])
    assert torch.equal(batch.noisy[0], batch.noisy[1])
    assert not torch.equal(batch.noisy[0], batch.noisy[2])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((2, latents.WIDTH + 1), np.float32), "shape"),
        (np.zeros((0, latents.WIDTH), np.float32), "shape"),
        (np.zeros((2, latents.WIDTH), np.int64), "floating"),
        (np.full((2, latents.WIDTH), np.nan, np.float32), "finite"),
        (np.zeros((9, latents.WIDTH), np.float32), "at most 8, as data.length says"),
    ],
)
def test_a_wrong_image_is_refused_by_its_place_or_without_a_loss(image, reason, folder):
    records = latents.with_images(3, 0)
    records[1]["image_embeds"] = image
    with pytest.raises(DataError, match=f"record=2.*{reason}"):
        encoded(folder, records)
    forgiving = LenientRecords(records)
    assert encoded(folder, forgiving).targets.tolist() == [1, 0, 1]
    assert len(forgiving.faults) == 1
