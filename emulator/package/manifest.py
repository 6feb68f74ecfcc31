"""A package's manifest.json: every fact about the package, and the SHA-256 of every byte of it."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from offsite.emulator.structure.geometry import Geometry
from offsite.errors import MalformedMessage

V = TypeVar("V")

FORMAT = 2
MANIFEST, WEIGHTS, CONFIG = "manifest.json", "emulator.safetensors", "config.json"
GIVEN = "given.safetensors"  # auxiliary tensors, in packages for adapters that need some
HASH = re.compile(r"[0-9a-f]{64}")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a package.

    Attributes:
      sha256: hash of the file, 64 lower-case hexadecimal digits.
      bytes: size of the file.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The facts of one emulator package; every fact may be published to the sites.

    Attributes:
      format: version of this layout.
      auto: the kind of model, a key of `structure.from_config.AUTO`.
      dtype: the full model's floating dtype at the build, for example "bfloat16"; the default dtype of a load.
      geometry: roles of the blocks: shipped verbatim, carrying adapters, or middle.
      recipe: compressors that were applied, in order.
      embedding: storage setting of the input embedding and the head.
      skipped: blocks that are left out, each path with the form in which the block hands its input on.
      shared: blocks that run on another block's weights, path to the owner's path.
      parts: modules that differ from the configuration's, path to textual spec (`structure.replacements`).
      storage: storage of each stored tensor ("bf16", "int4:64", ...), by the tensor's name.
      tied: tensors that are the same object as an earlier tensor, name to the earlier name.
      tensors: SHA-256 of each stored piece's bytes, by the piece's name.
      files: every file of the package but the manifest, by name.
      full_bytes: size of the full model at 2 bytes for each parameter, tied parameters counted once.
      middle_full_bytes: size of the full model's middle at 2 bytes for each parameter.
      slot_bytes: shipped payload of the blocks at both ends.
      embedding_bytes: shipped payload of the input embedding and the head.
      middle_bytes: shipped payload of the middle.
      other_bytes: shipped payload of all other tensors.
      verbatim_bytes: size of the parameters that are shipped bit for bit, at 2 bytes each.
      middle_macs: multiply-adds for each position in the dense layers of the emulator's middle.
      middle_full_macs: multiply-adds for each position in the dense layers of the full model's middle.
    """

    format: int
    auto: str
    dtype: str
    geometry: Geometry
    recipe: tuple[str, ...]
    embedding: str
    skipped: dict[str, tuple[str, ...]]
    shared: dict[str, str]
    parts: dict[str, str]
    storage: dict[str, str]
    tied: dict[str, str]
    tensors: dict[str, str]
    files: dict[str, FileEntry]
    full_bytes: int
    middle_full_bytes: int
    slot_bytes: int
    embedding_bytes: int
    middle_bytes: int
    other_bytes: int
    verbatim_bytes: int
    middle_macs: int
    middle_full_macs: int

    @property
    def shipped_bytes(self) -> int:
        """Size on disk of the weights file."""
        return self.files[WEIGHTS].bytes

    @property
    def payload_bytes(self) -> int:
        """Size of all tensors; the weights file is larger by their names, some hundred bytes for each tensor."""
        return self.slot_bytes + self.embedding_bytes + self.middle_bytes + self.other_bytes

    @property
    def package_bytes(self) -> int:
        """Size on disk of all files but the manifest: weights, configuration, tokenizer."""
        return sum(entry.bytes for entry in self.files.values())

    @property
    def config_sha256(self) -> str:
        """SHA-256 of the model's configuration, 64 hexadecimal digits."""
        return self.files[CONFIG].sha256

    @property
    def middle_ratio(self) -> float:
        """Shipped bytes of the middle over its bytes at 16 bits; 1 is verbatim, 0 is nothing."""
        return self.middle_bytes / self.middle_full_bytes

    @property
    def compute_ratio(self) -> float:
        """Multiply-adds of the emulator's middle over the full model's; 1 if neither has dense layers."""
        return self.middle_macs / self.middle_full_macs if self.middle_full_macs else 1.0

    @property
    def verbatim(self) -> float:
        """Share of the full model's parameters that is shipped bit for bit, in 0..1."""
        return self.verbatim_bytes / self.full_bytes

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        return asdict(self)

    def to_bytes(self) -> bytes:
        """Returns the canonical bytes of the manifest: the content of manifest.json."""
        return json.dumps(self.to_dict(), indent=1, sort_keys=True, ensure_ascii=True).encode() + b"\n"

    def digest(self) -> str:
        """Returns the SHA-256 of `to_bytes`, 64 hexadecimal digits: the name of the whole package."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_dict(cls, values: object) -> "Manifest":
        """Returns the manifest of a JSON object with exactly the keys of `to_dict`.

        Raises:
          MalformedMessage: a key is missing or unknown, a value has another type, or a file name is not a plain name.
        """
        document = _keys("manifest", values, tuple(field.name for field in fields(cls)))
        if document["format"] != FORMAT:
            raise MalformedMessage(f"format={document['format']!r} is not {FORMAT}; update offsite on the older side")
        numbers = {name: _count(name, document[name]) for name in document if name.endswith(("_bytes", "_macs"))}
        if not (numbers["full_bytes"] and numbers["middle_full_bytes"]):
            raise MalformedMessage("full_bytes=0 or middle_full_bytes=0: a model has parameters; build again")
        return cls(
            format=FORMAT,
            auto=_text("auto", document["auto"]),
            dtype=_text("dtype", document["dtype"]),
            geometry=_geometry(document["geometry"]),
            recipe=_texts("recipe", document["recipe"]),
            embedding=_text("embedding", document["embedding"]),
            skipped=_table("skipped", document["skipped"], _texts),
            shared=_table("shared", document["shared"], _text),
            parts=_table("parts", document["parts"], _text),
            storage=_table("storage", document["storage"], _text),
            tied=_table("tied", document["tied"], _text),
            tensors=_table("tensors", document["tensors"], _hash),
            files=_files(document["files"]),
            **numbers,
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> "Manifest":
        """Returns the manifest of a manifest.json; only the bytes that `to_bytes` gives are accepted.

        Raises:
          MalformedMessage: the content is not a manifest, or not in its canonical form.
        """
        try:
            manifest = cls.from_dict(json.loads(content))
        except (ValueError, RecursionError) as error:
            raise MalformedMessage(f"{MANIFEST}: not JSON ({error}); fetch the package again") from error
        if manifest.to_bytes() != content:
            raise MalformedMessage(f"{MANIFEST}: not in its canonical form; fetch the package again")
        return manifest


def _keys(name: str, value: object, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict) or sorted(value) != sorted(keys):
        different = sorted(set(value) ^ set(keys)) if isinstance(value, dict) else type(value).__name__
        raise MalformedMessage(f"{name}: keys missing or unknown: {different}; fetch the package again")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise MalformedMessage(f"{name}={value!r} must be text; fetch the package again")
    return value


def _texts(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise MalformedMessage(f"{name}={value!r} must be a list; fetch the package again")
    return tuple(_text(name, item) for item in value)


def _hash(name: str, value: object) -> str:
    if not HASH.fullmatch(_text(name, value)):
        raise MalformedMessage(f"{name}={value!r} must be a SHA-256 in 64 hexadecimal digits; fetch the package again")
    return str(value)


def _count(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise MalformedMessage(f"{name}={value!r} must be a whole number, not negative; fetch the package again")
    return value


def _table(name: str, value: object, read: Callable[[str, object], V]) -> dict[str, V]:
    if not isinstance(value, dict):
        raise MalformedMessage(f"{name}={value!r} must be a table; fetch the package again")
    return {_text(name, key): read(f"{name}.{key}", item) for key, item in value.items()}


def _geometry(value: object) -> Geometry:
    entries = _keys("geometry", value, ("tower", "first", "last", "shape"))
    first, last = (_count(name, entries[name]) for name in ("first", "last"))
    return Geometry(_text("tower", entries["tower"]), first, last, _text("shape", entries["shape"]))


def _files(value: object) -> dict[str, FileEntry]:
    files = _table("files", value, _file)
    for name in files:
        # A name is one plain file beside the manifest: no folder, no parent, no hidden file, no device.
        if not FILE.fullmatch(name) or name == MANIFEST:
            raise MalformedMessage(f"file={name!r} is not a plain file name; refuse this package")
    if not {WEIGHTS, CONFIG} <= files.keys():
        raise MalformedMessage(f"files: {WEIGHTS} and {CONFIG} must be among them; fetch the package again")
    return files


def _file(name: str, value: object) -> FileEntry:
    entries = _keys(name, value, ("sha256", "bytes"))
    return FileEntry(_hash(name, entries["sha256"]), _count(name, entries["bytes"]))
