"""`conftest`: directories of tests skip as a whole where what they need is not installed."""

from __future__ import annotations

import functools

from tests.conftest import NEEDED
from tests.forked_commands import ForkedCommand, hide_modules


def test_tests_of_missing_extra_are_skipped_with_reason() -> None:
    directory, (names, reason) = next(iter(NEEDED.items()))
    words = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(directory)]
    done = ForkedCommand(words, prepare=functools.partial(hide_modules, names[:1])).finish()
    assert done.returncode == 5, done.stdout + done.stderr
    assert reason in done.stdout
    assert f"{len(list(directory.glob('test_*.py')))} skipped" in done.stdout
