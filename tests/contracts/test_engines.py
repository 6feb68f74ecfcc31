"""The promise of every entry of ENGINES: each example's own gradient, as exactly as arithmetic allows."""

from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.func import functional_call, grad
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.errors import PrivacyRefusal
from offsite.privacy.batches import trainable
from offsite.privacy.engines import ENGINES
from offsite.privacy.norms import CLIP_MARGIN
from offsite.privacy.probe import choose_engine, single_gradient
from offsite.task.causal_lm import CausalLM
from offsite.task.examples import Examples

TASK = CausalLM()
DENSE = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
# name -> (family, method, targets): dense layers, transposed ones, norms, whole blocks, and what only a slot has.
CASES = {
    "lora on llama": ("llama", "lora", DENSE),
    "lora on gpt2": ("gpt2", "lora", ("c_attn", "c_proj", "c_fc")),
    "norms of llama": ("llama", "norm", ()),
    "norms of gpt2": ("gpt2", "norm", ()),
    "bottleneck": ("llama", "bottleneck", ()),
    "biases": ("gpt2", "bitfit", ()),
    "scales": ("llama", "ia3", ("k_proj", "v_proj", "down_proj")),
    "shards": ("llama", "miss", ("q_proj", "down_proj")),
    "blocks of llama": ("llama", "", ()),
    "blocks of gpt2": ("gpt2", "", ()),
    "changes of llama": ("llama", "blocks", ()),
    "changes of gpt2": ("gpt2", "blocks", ()),
}
CLOSED = {"lora on llama", "lora on gpt2", "norms of llama", "norms of gpt2", "bottleneck", "blocks of llama"}
CLOSED |= {"changes of llama", "changes of gpt2"}
HOOKED = {*CLOSED, "blocks of gpt2", "biases"}


