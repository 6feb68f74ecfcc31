"""task.llava: the answer's loss by another route, an image's places, and questions that disturb the places."""

import dataclasses
import json

import pytest
import torch
import transformers as hf

from offsite.errors import ConfigError, DataError, UnsupportedModel
from offsite.task.image_text_processor import MARKERS, image_marker, without_marker
from offsite.task.images import Pixels
from offsite.task.llava import AskedImages, ImageText, image_places
from offsite.task.records import LenientRecords, Row
from tests.task.pictures import LENGTH, SIDE, TEXT, VISION, WORDS, llava_folder, pictures

TASK = ImageText()
PLACES = 16


@pytest.fixture
def opened(tmp_path):
    llava_folder(tmp_path)
    return TASK.load(tmp_path, dtype=torch.float32), TASK.load_processor(tmp_path)


def encode(opened, records, length=LENGTH):
    return TASK.encode(opened[1], records, length=length, split="truncate", model_config=opened[0].config)


def words(text):
    return [WORDS.index(word) for word in text.split()]


def records():
    long, short, other = pictures(3, 0)
    return [{**long, "question": "which pattern of a photo ?"}, short, {**other, "answer": "a photo of dots"}]


def test_a_conversation_is_the_chat_template_with_the_image_in_its_place(opened):
    batch = encode(opened, records())
    ids = words("<s> user :") + [2] * PLACES + words("which pattern ? assistant :")
    answer = [*words(records()[1]["answer"]), 1]
    assert batch.text.input_ids[1, : len(ids) + len(answer)].tolist() == ids + answer
    assert batch.targets.tolist() == [2, 2, 5]
    assert batch.text.answers[1].nonzero().flatten().tolist() == [len(ids), len(ids) + 1]


def test_losses_are_those_of_each_answer_alone_and_unpadded(opened):
    model, batch = opened[0], encode(opened, records())
    for row, loss in enumerate(TASK.losses(model, batch).tolist()):
        width = int(batch.text.attention_mask[row].sum())
        ids, learnt = batch.text.input_ids[row, :width], batch.text.answers[row, :width].bool()
        pixels = batch.pixels.select(torch.tensor([row])).scaled(torch.float32)
        expected = model(input_ids=ids[None], pixel_values=pixels, labels=ids.masked_fill(~learnt, -100)[None]).loss
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_length_of_another_answer_changes_no_bit(opened):
    """In a product over all scored positions, their number decides how each of them is rounded."""
    model, batch = opened[0], encode(opened, records())
    one, seen = batch.select([2, 2, 2]), []
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_()
    for count in (1, 2, int(one.text.answers[0].sum())):
        answers = one.text.answers.clone()
        learnt = answers[0].nonzero().squeeze(1)
        answers[1:, learnt[count:]] = 0
        text = dataclasses.replace(one.text, answers=answers)
        loss = TASK.losses(model, AskedImages(one.pixels, text))[0]
        seen.append((loss.detach(), *torch.autograd.grad(loss, weight)))
    for found in seen:
        assert all(torch.equal(ours, first) for ours, first in zip(found, seen[0], strict=True))


def test_the_image_matters_and_the_question_is_not_learnt(opened):
    model, batch = opened[0], encode(opened, records())
    dark = dataclasses.replace(batch.pixels, values=torch.zeros_like(batch.pixels.values))
    assert not torch.allclose(TASK.losses(model, type(batch)(dark, batch.text)), TASK.losses(model, batch), rtol=1e-3)
    total = TASK.tally(model, batch)
    assert total.targets == 9
    assert total.metrics["perplexity"] == (total.loss, 9)


def test_exact_matches_are_what_greedy_decoding_says(opened):
    model, tries = opened[0], records()
    for row, record in enumerate(tries):
        batch = encode(opened, [record])
        start = int(batch.text.answers[0].argmax())
        said = model.generate(
            input_ids=batch.text.input_ids[:, :start],
            pixel_values=batch.pixels.scaled(torch.float32),
            attention_mask=torch.ones(1, start, dtype=torch.long),
            max_new_tokens=2,
            do_sample=False,
            eos_token_id=None,
        )[0, -2:].tolist()
        answers = torch.tensor([said])
        ids, mask = batch.text.input_ids.clone(), batch.text.attention_mask.clone()
        ids[0, start : start + 2], mask[0, start + 2 :] = answers[0], 0
        told = type(batch)(batch.pixels, dataclasses.replace(batch.text, input_ids=ids, attention_mask=mask))
        assert TASK.tally(model, told).metrics["exact_match"] == (1.0, 1), row
        ids[0, start + 1] = (ids[0, start + 1] + 1) % len(WORDS)
        assert TASK.tally(model, told).metrics["exact_match"] == (0.0, 1), row


ASKED = ["<image>\nwhich pattern ?", "which pattern ?\n<image>", "which <image> pattern ?", " <image> which pattern ?"]


def test_the_marker_of_the_image_in_a_question_is_left_out(opened):
    """As LLaVA's own data sets write it; the chat template writes the marker of the model."""
    expected = encode(opened, [records()[1]] * len(ASKED))
    marked = [{**records()[1], "question": question} for question in ASKED]
    for batch in (encode(opened, marked), encode(opened, LenientRecords(marked))):
        assert torch.equal(batch.text.input_ids, expected.text.input_ids)
        assert torch.equal(batch.text.answers, expected.text.answers)
        assert batch.targets.tolist() == [2] * len(ASKED)


