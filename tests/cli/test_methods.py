"""`offsite methods`: what it measures is what closed forms and the table of methods say, and it fits a page."""

import json
from collections.abc import Callable

import pytest

from offsite.adapter.methods import METHODS
from offsite.adapter.methods.refused import REFUSED
from offsite.cli import main as command
from offsite.cli.method_probe import FAMILIES, SIZES, probe
from offsite.privacy.engines import ENGINES

Run = Callable[..., tuple[int, str, str]]

H, KV, F = SIZES["hidden_size"], SIZES["hidden_size"] // 2, SIZES["intermediate_size"]
RANK, BLOCKS = 2, 2
# Trained numbers in the first and last block of the tiny Llama, whose query layers are H x H and value layers KV x H.
LLAMA = {
    "lora": BLOCKS * RANK * (H + H + H + KV),
    "ffa_lora": BLOCKS * RANK * (H + KV),
    "fed_sb": BLOCKS * 2 * RANK * RANK,
    "norm": BLOCKS * 2 * H,
    "bottleneck": BLOCKS * (2 * H * RANK + H + RANK),
    "houlsby": 2 * BLOCKS * (2 * H * RANK + H + RANK),
    "soft_prompt": BLOCKS * RANK * H,
    "blocks": BLOCKS * (H * H + 2 * H * KV + H * H + 3 * H * F + 2 * H),
    "head": 97 * H,
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["offsite", "methods", *arguments])
        with pytest.raises(SystemExit) as stopped:
            command.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return call


def test_the_json_holds_every_method_as_it_was_measured(run: Run) -> None:
    code, out, err = run("--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    measured = {one["method"]: one for one in found["methods"]}
    assert set(measured) | set(found["unfit"]) == set(METHODS)
    assert found["unfit"].keys() == {"bitfit", "clip_adapter", "concept_tokens", "ip_adapter"}
    assert found["refused"] == REFUSED
    for name, one in measured.items():
        assert one["linear"] == METHODS[name].exact_mean, name
        assert one["engine"] in ENGINES
        assert one["bytes_up"] == 4 * one["parameters"]
    assert {name: measured[name]["parameters"] for name in LLAMA} == LLAMA


def test_the_table_fits_a_hundred_columns_and_names_every_method(run: Run) -> None:
    code, page, err = run("--family", "vit")
    assert (code, err) == (0, "")
    assert max(map(len, page.splitlines())) <= 100
    assert all(f" {name} " in page for name in (*METHODS, *REFUSED))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["bitfit", "miss", "parallel"])
def test_a_family_that_lacks_what_a_method_tunes_has_a_reason(family: str, method: str) -> None:
    finding = probe(method, family)
    unfit = (method, family) in {("bitfit", "llama"), ("miss", "gpt2")}
    assert bool(finding.refused) == unfit
    assert (finding.engine in ENGINES) != unfit


def test_an_unknown_family_is_refused(run: Run) -> None:
    code, out, err = run("--family", "lama")
    assert (code, out) == (2, "")
    assert "family='lama' is not known; did you mean llama" in err