def plain(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "use_cache": False}
        if family == "llama":
            config = LlamaConfig(
                **sizes, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
            )
            return LlamaForCausalLM(config).eval().requires_grad_(False)
        if family == "opt":
            sizes |= {"word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0}
            return OPTForCausalLM(
                OPTConfig(**sizes, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4)
            ).requires_grad_(False)
        config = GPT2Config(
            **sizes, n_embd=32, n_layer=4, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        return GPT2LMHeadModel(config).eval().requires_grad_(False)


TOWER = {"llama": "model.layers", "gpt2": "transformer.h"}


def adapted(case: str, dtype: torch.dtype = torch.float32) -> Any:
    family, method, targets = CASES[case]
    model, slots = plain(family).to(dtype), tuple(f"{TOWER[family]}.{index}" for index in (0, 3))
    if method:
        model = attach(model, AdapterSpec(method, rank=3, targets=targets, slots=slots))
    else:
        for slot in slots:
            model.get_submodule(slot).requires_grad_(True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return model


def ragged(count: int = 5, length: int = 10) -> Examples:
    ids = torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(2))
    widths = torch.tensor([length, 4, length - 3, 2, length - 1])[:count]
    return Examples(ids, (torch.arange(length) < widths[:, None]).long())


def by_function(model: nn.Module, losses: Any, batch: Any) -> list[Tensor]:
    """Returns each example's gradient, flat, by torch.func.grad through the whole model."""
    values = {name: p.detach() for name, p in trainable(model).items()}

    class Fixed(nn.Module):
        def __init__(self, weights: dict[str, Tensor]) -> None:
            super().__init__()
            self.weights = weights

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return functional_call(model, self.weights, args, kwargs)

    rows = [
        grad(lambda weights, i=i: losses(Fixed(weights), batch.select([i])).sum())(values) for i in range(len(batch))
    ]
    return [torch.cat([row[name].flatten() for name in values]).double() for row in rows]


def by_engine(model: nn.Module, losses: Any, batch: Any, engine: str) -> list[Tensor]:
    with ENGINES[engine](model) as opened:
        found = [single_gradient(model, losses, batch, opened, row) for row in range(len(batch))]
    return [torch.cat([part.flatten() for part in row.values()]) for row in found]


def error(found: list[Tensor], right: list[Tensor]) -> float:
    return max(float((f - r).norm() / r.norm()) for f, r in zip(found, right, strict=True))


def fits(engine: str, case: str) -> bool:
    """Whether an engine is made for a case; the slot engine and the loop are made for all."""
    return {"bookkeeping": case in CLOSED | {"blocks of gpt2"}, "hooks": case in HOOKED}.get(engine, True)


def fitting(engines: Any, cases: Any) -> list[tuple[str, str]]:
    return [(engine, case) for engine in engines for case in cases if fits(engine, case)]


@pytest.mark.parametrize("case", CASES)
def test_the_slot_engine_takes_all_examples_of_a_module_at_once(case: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its way out, one example at a time, gives the same gradients, so that only its log line tells of it."""
    with caplog.at_level("INFO"):
        by_engine(adapted(case), TASK.losses, ragged(), "slot")
    assert "goes through a loop" not in caplog.text


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_each_example_has_its_own_gradient(engine: str, case: str) -> None:
    """In float64, so that only a different computation can differ; with short and long records in one batch."""
    model = adapted(case).double()
    if not fits(engine, case):
        with pytest.raises((PrivacyRefusal, NotImplementedError, RuntimeError, AttributeError, TypeError)):
            by_engine(model, TASK.losses, ragged(), engine)
        return
    right = by_function(adapted(case).double(), TASK.losses, ragged())
    assert error(by_engine(model, TASK.losses, ragged(), engine), right) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_the_probe_takes_the_first_engine_that_is_exact(case: str) -> None:
    wanted = next(engine for engine in ENGINES if fits(engine, case))
    assert choose_engine(adapted(case), TASK.losses, ragged()) == wanted


@pytest.mark.parametrize(
    ("engine", "case"),
    fitting(("bookkeeping", "slot", "loop"), ("lora on llama", "norms of gpt2", "scales", "changes of gpt2")),
)
def test_gradient_checkpointing_changes_nothing(engine: str, case: str) -> None:
    """Transformers' default kind, under which Opacus' hooks see every module twice or not at all."""
    right = by_function(adapted(case).double(), TASK.losses, ragged())
    model = adapted(case).double()
    model.gradient_checkpointing_enable()  # not reentrant
    model.train()
    assert error(by_engine(model, TASK.losses, ragged(), engine), right) < 1e-6
    assert choose_engine(model, TASK.losses, ragged()) != "hooks"


@pytest.mark.parametrize(("engine", "case"), fitting(ENGINES, ("lora on llama", "norms of gpt2", "scales")))
def test_a_bfloat16_model_with_float32_adapters(engine: str, case: str) -> None:
    """Against batches of one in the same precision: bfloat16 keeps 8 bits, and sums of other order round otherwise."""
    model = adapted(case, torch.bfloat16)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    found = by_engine(model, TASK.losses, ragged(), engine)
    right = by_engine(model, TASK.losses, ragged(), "loop")
    assert error(found, right) < 2e-2
    assert error(found[::-1], right) > 0.5  # the gradients of two examples differ


def clipped_sum(model: nn.Module, losses: Any, batch: Any, engine: str, bound: float, physical: int = 64) -> Tensor:
    for parameter in trainable(model).values():
        parameter.__dict__.pop("summed_grad", None)
    total = torch.zeros(sum(p.numel() for p in trainable(model).values()), dtype=torch.float64)
    with ENGINES[engine](model) as opened:
        for start in range(0, len(batch), physical):
            part = batch.select(list(range(start, min(start + physical, len(batch)))))
            opened.add(losses, part, lambda norms, _: (bound * (1 - CLIP_MARGIN) / norms).clamp(max=1.0))
        if len(batch):
            total = torch.cat([p.summed_grad.flatten() for p in trainable(model).values()])
    return total


@pytest.mark.parametrize(("engine", "case"), fitting(ENGINES, CASES))
def test_no_example_moves_the_sum_by_more_than_the_bound(engine: str, case: str) -> None:
    """Leave one out, noise off, at bounds under which all, some and none of the examples are clipped."""
    model, batch = adapted(case), ragged()
    norms = torch.stack([g.norm() for g in by_engine(model, TASK.losses, batch, "loop")])
    for bound in (float(norms.min()) / 3, float(norms.median()), float(norms.max()) * 3):
        whole = clipped_sum(model, TASK.losses, batch, engine, bound)
        for row in range(len(batch)):
            rest = clipped_sum(model, TASK.losses, batch.select([i for i in range(5) if i != row]), engine, bound)
            moved = float((whole - rest).norm())
            assert moved <= bound * (1 + 1e-6)
            assert moved == pytest.approx(min(bound * (1 - CLIP_MARGIN), float(norms[row])), rel=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_micro_batches_and_empty_ones_add_up_to_the_whole(engine: str) -> None:
    model, batch = adapted("lora on llama").double(), ragged()
    whole = clipped_sum(model, TASK.losses, batch, engine, 0.3)
    for physical in (1, 2, 3):
        parts = clipped_sum(model, TASK.losses, batch, engine, 0.3, physical)
        assert float((parts - whole).norm() / whole.norm()) < 1e-12
    assert not clipped_sum(model, TASK.losses, batch.select([]), engine, 0.3).any()


class Poison(torch.autograd.Function):
    """The identity, except for values that are not finite in some rows: forwards, or only backwards."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, bad: Tensor, where: str) -> Tensor:
        ctx.bad = bad if where == "gradient" else torch.zeros_like(bad)
        return losses.masked_fill(bad, float("nan")) if where == "loss" else losses.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.masked_fill(ctx.bad, float("inf")), None, None


def poisoned(row: int, where: str) -> Any:
    def losses(model: nn.Module, batch: Examples) -> Tensor:
        bad = (batch.input_ids == ragged().input_ids[row]).all(dim=1)
        return Poison.apply(TASK.losses(model, batch), bad, where)

    return losses


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_example_that_is_not_finite_leaves_no_trace(engine: str, where: str) -> None:
    model, batch = adapted("lora on llama").double(), ragged()
    others = batch.select([0, 1, 3, 4])
    clean = clipped_sum(model, TASK.losses, others, engine, 0.3)
    assert float((clipped_sum(model, poisoned(2, where), batch, engine, 0.3) - clean).norm()) < 1e-12


def test_a_layer_that_runs_twice_and_one_that_is_shared_count_once() -> None:
    """The norm is that of the sum of both uses, which norms of the parts would get wrong."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    model = Twice().double()
    rows = Rows(torch.randn(4, 3, 6, dtype=torch.float64))
    right = by_function(model, squares, rows)
    assert error(by_engine(model, squares, rows, "bookkeeping"), right) < 1e-9


class Rows:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def select(self, indices: Any) -> "Rows":
        return Rows(self.values[torch.as_tensor(indices, dtype=torch.long)])


def squares(model: nn.Module, rows: Rows) -> Tensor:
    return model(rows.values).square().flatten(1).mean(1)


def test_a_wide_layer_is_taken_from_its_factors() -> None:
    """Wide against its positions: gradients are not held whole, and two chunks of one layer are joined."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 50)).double()
    rows = Rows(torch.randn(4, 2, 40, dtype=torch.float64))
    assert error(by_engine(model, squares, rows, "bookkeeping"), by_function(model, squares, rows)) < 1e-9


def test_a_module_may_have_several_outputs_of_several_kinds() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6))

        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return x * self.scale, (x + self.scale).square(), x.argmax(-1, keepdim=True), None, 3

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Several()

        def forward(self, x: Tensor) -> Tensor:
            first, second, place, _, times = self.inner(x)
            return first + times * second + place

    model, rows = Around().double(), Rows(torch.randn(4, 6, dtype=torch.float64))
    assert error(by_engine(model, squares, rows, "slot"), by_function(model, squares, rows)) < 1e-9


def test_a_weight_that_is_read_beside_its_module_is_refused() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) @ self.inner.weight

    rows = Rows(torch.randn(3, 6))
    with pytest.raises(PrivacyRefusal, match="outside its module"):
        by_engine(Beside(), squares, rows, "bookkeeping")
    assert choose_engine(Beside(), squares, rows) in {"slot", "loop"}


