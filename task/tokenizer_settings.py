"""The settings of a tokenizer beside tokenizer.json: values from its JSON files and its chat template, never a path.

`add_bos_token` and `add_eos_token` are no such settings: beside a tokenizer.json, whose rule says what stands around a
text, transformers ignores them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from offsite.errors import DataError

# Tokens that transformers names, and that a chat template may write.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
DATE = "chat_template_date"  # our own key of tokenizer_config.json: the date for a template that asks for one
TEMPLATE, LEGACY_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
_TOKENIZER, _SPECIAL, _MODEL = "tokenizer_config.json", "special_tokens_map.json", "config.json"
ELSEWHERE = "elsewhere"  # a place of language codes that is not known here
# Classes whose texts carry a language code: places of the code around a text of the source and of the target.
_LANGUAGES = {"MBartTokenizer": "behind", "MBart50Tokenizer": "in front", "NllbTokenizer": "in front"}
_LANGUAGES |= dict.fromkeys(("M2M100Tokenizer", "PLBartTokenizer", "SeamlessM4TTokenizer"), ELSEWHERE)
# Classes that make their byte-level rule anew from `add_prefix_space`; all others take the rule of tokenizer.json.
_SPACED = ("BartTokenizer", "GPT2Tokenizer", "LEDTokenizer", "LongformerTokenizer", "RobertaTokenizer")


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings that change the ids of a text or of a conversation.

    Attributes:
      tokens: special tokens, by their names in the settings.
      eos_id: number of the end-of-text token in the model's configuration, where no setting names the token; else None.
      split_special: whether a special token inside a text is cut like other text.
      prefix_space: whether a text begins with a space, for a class that says so beside tokenizer.json; else None.
      code_place: place of a language code, "in front" of a text or "behind" its end, or `ELSEWHERE`; empty without
        language codes.
      source_language, target_language: codes of the two languages; empty where no setting names the code.
      template: chat template; empty without one.
      template_names: names of the templates of a folder that has templates, but no default template.
      date: date and time that a template sees, in ISO form; empty without one.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    eos_id: int | None = None
    split_special: bool = False
    prefix_space: bool | None = None
    code_place: str = ""
    source_language: str = ""
    target_language: str = ""
    template: str = ""
    template_names: tuple[str, ...] = ()
    date: str = ""

    def to_bytes(self) -> bytes:
        """Returns the settings as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def of(cls, folder: Path, *, with_images: bool = False) -> "TokenizerSettings":
        """Reads the settings of a folder.

        Args:
          folder: folder of a model or a package.
          with_images: whether the template is for conversations with images, which transformers' processors look for
            in `chat_template.json` before they look at the tokenizer's own.

        Raises:
          DataError: a file is damaged, or a value is out of its range.
        """
        settings = _json(folder, _TOKENIZER)
        kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
        tokens = _special_tokens(settings, _json(folder, _SPECIAL))
        template, names = _chat_template(folder, settings, with_images=with_images)
        place = _LANGUAGES.get(kind, "")
        if kind == "NllbTokenizer" and settings.get("legacy_behaviour"):
            place = "behind"
        return cls(
            tokens=tokens,
            eos_id=None if "eos_token" in tokens else _eos_id(folder),
            split_special=bool(settings.get("split_special_tokens")),
            prefix_space=bool(settings.get("add_prefix_space")) if kind in _SPACED else None,
            code_place=place,
            source_language=_text(settings, "src_lang"),
            target_language=_text(settings, "tgt_lang"),
            template=template,
            template_names=names,
            date=_date(folder, settings),
        )


def _json(folder: Path, name: str) -> dict[str, Any]:
    """Returns the content of a JSON file in the folder; an empty dictionary for a missing file."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"tokenizer={folder.name!r} has a damaged {name}; save it again") from error
    return content if isinstance(content, dict) else {}


def _text(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name)
    return value if isinstance(value, str) else ""


def _special_tokens(*files: Mapping[str, Any]) -> dict[str, str]:
    """Returns the named special tokens; the first file that names a token counts."""
    tokens: dict[str, str] = {}
    for settings in files:
        for name in NAMED:
            token = settings.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens.setdefault(name, token)
    return tokens


def _eos_id(folder: Path) -> int | None:
    """Returns the end-of-text token of the model's own configuration, as for a GPT-2 without any setting."""
    number = _json(folder, _MODEL).get("eos_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if type(number) is int else None


def _date(folder: Path, settings: Mapping[str, Any]) -> str:
    date = settings.get(DATE, "")
    try:
        return datetime.fromisoformat(date).isoformat() if date else ""
    except (TypeError, ValueError) as error:
        raise DataError(
            f"tokenizer={folder.name!r} {DATE}={date!r} must be a date such as '2026-12-01'; correct {_TOKENIZER}"
        ) from error


def _chat_template(folder: Path, settings: Mapping[str, Any], *, with_images: bool) -> tuple[str, tuple[str, ...]]:
    """Returns the default chat template as transformers finds it, and the names of templates if none is the default.

    Files of templates replace the templates in tokenizer_config.json. transformers takes the template "default" of
    several, unless tools are given, and no task gives tools.
    """
    templates = {path.stem: _template_file(folder, path) for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        templates["default"] = _template_file(folder, folder / TEMPLATE)
    places = [_named(settings.get("chat_template"))]
    places.insert(0 if with_images else 1, _named(_json(folder, LEGACY_TEMPLATE).get("chat_template")))
    for named in places:
        templates = templates or named
    return templates.get("default", ""), () if "default" in templates else tuple(sorted(templates))


def _named(templates: Any) -> dict[str, str]:
    """Returns a setting's templates by name: a text is the default, and several are a list of names with texts."""
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, dict):
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    pairs = [(entry.get("name"), entry.get("template")) for entry in templates or () if isinstance(entry, dict)]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}


def _template_file(folder: Path, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"tokenizer={folder.name!r} has a damaged {path.name}; save it again") from error
