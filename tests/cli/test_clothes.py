"""The clothes demo's input: the owner of each image, no image in two places, and the model trained on public images."""

import gzip
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from offsite.coordinator.config.federation_file import read_config
from offsite.demo import clothes
from offsite.errors import ConfigError, DataError, DigestMismatch
from offsite.task.readers.columns import columns_for
from offsite.task.readers.tables import read
from offsite.task.tasks import TASKS

COUNTS = {"train": 60_000, "t10k": 10_000}
OWN = {
    "east": "coat",
    "north": "trousers",
    "south": "pullover",
    "west": "dress",
}  # the kind of which both owners sell half


def numbered(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and kinds; three pixels of an image give its number, and one pixel its part."""
    count = COUNTS[part]
    images = np.zeros((count, clothes.SIDE, clothes.SIDE), np.uint8)
    for digit in range(3):
        images[:, 0, digit] = np.arange(count) >> 8 * digit & 255
    images[:, 0, 3] = part == "t10k"
    return images, np.random.default_rng(count).integers(0, len(clothes.KINDS), count).astype(np.uint8)


def debian_package(folder: Path) -> Path:
    """Writes a package with the layout of the real images."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb here to build a package with")
    place = folder / "tree" / clothes.INSIDE
    place.mkdir(parents=True)
    for part in COUNTS:
        images, kinds = numbered(part)
        for name, sizes, array in (("images-idx3", images.shape, images), ("labels-idx1", kinds.shape, kinds)):
            head = np.array([0, *sizes], ">i4").tobytes()
            path = place / f"{part}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.tobytes(), compresslevel=1))
    (folder / "tree" / "DEBIAN").mkdir()
    facts = {"Package": "clothes", "Version": "1", "Architecture": "all", "Maintainer": "nobody", "Description": "none"}
    (folder / "tree" / "DEBIAN" / "control").write_text("".join(f"{key}: {value}\n" for key, value in facts.items()))
    package = folder / "clothes.deb"
    build = ["dpkg-deb", "--build", "--root-owner-group", "-Znone", str(folder / "tree"), str(package)]
    subprocess.run(build, check=True, capture_output=True)
    return package


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], list[int], list[str]]]:
    """The files made of such a package: for each file the numbers, parts and kinds of its images."""
    folder = tmp_path_factory.mktemp("clothes")
    clothes.extract_clothes(debian_package(folder), folder)
    found = {}
    for path in folder.glob("*.npz"):
        with np.load(path) as file:
            digits = file["image"][:, 0, :4].astype(int)
            found[path.stem] = (
                (digits[:, :3] @ [1, 256, 65536]).tolist(),
                digits[:, 3].tolist(),
                file["label"].tolist(),
            )
    return found


def test_every_image_is_in_one_place_with_its_own_kind(
    parts: dict[str, tuple[list[int], list[int], list[str]]],
) -> None:
    places = [(of, number) for numbers, ofs, _ in parts.values() for of, number in zip(ofs, numbers, strict=True)]
    assert len(places) == len(set(places))
    for numbers, ofs, kinds in parts.values():
        (of,) = set(ofs)
        right = numbered("t10k" if of else "train")[1]
        assert kinds == [clothes.KINDS[right[number]] for number in numbers]
    trained = [number for shop in clothes.SHOPS for number in parts[f"{shop}-train"][0]]
    assert sorted(trained) == list(range(clothes.PUBLIC, clothes.PUBLIC + clothes.PRIVATE))
    held = [number for shop in clothes.SHOPS for number in parts[f"{shop}-heldout"][0]]
    assert sorted(held) == list(range(clothes.HELD_OUT))
    assert {of for shop in clothes.SHOPS for of in parts[f"{shop}-heldout"][1]} == {1}


def test_the_public_sees_seven_kinds_and_each_shop_all_of_them_unevenly(
    parts: dict[str, tuple[list[int], list[int], list[str]]],
) -> None:
    numbers, _, kinds = parts["public"]
    assert max(numbers) < clothes.PUBLIC
    assert set(kinds) == set(clothes.KINDS) - set(clothes.UNSEEN)
    for shop, kind in OWN.items():
        for part in ("train", "heldout"):
            mine = {one: parts[f"{one}-{part}"][2] for one in clothes.SHOPS}
            assert set(mine[shop]) == set(clothes.KINDS)
            share = mine[shop].count(kind) / sum(of.count(kind) for of in mine.values())
            assert share == pytest.approx(5 / 8, abs=0.02 if part == "train" else 0.1)


def test_the_model_knows_all_kinds_by_name_and_learns_those_it_is_shown(tmp_path: Path) -> None:
    images = np.zeros((200, clothes.SIDE, clothes.SIDE), np.uint8)
    images[::2, :14] = 255
    np.savez(tmp_path / "public.npz", image=images, label=np.array(["top", "coat"] * 100))
    (tmp_path / "model").mkdir()
    clothes.train_model(tmp_path / "public.npz", tmp_path / "model")
    task = TASKS["image_classification"]
    model = task.load(tmp_path / "model", dtype=torch.float32)
    assert tuple(model.config.id2label.values()) == clothes.KINDS
    records = read(tmp_path / "public.npz", reader="npz", columns=columns_for(task.name, column="", names={}))
    processor = task.load_processor(tmp_path / "model")
    batch = task.encode(processor, records, length=1, split="truncate", model_config=model.config)
    assert task.tally(model, batch).means()["accuracy"] == 1


def test_the_federation_file_is_one_and_names_every_shop(tmp_path: Path) -> None:
    for name in ("models/vit-clothes", "clothes"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "SHA256.json").write_text("{}")  # the earlier run made both, without a file
    model, images, content = clothes.prepare_clothes(tmp_path, None)
    (tmp_path / "fed.toml").write_text(content)
    config, _ = read_config(tmp_path / "fed.toml")
    assert tuple(site.name for site in config.sites) == clothes.SHOPS
    assert Path(config.model.path) == model
    assert Path(config.sites[0].train).parent == images
    with pytest.raises(ConfigError, match="leave --data out"):
        clothes.prepare_clothes(tmp_path, tmp_path)


def test_what_cannot_be_unpacked_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "no.deb").write_bytes(b"no package")
    with pytest.raises(DataError, match=r"(?s)^file=no\.deb cannot be unpacked \([^\n]+\); update dpkg|not on PATH"):
        clothes.extract_clothes(tmp_path / "no.deb", tmp_path)


def test_another_package_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "downloads" / clothes.PACKAGE.file
    place.parent.mkdir()
    place.write_bytes(b"no package")
    with pytest.raises(DigestMismatch, match="sha256="):
        clothes.prepare_clothes(tmp_path, None)