def test_another_marker_is_refused_by_its_line(opened):
    places = [(field, other) for field in ("question", "answer") for other in (*MARKERS[1:], "<image> <image>")]
    wrong = [Row({**records()[1], field: f"which {other} ?"}, f"line={at}") for at, (field, other) in enumerate(places)]
    for at in (0, len(MARKERS) - 1, len(MARKERS), len(places) - 1):
        with pytest.raises(DataError, match=f"^line={at} field='{places[at][0]}': must hold .*marker"):
            encode(opened, [wrong[at]])
    lenient = LenientRecords([*wrong, records()[0]])
    assert encode(opened, lenient).targets.tolist() == [0] * len(wrong) + [2]
    assert [fault.split(":")[0] for fault in lenient.faults] == [
        f"line={at} field={field!r}" for at, (field, _) in enumerate(places)
    ]


@pytest.mark.parametrize("written", ["<picture>", {"content": "<picture>", "special": True}])
@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json"])
def test_the_models_own_marker_is_read_from_its_processor(tmp_path, name, written):
    assert image_marker(tmp_path) == "<image>"
    (tmp_path / name).write_text(json.dumps({"image_token": written}))
    assert image_marker(tmp_path) == "<picture>"
    for question in ("<picture>\nwhat is it?", "what is it? <image>"):
        assert without_marker(question, "<picture>") == "what is it?"
    assert without_marker("<picture> and <image>", "<picture>") is None
    assert without_marker("what is <img> in\n HTML ?", "<picture>") == "what is <img> in\n HTML ?"
    (tmp_path / name).write_text("{")
    with pytest.raises(DataError, match=f"damaged {name}"):
        image_marker(tmp_path)


def test_an_image_that_only_the_tokenizer_knows_is_refused_by_its_line(opened, tmp_path):
    """A template that writes two images stands for a tokenizer with a second name of the image."""
    (tmp_path / "chat_template.jinja").write_text("{{ '<image> <image>' }}{% for m in messages %}a{% endfor %}")
    twice = TASK.load_processor(tmp_path)
    with pytest.raises(DataError, match=r"^record=1 field='question': makes 2 images in the model's tokens"):
        encode((opened[0], twice), records())
    lenient = LenientRecords(records())
    assert encode((opened[0], twice), lenient).targets.tolist() == [0, 0, 0]
    assert len(lenient.faults) == 3


@pytest.mark.parametrize("question", ["<image> <image>", "pattern " * LENGTH])
def test_a_question_that_spoils_the_places_is_an_example_without_a_target(opened, question):
    """The model counts the places of a whole batch, and would fail on all examples."""
    model, (first, second, third) = opened[0], records()
    batch = encode(opened, LenientRecords([first, {**second, "question": question}, third]))
    assert batch.targets.tolist() == [2, 0, 5]
    losses = TASK.losses(model, batch)
    honest = TASK.losses(model, encode(opened, records()))
    assert losses[1] == 0
    assert torch.allclose(losses[[0, 2]], honest[[0, 2]], rtol=1e-5)


def test_ids_that_the_model_does_not_know_are_emptied(opened):
    model, batch = opened[0], encode(opened, records())
    ids = batch.text.input_ids.clone()
    ids[0, -1], ids[2, 3] = len(WORDS), 5  # an id beyond the vocabulary, and an id in the image's place
    spoilt = type(batch)(batch.pixels, dataclasses.replace(batch.text, input_ids=ids)).within(model)
    assert spoilt.targets.tolist() == [0, 2, 0]
    assert torch.allclose(TASK.losses(model, spoilt)[1], TASK.losses(model, batch)[1], rtol=1e-5)


def test_too_short_for_an_image_is_refused(opened):
    with pytest.raises(ConfigError, match="an image takes 16 tokens"):
        encode(opened, records(), length=PLACES + 1)
    assert encode(opened, records(), length=PLACES + 2).targets.tolist() == [0, 0, 0]


def test_without_a_chat_template_it_is_refused(opened, tmp_path):
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="chat template"):
        TASK.encode(
            TASK.load_processor(tmp_path), records(), length=LENGTH, split="truncate", model_config=opened[0].config
        )


@pytest.mark.parametrize("vision", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_places_are_those_that_the_model_fills(vision, strategy):
    text = {"model_type": "llama", **TEXT, "vocab_size": 97, "num_hidden_layers": 1}
    config = hf.LlavaConfig(
        text_config=text,
        vision_config={"model_type": vision, **VISION, "num_hidden_layers": 2},
        image_token_index=2,
        vision_feature_select_strategy=strategy,
    )
    model = hf.LlavaForConditionalGeneration(config).eval()
    pixels = Pixels(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8), 1.0, (0.0,) * 3, (1.0,) * 3)
    features = model.get_image_features(pixels.scaled(torch.float32), vision_feature_layer=-2).pooler_output
    assert image_places(config) == features[0].shape[0]


def test_models_that_cut_images_into_pieces_are_refused():
    with pytest.raises(UnsupportedModel, match="llava_next"):
        image_places(hf.LlavaNextConfig())
