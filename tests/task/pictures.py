"""Tiny models that take images, with their processors, and pictures with patterns to learn."""

import json

import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from offsite.adapter.methods import attach
from offsite.adapter.spec import AdapterSpec
from offsite.emulator.structure.towers import blocks_at
from offsite.task.clip_model import ClipClassification
from offsite.task.image_classification import ImageClassification
from offsite.task.llava import ImageText

NAMES = ("across", "down", "rising", "falling", "dots", "plain")  # names of the patterns, and of the models' labels
SIDE = 16
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 64}
WORDS = ["<s>", "</s>", "<image>", "<unk>", "user", "assistant", "which", "pattern", "?", ":", "a", "photo", "of", "."]
WORDS += NAMES
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}
CHAT = (
    "{% for message in messages %}{{ '<s>' if loop.first }}{{ message.role }} : "
    "{% for part in message.content %}{{ '<image> ' if part.type == 'image' }}{% endfor %}"
    "{% for part in message.content %}{{ part.text if part.type == 'text' }}{% endfor %}"
    "{{ '</s>' if message.role == 'assistant' else ' ' }}{% endfor %}"
    "{{ 'assistant : ' if add_generation_prompt }}"
)


def picture(name, generator):
    """Returns one noisy picture of a pattern, uint8, with a random size."""
    height, width = generator.integers(SIDE - 2, SIDE + 10, 2)
    down, across = np.mgrid[0:height, 0:width]
    along = {"across": down, "down": across, "rising": down + across, "falling": down - across}
    if name == "dots":
        pattern = ((down // 2 + across // 2) % 2).astype(float)
    elif name == "plain":
        pattern = np.full((height, width), 0.5)
    else:
        pattern = ((along[name] // 2) % 2).astype(float)
    noisy = 200 * pattern + 25 + generator.normal(0, 8, (height, width))
    return np.repeat(np.clip(noisy, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def pictures(count, seed):
    """Returns records of pictures with the names of their patterns, as a label and as a question with its answer."""
    generator = np.random.default_rng(seed)
    names = [NAMES[number] for number in generator.integers(0, len(NAMES), count)]
    return [
        {"image": picture(name, generator), "label": name, "question": "which pattern ?", "answer": name}
        for name in names
    ]


def tokenizer(folder, *, ends, chat=""):
    """Writes a tokenizer of whole words; with `ends` it adds start and end tokens to a text."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.Fuse()
    if ends:
        words.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), False, False)
    words.add_special_tokens(["<s>", "</s>", "<image>"])
    made = hf.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    if chat:
        (folder / "chat_template.jinja").write_text(chat)


def settings(folder, kind, **rules):
    """Writes the settings of an image processor."""
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind, **rules}))


def _varied(model):
    """Moves norms and biases away from 1 and 0, which would hide a lost tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def vit():
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_hidden_layers=4, **LABELS))


def clip(eos=1):
    text = {**TEXT, "vocab_size": len(WORDS), "num_hidden_layers": 3, "bos_token_id": 0, "eos_token_id": eos}
    vision = {**VISION, "num_hidden_layers": 4}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32, **LABELS))


def llava():
    vision = {"model_type": "clip_vision_model", **VISION, "num_hidden_layers": 3}
    text = {"model_type": "llama", **TEXT, "vocab_size": len(WORDS), "num_hidden_layers": 4, "head_dim": 8}
    text |= {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=2, vision_feature_layer=-2)
    )


def vit_processor(folder):
    settings(folder, "ViTImageProcessor", size={"height": SIDE, "width": SIDE})


def clip_processor(folder):
    settings(folder, "CLIPImageProcessor", size={"shortest_edge": SIDE}, crop_size=SIDE)
    tokenizer(folder, ends=True)


def llava_processor(folder):
    settings(folder, "CLIPImageProcessor", size={"shortest_edge": SIDE}, crop_size=SIDE)
    tokenizer(folder, ends=False, chat=CHAT)


def vit_folder(folder):
    _save(vit, folder)
    vit_processor(folder)


def clip_folder(folder):
    _save(clip, folder)
    clip_processor(folder)


def llava_folder(folder):
    _save(llava, folder)
    llava_processor(folder)


def _save(make, folder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _varied(make()).save_pretrained(folder)


# name -> task, writer of its tiny model's folder, leaf modules that an adapter tunes, tower of the adapter
TASKS = {
    "image_classification": (ImageClassification(), vit_folder, ("q_proj", "v_proj", "fc1"), "vit.layers"),
    "clip_classification": (
        ClipClassification(),
        clip_folder,
        ("q_proj", "v_proj", "fc1"),
        "vision_model.encoder.layers",
    ),
    "image_text": (ImageText(), llava_folder, ("q_proj", "v_proj", "up_proj"), "model.language_model.layers"),
}
LENGTH = 32  # tokens: 16 for the image, and the rest for a question with its answer


def adapted(model, tower, targets, *, rank=4):
    """Returns a model with an adapter in the first and the last block of a tower."""
    blocks = blocks_at(model, tower)
    slots = (blocks[0], blocks[-1])
    return attach(model, AdapterSpec(method="lora", rank=rank, alpha=2.0 * rank, targets=targets, slots=slots))