def test_opts_flattened_feed_forward_breaks_the_bound_in_opacus_and_goes_to_the_loop() -> None:
    """OPT hands its feed-forward layers one row per token, so Opacus clips tokens and not records."""
    model = plain("opt").eval()
    for layer in model.model.decoder.layers:
        layer.fc1.requires_grad_(True)
    batch, bound = ragged(), 0.01
    assert choose_engine(model, TASK.losses, batch) == "loop"
    for engine in ("bookkeeping", "slot", "hooks"):
        with pytest.raises(PrivacyRefusal):
            by_engine(model, TASK.losses, batch, engine)

    def stock(part: Examples) -> Tensor:
        """Opacus' own clipped sum, as its optimizer forms it."""
        hooks = GradSampleHooks(model.train(), loss_reduction="sum", strict=True)
        TASK.losses(model, part).sum().backward()
        rows = [p.grad_sample for p in trainable(model).values()]
        norms = torch.stack([row.flatten(1).norm(dim=1) for row in rows], 1).norm(dim=1)
        factors = (bound / (norms + 1e-6)).clamp(max=1.0)
        total = torch.cat([torch.einsum("b,b...->...", factors, row).flatten() for row in rows]).detach()
        hooks.cleanup()
        for parameter in model.parameters():
            parameter.grad = None
            parameter.__dict__.pop("grad_sample", None)
        model.eval()
        return total

    whole = stock(batch)
    worst = max(float((whole - stock(batch.select([i for i in range(5) if i != row]))).norm()) for row in range(5))
    assert worst > 1.5 * bound
    ours = clipped_sum(model, TASK.losses, batch, "loop", bound)
    rest = [
        clipped_sum(model, TASK.losses, batch.select([i for i in range(5) if i != r]), "loop", bound) for r in range(5)
    ]
    assert max(float((ours - one).norm()) for one in rest) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("case", ["lora on llama", "norms of gpt2", "bottleneck", "blocks of llama"])
def test_bookkeeping_makes_autograd_hold_no_byte_more(case: str) -> None:
    """Between forward and backward pass, where a step's memory is at its peak."""

    def held(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def kept(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            losses = TASK.losses(model, ragged())
        total = sum(size for place, size in sizes.items() if place not in weights)
        del losses
        return total

    model = adapted(case)
    plain_bytes = held(model)
    with ENGINES["bookkeeping"](model):
        assert held(model) <= plain_bytes
