"""Tasks with labels: losses against transformers', one example at a time, and metrics against slow counts."""

import random
from types import SimpleNamespace

import pytest
import torch

from offsite.errors import ConfigError, DataError, UnsupportedModel
from offsite.task.labels import IGNORED, Labels, names_of
from offsite.task.records import LenientRecords, Row
from offsite.task.rows import RowBatch
from offsite.task.sequence_classification import class_tally
from offsite.task.tasks import TASKS
from tests.task_samples import LABELS, SAMPLES, TAGS, WORDS, first_of

LABELLED = ("sequence_classification", "token_classification", "extractive_qa", "seq2seq")
each = pytest.mark.parametrize("sample", [one for one in SAMPLES if one.task in LABELLED], ids=str)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    found = {}

    def open_one(sample):
        if str(sample) not in found:
            folder, task = sample.save(tmp_path_factory.mktemp("model")), TASKS[sample.task]
            found[str(sample)] = task, task.load(folder, dtype=torch.float32), task.load_processor(folder)
        return found[str(sample)]

    return open_one


def encode(opened, sample, records, length=None):
    task, model, processor = opened(sample)
    length = length or sample.length
    return task.encode(processor, records, length=length, split="truncate", model_config=model.config)


@each
def test_the_loss_of_one_example_is_what_transformers_reports_of_it_alone(sample, opened):
    """Computed without padding, with the labels in transformers' form."""
    task, model, _ = opened(sample)
    batch = encode(opened, sample, sample.records(6, 3))
    for row in range(6):
        width = int(batch.inputs["attention_mask"][row].sum())
        inputs = {k: v[row : row + 1, :width] for k, v in batch.inputs.items() if k != "decoder_input_ids"}
        label = batch.labels[row : row + 1]
        if sample.task == "extractive_qa":
            arguments = {"start_positions": label[:, 0], "end_positions": label[:, 1]}
        elif sample.task == "token_classification":
            arguments = {"labels": label[:, :width]}
        else:
            arguments = {"labels": label}  # transformers' model shifts the labels itself
        with torch.no_grad():
            expected = model(**inputs, **arguments).loss
            found = task.losses(model, batch.select([row]))[0]
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_measures_of_classes_are_those_of_a_slow_count():
    dice = random.Random(1)
    truth = [dice.choice([0, 1, 1, 3]) for _ in range(60)] + [IGNORED] * 5
    logits = torch.randn(65, 5, generator=torch.Generator().manual_seed(1))
    logits[:, 4] -= 100  # a class that is neither true nor predicted
    pairs = [(t, int(row.argmax())) for t, row in zip(truth, logits, strict=True) if t != IGNORED]
    recalls, scores = [], []
    for label in range(4):
        right = sum(t == g == label for t, g in pairs)
        actual, called = sum(t == label for t, _ in pairs), sum(g == label for _, g in pairs)
        recalls += [right / actual] if actual else []
        precision, recall = (right / called if called else 0.0), (right / actual if actual else 0.0)
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    parts = [class_tally(logits[at : at + 9], torch.tensor(truth[at : at + 9])) for at in range(0, 65, 9)]
    total = parts[0]
    for part in parts[1:]:
        total += part
    assert total.targets == 60
    assert total.means() == pytest.approx(
        {
            "accuracy": sum(t == g for t, g in pairs) / 60,
            "balanced_accuracy": sum(recalls) / len(recalls),
            "macro_f1": sum(scores) / 4,
        }
    )


def test_the_accuracy_of_words_is_that_of_a_slow_count(opened):
    """Their F1 is compared with seqeval's in test_entities.py."""
    sample = first_of("token_classification")
    task, model, _ = opened(sample)
    batch = encode(opened, sample, sample.records(20, 5))
    with torch.no_grad():
        guesses = model(**batch.inputs).logits.argmax(-1)
    pairs = [
        (t, g)
        for truth, guess in zip(batch.labels.tolist(), guesses.tolist(), strict=True)
        for t, g in zip(truth, guess, strict=True)
        if t != IGNORED
    ]
    means = task.tally(model, batch).means()
    assert means["accuracy"] == pytest.approx(sum(t == g for t, g in pairs) / len(pairs))
    assert set(means) == {"accuracy", "entity_f1"}


