"""`offsite emulator build` on another device: blocks read from shards, a recipe, and a search within limits."""

from pathlib import Path

import pytest
import torch

from offsite.adapter.spec import AdapterSpec
from offsite.emulator.build.cost import SizeLimits
from offsite.emulator.build.from_folder import PublicData, build_from_folder
from offsite.emulator.build.pipeline import Order
from offsite.emulator.package.package_reader import load
from tests.fake_device import DEVICE, fake_device

ADAPTER = AdapterSpec(method="lora", rank=2, alpha=4.0)
ORDERS = {
    "a recipe": Order(first=1, last=1, recipe=("narrow:0.5", "int8:16"), adapter=ADAPTER, gate=0.05),
    "a search": Order(first=1, last=1, limits=SizeLimits(bytes=105_000, flops=0.7), adapter=ADAPTER, gate=0.05),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_build_gives_the_same_emulator(name: str, fed: Path, tmp_path: Path) -> None:
    model, said = fed.parent / "model", list[str]()
    data = PublicData(fed.parent / "data" / "public", sequences=24, length=16)
    expected = build_from_folder(model, tmp_path / "cpu", ORDERS[name], data, device="cpu")
    with fake_device():
        found = build_from_folder(model, tmp_path / "other", ORDERS[name], data, said.append, device=DEVICE)
    assert f"open the model, device={DEVICE}" in said
    assert not any("whole model" in line for line in said)  # block by block, as on the CPU
    assert found.manifest.recipe == expected.manifest.recipe
    assert found.cosine == pytest.approx(expected.cosine, abs=1e-3)
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)
    weights, others = (load(tmp_path / one, dtype=torch.float32).state_dict() for one in ("cpu", "other"))
    for key, tensor in weights.items():
        assert (others[key] - tensor).norm() <= 0.05 * tensor.norm(), key
