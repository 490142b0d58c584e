"""Write several files that replace their predecessors together."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from runtime.core.interrupts import deferred
from runtime.core.io import finished_files
from runtime.core.io.atomic_files import LOCK, resolved_output, staging_directory, unwritable


class Staging:
    """A context manager for files that replace their predecessors together, in `commit`.

    Links are followed as in `atomic_write`: the target of a link is replaced, and the link stays. A file with a derived
    name, such as drn.parity.json of drn.engine, is written in the directory of the link, not in that of its target.
    At the end of the context all temporary files are removed.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        # Resolved directories, to their temporary directories and to the directories as given.
        self._staged: dict[Path, Path] = {}
        self._given: dict[Path, Path] = {}

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        with deferred():
            self._stack.close()

    def path(self, final: str | os.PathLike[str]) -> Path:
        """Return the temporary path of the file `final`; OutputError if it cannot be written."""
        final = Path(final)
        resolved_output(final)
        parent = Path(os.path.realpath(final.parent))
        self._given.setdefault(parent, final.parent)
        return self._staged_path(parent / final.name)

    def commit(self, expected: Callable[[str], bool] = lambda name: True) -> list[Path]:
        """Rename the written files to their final paths, in the order of their names, and return these as given.

        Args:
            expected: returns whether a file of this name is renamed; others are removed.

        Raises:
            OutputError: a file cannot be written.
        """
        finals, moves = [], []
        for parent, given in self._given.items():
            for file in sorted(self._staged[parent].iterdir()):
                if file.name != LOCK and expected(file.name):
                    target = resolved_output(given / file.name)
                    moves.append((self._moved_near(file, target), target))
                    finals.append(given / file.name)
        # A signal between two renames would leave one new and one old file.
        with deferred():
            for final, (file, target) in zip(finals, moves):
                try:
                    os.replace(file, target)
                except OSError as error:
                    raise unwritable(target, error) from error
                finished_files.record(final)
        return finals

    def _moved_near(self, file: Path, target: Path) -> Path:
        """Return a written file after moving it to the file system of its target, to which a link may lead."""
        near = self._staged_path(target)
        if near.parent == file.parent:
            return file
        try:
            return Path(shutil.move(file, near))
        except OSError as error:
            raise unwritable(target, error) from error

    def _staged_path(self, target: Path) -> Path:
        """Return the temporary path of a file, by its resolved path."""
        parent = target.parent
        if parent not in self._staged:
            try:
                with deferred():
                    self._staged[parent] = self._stack.enter_context(staging_directory(parent))
            except OSError as error:
                raise unwritable(target, error) from error
        return self._staged[parent] / target.name
