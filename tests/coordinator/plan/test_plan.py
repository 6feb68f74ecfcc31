"""`offsite plan` and the check of memory: what fits, what does not and why, and every mistake at once."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from offsite.cli.main import app
from offsite.coordinator.check.memory import check_memory
from offsite.coordinator.config.federation_file import read_config
from offsite.coordinator.plan.coordinator_phases import least_memory
from offsite.coordinator.plan.device_profile import DeviceProfile, read_profile
from offsite.coordinator.plan.make_plan import Planner
from offsite.coordinator.plan.model_outline import read_outline
from offsite.coordinator.plan.paper_package import Design, make_package
from offsite.coordinator.plan.privacy_table import Terms, privacy_rows
from offsite.coordinator.plan.request import PlanRequest, read_size
from offsite.coordinator.plan.trial import Batches
from offsite.errors import CheckFailed, ConfigError, DataError, PrivacyRefusal
from offsite.privacy.accountants import ACCOUNTANTS
from offsite.privacy.events import Event
from offsite.task.findings import Findings
from offsite.task.tasks import TASKS

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8000,
    "dtype": "bfloat16",
}  # fmt: skip
PROFILE = DeviceProfile("cpu", 10**10, 1, 4 * 10**8, 1e10, 1e10, 1e9, 1e8, 1e6, 1e9, 1e7)
SMALL = Batches(32, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    (place / "config.json").write_text(json.dumps(CONFIG))
    return place


def planner(folder: Path, **request: object) -> Planner:
    return Planner(read_outline(folder), PlanRequest(**{"batches": SMALL, **request}))  # type: ignore[arg-type]


def test_the_most_faithful_emulator_that_fits_is_taken(folder: Path) -> None:
    everything = planner(folder).plan()
    assert everything.chosen == 0
    assert all(option.fits for option in everything.options)
    memories = [option.memory for option in everything.options]
    limit = sorted(memories)[3]
    some = planner(folder, memory=limit).plan()
    assert some.options[some.chosen].fits
    assert not any(option.fits for option in some.options[: some.chosen])
    assert some.advice == ()


@pytest.mark.parametrize(
    "recipe", [("int4:64",), ("narrow:0.33", "gptq4:64"), ("skip_uniform:0.5", "int8:64")], ids=" ".join
)
def test_the_quick_numbers_of_the_comparison_are_near_the_exact_ones(folder: Path, recipe: tuple[str, ...]) -> None:
    plan = planner(folder)
    plan.site(Design(recipe=("int8:128",)), quick=True)  # the ends' share comes from another emulator
    quick, exact = (plan.site(Design(recipe=recipe), quick=quick) for quick in (True, False))
    assert quick.step(PROFILE).memory == pytest.approx(exact.step(PROFILE).memory, rel=0.1)
    assert quick.step(PROFILE).seconds == pytest.approx(exact.step(PROFILE).seconds, rel=0.1)
    assert quick.bytes_up == exact.bytes_up


def test_what_cannot_fit_says_what_it_needs_and_what_would_help(folder: Path) -> None:
    result = planner(folder, memory=460_000_000, own_memory=460_000_000).plan()
    site, own = result.advice
    needed = result.options[result.chosen].memory
    assert "--memory=460.0 MB is too little: the smallest emulator" in site
    assert f"needs {needed / 1e6:.1f} MB in its phase" in site
    assert "--physical-batch 1 needs about" in site
    assert "--first 1 --last 1 needs about" in site
    assert "the coordinator's phase gate needs" in own


def test_seconds_need_a_profile_and_grow_with_its_slowness(folder: Path) -> None:
    one = Design()
    unknown = planner(folder, design=one).plan()
    assert not unknown.measured
    assert {phase.seconds for phase in (*unknown.site, *unknown.coordinator)} == {None}
    plan = planner(folder, design=one)
    slow, fast = (
        Planner(plan.outline, plan.request, PROFILE).plan(),
        Planner(
            plan.outline, plan.request, DeviceProfile(**{**PROFILE.__dict__, "flops": 2e10, "traffic": 2e10})
        ).plan(),
    )
    for left, right in zip(slow.site[1:3], fast.site[1:3], strict=True):
        assert left.seconds is not None
        assert right.seconds is not None
        assert left.memory == right.memory
        assert 1.5 < left.seconds / right.seconds <= 2.001
    assert slow.bytes_up == 4 * slow.upload


def test_the_rows_of_privacy_keep_to_epsilon_and_no_less_noise_does() -> None:
    for row in privacy_rows(Terms(records=2000, sites=4, rounds=3, local_steps=2, batch=20, epsilon=2.0)):
        spent = ACCOUNTANTS["rdp"]
        event = Event(row.noise_multiplier, 0.01, row.steps)
        assert spent([event], row.delta) == pytest.approx(row.epsilon)
        assert row.epsilon <= 2.0
        assert spent([Event(0.97 * row.noise_multiplier, 0.01, row.steps)], row.delta) > 2.0
        assert row.relative_noise == pytest.approx(row.noise_multiplier / 40)
    with pytest.raises(PrivacyRefusal, match="records=30"):
        privacy_rows(Terms(records=30, sites=4, rounds=3, local_steps=2, batch=20, epsilon=2.0))


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * 10**9), ("500 mb", 5 * 10**8), ("1.5g", 15 * 10**8), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text, "memory") == size


@pytest.mark.parametrize("text", ["", "-1GB", "0", "many", "16 PB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory="):
        read_size(text, "memory")


def test_a_profile_is_read_as_it_was_written_and_no_other_file_is(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cpu.json"
    PROFILE.write(path)
    assert read_profile(path) == PROFILE
    for wrong in ("{}", "[]", "no", path.read_text().replace("400000000", "0"), path.read_text().replace('"cpu"', "1")):
        path.write_text(wrong)
        with pytest.raises(DataError, match="--measure"):
            read_profile(path)


def test_all_mistakes_at_once(folder: Path, tmp_path: Path) -> None:
    words = [
        "plan",
        str(folder),
        "--sites",
        "1",
        "--memory",
        "much",
        "--rounds",
        "0",
        "--weights",
        "nf5",
        "--epsilon",
        "0",
    ]
    with pytest.raises(CheckFailed) as raised:
        CliRunner().invoke(app, [*words, "--profile", str(tmp_path / "none.json")], catch_exceptions=False)
    said = str(raised.value)
    for name in ("--sites=1", "--memory='much'", "--rounds=0", "--weights='nf5'", "--epsilon=0.0", "none.json"):
        assert name in said
    assert len(said.splitlines()) == 6


@pytest.mark.parametrize(
    "words", [["--targets", "nothing"], ["--compress", "int4:64@11"], ["--first", "9", "--last", "9"]]
)
def test_what_does_not_fit_the_model_is_refused(folder: Path, words: list[str]) -> None:
    with pytest.raises(CheckFailed):
        CliRunner().invoke(app, ["plan", str(folder), *words], catch_exceptions=False)


def test_the_command_prints_tables_and_json(folder: Path, tmp_path: Path) -> None:
    PROFILE.write(tmp_path / "cpu.json")
    words = ["plan", str(folder), "--profile", str(tmp_path / "cpu.json"), "--compress", "narrow:0.5 gptq4:64"]
    words += ["--length", "32", "--physical-batch", "2", "--records", "1000", "--memory", "2GB"]
    shown = CliRunner().invoke(app, words, catch_exceptions=False).output
    for text in ("opening", "vetting", "plug-in", "noise multiplier", "narrow:0.5 gptq4:64", "on cpu with 1 threads"):
        assert text in shown
    content = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert content["parameters"] == sum(p.numel() for p in read_outline(folder).model.parameters())
    assert content["options"][0]["fits"] is True


def test_the_check_of_memory_uses_the_plans_numbers(fed: Path) -> None:
    config = read_config(fed)[0]
    outline = read_outline(Path(config.model.path))
    model_config, task = outline.model.config, TASKS["causal_lm"]
    assert next(outline.model.parameters()).dtype == torch.float32

    def found(memory: int) -> Findings:
        findings = Findings()
        check_memory(config, task, model_config, findings, memory)
        return findings

    own = config.emulator
    least = least_memory(make_package(outline, Design(own.first, own.last, own.shape, own.compress, own.embedding)))
    assert least < 4 * 2 * outline.parameters  # of full model and emulator, side by side in float32
    assert found(least).errors == []
    assert "weights of full model and emulator alone" in found(least - 1).errors[0]
    assert found(10**12).errors == found(10**12).warnings == []
    assert "is estimated to take" in found(least).warnings[0]
