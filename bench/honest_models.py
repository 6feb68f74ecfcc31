"""Honest models of every family that the tests know, at any width and depth: the corpus of `bench.vetting`."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers as hf

from offsite.emulator.vetting.random_inputs import random_inputs
from tests.emulator.conftest import IMAGE_TOKEN, Family

WEIGHTS = {"fresh": 0.0, "stirred": 0.05}  # name -> deviation of noise on every parameter, norms and biases included
LABELS = (1, 2, 3, 20)
Sizes = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
      width: width of the residual stream, a multiple of 16.
      depth: number of blocks in each tower.
      words: size of the vocabulary, above `IMAGE_TOKEN`.
      labels: number of labels; 1 is regression.
    """

    width: int
    depth: int
    words: int
    labels: int

    @property
    def text(self) -> Sizes:
        """Sizes under the names of most configurations."""
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
        return {"vocab_size": self.words, "num_hidden_layers": self.depth, **self.block, **ids}

    @property
    def block(self) -> Sizes:
        """Sizes of one block."""
        return {"hidden_size": self.width, "intermediate_size": self.width * 3 // 2, "num_attention_heads": 4}

    @property
    def grouped(self) -> Sizes:
        """Sizes with two heads of keys and values."""
        return {**self.text, "num_key_value_heads": 2, "head_dim": self.width // 4}

    @property
    def image(self) -> Sizes:
        """Sizes of a tower of images; beside words it has fewer blocks, so that the slots are in the words' tower."""
        return {**self.block, "num_hidden_layers": self.depth - 1, "image_size": 16, "patch_size": 4}

    @property
    def pair(self) -> Sizes:
        """Sizes of BART's kin, with an encoder and a decoder."""
        sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in self._side.items()}
        return {"vocab_size": self.words, "d_model": self.width, "max_position_embeddings": 64, **sides}

    @property
    def _side(self) -> Sizes:
        return {"layers": self.depth, "ffn_dim": self.width * 3 // 2, "attention_heads": 4}


def _t5(s: Shape) -> Any:
    sizes = {"d_model": s.width, "d_kv": s.width // 4, "d_ff": 3 * s.width, "num_layers": s.depth, "num_heads": 4}
    return hf.T5Config(vocab_size=s.words, decoder_start_token_id=0, **sizes)


def _clip(s: Shape) -> Any:
    text = {**s.text, "eos_token_id": IMAGE_TOKEN}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=s.image, projection_dim=s.width))


def _llava(s: Shape) -> Any:
    parts = {"text_config": {"model_type": "llama", **s.grouped}, "image_token_index": IMAGE_TOKEN}
    vision = {"model_type": "clip_vision_model", **s.image}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, **parts))


def _dit(s: Shape) -> Any:
    return diffusers.DiTTransformer2DModel(**_denoiser(s), num_embeds_ada_norm=10)


def _pixart(s: Shape) -> Any:
    return diffusers.PixArtTransformer2DModel(**_denoiser(s), cross_attention_dim=s.width, caption_channels=12)


def _denoiser(s: Shape) -> Sizes:
    return {"num_attention_heads": 4, "attention_head_dim": s.width // 4, "num_layers": s.depth, "sample_size": 8}


GROUPED = {"llama": hf.LlamaConfig, "mistral": hf.MistralConfig, "qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config}
GROUPED |= {
    "gemma3": hf.Gemma3TextConfig,
    "gemma2": hf.Gemma2Config,
    "phi3": hf.Phi3Config,
    "cohere2": hf.Cohere2Config,
}
GROUPED |= {"mixtral": hf.MixtralConfig}
PLAIN = {"phi": hf.PhiConfig, "gpt_neox": hf.GPTNeoXConfig}
ENCODERS = {"bert": hf.BertConfig, "roberta": hf.RobertaConfig, "electra": hf.ElectraConfig, "mpnet": hf.MPNetConfig}
ENCODERS |= {"deberta": hf.DebertaV2Config, "modernbert": hf.ModernBertConfig}
CONFIGS: dict[str, Callable[[Shape], Any]] = {
    **{name: lambda s, kind=kind: kind(**s.grouped) for name, kind in GROUPED.items()},
    **{name: lambda s, kind=kind: kind(**s.text) for name, kind in (PLAIN | ENCODERS).items()},
    "gpt2": lambda s: hf.GPT2Config(
        vocab_size=s.words, n_embd=s.width, n_layer=s.depth, n_head=4, n_positions=64, eos_token_id=2, pad_token_id=0
    ),
    "opt": lambda s: hf.OPTConfig(**s.text, ffn_dim=s.width * 3 // 2, word_embed_proj_dim=s.width),
    "bloom": lambda s: hf.BloomConfig(vocab_size=s.words, hidden_size=s.width, n_layer=s.depth, n_head=4),
    "falcon": lambda s: hf.FalconConfig(**s.text),
    "t5": _t5,
    "bart": lambda s: hf.BartConfig(**s.pair),
    "vit": lambda s: hf.ViTConfig(**s.image),
}
MODELS = {"clip": _clip, "llava": _llava, "dit": _dit, "pixart": _pixart}
HEADS = {"t5": (hf.AutoModelForSeq2SeqLM,), "bart": (hf.AutoModelForSeq2SeqLM,)}
HEADS |= {"vit": (hf.AutoModelForImageClassification,), "bloom": (hf.AutoModelForCausalLM,)}
HEADS |= dict.fromkeys(
    ENCODERS,
    (
        hf.AutoModelForSequenceClassification,
        hf.AutoModelForTokenClassification,
        hf.AutoModelForMaskedLM,
        hf.AutoModelForQuestionAnswering,
    ),
)
CAUSAL = (hf.AutoModelForCausalLM, hf.AutoModelForCausalLM, hf.AutoModelForSequenceClassification)
WITHOUT_CLASSES = ("cohere2",)  # transformers has no classifier of this family
FAMILIES = sorted([*CONFIGS, *MODELS])


def honest(family: str, draw: random.Random) -> tuple[str, Family]:
    """Returns a description and a model with random sizes, head and weights."""
    shape = Shape(
        draw.choice((16, 32, 32, 48, 64)), draw.choice((4, 5, 6, 8)), draw.choice((61, 97, 300)), draw.choice(LABELS)
    )
    seed, weights = draw.randrange(1 << 30), draw.choice(sorted(WEIGHTS))
    torch.manual_seed(seed)
    model = _model(family, shape, draw).eval().requires_grad_(False)
    if isinstance(model, hf.PreTrainedModel):
        model.config.use_cache = False
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=WEIGHTS[weights])
    text = f"{type(model).__name__} {shape.width}x{shape.depth}, {shape.words} words, {shape.labels} labels, {weights}"
    return text, Family(family, model, random_inputs(model, torch.Generator().manual_seed(seed)))


def _model(family: str, shape: Shape, draw: random.Random) -> Any:
    if family in MODELS:
        return MODELS[family](shape)
    config = CONFIGS[family](shape)
    heads = HEADS.get(family, CAUSAL[:1] if family in WITHOUT_CLASSES else CAUSAL)
    head = draw.choice(heads)
    if head not in (hf.AutoModelForCausalLM, hf.AutoModelForQuestionAnswering, hf.AutoModelForSeq2SeqLM):
        config.num_labels = shape.labels
    return head.from_config(config)
