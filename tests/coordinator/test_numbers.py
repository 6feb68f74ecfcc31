"""A number never comes twice: after restarts, with a clock set back, without the file; disk comes before use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offsite.coordinator.rounds.counter import MonotonicCounter
from offsite.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
CLOCK = st.integers(1, 2**62)


def test_they_start_at_the_clock_and_only_go_up(tmp_path: Path) -> None:
    ticks = iter([100, 100, 99, 5, 200])
    numbers = MonotonicCounter(tmp_path / "n", lambda: next(ticks))
    assert [numbers.next() for _ in range(5)] == [100, 101, 102, 103, 200]


@settings(deadline=None)  # each number is on disk, with its folder, before it is returned
@given(st.lists(st.tuples(CLOCK, st.booleans()), min_size=2, max_size=20))
def test_whatever_the_clock_says_and_however_often_it_is_opened(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, bool]]
) -> None:
    path, clock = tmp_path_factory.mktemp("numbers") / "n", [0]
    numbers, seen = MonotonicCounter(path, lambda: clock[0]), [0]
    for now, restart in steps:
        clock[0] = now
        numbers = MonotonicCounter(path, lambda: clock[0]) if restart else numbers
        seen.append(numbers.next())
        assert seen[-1] > seen[-2]
        assert seen[-1] >= now
        assert path.read_text() == str(seen[-1])


def test_two_that_share_a_file_take_turns(tmp_path: Path) -> None:
    """The offers, the rounds and the farewell of a job each open the counter of signed messages."""
    two = [MonotonicCounter(tmp_path / "n", lambda: 1) for _ in range(3)]
    assert [two[place % 3].next() for place in range(9)] == list(range(1, 10))


def test_a_lost_file_costs_nothing_while_the_clock_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "n"
    before = [MonotonicCounter(path).next() for _ in range(50)]
    path.unlink()
    assert MonotonicCounter(path).next() > before[-1]


def test_a_number_that_could_not_be_kept_is_not_given(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    with pytest.raises(DataError, match=r"path='.*/gone/n': cannot be written \(No such file or directory\)"):
        MonotonicCounter(folder / "n").next()
    folder.mkdir()
    path = folder / "n"
    first = MonotonicCounter(path, lambda: 10).next()
    partial = folder / f".n.{os.getpid()}.partial"
    partial.mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        MonotonicCounter(path, lambda: 10).next()
    partial.rmdir()
    assert MonotonicCounter(path, lambda: 10).next() == first + 1


def test_killed_at_any_moment_none_comes_again(tmp_path: Path) -> None:
    """A process prints each number and is killed; the next process, with its clock at 1, must go on above."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom offsite.coordinator.rounds.counter import MonotonicCounter\n"
        "numbers = MonotonicCounter(Path(sys.argv[1]), lambda: 1)\n"
        "while True:\n    print(numbers.next(), flush=True)\n"
    )
    last = 0
    for lines in (1, 7, 40):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "n")], cwd=ROOT, stdout=subprocess.PIPE, env=os.environ
        )
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(lines)]
        process.kill()
        rest = process.stdout.read()  # not `communicate`, which passes over what `readline` has buffered
        process.stdout.close()
        process.wait(timeout=30)
        seen += [int(line) for line in rest.split(b"\n")[:-1]]
        assert seen == list(range(seen[0], seen[0] + len(seen)))
        assert seen[0] > last
        last = seen[-1]


@pytest.mark.parametrize("content", ["", "x", "12x", "1.5"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "n").write_text(content)
    with pytest.raises(DataError, match="is damaged; remove it"):
        MonotonicCounter(tmp_path / "n").next()
