"""Every command block of README, CONTRIBUTING and docs/ is executed, here or in a named test, or says why not."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_model, sentence
from tests.docs.blocks import PAGES, ROOT, Block, blocks

SITES = ("north", "south", "west")
SHELLS = {"sh", "bash", "console"}
SECONDS = 600
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def records(name: str, count: int) -> list[str]:
    """Returns texts from one vocabulary, each longer than a record's 128 tokens."""
    return [sentence(name, 130 + number % 7) for number in range(count)]


def write_records(folder: Path, name: str, texts: list[str]) -> None:
    """Writes texts as NAME.jsonl with the key `text`, and as NAME.csv with the column `body`."""
    (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["body"], *([text] for text in texts)])


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has a model and records under the names that the pages use."""
    folder = tmp_path_factory.mktemp("reader")
    make_model(folder / "model")
    write_records(folder, "public", [text for number in range(120) for text in records(f"public{number}", 1)])
    for site in SITES:
        for part, count in (("", 200), ("-heldout", 20)):
            write_records(folder, f"{site}{part}", records(site, count))
        for part, count in (("train", 200), ("heldout", 20)):
            place = folder / "sites" / site / part
            place.mkdir(parents=True)
            for number, text in enumerate(records(site, count)):
                (place / f"{number}.txt").write_text(text)
    return folder


def type_in(block: Block, folder: Path) -> None:
    """Types a block at a shell, or at Python, or writes it as the file that it is."""
    if block.file:
        (folder / block.file).write_text(block.text)
        return
    commands = {"python": [sys.executable, "-c"], **{shell: ["bash", "-euo", "pipefail", "-c"] for shell in SHELLS}}
    assert block.language in commands, f"{block.page}:{block.line}: nothing runs a block of {block.language!r}; mark it"
    own = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    run = [*commands[block.language], block.text]
    done = subprocess.run(
        run, cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{block.page}:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGE_NAMES)
def test_what_a_page_says_to_type_runs(page: str, reader: Path, tmp_path: Path) -> None:
    """The blocks of a page in their order, in one folder, as a reader types them."""
    for entry in reader.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    for block in blocks(ROOT / page):
        if not block.excuse and not block.runner:
            type_in(block, tmp_path)


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_a_note_before_a_block_is_one_that_counts(page: str) -> None:
    for block in blocks(ROOT / page):
        place = f"{block.page}:{block.line}"
        assert not block.note or block.excuse or block.runner or block.file, f"{place}: {block.note!r}"
        assert not block.excuse or len(block.excuse.split()) > 2, f"{place}: the reason says nothing"
        assert block.file or block.language in SHELLS | {"python"} or block.excuse, f"{place}: say why it is not run"


def test_blocks_that_other_tests_run_are_typed_there() -> None:
    """Each `offsite` command of such a block stands in one of the tests that the note names, word by word."""
    borrowed = [block for page in PAGES for block in blocks(page) if block.runner]
    assert borrowed
    for block in borrowed:
        code = "".join((ROOT / name).read_text(encoding="utf-8") for name in block.runner.split(", "))
        words = re.sub(r"[^\w-]+", " ", code)
        commands = re.findall(r"(?m)^offsite (\w+ (?:audit )?[a-z-]+)", block.text)
        assert commands, f"{block.page}:{block.line}: no command of offsite in it"
        assert [one for one in commands if one not in words] == [], f"{block.page}:{block.line}"


def test_a_block_that_fails_is_seen(tmp_path: Path) -> None:
    """The check itself: a command that ends with an error, in the middle of a block, fails."""
    page = tmp_path / "page.md"
    page.write_text("```sh\nfalse\ntrue\n```\n")
    with pytest.raises(AssertionError, match=r"README\.md:1"):
        type_in(Block("README.md", 1, "", "sh", "false\ntrue\n"), tmp_path)
    with pytest.raises(AssertionError, match="nothing runs a block of 'yaml'"):
        type_in(Block("README.md", 1, "", "yaml", "a: 1\n"), tmp_path)


def test_every_fence_is_a_block() -> None:
    """No fence escapes the pattern: as many opening fences as blocks, in every page."""
    for page in PAGES:
        fences = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
        typed = [fence for fence in fences if fence.strip() not in ("```", "```text")]
        assert len(typed) == len(list(blocks(page))), page
