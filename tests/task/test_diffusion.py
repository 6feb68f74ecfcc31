"""task.diffusion: each record has its own loss and its own noise."""

import json

import numpy as np
import pytest
import torch

from offsite.errors import ConfigError, DataError, UnknownName, UnsupportedModel
from offsite.privacy.probe import probe
from offsite.task.diffusion import ClassToImage, TextToImage
from offsite.task.noise import NoiseSchedule, parse
from offsite.task.records import LenientRecords
from tests.task.latents import (
    CHANNELS,
    CLASSES,
    LENGTH,
    SCHEDULE,
    SIDE,
    TASKS,
    TOWERS,
    WIDTH,
    diffusers,
    dit,
    folder,
    latents,
)
from tests.task.pictures import adapted

each = pytest.mark.parametrize("name", sorted(TASKS))


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Returns a function from a task's name to the task, a new model and its schedule."""
    folders = {}

    def load(name, dtype=torch.float32):
        task, make, targets = TASKS[name]
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            folder(make, folders[name])
        return task, task.load(folders[name], dtype=dtype), task.load_processor(folders[name]), targets

    return load


def encoded(task, model, schedule, records):
    return task.encode(schedule, records, length=LENGTH, split="truncate", model_config=model.config)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_one_finite_float32_number_per_example(name, dtype, opened):
    task, model, schedule, _ = opened(name, dtype)
    losses = task.losses(model, encoded(task, model, schedule, latents(3, 0)))
    assert losses.shape == (3,)
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()
    assert (losses > 0).all()
    assert not any(p.requires_grad for p in model.parameters())


@each
def test_no_example_touches_another_and_its_noise_is_its_own(name, opened):
    task, model, schedule, _ = opened(name)
    records = latents(3, 0)
    batch = encoded(task, model, schedule, records)
    together = task.losses(model, batch)
    assert torch.equal(task.losses(model, batch), together)
    for row in range(3):
        assert torch.allclose(task.losses(model, batch.select([row]))[0], together[row], rtol=1e-5)
        alone = encoded(task, model, schedule, records[row : row + 1])  # as if the other records did not exist
        assert torch.equal(alone.noisy[0], batch.noisy[row])
        assert torch.equal(alone.steps[0], batch.steps[row])
    assert not torch.equal(batch.steps[0], batch.steps[1])


@each
def test_losses_are_those_of_each_draw_alone(name, opened):
    """Each record and draw is computed in a separate call, with an unpadded text."""
    task, model, schedule, _ = opened(name)
    records = latents(3, 0)
    batch = encoded(task, model, schedule, records)
    for row, record in enumerate(records):
        conditions = {"class_labels": torch.tensor([record["label"]])}
        if name != "class_to_image":
            conditions = {"encoder_hidden_states": torch.from_numpy(record["prompt_embeds"])[None]}
        errors = []
        for draw in range(4):
            step, noisy = int(batch.steps[row, draw]), batch.noisy[row, draw]
            assert draw * 250 <= step < (draw + 1) * 250
            kept = float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: step + 1]))
            noise = (noisy - kept**0.5 * torch.from_numpy(record["latents"])) / (1 - kept) ** 0.5
            said = model(noisy[None], timestep=torch.tensor([step]), **conditions).sample[0, :CHANNELS]
            errors.append(float(((said - noise) ** 2).mean().detach()))
        assert float(task.losses(model, batch)[row]) == pytest.approx(np.mean(errors), rel=1e-3)


@each
def test_tallies_add_up_and_run_calls_the_model_once(name, opened):
    task, model, schedule, _ = opened(name)
    batch = encoded(task, model, schedule, latents(3, 0))
    whole, parts = (
        task.tally(model, batch),
        task.tally(model, batch.select([0, 2])) + task.tally(model, batch.select([1])),
    )
    assert whole.targets == parts.targets == 3
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    assert whole.loss == pytest.approx(float(task.losses(model, batch).sum()), rel=1e-5)
    assert whole.metrics["explained"] == pytest.approx(parts.metrics["explained"], rel=1e-5)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    task.run(model, batch)
    assert calls == [1]