def test_a_words_label_stands_at_its_first_token_only(opened):
    """A word of several tokens, a word without tokens, and a word after the cut."""
    sample = first_of("token_classification")
    words = ["w1", "w2-w3-w4", "", "w5", "w6"]
    batch = encode(opened, sample, [{"words": words, "labels": ["O", "LOC", "B-PER", "I-PER", 3]}], length=9)
    # <s> w1 w2 - w3 - w4 w5 </s>
    assert batch.labels.tolist() == [[IGNORED, 0, 3, IGNORED, IGNORED, IGNORED, IGNORED, 2, IGNORED]]


def test_an_answer_is_found_by_its_characters(opened):
    sample = first_of("extractive_qa")
    context = "w1  w2 w55,w3"
    record = {"question": "w41", "context": context, "answer": "w55,w3", "answer_start": 7}
    batch = encode(opened, sample, [record, record | {"answer": "w2", "answer_start": 4}])
    # <s> w41 </s> w1 w2 w55 , w3 </s>
    assert batch.labels.tolist() == [[5, 7], [4, 4]]
    assert batch.aside["context"][0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]
    assert batch.inputs["token_type_ids"][0].tolist()[:9] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    spaced = [
        record | {"answer": " w55,w3 ", "answer_start": 6, "context": context + " "},
        record | {"answer": " w55,w3", "answer_start": 7},
    ]
    assert encode(opened, sample, spaced).labels.tolist() == [[5, 7], [5, 7]]
    cut = encode(opened, sample, [record, record | {"answer": "w1", "answer_start": 0}], length=7)
    assert cut.labels.tolist() == [[3, 5], [3, 3]]  # <s> w41 </s> w55 , w3 </s>, and the window from w1
    assert cut.inputs["input_ids"][0].tolist()[3:6] == batch.inputs["input_ids"][0].tolist()[5:8]


def test_a_decoder_gets_what_transformers_would_give_it(opened):
    for sample in (one for one in SAMPLES if one.task == "seq2seq"):
        _, model, _ = opened(sample)
        batch = encode(opened, sample, sample.records(4, 1))
        expected = model.prepare_decoder_input_ids_from_labels(batch.labels)
        assert torch.equal(batch.inputs["decoder_input_ids"], expected)


SECRET = "a private sentence"
WRONG = [
    ("sequence_classification", {"text": SECRET, "label": SECRET}, "label", r"must be one of the model's 3 labels"),
    ("sequence_classification", {"text": SECRET, "label": 3}, "label", "must be one of the model's 3 labels"),
    ("sequence_classification", {"text": SECRET, "label": "-1"}, "label", "must be one of the model's 3 labels"),
    ("token_classification", {"words": [SECRET, "b"], "labels": ["O"]}, "labels", "as many as the words"),
    ("token_classification", {"words": [SECRET, 5], "labels": ["O", "O"]}, "words", "a list of texts"),
    ("token_classification", {"words": [SECRET], "labels": [SECRET]}, "labels", "must be one of the model's 4 labels"),
    (
        "extractive_qa",
        {"question": SECRET, "context": SECRET, "answer": "private", "answer_start": 3},
        "answer",
        "must stand in the context at answer_start",
    ),
    (
        "extractive_qa",
        {"question": SECRET, "context": SECRET, "answer": "", "answer_start": 0},
        "answer",
        "must stand in the context",
    ),
]


@pytest.mark.parametrize(("task", "record", "field", "rule"), WRONG)
def test_a_wrong_record_is_named_by_its_place_and_never_shown(task, record, field, rule, opened):
    sample = first_of(task)
    good = sample.records(1, 1)[0]
    with pytest.raises(DataError, match=rf"^record=2 field='{field}': .*{rule}") as caught:
        encode(opened, sample, [good, record])
    assert SECRET not in str(caught.value)
    with pytest.raises(DataError, match=rf"^line=17 field='{field}'"):
        encode(opened, sample, [Row(record, "line=17")])


