"""The packed formats of quantised checkpoints that can be read, from config.json alone: GPTQ, AWQ and bitsandbytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offsite.errors import UnsupportedModel

KEY = "quantization_config"
GPTQ, AWQ, NF4, INT8 = "gptq", "awq", "bitsandbytes 4-bit", "bitsandbytes 8-bit"
# Models whose dense layers are stored the other way round, which a packed tensor alone does not tell.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
NEXT = "take the plain checkpoint of this model, or save a dequantised copy"


@dataclass(frozen=True)
class PackedFormat:
    """The packed format of a checkpoint's dense layers.

    Attributes:
      name: name of the format, one of the constants of this module.
      bits: width of a code.
      shift: number that is added to each stored zero point; 1 in the first layout of GPTQ.
    """

    name: str
    bits: int
    shift: int = 0

    @property
    def sentence(self) -> str:
        """What is computed with, in plain words, for a person who reads a score."""
        return (
            f"the model is scored with its {self.bits}-bit weights widened to float16 ({self.name}); the weights "
            "before their quantisation are not known here"
        )


def packed_format(folder: Path, document: Mapping[str, Any]) -> PackedFormat | None:
    """Returns the packed format of a model's folder; None where its weights are plain.

    Args:
      folder: the model's folder.
      document: content of its config.json.

    Raises:
      UnsupportedModel: the format, or an option of it, is not read here.
    """
    settings = document.get(KEY)
    if not settings:
        return None
    where = f"model={str(folder)!r} {KEY}"
    if not isinstance(settings, Mapping):
        raise UnsupportedModel(f"{where}={settings!r}: must be a table; {NEXT}")
    method = settings.get("quant_method", "")
    if method == "bitsandbytes" or (not method and (settings.get("load_in_4bit") or settings.get("load_in_8bit"))):
        return _bitsandbytes(where, settings)
    if method not in (GPTQ, AWQ):
        raise UnsupportedModel(
            f"{where}.quant_method={method!r}: read are gptq, awq and bitsandbytes; {NEXT}",
        )
    if document.get("model_type") in TRANSPOSED:
        raise UnsupportedModel(
            f"{where}: packed layers of model_type={document['model_type']!r} lie the other way round and are not "
            f"read; {NEXT}"
        )
    return _gptq(where, settings) if method == GPTQ else _awq(where, settings)


def _gptq(where: str, settings: Mapping[str, Any]) -> PackedFormat:
    """Returns the format of a GPTQ checkpoint; the order of activations (desc_act) is in its tensors."""
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModel(
            f"{where}.checkpoint_format={layout!r}: a layout for one kernel; read are gptq and gptq_v2; {NEXT}"
        )
    if bits := [name for name in settings.get("dynamic") or () if not str(name).startswith("-")]:
        raise UnsupportedModel(f"{where}.dynamic={bits[0]!r}: layers of other widths are not read; {NEXT}")
    return PackedFormat(GPTQ, _bits(where, settings, (2, 4, 8)), shift=int(layout == "gptq"))


def _awq(where: str, settings: Mapping[str, Any]) -> PackedFormat:
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise UnsupportedModel(f"{where}.version={version!r}: a layout for one kernel; read is gemm; {NEXT}")
    if settings.get("zero_point", True) is not True:
        raise UnsupportedModel(
            f"{where}.zero_point={settings['zero_point']!r}: read are checkpoints with zeros; {NEXT}"
        )
    return PackedFormat(AWQ, _bits(where, settings, (4,)))


def _bitsandbytes(where: str, settings: Mapping[str, Any]) -> PackedFormat:
    if settings.get("load_in_8bit"):
        return PackedFormat(INT8, 8)
    if not settings.get("load_in_4bit"):
        raise UnsupportedModel(f"{where}: neither load_in_4bit nor load_in_8bit is set; {NEXT}")
    return PackedFormat(NF4, 4)


def _bits(where: str, settings: Mapping[str, Any], known: tuple[int, ...]) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if type(bits) is not int or bits not in known:
        raise UnsupportedModel(f"{where}.bits={bits!r}: read are {', '.join(map(str, known))}; {NEXT}")
    return bits
