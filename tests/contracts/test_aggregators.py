"""Every server rule: pure, still at rest, equal to a second implementation by another route, its claims measured."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from offsite.adapter.layout import Layout
from offsite.coordinator.aggregation.factor_rules import nearest_product, read_earlier
from offsite.coordinator.aggregation.rules import AGGREGATORS, INDIVIDUALS, REFUSED, SUM, RuleSettings, ServerState
from offsite.errors import ConfigError, DataError, TooFewSurvivors

A, B = "layer.{}.lora_A.default.weight", "layer.{}.lora_B.default.weight"
LAYOUT = Layout((A.format(0), B.format(0), A.format(1), B.format(1), "norm"), ((2, 7), (5, 2), (2, 4), (6, 2), (3,)))
SITES = 5
EARLIER = {A.format(0): np.eye(7, dtype=np.float32)[:2] * 1.5, A.format(1): np.eye(4, dtype=np.float32)[2:3]}
SETTINGS = RuleSettings(0.1, 0.9, faulty=1, penalty=0.4, layout=LAYOUT, earlier=(EARLIER,))
Reference = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]


def draw(seed: int, name: str, scale: float = 1.0) -> np.ndarray:
    """Draws the input of a rule: a mean, or an update for each site."""
    shape = (LAYOUT.size,) if AGGREGATORS[name].needs == SUM else (SITES, LAYOUT.size)
    return np.random.default_rng(seed).normal(size=shape) * scale


def adapter(seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=LAYOUT.size).astype(np.float32)


def products(vector: np.ndarray) -> list[np.ndarray]:
    named = LAYOUT.named(vector)
    return [named[B.format(i)].astype(np.float64) @ named[A.format(i)] for i in (0, 1)]


# promises of every rule


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_rule_is_pure(name: str) -> None:
    update, start = draw(0, name), ServerState.start(adapter())
    before, given = start.adapter.copy(), update.copy()
    once, twice = (AGGREGATORS[name].step(start, update, SETTINGS) for _ in range(2))
    np.testing.assert_array_equal(once.adapter, twice.adapter)
    np.testing.assert_array_equal(start.adapter, before)
    np.testing.assert_array_equal(update, given)
    assert (start.first == 0).all()
    assert (start.second == 0).all()
    assert once.adapter.dtype == np.float32
    assert (once.rounds, start.rounds) == (1, 0)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_zero_update_moves_nothing(name: str) -> None:
    """flexlora writes the same products with other factors; olora is tested where it has nothing left to do."""
    start = adapter()
    if name == "olora":
        named = LAYOUT.named(start)
        named[A.format(0)][:, :2] = named[A.format(1)][:, 2] = 0
        start = np.concatenate([named[one].reshape(-1) for one in LAYOUT.names])
    after = AGGREGATORS[name].step(ServerState.start(start), draw(0, name) * 0, SETTINGS).adapter
    if name != "flexlora":
        np.testing.assert_array_equal(after, start)
    np.testing.assert_array_equal(after[-3:], start[-3:])
    for found, expected in zip(products(after), products(start), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_rule_is_linear_where_it_says_so_and_only_there(name: str) -> None:
    """In the upload, from a fixed state with moments: next(a) + next(b) = next(a + b) + next(0)."""
    first, second = np.random.default_rng(1).normal(size=(2, LAYOUT.size))
    state = ServerState(adapter(), first, np.square(second), 3)

    def after(update: np.ndarray) -> np.ndarray:
        return AGGREGATORS[name].step(state, update, SETTINGS).adapter.astype(np.float64)

    a, b = draw(2, name), draw(3, name)
    gap = np.abs(after(a) + after(b) - after(a + b) - after(a * 0)).max()
    assert (gap < 1e-5) if AGGREGATORS[name].linear else (gap > 1e-2), gap


def test_what_a_rule_needs_is_one_of_two_things() -> None:
    for name, rule in AGGREGATORS.items():
        assert rule.name == name
        assert rule.needs in (SUM, INDIVIDUALS)
        assert rule.why
        assert not rule.why.endswith(".")
    assert not set(AGGREGATORS) & set(REFUSED)


# by another route


def by_torch(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> Reference:
    def run(start: np.ndarray, updates: list[np.ndarray]) -> np.ndarray:
        parameter = torch.nn.Parameter(torch.from_numpy(start.astype(np.float64)))
        optimizer = make([parameter])
        for update in updates:
            parameter.grad = torch.from_numpy(-update)
            optimizer.step()
        return parameter.detach().numpy()

    return run


def yogi_by_hand(start: np.ndarray, updates: list[np.ndarray]) -> np.ndarray:
    """Reddi et al. 2021, algorithm 2, entry by entry in Python's own numbers."""
    found = []
    for place, begin in enumerate(start.tolist()):
        value, m, v = begin, 0.0, 0.0
        for count, update in enumerate(updates, 1):
            step = float(update[place])
            m = 0.9 * m + 0.1 * step
            if v > step**2:
                v -= 0.001 * step**2
            elif v < step**2:
                v += 0.001 * step**2
            value += 0.1 * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)) ** 0.5 + 1e-12)
        found.append(value)
    return np.array(found)


