"""task.images: the same images as transformers' processors make, and every fault of a setting."""

import json

import numpy as np
import pytest
import torch
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from offsite.errors import DataError, UnsupportedModel
from offsite.task.image_settings import PROCESSORS, parse
from offsite.task.images import ImageProcessor
from tests.task.pictures import settings

THEIRS = {
    "ViTImageProcessor": ViTImageProcessorPil,
    "DeiTImageProcessor": DeiTImageProcessorPil,
    "SiglipImageProcessor": SiglipImageProcessorPil,
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "BitImageProcessor": BitImageProcessorPil,
}
SMALL = {"size": {"shortest_edge": 21}, "crop_size": {"height": 17, "width": 18}, "do_center_crop": True}
RULES = {
    "defaults": {},
    "small": {"size": {"height": 13, "width": 17}, "do_center_crop": False},
    "crop": SMALL,
    "wider": SMALL | {"crop_size": {"height": 30, "width": 12}},  # black above and below
    "bare": {"size": {"height": 9, "width": 9}, "do_center_crop": False, "do_normalize": False, "do_rescale": False},
    "box": {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 40, "width": 19}},
    "lanczos": {"size": {"height": 9, "width": 9}, "resample": 1, "do_center_crop": False, "rescale_factor": 0.01},
}


class Vision:
    """The configuration of a model that takes images of one size."""

    num_channels = 3
    model_type = "vit"

    def __init__(self, size):
        self.image_size = size


def random_images(*shapes):
    generator = np.random.default_rng(0)
    return [{"image": generator.integers(0, 256, shape, dtype=np.uint8)} for shape in shapes]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_images_are_those_of_the_processor_of_transformers(kind, rules, tmp_path):
    theirs = THEIRS[kind](**RULES[rules])
    theirs.save_pretrained(tmp_path)
    mine = ImageProcessor.of(tmp_path)
    records = random_images((31, 47, 3), (50, 22, 3), (23, 23, 3), (28, 30))
    found, right = mine.pixels(records, "image", Vision(mine.settings.shape))
    assert right.all()
    assert found.values.dtype == torch.uint8
    for row, record in zip(found.scaled(torch.float32), records, strict=True):
        image = record["image"] if record["image"].ndim == 3 else np.stack([record["image"]] * 3, axis=-1)
        expected = theirs(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]
        assert row.shape == expected.shape
        assert torch.allclose(row, expected.float(), atol=1e-5)


@pytest.mark.parametrize("kind", sorted(PROCESSORS))
def test_a_file_that_is_silent_means_what_transformers_means(kind, tmp_path):
    settings(tmp_path, kind)
    silent = ImageProcessor.of(tmp_path).settings
    THEIRS[kind]().save_pretrained(tmp_path)
    written = ImageProcessor.of(tmp_path).settings
    assert silent.shape == written.shape
    assert silent == written


def test_settings_inside_those_of_a_processor_of_several_things(tmp_path):
    inner = {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 9}, "crop_size": 8}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner, "processor_class": "P"}))
    assert ImageProcessor.of(tmp_path).settings.shape == (8, 8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"image_processor_type": "OwnImageProcessor"}, "must be one of ViT"),
        ({}, "must be one of ViT"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad"),
        ({"image_processor_type": "ViTImageProcessor", "crop_pct": 0.9}, "crop_pct"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, "size"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 9}}, "the same size"),
        ({"image_processor_type": "ViTImageProcessor", "size": 1 << 20}, "1..2048"),
        ({"image_processor_type": "ViTImageProcessor", "size": 0}, "1..2048"),
        ({"image_processor_type": "ViTImageProcessor", "size": True}, "size"),
        ({"image_processor_type": "ViTImageProcessor", "resample": 9}, "resample"),
        ({"image_processor_type": "ViTImageProcessor", "image_std": [1, 0, 1]}, "image_std"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [1, float("nan"), 1]}, "within"),
        ({"image_processor_type": "ViTImageProcessor", "image_mean": [1, 1]}, "three"),
        ({"image_processor_type": "ViTImageProcessor", "rescale_factor": "1"}, "within"),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "the same size"),
    ],
)
def test_a_rule_that_is_not_known_is_refused(content, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        parse(content)


def test_a_folder_without_settings_or_with_damaged_ones_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no preprocessor_config\.json"):
        ImageProcessor.of(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        ImageProcessor.of(tmp_path)


def test_a_processor_of_another_size_than_the_model_is_refused(tmp_path):
    settings(tmp_path, "ViTImageProcessor", size=16)
    with pytest.raises(UnsupportedModel, match="image_size=32x32 must be 16x16, as the image processor makes it"):
        ImageProcessor.of(tmp_path).pixels(random_images((9, 9, 3)), "image", Vision(32))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("a path", "no path is followed"),
        (np.zeros((4, 4, 3), np.float32), "uint8"),
        (np.zeros((4,), np.uint8), "uint8"),
        (np.zeros((4, 4, 4), np.uint8), "3 channels"),
        (np.zeros((0, 4, 3), np.uint8), "times the short side"),
        (np.zeros((1, 200, 3), np.uint8), "times the short side"),
    ],
)
def test_a_record_without_an_image_is_refused_by_its_place(image, reason, tmp_path):
    settings(tmp_path, "ViTImageProcessor", size=16)
    with pytest.raises(DataError, match=f"record=2 field='image'.*{reason}"):
        ImageProcessor.of(tmp_path).pixels([*random_images((9, 9, 3)), {"image": image}], "image", Vision(16))


def test_an_image_does_not_depend_on_the_others(tmp_path):
    settings(tmp_path, "CLIPImageProcessor", size={"shortest_edge": 16}, crop_size=16)
    processor, records = ImageProcessor.of(tmp_path), random_images((31, 47, 3), (50, 22, 3))
    both, _ = processor.pixels(records, "image", Vision(16))
    for row, record in enumerate(records):
        assert torch.equal(processor.pixels([record], "image", Vision(16))[0].values[0], both.values[row])
