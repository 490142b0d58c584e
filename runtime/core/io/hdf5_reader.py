"""Read datasets of an HDF5 file in a separate process, because damaged files crash libhdf5.

Of 12,000 damaged files two ended the process with a segmentation fault (h5py 3.16; tests/fuzzing.py). The process
starts with the first request, in 0.2 s, and serves all later ones. A crash is one error, and the next request starts
another process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np

from runtime.core.errors import DeviceError, FeatureError, GroundingError, MissingFeatures, excerpt, one_line, reading
from runtime.core.io.array_files import check_unfolded, in_native_order
from runtime.core.io.digests import file_stamp
from runtime.core.io.input_files import check_file
from runtime.core.names import by_fold, near_name

# The name of a dataset in the group of a video, as in the published features of ActivityNet (v_X/c3d_features).
DATASET = "c3d_features"
# A request that needs more memory in the process fails, because the file is damaged.
MAX_MEMORY_BYTES = 4 << 30
# A request that takes longer fails, because the file is damaged. Reading the features of a video takes milliseconds.
TIMEOUT_S = 60.0
# Maximum number of soft links on the path to a dataset, as in libhdf5.
MAX_LINKS = 16
# Error code of features whose values are not in the file itself.
OUTSIDE = "features_outside_file"
ERRORS: dict[str, type[GroundingError]] = {"invalid_features": FeatureError, "missing_features": MissingFeatures}


class Hdf5Reader:
    """The datasets of one HDF5 file, read in another process.

    Thread-safe. A forked process starts its own reader. Its methods take spellings of the name of a video, of which the
    first that exists, as a dataset or a group of one, is used.

    Raises:
        MissingFeatures: there is neither a dataset nor a group of any of these names.
        FeatureError: the file or the dataset is damaged, or is not an array of floats with two axes.
        DeviceError: h5py is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._stamp: tuple[int, ...] | None = None
        self._lock = threading.Lock()

    def describe(self, names: list[str]) -> dict[str, Any]:
        """Return `name`, `dtype` and `shape` of a dataset, without reading its values."""
        reply, _ = self._request({"names": names, "values": False})
        return reply

    def read(self, names: list[str]) -> np.ndarray:
        """Return the features of a video, (num_clips, D) in the float type of the file."""
        reply, values = self._request({"names": names, "values": True})
        assert values is not None
        return in_native_order(values.view(np.dtype(reply["dtype"])).reshape(reply["shape"]))

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with contextlib.suppress(OSError):
                    stream.close()

    def __del__(self) -> None:
        # Modules may already be cleared when the interpreter exits.
        with contextlib.suppress(Exception):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Hdf5Reader.__init__(self, state["_path"])

    def _request(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        """Return the reply of the process and the bytes of the values, if requested."""
        with self._lock:
            process = self._running()
            watchdog = threading.Timer(TIMEOUT_S, process.kill)
            watchdog.daemon = True
            watchdog.start()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                length = int.from_bytes(_exactly(process.stdout, 4), "little")
                reply = json.loads(_exactly(process.stdout, length).tobytes())
                if "error" in reply:
                    raise ERRORS.get(reply["code"], FeatureError)(reply["error"], code=reply["code"])
                values = _exactly(process.stdout, reply["bytes"]) if request["values"] else None
                return reply, values
            except GroundingError:
                raise
            except (OSError, EOFError, ValueError, KeyError) as error:
                self.close()
                raise FeatureError(
                    f"{self._path} is damaged: the HDF5 library crashed or timed out ({one_line(error)}). Copy or "
                    "download it again.",
                    code="damaged_file",
                ) from error
            except BaseException:
                # A reply that arrives later would be read as the reply to the next request.
                self.close()
                raise
            finally:
                watchdog.cancel()

    def _running(self) -> subprocess.Popen[bytes]:
        stamp = file_stamp(self._path)
        is_running = self._process is not None and self._owner == os.getpid() and self._process.poll() is None
        # A running process still has a file open that was replaced since.
        if self._process is None or not is_running or stamp != self._stamp:
            if importlib.util.find_spec("h5py") is None:
                raise DeviceError(
                    "Features in HDF5 need h5py, which is not installed. Run `pip install '.[hdf5]'`.",
                    code="missing_library",
                )
            check_file(self._path, "The feature file", FeatureError)
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runtime.core.io.hdf5_reader", str(self._path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            self._owner, self._stamp = os.getpid(), stamp
        return self._process


def _exactly(stream: IO[bytes], count: int) -> np.ndarray:
    """Return `count` bytes of a pipe; EOFError if it ends before."""
    content = np.empty(count, np.uint8)
    if count and stream.readinto(content.data) != count:  # type: ignore[attr-defined]
        raise EOFError("no complete reply")
    return content


# The following code runs in the other process.


def _serve(path: str) -> None:
    """Answer the requests on standard input, a JSON object a line, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Some systems have no such limits, or allow only lower ones.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    file = Hdf5File(path)
    output = sys.stdout.buffer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        values = None
        try:
            reply, values = file.answer(request["names"], request["values"])
        except GroundingError as error:
            reply = {"error": str(error), "code": error.code}
        text = json.dumps(reply).encode()
        output.write(len(text).to_bytes(4, "little") + text)
        if values is not None:
            output.write(values.data if values.size else b"")
        output.flush()


class Hdf5File:
    """An HDF5 file that is read in this process; a damaged file may crash it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._root: Any = None
        self._names: dict[str, str] = {}

    def answer(self, names: list[str], values: bool) -> tuple[dict[str, Any], np.ndarray | None]:
        """Return the description of a dataset and, if requested, its values; see `Hdf5Reader`.

        Args:
            names: spellings of the name of the video. The first that is a dataset, or a group with one dataset, is
                read.

        Returns:
            `name`, `dtype`, `shape` and, with values, `bytes`; and the (num_clips, D) values or None.
        """
        import h5py

        with reading(self._path, "an HDF5 file of clip features", FeatureError, "copy or download it again"):
            self._root = self._root or h5py.File(self._path, "r")
            try:
                dataset = _dataset(self._root, self._path, names)
            except MissingFeatures as error:
                # The names are listed once, because a corpus may lack many videos.
                self._names = self._names or by_fold(self._root)
                raise MissingFeatures(str(error) + near_name(self._names, *names)) from error
            reply = {"name": dataset.name, "dtype": dataset.dtype.str, "shape": list(dataset.shape)}
            if not values:
                return reply, None
            check_unfolded(f"{self._path}: {dataset.name}", dataset.nbytes, dataset.id.get_storage_size())
            content = np.ascontiguousarray(dataset[()])
            return {**reply, "bytes": content.nbytes}, content

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._root is not None:
            self._root.close()


def _dataset(root: Any, path: str, names: list[str]) -> Any:
    """Return the dataset of one of these names, or the dataset in the group of that name."""
    nodes = (_member(root, path, name) for name in names)
    node = next((member for member in nodes if member is not None), None)
    video = names[0]
    if node is None:
        raise MissingFeatures(
            f"{path} has no dataset or group {excerpt(video)}. Check the name of the video, or extract its features."
        )
    if hasattr(node, "keys"):
        members = list(node.keys())
        name = DATASET if DATASET in members else members[0] if len(members) == 1 else None
        inner = None if name is None else _member(node, path, name)
        if inner is None:
            raise FeatureError(
                f"{path}: expected one dataset, or one named {DATASET!r}, in the group {excerpt(video)}, got "
                f"{', '.join(members[:3]) or 'none'}. Remove the others.",
                code="ambiguous_features",
            )
        node = inner
    if getattr(node, "ndim", None) != 2 or node.dtype.kind != "f" or node.dtype.itemsize > 8:
        raise FeatureError(
            f"{path}: expected floats of shape (num_clips, D) for {excerpt(video)}, got "
            f"{getattr(node, 'dtype', 'no numbers')} of shape {getattr(node, 'shape', None)}. Write them again.",
            code="wrong_array",
        )
    if node.external or node.is_virtual:
        raise FeatureError(
            f"{path}: the features of {excerpt(video)} are a virtual dataset, or their values are in another file. "
            "Copy them into this file.",
            code=OUTSIDE,
        )
    return node


def _member(group: Any, path: str, name: str) -> Any:
    """Return a member of a group, or None; FeatureError if a link leads out of the file, to nothing, or in a circle.

    Soft links are resolved component by component, because any component may lead out of the file.
    """
    import h5py

    node, parts, num_links = group, [name], 0
    while parts:
        part = parts.pop(0)
        if part in ("", "."):
            continue
        link = node.get(part, getlink=True) if hasattr(node, "keys") else None
        if link is None and not num_links:
            return None
        if link is None or num_links == MAX_LINKS:
            raise FeatureError(
                f"{path}: the link {excerpt(name)} leads nowhere or in a circle. Correct the link, or replace it by "
                "the features.",
                code="broken_link",
            )
        if isinstance(link, h5py.SoftLink):
            num_links += 1
            node, parts = node.file if link.path.startswith("/") else node, link.path.split("/") + parts
        elif isinstance(link, h5py.HardLink):
            node = node[part]
        else:
            raise FeatureError(
                f"{path}: the link {excerpt(name)} leads out of the file and is not followed. Copy its target into "
                "this file.",
                code=OUTSIDE,
            )
    return node


if __name__ == "__main__":
    _serve(sys.argv[1])
