"""Whether a tokenizer gives the ids that transformers gives; asked where the folder is the model owner's own.

At a site the package is another's, so nothing but `task.tokenizer` reads it there: transformers opens files that the
settings name. The coordinator's own folder is no secret to the coordinator, so a difference is found here, before a
job begins. It can come from a class of transformers that makes its rules anew and ignores tokenizer.json.
"""

from pathlib import Path
from typing import Any

from offsite.errors import DataError
from offsite.task.tokenizer import Tokenizer

LENGTH = 128  # tokens, more than each of the texts has
TEXTS = (
    "The patient came in at 10:45, with 38.5 °C and a cough.",
    " A space in front, two  in the middle, one behind ",
    "don't; it's well-known",
    "UPPER lower MiXeD",
    "naïve Grüße ça è ñandú",
    "e\u0301 as two characters",
    "first line\nsecond line\n\n\tthird",
    "x = {'a': [1, 2]} # 123456",
    "日本語と한국어 and Ελληνικά",
    "العربية",
    "🙂👩🏽‍⚕️",
    "a",
)


def check_agreement(folder: Path | str, processor: Any) -> list[str]:
    """Refuses a tokenizer whose ids differ from those of transformers' class for the model.

    Args:
      folder: the model's own folder, never a package of another.
      processor: processor of a task; one without a tokenizer has nothing to compare.

    Returns:
      A warning where transformers cannot read the tokenizer, so that nothing was compared; else no warning.

    Raises:
      DataError: the ids of a text differ.
    """
    tokenizer = getattr(processor, "words", processor)
    if not isinstance(tokenizer, Tokenizer):
        return []
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizer.json alone is enough here, while a class may need further files or packages
        return [
            f"tokenizer={Path(folder).name!r}: not compared with transformers, which cannot read it "
            f"({type(error).__name__}); make sure that tokenizer.json encodes as the model was trained"
        ]
    own = [encoding.ids for encoding in tokenizer.singles(TEXTS, LENGTH)]
    same = [_ids(theirs, text) for text in TEXTS] == own
    if not same or theirs.eos_token_id not in (None, tokenizer.eos_token_id):
        part = "other ids" if not same else "another eos_token"
        raise DataError(
            f"tokenizer={Path(folder).name!r}: transformers ({type(theirs).__name__}) gives {part} than tokenizer.json "
            "with tokenizer_config.json; save the tokenizer again: AutoTokenizer.from_pretrained(folder)"
            ".save_pretrained(folder)"
        )
    return []


def _ids(theirs: Any, text: str) -> list[int]:
    """Returns transformers' ids of a text; an empty list where the tokenizer fails on the text, as in `Tokenizer`."""
    try:
        return list(theirs(text, truncation=True, max_length=LENGTH)["input_ids"])
    except Exception:  # the library raises plain exceptions, for example for a word without an unknown token
        return []