@pytest.mark.parametrize(("task", "record", "field", "rule"), WRONG)
def test_at_an_approved_job_a_wrong_record_stays_one_and_teaches_nothing(task, record, field, rule, opened):
    """The coordinator chooses the labels, so a job must not stop because of a record's label."""
    sample = first_of(task)
    first, third = sample.records(2, 1)
    records = LenientRecords([first, Row(record, "line=2"), third])
    batch = encode(opened, sample, records)
    assert len(batch) == 3
    assert [target > 0 for target in batch.targets.tolist()] == [True, False, True]
    assert len(records.faults) == 1
    assert records.faults[0].startswith(f"line=2 field={field!r}: ")
    assert SECRET not in records.faults[0]
    alone = encode(opened, sample, [first, third])
    fits, model, _ = opened(sample)
    assert torch.equal(fits.losses(model, batch)[[0, 2]], fits.losses(model, alone))


def test_labels_are_names_or_numbers():
    labels = Labels(SimpleNamespace(id2label={"0": "no", "1": "2", "2": "yes"}, problem_type=None))
    values = ["no", "2", "yes", 2, 0, "0", True, "maybe", 3, -1, "1", 1.0, None, "٣", "9" * 12]
    assert [labels.number(value) for value in values] == [
        0,
        None,
        2,
        None,
        0,
        0,
        None,
        None,
        None,
        None,
        1,
        1,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        ({"id2label": {0: "only"}}, "two or more"),
        ({"id2label": {0: "a", 2: "b"}}, "numbered from 0"),
        ({"id2label": {0: "a", 1: "a"}}, "two or more different names"),
        ({"id2label": LABELS, "problem_type": "regression"}, "problem_type='regression'"),
        ({"id2label": LABELS, "problem_type": "multi_label_classification"}, "must be .single_label_classification"),
        ({}, "id2label has 0 labels"),
    ],
)
def test_models_whose_labels_are_none_are_refused(config, rule):
    with pytest.raises(UnsupportedModel, match=rule):
        names_of(SimpleNamespace(**config))
    assert names_of(SimpleNamespace(id2label=TAGS)) == list(TAGS.values())


def test_what_a_model_lacks_is_said(opened):
    task, model, processor = opened(first_of("sequence_classification"))
    records = first_of("sequence_classification").records(2, 1)

    def change(**settings):
        config = SimpleNamespace(**(model.config.to_dict() | settings))
        return task.encode(processor, records, length=16, split="truncate", model_config=config)

    with pytest.raises(UnsupportedModel, match="pad_token_id"):
        change(pad_token_id=None)
    with pytest.raises(UnsupportedModel, match="examples would depend on each other"):
        change(is_encoder_decoder=True)
    with pytest.raises(ConfigError, match="length=3: must be at least 4 tokens"):
        task.encode(processor, records, length=3, split="truncate", model_config=model.config)
    translator, model, processor = opened(first_of("seq2seq"))
    config = SimpleNamespace(**(model.config.to_dict() | {"decoder_start_token_id": None}))
    with pytest.raises(UnsupportedModel, match="decoder_start_token_id"):
        translator.encode(
            processor, first_of("seq2seq").records(2, 1), length=12, split="truncate", model_config=config
        )


@each
def test_rows_that_the_model_would_fail_on_are_emptied_and_the_others_stay(sample, opened):
    """The ids come from a foreign tokenizer."""
    task, model, _ = opened(sample)
    batch = encode(opened, sample, sample.records(4, 1))
    expected = task.losses(model, batch)
    names = [name for name in ("input_ids", "token_type_ids", "decoder_input_ids") if name in batch.inputs]
    for name in names:
        inputs = {key: tensor.clone() for key, tensor in batch.inputs.items()}
        inputs[name][1, 2], inputs[name][3, 0] = 10**6, -1
        within = RowBatch(inputs, batch.labels, batch.aside).within(model)
        assert within.targets[[1, 3]].tolist() == [0, 0]
        losses = task.losses(model, within)
        assert losses[[1, 3]].tolist() == [0.0, 0.0]
        assert torch.equal(losses[[0, 2]], expected[[0, 2]])
        assert task.tally(model, within).targets == int(batch.targets[[0, 2]].sum())


def test_rows_of_other_numbers_are_refused():
    with pytest.raises(DataError, match="input_ids rows=2, labels rows=3"):
        RowBatch({"input_ids": torch.zeros(2, 4)}, torch.zeros(3))


def test_the_samples_hold_what_the_tests_need():
    records = first_of("sequence_classification").records(50, 1)
    assert {type(record["label"]) for record in records} == {int, str}
    assert len(WORDS) == 60
