"""The code blocks of README, CONTRIBUTING and docs/, each with the HTML comment that stands right before it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = {"", "text"}  # languages of blocks that nobody types: pictures and outputs
_BLOCK = re.compile(r"(?ms)^(?:<!-- ([^\n]*?) -->\n)?```(\w*)\n(.*?)^```$")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
      page: path of the page, relative to the repository.
      line: number of the line on which the block opens.
      note: text of the HTML comment right before the block, or "".
      language: word behind the opening fence.
      text: content of the block.
    """

    page: str
    line: int
    note: str
    language: str
    text: str

    @property
    def excuse(self) -> str:
        """The reason why the block is not run, or ""."""
        return self._after("not run")

    @property
    def runner(self) -> str:
        """The paths of other tests that run the block, with commas between, or ""."""
        return self._after("run by")

    @property
    def file(self) -> str:
        """The name of the file that the block is the content of, or ""."""
        return self._after("file")

    def _after(self, word: str) -> str:
        start, _, rest = self.note.partition(": ")
        return rest.strip() if start == word else ""


def blocks(path: Path) -> Iterator[Block]:
    """Yields the blocks of a page that a reader would type or write."""
    text = path.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        note, language, content = match.groups()
        if language not in SHOWN:
            line = text.count("\n", 0, match.start(2)) + 1
            yield Block(str(path.relative_to(ROOT)), line, note or "", language, content)