def test_a_model_that_says_the_noise_explains_it_and_one_that_says_nothing_does_not(opened):
    task, model, schedule, _ = opened("class_to_image")
    batch = encoded(task, model, schedule, latents(3, 0))

    class Says(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.weight, self.factor, self.calls = torch.nn.Parameter(torch.zeros(1)), factor, 0

        def forward(self, hidden_states, timestep, class_labels):
            self.calls += 1
            return type("Output", (), {"sample": self.factor * batch.wanted[:, self.calls - 1]})

    assert task.tally(Says(1.0), batch).metrics["explained"] == (3.0, 3)
    assert task.tally(Says(0.0), batch).metrics["explained"] == pytest.approx((0.0, 3), abs=1e-5)


@each
@pytest.mark.parametrize("engine", ["bookkeeping", "loop"])
def test_gradients_can_be_told_apart_by_example(name, engine, opened):
    task, model, schedule, targets = opened(name)
    model = adapted(model, TOWERS[name], targets)
    for batch in (task.dummy_batch(model, LENGTH, seed=3), encoded(task, model, schedule, latents(3, 0))):
        probe(model, task.losses, batch, engine)


@each
def test_an_adapter_learns_to_tell_noise_from_waves(name, opened):
    task, model, schedule, targets = opened(name)
    model = adapted(model, TOWERS[name], targets)
    seen, unseen = (encoded(task, model, schedule, latents(count, seed)) for count, seed in ((64, 1), (24, 2)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=4e-2)
    generator = torch.Generator().manual_seed(0)
    before = task.tally(model, unseen)
    for _ in range(24):
        rows = torch.randperm(64, generator=generator)[:8]
        optimizer.zero_grad()
        task.losses(model, seen.select(rows)).mean().backward()
        optimizer.step()
    after = task.tally(model, unseen)
    assert after.loss < 0.75 * before.loss
    assert before.metrics["explained"][0] < 0 < after.metrics["explained"][0]  # better than predicting 0


def test_a_class_that_the_model_does_not_have_is_without_a_loss(opened):
    task, model, schedule, _ = opened("class_to_image")
    batch = encoded(task, model, schedule, latents(3, 0))
    honest = task.losses(model, batch)
    batch.conditions["class_labels"][1] = CLASSES + 3
    losses = task.losses(model, batch.within(model))
    assert losses[1] == 0
    assert torch.allclose(losses[[0, 2]], honest[[0, 2]], rtol=1e-5)
    assert batch.within(model).targets.tolist() == [1, 0, 1]


@each
def test_bad_records_and_splits_are_refused_by_their_place(name, opened):
    task, model, schedule, _ = opened(name)
    good = latents(3, 0)
    wrong = [
        {"latents": np.zeros((CHANNELS, SIDE, SIDE + 1), np.float32)},
        {"latents": np.zeros((CHANNELS, SIDE, SIDE), np.int64)},
        {"latents": np.full((CHANNELS, SIDE, SIDE), 1e300)},  # not finite in float32
        {"label": CLASSES, "prompt_embeds": np.zeros((3, WIDTH + 1), np.float32)},
        {"label": True, "prompt_embeds": np.zeros((0, WIDTH), np.float32)},
    ]
    for change in wrong:
        with pytest.raises(DataError, match="record=2"):
            encoded(task, model, schedule, [good[0], {**good[1], **change}])
    with pytest.raises(DataError, match="examples=0"):
        encoded(task, model, schedule, [])
    with pytest.raises(ConfigError, match="truncate"):
        task.encode(schedule, good, length=LENGTH, split="blocks", model_config=model.config)


@each
def test_at_an_approved_job_a_wrong_record_is_one_without_a_loss(name, opened):
    task, model, schedule, _ = opened(name)
    records = latents(4, 0)
    honest = task.losses(model, encoded(task, model, schedule, records))
    conditions = {"label": CLASSES, "prompt_embeds": np.zeros((3, WIDTH + 1), np.float32)}
    forgiving = LenientRecords(
        [records[0], {**records[1], "latents": records[1]["latents"] * np.nan}, records[2] | conditions]
    )
    forgiving.append(records[3])
    batch = encoded(task, model, schedule, forgiving)
    assert len(forgiving.faults) == 2
    assert batch.targets.tolist() == [1, 0, 0, 1]
    losses = task.losses(model, batch)
    assert losses[[1, 2]].tolist() == [0.0, 0.0]
    assert torch.allclose(losses[[0, 3]], honest[[0, 3]], rtol=1e-5)


# Autoencoder -> its channels, scaling_factor and shift_factor, as published in its config.json.
AUTOENCODERS = {
    "Stable Diffusion 1 and 2": (4, 0.18215, 0.0),
    "Stable Diffusion XL": (4, 0.13025, 0.0),
    "Stable Diffusion 3": (16, 1.5305, 0.0609),
    "Flux": (16, 0.3611, 0.1159),
}


def sized(opened, channels, size, mean=0.0):
    """Encodes records of so many channels, of a root mean square and a mean."""
    task, model, schedule, _ = opened("class_to_image")
    generator = np.random.default_rng(5)
    noise = generator.normal(size=(9, channels, SIDE, SIDE))
    noise = (noise - noise.mean()) / noise.std() * (size**2 - mean**2) ** 0.5
    records = [{**one, "latents": (noise[n] + mean).astype(np.float32)} for n, one in enumerate(latents(9, 0))]
    config = {**model.config, "in_channels": channels, "out_channels": channels}
    task.encode(schedule, records, length=LENGTH, split="truncate", model_config=config)


@pytest.mark.parametrize("family", AUTOENCODERS)
@pytest.mark.parametrize("spread", [0.85, 1.0, 1.2])
def test_the_latents_of_every_autoencoder_are_known_unscaled_and_scaled(family, spread, opened, caplog):
    """A data set's images may be flatter or richer than those by which the factors were chosen: by `spread`."""
    channels, factor, shift = AUTOENCODERS[family]
    mean = shift * spread
    for size, off, warned in (
        (spread * np.hypot(1 / factor, shift), mean, True),
        (spread, 0.0, False),
        (spread * np.hypot(1, factor * shift), mean * factor, False),  # without the shift alone: cannot be told
    ):
        caplog.clear()
        sized(opened, channels, size, off)
        assert len(caplog.messages) == warned, (family, size)
        if warned:
            start = f"latents: records=9 of {channels} channels have a root mean square of {size:.3g}, "
            assert caplog.messages[0].startswith(start)
            assert f"(here about {1 / size:.3g})" in caplog.messages[0]


@pytest.mark.parametrize(
    ("channels", "size", "warned"),
    [
        (4, 0.18215, True),  # scaled twice
        (4, 110.0, True),
        (4, 0.66, False),  # of 4 channels no autoencoder is known that makes such latents
        (16, 0.66, True),
        (16, 1.5305, False),  # scaled twice, or rich images: cannot be told
        (8, 0.66, False),
        (8, 1 / 0.41407, True),
        (3, 1.5, False),
    ],
)
def test_latents_of_another_scale_than_the_noise_are_warned_about(channels, size, warned, opened, caplog):
    sized(opened, channels, size)
    assert len(caplog.messages) == warned


def test_a_class_is_one_number_in_every_form_of_it(opened):
    task, model, schedule, _ = opened("class_to_image")
    forms = [{**latents(1, 0)[0], "label": label} for label in (3, "3", 3.0, "3.0")]
    found = encoded(task, model, schedule, forms).conditions["class_labels"]
    assert found.tolist() == [3, 3, 3, 3]


def test_a_model_of_another_task_or_with_wishes_of_its_own_is_refused(opened, tmp_path):
    folder(dit, tmp_path)
    with pytest.raises(UnsupportedModel, match="must be PixArtTransformer2DModel or UNet2D"):
        TextToImage().load(tmp_path, dtype=torch.float32)
    task, model, schedule, _ = opened("text_to_image")
    for change, reason in (({"out_channels": 7}, "out_channels"), ({"use_additional_conditions": True}, "size")):
        with pytest.raises(UnsupportedModel, match=reason):
            task.encode(
                schedule, latents(1, 0), length=LENGTH, split="truncate", model_config={**model.config, **change}
            )


def test_every_way_a_folder_can_be_wrong_is_one_line(tmp_path):
    task = ClassToImage()
    with pytest.raises(DataError, match=r"no config\.json"):
        task.load(tmp_path, dtype=torch.float32)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(DataError, match="damaged"):
        task.load(tmp_path, dtype=torch.float32)
    folder(dit, tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        task.load(tmp_path, dtype=torch.float32)
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        task.load(tmp_path, dtype=torch.float32)


def test_missing_and_broken_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder(dit, tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    broken = {**tensors, "proj_out_1.bias": torch.full_like(tensors["proj_out_1.bias"], torch.nan)}
    save_file(broken, path)
    with pytest.raises(DataError, match="NaN"):
        ClassToImage().load(tmp_path, dtype=torch.float32)
    del tensors["proj_out_1.bias"]
    save_file(tensors, path)
    with pytest.raises(DataError, match=r"lacks tensor='proj_out_1\.bias'"):
        ClassToImage().load(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_noise_is_that_of_diffusers(betas, prediction, tmp_path):
    theirs = diffusers().DDPMScheduler(
        num_train_timesteps=100, beta_start=2e-4, beta_end=0.03, beta_schedule=betas, prediction_type=prediction
    )
    theirs.save_pretrained(tmp_path)
    mine = NoiseSchedule.of(tmp_path)
    assert mine.steps == 100
    image, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    for step in (0, 1, 50, 99):
        at = torch.tensor([step])
        assert torch.allclose(
            mine.mixed(image, noise, step), theirs.add_noise(image[None], noise[None], at)[0], atol=1e-5
        )
        wanted = {
            "epsilon": noise,
            "sample": image,
            "v_prediction": theirs.get_velocity(image[None], noise[None], at)[0],
        }[prediction]
        assert torch.allclose(mine.wanted(image, noise, step), wanted, atol=1e-5)


def test_schedules_that_are_not_known_are_refused(tmp_path):
    wrong = [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, UnsupportedModel, "flow matching"),
        ({"trained_betas": [0.1]}, UnsupportedModel, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, UnsupportedModel, "zero_snr"),
        ({"num_train_timesteps": 10**9}, UnsupportedModel, "num_train_timesteps"),
        ({"beta_end": float("nan")}, UnsupportedModel, "beta_end"),
        ({"beta_schedule": "lineal"}, UnknownName, "did you mean linear"),
        ({"prediction_type": "flow"}, UnknownName, "prediction_type"),
    ]
    for change, error, reason in wrong:
        with pytest.raises(error, match=reason):
            parse({**SCHEDULE, **change})
    with pytest.raises(DataError, match=r"no scheduler_config\.json"):
        NoiseSchedule.of(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SCHEDULE)[:-1])
    with pytest.raises(DataError, match="damaged"):
        NoiseSchedule.of(tmp_path)
