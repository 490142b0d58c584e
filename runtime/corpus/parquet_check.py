"""Read the metadata of Parquet files in another process first, because libarrow aborts on some damaged metadata.

Five of 6,000 damaged files ended the process with an uncaught C++ exception in `row_group(...).column(...)`
(pyarrow 26.0; `python -m tests.fuzzing --reader parquet-flat --seed 1044`). The check starts pyarrow once per source.
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

# Time to start pyarrow, and time per file, whose metadata is read in milliseconds.
START_TIMEOUT_S, FILE_TIMEOUT_S = 60.0, 2.0


def check_metadata(files: Sequence[Path]) -> None:
    """Raise FeatureError if reading the metadata of a Parquet file ends the process that reads it.

    Files that raise a Python exception pass, because the caller gets the same exception and reports it.
    """
    timeout = START_TIMEOUT_S + FILE_TIMEOUT_S * len(files)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "runtime.corpus.parquet_check"],
            input=json.dumps([os.fsencode(path).hex() for path in files]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            timeout=timeout,
            check=False,
        )
        started, end = result.stdout.split(), f"exit status {result.returncode}"
        if result.returncode == 0:
            return
    except subprocess.TimeoutExpired as error:
        started, end = (error.stdout or b"").split(), f"a timeout after {timeout:g} s"
    file = files[int(started[-1])] if started else files[0]
    raise FeatureError(
        f"Reading the metadata of {file} ended with {end}. Copy the Parquet file or write it again.",
        code="damaged_file",
    )


def _read_all() -> None:
    """Read the metadata of the files named on standard input; print the index of each before it is opened."""
    # An abort is expected here and must not leave a core file. Some systems have no such limit.
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
    _read_all()
