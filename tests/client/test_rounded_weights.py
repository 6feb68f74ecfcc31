"""A site with frozen weights in bitsandbytes' numbers: nearly the same update, and the line of doctor."""

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from offsite.client.home.installation import SiteHome
from offsite.client.home.settings import SETTINGS
from offsite.client.service.doctor import FAILED, FINE, examine
from offsite.emulator.package.stored_weight import Pieces
from offsite.emulator.runtime.quantized_linear import DequantizingLinear
from tests.memory_federation import World, make_world
from tests.rule_worlds import trained

NEEDED = "needs the optional extra: pip install 'offsite[bitsandbytes]'"
NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def world(fed: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A job with an emulator that keeps its middle in 32 bits, so that rounding has something to round."""
    pytest.importorskip("bitsandbytes", reason=NEEDED)
    path = fed.parent / "wide.toml"
    path.write_text(fed.read_text().replace('["int4:32"]', '["skip@2"]'))
    return make_world(path, tmp_path_factory.mktemp("rounded"))


def test_nearly_the_same_update_in_less_memory(world: World) -> None:
    """The noise is the same, so only the gradients' share differs."""
    plain, exact = trained(world, "widened")
    sizes = []
    for weights, most in (("int8", 0.02), ("nf4", 0.4)):
        session, update = trained(world, weights)
        assert 0 < float(np.linalg.norm(update - exact)) < most * float(np.linalg.norm(exact))
        held = [module.stored for module in session.model.modules() if isinstance(module, DequantizingLinear)]
        rounded = [stored for stored in held if isinstance(stored, Pieces)]
        assert len(rounded) == 3 * 7  # each dense layer of the middle
        sizes.append(sum(stored.size for stored in rounded))
        assert session.engine == plain.engine
        np.testing.assert_array_equal(session.start, plain.start)  # the slots are the coordinator's to the last bit
        numbers = [[check["value"] for check in one.vetting[0].to_dict()["checks"]] for one in (plain, session)]
        assert numbers[0] != numbers[1]  # the vetted emulator is the one that runs
    assert sizes[1] < 0.6 * sizes[0]


def test_doctor_says_that_the_extra_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "records.txt").write_text("a record\n")
    made = SiteHome.create(tmp_path / "site", name="ash", data=tmp_path / "records.txt", suite=1, now=NOW)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if bitsandbytes were not installed

    def versions() -> str:
        found = examine(SiteHome.open(made.folder), lambda: NOW)[0]
        assert found.state == (FAILED if "pip install" in found.detail else FINE)
        return found.detail

    assert "bitsandbytes" not in versions()
    settings = made.folder / SETTINGS
    settings.write_text(settings.read_text().replace('"stored"', '"nf4"'))
    assert "pip install 'offsite[bitsandbytes]'" in versions()


def test_doctor_names_the_version(tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes", reason=NEEDED)
    (tmp_path / "records.txt").write_text("a record\n")
    made = SiteHome.create(tmp_path / "site", name="ash", data=tmp_path / "records.txt", suite=1, now=NOW)
    settings = made.folder / SETTINGS
    settings.write_text(settings.read_text().replace('"stored"', '"int8"'))
    found = examine(SiteHome.open(made.folder), lambda: NOW)[0]
    assert found.detail.endswith(f"bitsandbytes {library.__version__}")