def per_round(move: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Reference:
    def run(start: np.ndarray, updates: list[np.ndarray]) -> np.ndarray:
        here = start.astype(np.float64)
        for update in updates:
            here = move(here, update).astype(np.float32).astype(np.float64)
        return here

    return run


def krum_by_hand(here: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """The least sum over every choice of n - f - 2 other updates."""
    scores = []
    for mine in range(SITES):
        others = [place for place in range(SITES) if place != mine]
        sums = [
            sum(sum((x - y) ** 2 for x, y in zip(updates[mine], updates[other], strict=True)) for other in chosen)
            for chosen in itertools.combinations(others, SITES - 1 - 2)
        ]
        scores.append(min(sums))
    return here + updates[scores.index(min(scores))]


def entrywise(choose: Callable[[list[float]], float]) -> Reference:
    return per_round(lambda here, updates: here + np.array([choose(sorted(column)) for column in updates.T.tolist()]))


def flexlora_by_hand(here: np.ndarray, updates: np.ndarray) -> np.ndarray:
    """By the whole product and its whole decomposition; signs are those of the rule, since they are free."""
    mine = LAYOUT.named(AGGREGATORS["flexlora"].step(ServerState.start(here), updates, SETTINGS).adapter)
    named = LAYOUT.named((here + updates).mean(axis=0))
    for i in (0, 1):
        parts = [LAYOUT.named(here + update) for update in updates]
        whole = sum(part[B.format(i)].astype(np.float64) @ part[A.format(i)] for part in parts) / SITES
        left, values, right = np.linalg.svd(whole, full_matrices=False)
        signs = np.sign((right[:2] * mine[A.format(i)]).sum(axis=1))
        named[A.format(i)] = (signs[:, None] * right[:2]).astype(np.float32)
        named[B.format(i)] = (left[:, :2] * values[:2] * signs).astype(np.float32)
    return np.concatenate([named[name].reshape(-1) for name in LAYOUT.names])


def olora_by_descent(here: np.ndarray, update: np.ndarray) -> np.ndarray:
    """Minimises |A' - A|^2 / 2 + lambda sum |A' A_i^T|^2 by small steps."""
    named = LAYOUT.named(here + update)
    for name, rows in EARLIER.items():
        start = torch.from_numpy(named[name]).double()
        moved = start.clone().requires_grad_(True)
        for _ in range(400):
            loss = (moved - start).square().sum() / 2 + 0.4 * (moved @ torch.from_numpy(rows).double().T).square().sum()
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = (moved - 0.2 * gradient).detach().requires_grad_(True)
        named[name] = moved.detach().float().numpy()
    return np.concatenate([named[one].reshape(-1) for one in LAYOUT.names])


PLAIN = by_torch(lambda p: torch.optim.SGD(p, lr=1.0))
REFERENCES: dict[str, Reference] = {
    "mean": PLAIN,
    "fedprox": PLAIN,
    "rolora": PLAIN,
    "nested": PLAIN,
    "fedavgm": by_torch(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "fedadam": by_torch(lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.999), eps=1e-12)),
    "fedyogi": yogi_by_hand,
    "krum": per_round(krum_by_hand),
    "median": entrywise(lambda values: values[SITES // 2]),
    "trimmed_mean": entrywise(lambda values: sum(values[1:-1]) / (SITES - 2)),
    "flexlora": per_round(flexlora_by_hand),
    "olora": per_round(olora_by_descent),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_rule_equals_its_second_implementation(name: str) -> None:
    assert set(REFERENCES) == set(AGGREGATORS)
    start = adapter()
    updates = [draw(seed, name, 0.3) for seed in range(10, 14)]
    state = ServerState.start(start)
    for update in updates:
        state = AGGREGATORS[name].step(state, update, SETTINGS)
    np.testing.assert_allclose(state.adapter, REFERENCES[name](start, updates), rtol=1e-4, atol=2e-5)
    assert np.abs(state.adapter - start).max() > 0.01


# promises of single rules


def test_krum_ignores_sites_that_send_anything() -> None:
    honest = np.random.default_rng(0).normal(size=(4, LAYOUT.size)) * 0.01 + 1
    for wild in (1e6, -3.0, np.float32(3e38)):
        after = AGGREGATORS["krum"].step(
            ServerState.start(adapter()), np.vstack([np.full(LAYOUT.size, wild), honest]), SETTINGS
        )
        assert np.abs(after.adapter - adapter() - 1).max() < 0.1
    for name in ("median", "trimmed_mean"):
        after = AGGREGATORS[name].step(
            ServerState.start(adapter()), np.vstack([np.full(LAYOUT.size, 1e6), honest]), SETTINGS
        )
        assert np.abs(after.adapter - adapter() - 1).max() < 0.1


@pytest.mark.parametrize(("name", "needed"), [("krum", 5), ("trimmed_mean", 3)])
def test_too_few_updates_are_no_round(name: str, needed: int) -> None:
    step, start = AGGREGATORS[name].step, ServerState.start(adapter())
    step(start, np.ones((needed, LAYOUT.size)), SETTINGS)
    with pytest.raises(TooFewSurvivors, match="faulty=1"):
        step(start, np.ones((needed - 1, LAYOUT.size)), SETTINGS)


@pytest.mark.parametrize(("out", "inside", "width", "rank"), [(6, 8, 10, 3), (2, 8, 6, 3), (8, 2, 6, 3), (9, 9, 3, 3)])
def test_the_nearest_product_leaves_what_no_rank_could_hold(out: int, inside: int, width: int, rank: int) -> None:
    """Eckart and Young: the error is that of the singular values beyond the rank."""
    rng = np.random.default_rng(5)
    up, down = rng.normal(size=(out, width)), rng.normal(size=(width, inside))
    new_up, new_down = nearest_product(up, down, rank)
    assert (new_up.shape, new_down.shape) == ((out, rank), (rank, inside))
    beyond = np.linalg.svd(up @ down, compute_uv=False)[rank:]
    error = np.linalg.norm(up @ down - new_up @ new_down)
    assert error == pytest.approx(np.linalg.norm(beyond), abs=1e-9)


def test_olora_moves_only_the_factors_of_earlier_adapters_and_towards_orthogonality() -> None:
    start, update = adapter(), draw(4, "olora")
    for penalty in (0.1, 1.0, 1e6):
        settings = dataclasses.replace(SETTINGS, penalty=penalty)
        after = LAYOUT.named(AGGREGATORS["olora"].step(ServerState.start(start), update, settings).adapter)
        plain = LAYOUT.named(start + update)
        for name, values in after.items():
            if name not in EARLIER:
                np.testing.assert_allclose(values, plain[name], atol=1e-6)
                continue
            overlap = np.linalg.norm(values @ EARLIER[name].T)
            assert overlap < np.linalg.norm(plain[name] @ EARLIER[name].T) / (1 + 1.9 * penalty)


def test_an_earlier_adapter_is_read_by_its_names(tmp_path_factory: pytest.TempPathFactory) -> None:
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("earlier")
    rows = np.ones((3, 7), dtype=np.float32)
    save_file(
        {"layer.0.lora_A.weight": rows, "layer.0.lora_B.weight": rows.T.copy(), "other.lora_A.weight": rows},
        folder / "adapter_model.safetensors",
    )
    assert {name: values.shape for name, values in read_earlier(str(folder), LAYOUT).items()} == {A.format(0): (3, 7)}
    with pytest.raises(ConfigError, match="no factor A"):
        read_earlier(str(folder), Layout(("norm",), ((3,),)))
    with pytest.raises(ConfigError, match="does not fit this model"):
        read_earlier(str(folder), Layout((A.format(0),), ((2, 8),)))
    with pytest.raises(DataError, match="no readable"):
        read_earlier(str(folder / "none"), LAYOUT)
