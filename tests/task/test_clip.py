"""task.clip_model: the likelihood by another route, prompts, and the reason against InfoNCE."""

import pytest
import torch
from torch.nn import functional
from transformers import ViTModel

from offsite.errors import PrivacyRefusal, UnsupportedModel
from offsite.privacy.engines import ENGINES
from offsite.privacy.probe import choose_engine, probe
from offsite.task.clip_model import ClipClassification, class_prompts
from tests.task.pictures import LENGTH, NAMES, WORDS, adapted, clip, clip_folder, pictures, tokenizer, vit

TASK = ClipClassification()
TOWERS = {"text_model.encoder.layers", "vision_model.encoder.layers"}


@pytest.fixture
def opened(tmp_path):
    clip_folder(tmp_path)
    model, processor = TASK.load(tmp_path, dtype=torch.float32), TASK.load_processor(tmp_path)
    batch = TASK.encode(processor, pictures(3, 0), length=LENGTH, split="truncate", model_config=model.config)
    return model, processor, batch


def renamed(model, names):
    model.config.id2label = dict(enumerate(names))
    return model.config


def test_losses_are_those_of_cosines_tower_by_tower(opened):
    """Computed for each prompt alone and without padding, and for each image alone."""
    model, processor, batch = opened
    names = ["across", "which pattern down", "a photo of a photo of dots"]
    prompts = class_prompts(processor.words, renamed(model, names), "a photo of {}.")
    assert prompts.shape == (3, 13)
    texts = []
    for name in names:
        alone = processor.words.singles([f"a photo of {name}."], 64)[0].ids
        texts.append(model.get_text_features(torch.tensor([alone])).pooler_output[0])
    records = [{**record, "label": index} for index, record in enumerate(pictures(3, 0))]
    task = ClipClassification("a photo of {}.")
    batch = task.encode(processor, records, length=LENGTH, split="truncate", model_config=model.config)
    for row, loss in enumerate(task.losses(model, batch).tolist()):
        pixels = batch.images.pixels.select(torch.tensor([row])).scaled(torch.float32)
        image = model.get_image_features(pixels).pooler_output[0].double()
        cosines = torch.stack([functional.cosine_similarity(image, text.double(), dim=0) for text in texts])
        expected = -torch.log_softmax(cosines * model.logit_scale.double().exp(), dim=0)[row]
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_padding_of_prompts_never_matters(opened):
    model, _, batch = opened
    wider = functional.pad(batch.prompts, (0, 5), value=int(batch.prompts[0, -1]))
    padded = type(batch)(batch.images, wider)
    assert torch.allclose(TASK.losses(model, padded), TASK.losses(model, batch), rtol=1e-5)


@pytest.mark.parametrize("tower", sorted(TOWERS))
def test_adapters_learn_in_either_tower(opened, tower):
    model, _, batch = opened
    model = adapted(model, tower, ("q_proj", "v_proj"))
    TASK.losses(model, batch).sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("count", [2, 3, len(NAMES)])
def test_prompts_have_no_rows_of_examples_so_only_the_loop_is_exact_in_their_tower(opened, count):
    """The text tower sees labels and not images, so a gradient of one row belongs to a label and not to an example."""
    model, processor, _ = opened
    model = adapted(model, "text_model.encoder.layers", ("q_proj", "v_proj"))
    renamed(model, NAMES[:count])
    records = [{**record, "label": index} for index, record in enumerate(pictures(min(count, 3), 0))]
    batch = TASK.encode(processor, records, length=LENGTH, split="truncate", model_config=model.config)
    for engine in sorted(ENGINES.keys() - {"loop"}):
        with pytest.raises(PrivacyRefusal):
            probe(model, TASK.losses, batch, engine)
    assert choose_engine(model, TASK.losses, batch) == "loop"
    assert choose_engine(model, TASK.losses, TASK.dummy_batch(model, LENGTH, seed=0)) == "loop"


def test_the_contrastive_loss_of_one_example_alone_has_no_gradient(opened):
    """An example alone has gradient 0, and in a batch its gradient depends on the others, so it cannot be clipped."""
    model, _, batch = opened
    model.requires_grad_(True)
    for rows, silent in (([0], True), ([0, 1, 2], False)):
        pixels = batch.images.pixels.select(torch.tensor(rows)).scaled(torch.float32)
        loss = model(input_ids=batch.prompts[rows], pixel_values=pixels, return_loss=True).loss
        size = sum(float(one.norm()) for one in torch.autograd.grad(loss, list(model.parameters())))
        assert (size < 1e-5) == silent


def test_the_mistaken_end_of_old_configurations_reads_at_the_highest_id(opened):
    _, processor, _ = opened
    config = clip(eos=2).config
    with pytest.raises(UnsupportedModel, match="must end with"):  # "</s>" is not the highest id here
        class_prompts(processor.words, config, "a photo of {}.")
    batch = TASK.dummy_batch(clip(eos=2), LENGTH, seed=0)
    assert (batch.prompts.max(dim=1).values == len(WORDS) - 1).all()


def test_labels_without_names_and_tokenizers_without_ends_are_refused(opened, tmp_path):
    model, processor, _ = opened
    with pytest.raises(UnsupportedModel, match="id2label"):
        class_prompts(processor.words, renamed(model, ["LABEL_0", "LABEL_1"]), "a photo of {}.")
    (tmp_path / "other").mkdir()
    tokenizer(tmp_path / "other", ends=False)
    words = TASK.load_processor(tmp_path).words.of(tmp_path / "other")
    with pytest.raises(UnsupportedModel, match="must end with"):
        class_prompts(words, renamed(model, NAMES), "a photo of {}.")


def test_another_encoder_is_refused(tmp_path):
    ViTModel(vit().config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="model_type='vit'"):
        TASK.load(tmp_path, dtype=torch.float32)
