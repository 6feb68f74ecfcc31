"""What lies beside data in a folder: names that are passed over without a word, and words that count all other files.

Messages name a file's suffix and never its name, because the name of a file may be a person's. A suffix that nobody
knows may be a part of a name.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

# Names that systems and archives write, in small letters; all names that begin with a dot are hidden as well.
SYSTEM = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM |= {"thumbs.db", "ehthumbs.db", "desktop.ini"}
# Names that Spark, pyarrow and Delta write beside shards, and beginnings of such names.
_WRITTEN = {"_success", "_metadata", "_common_metadata", "_temporary", "_delta_log", "_spark_metadata"}
_WRITTEN_FIRST = ("_committed_", "_started_")
# Names of files about a data set; with these suffixes they hold no record.
_ABOUT = {"readme", "license", "licence", "notice", "changelog", "citation", "copying"}
_ABOUT_SUFFIXES = {"", ".md", ".rst", ".cff", ".bib"}
_KNOWN = {".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather", ".npz", ".npy"}
_KNOWN |= {".xlsx", ".xls", ".ods", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".md", ".html", ".htm", ".xml", ".pptx"}
_KNOWN |= {".eml", ".msg", ".epub", ".zip", ".tar", ".7z", ".log", ".bak", ".tmp", ".lock", ".idx", ".py", ".ipynb"}
_KNOWN |= {".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".heic", ".heif", ".avif"}
_KNOWN |= {".dcm", ".nii", ".wav", ".mp3", ".mp4", ".db", ".yaml", ".yml"}


def is_hidden(name: str) -> bool:
    """Says whether a file or a folder is hidden, or made by a system or an archive."""
    return name.startswith(".") or name.lower() in SYSTEM


def is_about(name: str) -> bool:
    """Says whether a file or a folder beside shards is known to hold no record: a marker of a tool, or a README."""
    path = Path(name.lower())
    marker = path.name in _WRITTEN or path.name.startswith(_WRITTEN_FIRST)
    return marker or (path.stem in _ABOUT and path.suffix in _ABOUT_SUFFIXES)


def kind_of(suffix: str, known: Collection[str] = ()) -> str:
    """Returns the words for a suffix in small letters.

    Args:
      suffix: suffix with its dot; empty for none.
      known: suffixes that may be named beside those that are known here.
    """
    return suffix if suffix in _KNOWN or suffix in known else "with other suffixes" if suffix else "without suffix"


def counted(kinds: Iterable[str]) -> str:
    """Returns words that count the kinds, for example `.docx 2, .pdf 1`."""
    return ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(kinds).items()))
