"""`offsite methods`: the shipped table agrees with a live probe, closed forms and the table of methods."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from offsite.adapter.methods import METHODS
from offsite.adapter.methods.task_head import HEAD
from offsite.adapter.refused_methods import REFUSED
from offsite.cli import main as command
from offsite.cli.method_probe import FAMILIES, SIZES, probe
from offsite.cli.method_table import DIGITS, families, read_table, write_tables
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
UNFIT = {"llama": {"bitfit", "clip_adapter", "concept_tokens", "ip_adapter"}}


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
    table = json.loads(out)
    measured = {row["method"]: row for row in table["methods"]}
    assert set(measured) | set(table["unfit"]) == set(METHODS)
    assert table["unfit"].keys() == UNFIT["llama"]
    assert table["refused"] == REFUSED
    for name, row in measured.items():
        assert row["linear"] == METHODS[name].exact_mean, name
        assert row["engine"] in ENGINES
        assert row["bytes_up"] == 4 * row["parameters"]
    assert {name: measured[name]["parameters"] for name in LLAMA} == LLAMA


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_table_is_of_these_methods(family: str) -> None:
    """`make docs` brings the words up to date and measures a new method."""
    table = read_table(family)
    assert families() == tuple(FAMILIES)
    assert [finding.method for finding in table.findings] == list(METHODS)
    assert table.refused == REFUSED
    assert table.head == HEAD
    assert table.width == H
    for name, facts in table.facts.items():
        method = METHODS[name]
        assert (facts.why, facts.peft, facts.options) == (method.why, method.peft, method.options), name


def test_a_live_probe_gives_the_shipped_table(run: Run) -> None:
    """All methods on one family, by the command that a person types."""
    code, out, err = run("--probe", "--json")
    assert (code, err) == (0, "")
    live, shipped = json.loads(out), json.loads(run("--json")[1])
    gaps = [[row.pop("gap") for row in table["methods"]] for table in (live, shipped)]
    assert live == shipped
    assert gaps[0] == pytest.approx(gaps[1], rel=0.02, abs=10**-DIGITS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["bitfit", "miss", "parallel"])
def test_a_family_that_lacks_what_a_method_tunes_has_a_reason(family: str, method: str) -> None:
    finding = probe(method, family)
    unfit = (method, family) in {("bitfit", "llama"), ("miss", "gpt2")}
    assert bool(finding.refused) == unfit
    assert (finding.engine in ENGINES) != unfit
    (shipped,) = (row for row in read_table(family).findings if row.method == method)
    assert (shipped.parameters, shipped.engine, shipped.refused) == (
        finding.parameters,
        finding.engine,
        finding.refused,
    )


def test_tables_survive_the_file(tmp_path) -> None:
    tables = [read_table(family) for family in families()]
    write_tables(tables, tmp_path / "methods.json")
    assert [read_table(family, tmp_path / "methods.json") for family in families()] == tables


def test_the_table_fits_a_hundred_columns_and_names_every_method(run: Run) -> None:
    code, page, err = run("--family", "vit")
    assert (code, err) == (0, "")
    assert max(map(len, page.splitlines())) <= 100
    assert all(f" {name} " in page for name in (*METHODS, *REFUSED))


def test_the_shipped_table_is_printed_without_the_model_libraries() -> None:
    code = "import sys; sys.argv = ['offsite', 'methods'];\nfrom offsite.cli.main import main\n"
    code += (
        "try:\n    main()\nexcept SystemExit:\n    print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_unknown_family_is_refused(run: Run) -> None:
    code, out, err = run("--family", "lama")
    assert (code, out) == (2, "")
    assert "family='lama' is not known; did you mean llama" in err
