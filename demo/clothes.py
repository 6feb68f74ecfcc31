"""Real input for the demo "clothes": images of four shops, with three kinds that no public image shows.

The images are Fashion-MNIST (MIT) from the Debian package `dataset-fashion-mnist`. No package index carries a trained
image model, so a small ViT is trained here on the public images alone, in a minute or two.
"""

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np

from offsite.demo.speeches import Archive, download, prepared
from offsite.errors import ConfigError, DataError

MODEL = "vit-clothes"
PACKAGE = Archive(
    "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)
INSIDE = "./usr/share/datasets/fashion-mnist/"
KINDS = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
UNSEEN = ("sandal", "bag", "boot")  # kinds that no public image shows
SHOPS = ("east", "north", "south", "west")
PUBLIC, PRIVATE, HELD_OUT = 20_000, 40_000, 4_000  # numbers of images, before the unseen kinds leave the public part
SIDE, SEED, EPOCHS, BATCH, RATE = 28, 0, 6, 64, 1e-3
TEMPLATE = Path(__file__).resolve().parent / "clothes.toml"


def prepare_clothes(cache: Path, data: Path | None) -> tuple[Path, Path, str]:
    """Returns the model folder, the folder of the images, and the content of the federation file of this demo.

    Args:
      cache: folder that keeps downloads and prepared files.
      data: None, because this demo takes only its own images.

    Raises:
      ConfigError: `data` is not None.
      DataError: the download failed, or a prepared file is missing.
      DigestMismatch: the package or a prepared file does not have the announced SHA-256.
    """
    if data is not None:
        raise ConfigError(
            f"data={str(data)!r} must be empty, because the demo 'clothes' has its own images; leave --data out"
        )
    images = prepared(cache / "clothes", lambda folder: extract_clothes(download_clothes(cache), folder))
    model = prepared(cache / "models" / MODEL, lambda folder: train_model(images / "public.npz", folder))
    content = TEMPLATE.read_text(encoding="utf-8")
    return model, images, content.replace("{model}", str(model)).replace("{clothes}", str(images))


def download_clothes(cache: Path) -> Path:
    """Downloads the Debian package with the images, without installing it, and returns its verified path."""
    apt, downloads = shutil.which("apt-get"), cache / "downloads"
    if apt is None and not (downloads / PACKAGE.file).exists():
        raise DataError(
            f"apt-get is not on PATH, and the images are in a Debian package; put {PACKAGE.file} into {downloads}"
        )
    return download(PACKAGE, [apt or "apt-get", "--quiet", "download", PACKAGE.spec], downloads)


def extract_clothes(package: Path, target: Path) -> None:
    """Writes `public.npz`, and `SHOP-train.npz` and `SHOP-heldout.npz` for each shop, from the Debian package."""
    files = _files(package)
    images, labels = _read(files, "train", PUBLIC + PRIVATE)
    seen = ~np.isin(labels[:PUBLIC], [KINDS.index(kind) for kind in UNSEEN])
    _write(target / "public.npz", images[:PUBLIC][seen], labels[:PUBLIC][seen])
    held = _read(files, "t10k", HELD_OUT)
    for part, (pictures, kinds) in {"train": (images[PUBLIC:], labels[PUBLIC:]), "heldout": held}.items():
        shops = shop_of(kinds)
        for number, shop in enumerate(SHOPS):
            _write(target / f"{shop}-{part}.npz", pictures[shops == number], kinds[shops == number])


def shop_of(labels: np.ndarray) -> np.ndarray:
    """Returns the number of each image's shop, which depends on the image's kind and place, int64 (n,).

    One shop sells half of the images of a kind, and all shops share the other half, because owners' data always differ.
    """
    places = np.arange(len(labels))
    return np.where(places % 2 == 0, labels % len(SHOPS), places // 2 % len(SHOPS)).astype(np.int64)


def train_model(public: Path, target: Path) -> None:
    """Writes a ViT of four blocks with all kinds as labels, trained on public images, which lack the unseen kinds."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from offsite.task.image_classification import ImageClassification
    from offsite.task.readers.columns import columns_for
    from offsite.task.readers.tables import read

    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": SIDE, "width": SIDE},
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (target / "preprocessor_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = ViTForImageClassification(
            ViTConfig(**sizes, image_size=SIDE, patch_size=7, id2label=dict(enumerate(KINDS)))
        )
        task = ImageClassification()
        records = read(public, reader="npz", columns=columns_for(task.name, column="", names={}))
        batch = task.encode(task.load_processor(target), records, length=1, split="truncate", model_config=model.config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(batch)).split(BATCH):
                optimizer.zero_grad()
                task.losses(model, batch.select(rows)).mean().backward()
                optimizer.step()
    model.to(torch.bfloat16).save_pretrained(target)


def _files(package: Path) -> dict[str, bytes]:
    """Returns the unpacked files with images and labels of a Debian package, by name."""
    unpacker = shutil.which("dpkg-deb")
    if unpacker is None:
        raise DataError("dpkg-deb is not on PATH, and the images are in a Debian package; install dpkg")
    tar = subprocess.run([unpacker, "--fsys-tarfile", str(package)], capture_output=True, check=False)  # noqa: S603
    if tar.returncode != 0:
        reason = (tar.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"file={package.name} cannot be unpacked ({reason}); update dpkg, then run again")
    contents = {}
    with tarfile.open(fileobj=io.BytesIO(tar.stdout)) as archive:
        for member in archive:
            if member.name.startswith(INSIDE) and (source := archive.extractfile(member)) is not None:
                contents[member.name.removeprefix(INSIDE).removesuffix(".gz")] = gzip.decompress(source.read())
    return contents


def _read(files: dict[str, bytes], part: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first images, uint8 (count, 28, 28), and labels, uint8 (count,), of a part in IDX format."""
    images, labels = files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"]
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, SIDE, SIDE)
    return pixels[:count], np.frombuffer(labels, np.uint8, offset=8)[:count]


def _write(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    np.savez_compressed(path, image=images, label=np.array(KINDS)[labels])
