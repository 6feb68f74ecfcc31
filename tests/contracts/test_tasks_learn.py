"""A whole federation learns every task privately, under secure aggregation, on an emulator."""

import json
from dataclasses import replace

import pytest
import torch

from offsite.adapter.export import load
from offsite.cli.display import PlainDisplay
from offsite.coordinator.config.federation_file import parse_config
from offsite.coordinator.report.json_report import read_report
from offsite.simulation.memory_engine import memory_engine
from offsite.simulation.run_folder import Run
from offsite.simulation.simulate import Options, simulate
from offsite.task.generation import GeneratingTask
from offsite.task.tasks import TASKS
from tests.task import latents
from tests.task_samples import SAMPLES, first_of, write_records

STEPS = 60
OWNERS = ("ash", "birch", "cedar")


def teach(sample, folder, steps):
    """Trains the model a little on public records, so that an adapter has something to adapt."""
    task = TASKS[sample.task]
    model = task.load(folder, dtype=torch.float32).requires_grad_(True)
    batch = task.encode(
        task.load_processor(folder),
        sample.records(256, 4),
        length=sample.length,
        split="truncate",
        model_config=model.config,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        task.losses(model, batch.select(torch.randint(256, (16,), generator=order))).mean().backward()
        optimizer.step()
    model.save_pretrained(folder)


def config_for(sample, folder, steps=STEPS):
    """Writes model and data of a federation of three owners, and returns the content of its configuration file."""
    sample.save(folder / "model")
    if sample.dialects:
        teach(sample, folder / "model", steps)
    parts = [("public", 96, 2)]  # an even seed, as in `teach`; the owners' records have another dialect
    for number, owner in enumerate(OWNERS):
        parts += [(f"{owner}-train", 256, 10 * number + 1), (f"{owner}-heldout", 24, 10 * number + 3)]
    for name, count, seed in parts:
        write_records(sample.records(count, seed), folder / f"{name}{sample.suffix}")
    sites = [{"name": one, **{part: f"{one}-{part}{sample.suffix}" for part in ("train", "heldout")}} for one in OWNERS]
    data = {"public": f"public{sample.suffix}", "length": sample.length, "split": "truncate", "reader": sample.reader}
    adapter = {"method": "ffa_lora", "rank": 4, "alpha": 16.0, "targets": list(sample.targets)}
    if sample.task == "image_prompt_to_image":  # no other method may train this task
        adapter |= {"method": "ip_adapter", "targets": []}
    return {
        "seed": 1,
        "model": {"path": "model", "task": sample.task},
        "data": data,
        "sites": sites,
        "emulator": {"first": 1, "last": 1, "compress": ["int8:16"], "gate": 0.0},
        "adapter": adapter,
        "training": {"rounds": 4, "local_steps": 4, "batch": 32, "learning_rate": 1.0, "physical_batch": 32},
        "aggregation": {"rule": "fedadam", "learning_rate": 0.05},
        "privacy": {"epsilon": 8.0, "accountant": "rdp"},
        "evaluation": {"examples": 72, "public_examples": 24, "tolerance": 5.0},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_private_federation_learns_it_on_the_emulator_and_for_the_full_model(name, tmp_path):
    content, generates = config_for(first_of(name), tmp_path), isinstance(TASKS[name], GeneratingTask)
    if generates:
        content["evaluation"] |= {
            "measures": ["rouge", "chrf", "exact_match"],
            "generated_records": 12,
            "new_tokens": 8,
        }
    check_learnt(content, tmp_path)
    if generates:
        check_texts(tmp_path / "run", nearer=name != "image_text")  # the answers are single words, learnt in part


@pytest.mark.slow
def test_a_private_federation_learns_on_a_u_net(tmp_path):
    """The blocks of a U-net lie in several towers, so its emulator is built in another way."""
    content = config_for(next(one for one in SAMPLES if str(one) == "text_to_image-unet"), tmp_path)
    content["adapter"]["targets"] = ["to_v", "to_out.0", "proj", "net.2"]
    content["training"]["rounds"], content["aggregation"]["learning_rate"] = 2, 0.1
    check_learnt(content, tmp_path)


@pytest.mark.slow
def test_an_ip_adapter_learns_what_images_say(tmp_path):
    """The full model predicts a record better with its own image, and much worse with the image of another record."""
    sample = replace(first_of("image_prompt_to_image"), records=latents.toned, dialects=True)
    scores = private_scores(config_for(sample, tmp_path, steps=100), tmp_path)
    assert scores["plug_in"].loss < scores["full_zero_shot"].loss
    task, folder, records = TASKS[sample.task], tmp_path / "model", latents.toned(120, 77)
    images = [one["image_embeds"] for one in records]
    others = [one | {"image_embeds": image} for one, image in zip(records, images[1:] + images[:1], strict=True)]
    tuned = load(task.load(folder, dtype=torch.float32), tmp_path / "run" / "adapter")
    assert loss_of(task, folder, tuned, records) < 0.9 * loss_of(task, folder, tuned, others)


def loss_of(task, folder, model, records):
    facts = {"length": 8, "split": "truncate", "model_config": model.config}
    tally = task.tally(model, task.encode(task.load_processor(folder), records, **facts))
    return tally.loss / tally.targets


def private_scores(content, tmp_path):
    """Runs a private federation to its end, and returns its scores on held-out records by name."""
    run = Run.create(parse_config(content, tmp_path), "0" * 64, tmp_path / "run")
    report = simulate(run, Options(memory_engine, "memory", PlainDisplay(), "2026-01-01T00:00:00+00:00"))
    assert report.finished_rounds == content["training"]["rounds"]
    assert report.secagg.members == tuple(OWNERS)
    assert all(0 < (site.epsilon or 0) <= 8.0 for site in report.privacy.sites)
    assert report.quality.private is not None
    return report.quality.private.all()


def check_texts(folder, nearer):
    """The texts of the tuned model are nearer to the right texts, and the report says so in each of its forms."""
    texts = json.loads((folder / "report.json").read_text())["quality"]["generated"]
    assert (texts["part"], texts["records"], texts["left_out"], texts["new_tokens"]) == ("held out", 12, 0, 8)
    values = texts["measures"]
    assert list(values) == ["rouge1", "rouge2", "rougeL", "chrf", "exact_match"]
    assert not nearer or values["chrf"]["after"] > values["chrf"]["before"]
    assert values["chrf"]["error"] > 0
    sentence = f"ROUGE-1 {values['rouge1']['after']:.3f} against {values['rouge1']['before']:.3f} before"
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert "In the texts that the full model generated for 12 held-out private records: " in text
        assert sentence in text
        assert f"chrF {values['chrf']['after']:.1f} against {values['chrf']['before']:.1f} before" in text
        assert "Texts that the model generates" in text
    assert read_report(folder).quality.generated.measures["chrf"].after == values["chrf"]["after"]


def check_learnt(content, tmp_path):
    scores = private_scores(content, tmp_path)
    for before, after in (("emulator_zero_shot", "emulator_tuned"), ("full_zero_shot", "plug_in")):
        assert scores[after].loss < 0.9 * scores[before].loss
