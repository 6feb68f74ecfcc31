"""Reads the settings of a model's image processor from the model's folder; a table lists the known processors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.errors import DataError, UnsupportedModel

FILES = ("preprocessor_config.json", "processor_config.json")  # the second holds the first under a key
LARGEST = 2048  # pixels a side; the largest published models with one image for each call take 1024
RESAMPLINGS = range(6)  # PIL's numbers for resampling filters, from nearest to Hamming

Size = tuple[int, int]
_HALF = (0.5, 0.5, 0.5)
_BOX = {"height": 224, "width": 224}
_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_SHORT = {"resample": 3, "size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, **_CLIP}
# The defaults of each processor; the class is known only by its name, and its code is never run.
PROCESSORS: dict[str, Mapping[str, Any]] = {
    "ViTImageProcessor": {"resample": 2, "size": 224, "image_mean": _HALF, "image_std": _HALF},
    "DeiTImageProcessor": {
        "resample": 3,
        "size": 256,
        "crop_size": 224,
        "do_center_crop": True,
        "image_mean": _HALF,
        "image_std": _HALF,
    },
    "SiglipImageProcessor": {"resample": 3, "size": _BOX, "image_mean": _HALF, "image_std": _HALF},
    "CLIPImageProcessor": _SHORT,
    "BitImageProcessor": _SHORT,
}
_SQUARE = ("ViTImageProcessor", "DeiTImageProcessor")  # a size of one number means both sides; elsewhere the short side
_OLD = {"ViTFeatureExtractor": "ViTImageProcessor", "DeiTFeatureExtractor": "DeiTImageProcessor"} | {
    "CLIPFeatureExtractor": "CLIPImageProcessor"
}
# Keys that are read, and keys that change nothing; any other key that is set is an unknown rule.
_READ = {"do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"}
_READ |= {"do_normalize", "image_mean", "image_std", "do_convert_rgb", "default_to_square"}
_IDLE = {"image_processor_type", "feature_extractor_type", "processor_class", "return_tensors", "data_format"}
_IDLE |= {"input_data_format", "device", "disable_grouping", "image_seq_length", "_valid_processor_keys", "pad_size"}


@dataclass(frozen=True)
class Settings:
    """The steps from an image to a model's input: resize, crop, scale, subtract the mean, divide by std.

    Attributes:
      resize: height and width after resizing, whatever the image's ratio, in pixels; None to use `shortest` or not to
        resize.
      shortest: length of the short side after resizing with the ratio kept, in pixels; or None.
      resample: PIL's number of the resampling filter, 0..5.
      crop: height and width of the middle part that is kept, in pixels; or None.
      scale: factor of each pixel value, finite.
      mean: number that is subtracted from each scaled channel, finite.
      std: divisor of each channel after the subtraction, finite and > 0.
    """

    resize: Size | None
    shortest: int | None
    resample: int
    crop: Size | None
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def shape(self) -> Size:
        """Height and width of every finished image, in pixels."""
        size = self.crop or self.resize
        assert size is not None  # noqa: S101 - `parse` refuses settings without a size
        return size


def read_settings(folder: Path) -> Settings:
    """Returns the settings of a model's folder.

    Raises:
      DataError: there is no file of settings, or the file is damaged.
      UnsupportedModel: a rule in the file is not known.
    """
    for name in FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"model={folder.name!r} has a damaged {name}; save the image processor again") from error
        if isinstance(content, dict) and name == FILES[1]:
            content = content.get("image_processor")
        if isinstance(content, dict):
            return parse(content)
    raise DataError(f"model={folder.name!r} has no {FILES[0]}; copy that file of the model's image processor into it")


def parse(content: Mapping[str, Any]) -> Settings:
    """Returns the settings of a file's content.

    Raises:
      UnsupportedModel: the processor or a rule is not known, or images would not all get the same size.
    """
    written = content.get("image_processor_type") or content.get("feature_extractor_type")
    name = str(written).removesuffix("Fast").removesuffix("Pil")
    name = _OLD.get(name, name)
    if name not in PROCESSORS:
        raise UnsupportedModel(
            f"image_processor_type={written!r} must be one of {', '.join(PROCESSORS)}; choose another"
        )
    for key, value in content.items():
        if key not in _READ | _IDLE and value not in (None, False):
            raise UnsupportedModel(f"image processor {key}={value!r} is not a known rule; choose another model")
    rules = {**PROCESSORS[name], **{key: value for key, value in content.items() if value is not None}}
    resize, shortest = _size(rules, name in _SQUARE) if rules.get("do_resize", True) else (None, None)
    crop = _pair(rules, "crop_size") if rules.get("do_center_crop", False) else None
    if crop is None and resize is None:
        raise UnsupportedModel(
            f"image processor size={rules['size']!r} must give all images the same size; set a crop_size"
        )
    normal = rules.get("do_normalize", True)
    scale = _number(rules.get("rescale_factor", 1 / 255)) if rules.get("do_rescale", True) else 1.0
    settings = Settings(
        resize,
        shortest,
        rules["resample"],
        crop,
        scale,
        _three(rules, "image_mean") if normal else (0.0, 0.0, 0.0),
        _three(rules, "image_std") if normal else (1.0, 1.0, 1.0),
    )
    if settings.resample not in RESAMPLINGS or min(settings.std) <= 0:
        raise UnsupportedModel(
            f"image processor resample={settings.resample!r} must be 0..5, and image_std above 0; save it again"
        )
    return settings


def _size(rules: Mapping[str, Any], square: bool) -> tuple[Size | None, int | None]:
    size = rules["size"]
    square = bool(rules.get("default_to_square", square))
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return None, _side(size["shortest_edge"])
    if type(size) is int and not square:
        return None, _side(size)
    return _pair(rules, "size"), None


def _pair(rules: Mapping[str, Any], key: str) -> Size:
    value = rules[key]
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        return _side(value["height"]), _side(value["width"])
    if type(value) is int:
        return _side(value), _side(value)
    raise UnsupportedModel(f"image processor {key}={value!r} must be one number, or height and width; save it again")


def _side(value: object) -> int:
    if type(value) is not int or not 1 <= value <= LARGEST:
        raise UnsupportedModel(f"image processor side={value!r} must be 1..{LARGEST} pixels; choose another model")
    return value


def _three(rules: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    value = rules[key]
    three = [_number(number) for number in (value if isinstance(value, list | tuple) else [value] * 3)]
    if len(three) != 3:
        raise UnsupportedModel(f"image processor {key}={value!r} must be three numbers; save it again")
    return three[0], three[1], three[2]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        raise UnsupportedModel(f"image processor number must be within +-{LARGEST}; save the image processor again")
    return float(value)
