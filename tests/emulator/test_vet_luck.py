"""No honest emulator is refused by bad luck, and no trap passes by good luck: the false-alarm rate, measured.

The rate is stated in `emulator.vetting.draws` and measured by `bench/vetting.py`: an emulator is refused only where a
draw fails and then a mean of 16 fresh draws does. How far a mean of some hard models lies within its limit is measured
here in its own standard deviations.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf

from offsite.emulator.package.package_reader import load, read_manifest
from offsite.emulator.structure.geometry import Geometry
from offsite.emulator.structure.towers import find_towers, main_tower
from offsite.emulator.vetting import activation_checks as running
from offsite.emulator.vetting import weight_checks
from offsite.emulator.vetting.activation_checks import activation_checks
from offsite.emulator.vetting.draws import AVERAGED, decided
from offsite.emulator.vetting.limits import Check, VettingThresholds
from offsite.emulator.vetting.vet import vet
from offsite.errors import UnsupportedModel
from tests.emulator.conftest import Family
from tests.emulator.test_vet import TRAPS, vetted
from tests.task_samples import seeded

LIMITS = VettingThresholds()
SMALL = {"intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 100, "pad_token_id": 0}


def _modernbert(width: int, blocks: int) -> Any:
    sizes = SMALL | {"hidden_size": width, "num_hidden_layers": blocks, "global_attn_every_n_layers": 2}
    return hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**sizes, num_labels=2))


def _sure_bert(blocks: int = 4) -> Any:
    """A classifier of two labels that is as sure as a trained one: its probability of one label rounds to 1."""
    sizes = SMALL | {"hidden_size": 32, "num_hidden_layers": blocks}
    model = hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=2))
    with torch.no_grad():
        model.classifier.weight.mul_(3000)
    return model


def _t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 96, "num_layers": 4, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=100, **sizes, decoder_start_token_id=0))


def _llama() -> Any:
    sizes = SMALL | {"hidden_size": 32, "num_hidden_layers": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))


HONEST: dict[str, Callable[[], Any]] = {
    "modernbert of 8 blocks": lambda: _modernbert(64, 8),
    "narrow modernbert": lambda: _modernbert(16, 8),
    "deep modernbert": lambda: _modernbert(32, 22),
    "sure classifier": _sure_bert,
    "regression": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**SMALL, hidden_size=16, num_hidden_layers=4, num_labels=1)
    ),
    "sparse by relu": _t5,
    "llama": _llama,
}


def draws_of(model: Any, count: int) -> Iterator[list[Check]]:
    """Yields the checks of single draws on a model that nobody compressed."""
    model.eval().requires_grad_(False)
    tower = main_tower(model)
    facts: Any = SimpleNamespace(geometry=Geometry(tower.path, 2, 1), auto="causal_lm")
    blocks = tuple(path for each in find_towers(model) for path in each.blocks)
    for seed in range(count):
        yield list(activation_checks(model, facts, blocks, LIMITS, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("name", HONEST)
def test_every_mean_of_an_honest_emulator_lies_far_within_its_limit(name: str) -> None:
    """Six standard deviations of the mean: refused by luck less than once in 10,000,000 for each number."""
    with seeded(5):
        model = HONEST[name]()
    numbers: dict[tuple[str, str], list[Check]] = {}
    for checks in draws_of(model, 6):
        for check in checks:
            numbers.setdefault((check.name, check.where), []).append(check)
    assert len(numbers) > 50
    for key, same in numbers.items():
        values, limit = [check.value for check in same], same[0].limit
        if same[0].least and min(values) > 0:  # a mean is never below the geometric mean, whose logarithm is normal
            values, limit = [math.log(value) for value in values], math.log(limit)
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))
        room = mean - limit if same[0].least else limit - mean
        assert room >= 6 * deviation / math.sqrt(AVERAGED), (key, mean, deviation, limit)


def test_a_number_that_fails_once_is_averaged_over_fresh_draws() -> None:
    """The numbers of the report: one of four draws is over the limit of 0.25, and their mean is not."""
    values = iter([0.2917, *[0.125, 0.125, 0.052, 0.2917] * (AVERAGED // 4)])

    def draw() -> list[Check]:
        return [Check("single_rows", "layer", next(values), 0.25, ""), Check("growth", "block", 1.0, 10.0, "")]

    means = decided(draw)
    assert [check.value for check in means] == pytest.approx([(0.125 + 0.125 + 0.052 + 0.2917) / 4, 1.0])
    assert next(values, None) is None


def test_seven_lone_rows_of_24_refuse_nobody() -> None:
    """0.2917 is 7 of 24: in a layer of 24 outputs, 7 rows of the gradient have one token each, of 8 examples in all.

    `single_rows` counts so, and its limit grows to 8.5 of 24 in so narrow a layer: a head that reads one token of each
    example leaves the gradient to 8 tokens. One token more is still refused.
    """
    draw = torch.Generator().manual_seed(2)
    inputs = torch.randn(8, 32, 16, generator=draw)
    for lone, refused in ((7, False), (8, False), (9, True)):
        gradients = torch.randn(8, 32, 24, generator=draw)
        for row in range(lone):
            gradients[row % 8, row, row] = 1e6
        layer = running.Pass("layer", inputs, gradients)
        checks = {check.name: check for check in running.gradient_checks([layer], LIMITS, everywhere=False)}
        assert checks["single_rows"].value == pytest.approx(lone / 24)
        assert {name for name, check in checks.items() if not check.passed} == ({"single_rows"} if refused else set())


def test_what_fails_on_average_is_refused_and_what_is_not_finite_always() -> None:
    for values in (
        [0.3] * 99,
        [0.3, *[0.2, 0.31] * 20],
        [0.3, *[0.1] * 15, math.nan],
        [math.inf, math.inf, *[0.1] * 20],
    ):
        left = iter(values)
        with pytest.raises(UnsupportedModel, match=r"vetting single_rows=.*do not train on this emulator"):
            decided(lambda left=left: [Check("single_rows", "layer", next(left), 0.25, "")])  # type: ignore[misc]


def test_an_emulator_is_refused_by_luck_less_often_than_16_p_squared() -> None:
    """One failing draw of 16 may break a mean, and draws that pass never do: the bound on which the rate rests."""
    chance = random.Random(4)
    for p in (0.02, 0.05):
        refused = 0
        for _ in range(4000):

            def draw(p: float = p) -> list[Check]:
                value = 1e9 if chance.random() < p else chance.random()
                return [Check("growth", "block", value, 1.0, ""), Check("least", "b", 1 - min(value, 1), 0.0, "", True)]

            try:
                decided(draw)
            except UnsupportedModel:
                refused += 1
        assert refused / 4000 == pytest.approx(p * (1 - (1 - p) ** AVERAGED), rel=0.4)
        assert refused / 4000 < AVERAGED * p**2


def test_one_draw_is_enough_for_what_passes() -> None:
    left = iter([0.2])
    assert [check.value for check in decided(lambda: [Check("a", "b", next(left), 0.25, "")])] == [0.2]


def test_an_honest_modernbert_has_the_same_verdict_whatever_is_drawn(tmp_path: Path) -> None:
    with seeded(5):
        family = Family("modernbert", _modernbert(64, 8).eval().requires_grad_(False), {})
    family.build(tmp_path / "p")
    model, manifest = load(tmp_path / "p", dtype=torch.float32), read_manifest(tmp_path / "p")
    for seed in range(4):
        assert vet(tmp_path / "p", model, manifest, LIMITS, seed=seed).measured > 50


LUCKY = [trap for trap in TRAPS if {"least_change", "least_context", "sureness"} & set(TRAPS[trap])]


@pytest.mark.parametrize("trap", LUCKY, ids=lambda trap: trap.__name__.strip("_"))
def test_no_trap_passes_by_good_luck(make: Callable[..., Family], trap: Callable[[Any], None], tmp_path: Path) -> None:
    family = make("llama_untied")
    with torch.no_grad():
        trap(family.model)
    family.build(tmp_path / "p")
    for seed in (2, 3):
        with pytest.raises(UnsupportedModel, match="do not train on this emulator"):
            vetted(tmp_path / "p", seed=seed)


def _as_loud(model: Any) -> None:
    """A hidden identity whose table is just below the limit of tables."""
    model.get_input_embeddings().weight.mul_(1300)


def _all_quiet(model: Any) -> None:
    """Every block is an identity, so that none stands out."""
    for layer in model.model.layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            layer.get_submodule(name).weight.mul_(1e-3).clamp_(-1e-3, 1e-3)
        layer.input_layernorm.weight.mul_(1e-2)
        layer.post_attention_layernorm.weight.mul_(1e-2)


@pytest.mark.parametrize("trap", [_as_loud, _all_quiet])
def test_a_hidden_identity_is_no_quiet_model(
    make: Callable[..., Family], trap: Callable[[Any], None], tmp_path: Path
) -> None:
    family = make("llama_untied")
    with torch.no_grad():
        trap(family.model)
    family.build(tmp_path / "p")
    with pytest.raises(UnsupportedModel, match=r"vetting (least_change|least_loudest|least_context)="):
        vetted(tmp_path / "p")


def test_a_loud_word_of_a_large_table_is_always_seen() -> None:
    """Ratios and zeros are exact at any size: a sample of 1,024 rows would miss this word nine times of ten."""
    draw = torch.Generator().manual_seed(1)
    table = torch.randn(10_000, 16, generator=draw)
    table[9_876] *= 1e3
    for seed in range(3):
        checks = weight_checks._table_checks("t", table, LIMITS, torch.Generator().manual_seed(seed), tokens=False)
        assert "table_outlier" in {check.name for check in checks if not check.passed}
    half = torch.randn(16, 20_000, generator=draw)
    half[:, ::2] = 0.0
    zeros = {
        check.value
        for seed in range(3)
        for check in weight_checks._matrix_checks("m", half, LIMITS, torch.Generator().manual_seed(seed))
        if check.name == "zeros"
    }
    assert zeros == {0.5}


def apart(output: torch.Tensor) -> bool:
    """Whether outputs (8, numbers) count as different ones."""
    (check,) = (check for check in running._output_checks(output, LIMITS) if check.name == "least_apart")
    return check.passed


def test_two_alike_numbers_among_eight_are_chance_and_few_codes_are_a_trap() -> None:
    """A regression or a classifier of two labels has so few numbers that two examples get the same by chance."""
    draw = torch.Generator().manual_seed(1)
    assert all(apart(torch.randn(8, 1, generator=draw)) for _ in range(5000))
    opposite = torch.tensor([[1.0, -1.0]])  # the logits of a trained classifier of two labels
    assert all(apart(torch.randn(8, 1, generator=draw) @ opposite) for _ in range(1000))
    codes = torch.randn(3, 1, generator=draw)
    for same in (torch.full((8, 1), 5.0), codes[[0, 0, 0, 0, 1, 1, 1, 1]], codes[[0, 1, 2, 0, 1, 2, 0, 1]]):
        assert not apart(same)
        assert not apart(same @ opposite)
    wide = torch.randn(8, 100, generator=draw)
    assert apart(wide)
    assert not apart(wide[[0, 1, 2, 3, 4, 5, 6, 6]])  # two equal outputs of many numbers are no chance
