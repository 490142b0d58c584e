"""Walk the metadata of Parquet files in a process of its own, because damaged metadata makes libarrow abort.

Of 6,000 damaged files five ended the process with an uncaught C++ exception in `row_group(...).column(...)`
(pyarrow 26.0; `python -m tests.fuzzing --reader parquet-flat --seed 1044`). The check costs one start of pyarrow for
each source, and the metadata is read once more.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.core.errors import FeatureError

# For the start of pyarrow, and for each file: metadata is read in milliseconds.
START_TIMEOUT_S, FILE_TIMEOUT_S = 60.0, 2.0


def check_metadata(files: Sequence[Path]) -> None:
    """Raise FeatureError if reading the metadata of a Parquet file ends the process that reads it.

    Python exceptions are left to the caller, who meets them again and reports them.
    """
    timeout = START_TIMEOUT_S + FILE_TIMEOUT_S * len(files)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "runtime.corpus.parquet_check"],
            input=json.dumps([os.fsencode(path).hex() for path in files]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            timeout=timeout,
            check=False,
        )
        begun, ended = done.stdout.split(), f"exit status {done.returncode}"
        if done.returncode == 0:
            return
    except subprocess.TimeoutExpired as error:
        begun, ended = (error.stdout or b"").split(), f"no end after {timeout:g} s"
    file = files[int(begun[-1])] if begun else files[0]
    raise FeatureError(
        f"{file} should be a Parquet file, and reading its metadata ended with {ended}; copy it or write it again."
    )


def _walk() -> None:
    """Read the metadata of the files named on standard input; print the index of each before it is opened."""
    # What is expected here leaves no core file. Not every system has such limits.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pyarrow.parquet as parquet

    for index, name in enumerate(json.load(sys.stdin)):
        print(index, flush=True)
        with contextlib.suppress(Exception):
            _read_metadata(parquet.ParquetFile(os.fsdecode(bytes.fromhex(name)), memory_map=True, pre_buffer=False))


def _read_metadata(file: Any) -> None:
    with file:
        str(file.schema_arrow)
        for group in map(file.metadata.row_group, range(file.num_row_groups)):
            for column in range(group.num_columns):
                group.column(column).to_dict()


if __name__ == "__main__":
    _walk()
