"""Store the kernels that TensorRT-RTX compiles for a plan, so that later processes need not compile them.

TensorRT-RTX compiles kernels on the machine that runs them. The bytes of its runtime cache (`IRuntimeCache`) are valid
for one library version and one kind of GPU. The file is a line of JSON with these properties, followed by the bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from runtime.core.errors import GroundingError, ModelFileError, one_line
from runtime.core.io.atomic_files import atomic_write
from runtime.core.io.text_files import check_format, parse_json

log = logging.getLogger("drn")

FORMAT = "drn-runtime-cache/1"
MAX_HEADER_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Key:
    """The properties that compiled kernels are valid for.

    Attributes:
        plan: SHA-256 of the plan.
        library: name and version of TensorRT-RTX.
        gpu: name and compute capability.
    """

    plan: str
    library: str
    gpu: str


class KernelCache:
    """The file with the compiled kernels of a plan, in the same directory."""

    def __init__(self, plan: Path, key: Key) -> None:
        self.path = cache_path(plan)
        self.key = key
        self._stored = ""

    def read(self) -> bytes | None:
        """Return the compiled kernels; None without a file or, with a warning, if it cannot be used."""
        try:
            with open(self.path, "rb") as file:
                header, content = file.readline(MAX_HEADER_BYTES), file.read()
            digest = hashlib.sha256(content).hexdigest()
            self._check(header, digest)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, GroundingError) as error:
            self.ignore(one_line(error))
            return None
        self._stored = digest
        return content

    def _check(self, header: bytes, digest: str) -> None:
        """Raise ValueError or ModelFileError unless a header has the format, the key and this digest of the content."""
        source, advice = "its first line", "no action is needed"
        about = parse_json(header.decode(), source, ModelFileError, advice=advice)
        check_format(about, FORMAT, source, ModelFileError, advice)
        if about.get("sha256") != digest:
            raise ValueError("it is damaged")
        different = [name for name, value in dataclasses.asdict(self.key).items() if about.get(name) != value]
        if different:
            raise ValueError(f"it was written for another {' and '.join(different)}")

    def ignore(self, reason: str) -> None:
        """Warn that the file is not used, so that the next `write` replaces it."""
        self._stored = ""
        log.warning("%s is not used: %s. Kernels are compiled again, and the file is replaced.", self.path, reason)

    def write(self, content: bytes) -> bool:
        """Write compiled kernels atomically, unless the file contains them already.

        Returns:
            Whether the file contains them; False, with a warning, if it cannot be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        if digest == self._stored:
            return True
        header = json.dumps({"format": FORMAT, **dataclasses.asdict(self.key), "sha256": digest})
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(header.encode() + b"\n" + content)
        except (GroundingError, OSError) as error:
            log.warning("%s was not written: %s The next process compiles the kernels again.", self.path, error)
            return False
        self._stored = digest
        return True


def cache_path(plan: Path) -> Path:
    """Return the path of the compiled kernels of a plan: drn.fp16.engine.cache for drn.fp16.engine."""
    return plan.with_name(f"{plan.name}.cache")
