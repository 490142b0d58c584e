"""Read and write `drn.pt`: a network and all that is needed to use it. Loading a file never runs code in it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.artifacts.extractor_manifest import FORMAT as EXTRACTOR_FORMAT
from runtime.artifacts.manifest import Features, Manifest
from runtime.core.decoding import Decoding
from runtime.core.errors import CheckpointError, one_line, reading
from runtime.core.io import torch_reader
from runtime.core.io.atomic_files import atomic_write
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file
from runtime.core.io.text_files import check_format
from runtime.core.presence import Presence
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from runtime.datasets.presets import query_length_of
from train.network.model import DRN, DRNConfig

FORMAT = "drn-checkpoint/1"
RESUME_FORMAT = "drn-training/1"
# Maximum query length of exported models, in tokens, unless the data set has longer queries.
LONGEST_QUERY = 64
# Files that record a digest of their content.
FORMATS = (FORMAT, RESUME_FORMAT, EXTRACTOR_FORMAT)
DIGEST = "digest"
# Starts the comment of the zip archive. The SHA-256 of all bytes of the file so far follows, as hexadecimal digits.
SEAL = b"drn-sha256:"
SEAL_BYTES = len(SEAL) + 64
BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a `drn.pt`.

    Attributes:
        config: sizes of the network.
        features: clip features that it was trained on.
        vocabulary: words that it knows; empty if a converted file had no word table.
        decoding: how heads become moments.
        weights: state dict, on the CPU.
        training: record of the training; contains at least `stage`.
        windows: how longer videos are split; None if the lengths of the training videos are unknown.
        presence: no-match threshold; None if none was fitted.
    """

    config: DRNConfig
    features: Features
    vocabulary: Vocabulary
    decoding: Decoding
    weights: Mapping[str, Tensor]
    training: Mapping[str, Any]
    windows: Windows | None = None
    presence: Presence | None = None

    def model(self, *, copy: bool = True) -> DRN:
        """Return the network in evaluation mode, on the CPU. Without `copy`, training it changes `weights`."""
        # The `meta` device skips the random initialization, which would take longer than all else.
        with torch.device("meta"):
            model = DRN(self.config)
        state = {
            name: self.weights[name].detach().to(expected.dtype, copy=copy).contiguous()
            for name, expected in model.state_dict().items()
        }
        model.load_state_dict(state, assign=True)
        return model.eval()

    @property
    def longest_query(self) -> int:
        """Maximum query length of exported graphs, in tokens: that of the data set it was trained on, at least 64."""
        return max(LONGEST_QUERY, *query_length_of(self.training))

    def manifest(self, max_query_length: int | None = None, **fields: Any) -> Manifest:
        """Return the manifest of a model file exported from this checkpoint; `fields` are further fields of `Manifest`.

        Queries have at most `max_query_length` tokens, `longest_query` when None.
        """
        return Manifest(
            vocabulary=self.vocabulary,
            decoding=self.decoding,
            features=self.features,
            stage=int(self.training["stage"]),
            max_query_length=max_query_length or self.longest_query,
            training=dict(self.training),
            windows=self.windows,
            presence=self.presence,
            **fields,
        )


# Of a training run.
STAGE_DIRECTORY = re.compile("stage([1-3])")


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically."""
    config = dataclasses.asdict(checkpoint.config)
    content = {
        "format": FORMAT,
        "config": {
            **config,
            "strides": list(config["strides"]),
            "features": dataclasses.asdict(checkpoint.features),
        },
        "vocabulary": checkpoint.vocabulary.to_dict(),
        "decoding": checkpoint.decoding.to_dict(),
        "weights": {name: tensor.detach().cpu() for name, tensor in checkpoint.weights.items()},
        "training": dict(checkpoint.training),
        **({"windows": checkpoint.windows.to_dict()} if checkpoint.windows else {}),
        **({"presence": checkpoint.presence.to_dict()} if checkpoint.presence else {}),
    }
    save(path, content)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        CheckpointError: the file is missing, not a torch file, contains code, is damaged, or is not a DRN checkpoint.
    """
    with opened(path) as (content, _):
        return checkpoint_of(content, path)


def checkpoint_of(content: Any, path: str | os.PathLike[str]) -> Checkpoint:
    """Return the checkpoint in the content of a torch file, as `read` returns it; `path` is for messages.

    Raises:
        CheckpointError: the content is not that of a DRN checkpoint.
    """
    actual_format = content.get("format") if isinstance(content, dict) else None
    if actual_format == EXTRACTOR_FORMAT:
        raise CheckpointError(
            f"{path} is a feature extractor, not a DRN. Pass drn.pt here, and export the extractor with "
            f"`python -m export.to_onnx --model {path}`.",
            code="wrong_model_kind",
        )
    if actual_format == RESUME_FORMAT:
        raise CheckpointError(
            f"{path} is the state for `train --resume`. Give best.pt of the same directory.", code="training_state"
        )
    advice = "convert published checkpoints with `python -m train.convert`"
    check_format(content, FORMAT, f"{path}", CheckpointError, advice)
    try:
        config = dict(content["config"])
        features = Features(**config.pop("features"))
        checkpoint = Checkpoint(
            config=DRNConfig(**config),
            features=features,
            vocabulary=Vocabulary.from_dict(content["vocabulary"]),
            decoding=Decoding.from_dict(content["decoding"]),
            weights=content["weights"],
            training={**content["training"], "stage": int(content["training"].get("stage", 3))},
            windows=Windows.from_dict(content["windows"]) if "windows" in content else None,
            presence=Presence.from_dict(content["presence"]) if "presence" in content else None,
        )
    # A damaged file may contain values of any type, and errors of the parts do not name the file.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {one_line(error)}). Train or convert again.",
            code="damaged_file",
        ) from error
    words, decoding, network = len(checkpoint.vocabulary), checkpoint.decoding, checkpoint.config
    if words not in (0, network.vocab_size):
        raise CheckpointError(
            f"{path}: expected a vocabulary of {network.vocab_size} words, got {words}. Convert the file again.",
            code="vocabulary_mismatch",
        )
    if (decoding.num_segments, decoding.strides) != (network.num_segments, network.strides):
        raise CheckpointError(
            f"{path}: expected decoding for {network.num_segments} segments, got {decoding.num_segments}. Train or "
            "convert again.",
            code="segment_count_mismatch",
        )
    check_weights(checkpoint.weights, lambda: DRN(network), str(path))
    _check_stage(Path(path), checkpoint.training["stage"])
    return checkpoint


def _check_stage(path: Path, stage: int) -> None:
    """Raise CheckpointError if `stageK/best.pt` of a training run was trained in another stage."""
    directory = path.absolute().parent
    expected = STAGE_DIRECTORY.fullmatch(directory.name)
    if expected and path.name == "best.pt" and (directory.parent / "run.json").is_file() and int(expected[1]) != stage:
        raise CheckpointError(
            f"{path} was trained in stage {stage}, but is in the directory of stage {expected[1]}. Restore the "
            "checkpoint of that stage, or copy this one out of the run.",
            code="stage_mismatch",
        )


def check_weights(weights: Any, network: Callable[[], nn.Module], source: str) -> None:
    """Check the names, shapes and values of the tensors of a network.

    Args:
        weights: name to torch tensor or NumPy array.
        network: creates the network, here without memory for its weights.
        source: name of the file in messages.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or contains impossible values.
    """
    if not isinstance(weights, Mapping) or not all(hasattr(tensor, "shape") for tensor in weights.values()):
        raise CheckpointError(
            f"{source} is damaged: its weights are not named tensors. Train or convert again.", code="damaged_file"
        )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in network().state_dict().items()}
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    misshapen = [
        f"{name} is {tuple(weights[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    problems = [
        f"{kind} {some(names)}"
        for kind, names in (("missing:", missing), ("unexpected:", extra), ("wrong shape:", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The tensors of {source} do not fit its network ({'; '.join(problems)}). Train or convert again.",
            code="tensor_mismatch",
        )
    _check_values(weights, source)


def some(names: Sequence[str]) -> str:
    """Return the first four names, and the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_values(weights: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError if a value is not finite, or if a variance of a batch norm is negative."""
    problems = []
    for name, value in weights.items():
        # A copy, because torch warns about read-only arrays.
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Extremes propagate NaN, and take a tenth of the time of `isfinite`.
        low, high = (float(extreme) for extreme in tensor.aminmax())
        if math.isfinite(low) and math.isfinite(high) and not (name.endswith(".running_var") and low < 0):
            continue
        bad = ~tensor.isfinite()
        kind = "not finite"
        if name.endswith(".running_var"):
            bad |= tensor < 0
            kind = "negative or not finite, but are variances"
        problems.append(f"{int(bad.sum())} of {tensor.numel()} values of {name} are {kind}")
    if problems:
        more = f"; and {len(problems) - 3} more tensors" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{source} contains impossible weights: {'; '.join(problems[:3])}{more}. Train or convert again.",
            code="impossible_weights",
        )


def source_hash(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return {file name: SHA-256}, as `sources` of a manifest records it."""
    return {Path(path).name: sha256(path)}


def save(path: str | os.PathLike[str], content: Any) -> None:
    """Write tensors and plain containers with torch atomically, with a digest if `content` has a known format.

    Raises:
        OutputError: the file cannot be written.
    """
    if isinstance(content, Mapping) and content.get("format") in FORMATS:
        content = {**content, DIGEST: content_digest(content)}
    with atomic_write(path) as temporary:
        try:
            torch.save(content, temporary)
            if isinstance(content, Mapping) and DIGEST in content:
                _seal(temporary)
        # torch's zip writer reports a full disk as a RuntimeError.
        except RuntimeError as error:
            full = shutil.disk_usage(temporary.parent).free < _bytes(content)
            raise OSError(errno.ENOSPC if full else errno.EIO, "torch could not write the file") from error


def _bytes(content: Any) -> int:
    """Return the size of all tensors in plain containers, in bytes."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, Mapping):
        return sum(map(_bytes, content.values()))
    return sum(map(_bytes, content)) if isinstance(content, list | tuple) else 0


def content_digest(content: Any) -> str:
    """Return the SHA-256 of tensors and plain containers, over all names, values and shapes in order."""
    digest = hashlib.sha256()
    _digest(content, digest)
    return digest.hexdigest()


def _digest(content: Any, digest: hashlib._Hash) -> None:
    if isinstance(content, Tensor):
        digest.update(f"tensor {content.dtype} {tuple(content.shape)}\n".encode())
        digest.update(content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(content, Mapping):
        digest.update(f"table {len(content)}\n".encode())
        for name, value in content.items():
            digest.update(f"{name!r}\n".encode())
            _digest(value, digest)
    elif isinstance(content, list | tuple):
        digest.update(f"list {len(content)}\n".encode())
        for value in content:
            _digest(value, digest)
    else:
        digest.update(f"{content!r}\n".encode())


def check_records(path: Path) -> None:
    """Raise CheckpointError if a record of a torch file does not match its CRC, which torch does not check.

    Files written by torch before 1.6 are not zip archives and have no CRC.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                # The CRC is 0 after `torch.serialization.set_crc32_options(False)`.
                if record.CRC:
                    with archive.open(record) as stream:
                        while stream.read(BLOCK_BYTES):
                            pass
    # zipfile and its decompressors raise exceptions without a common base class.
    except Exception as error:
        raise CheckpointError(
            f"{path} is damaged: {one_line(error)}. Copy it again, or use another checkpoint.", code="digest_mismatch"
        ) from error


def _seal(path: Path) -> None:
    """Write the SHA-256 of a zip archive to its comment, at the end of the file."""
    with path.open("r+b") as stream:
        # The end of a zip archive is the length of its comment, in two bytes.
        stream.seek(-2, os.SEEK_END)
        stream.write(SEAL_BYTES.to_bytes(2, "little") + SEAL)
    digest = sha256(path).encode()
    with path.open("ab") as stream:
        stream.write(digest)


def sha256_and_seal(path: str | os.PathLike[str]) -> tuple[str, bool | None]:
    """Hash a file in one pass.

    Returns:
        Its SHA-256 as 64 hexadecimal digits, and whether the digest that `save` appended matches; None without one.
    """
    digest = hashlib.sha256()
    with reading(path, "the checkpoint", CheckpointError, "copy it again"), open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        left, block = max(size - SEAL_BYTES, 0), memoryview(bytearray(4 * BLOCK_BYTES))
        while left and (count := stream.readinto(block[:left])):
            digest.update(block[:count])
            left -= count
        tail = stream.read()
    if not tail.startswith(SEAL):
        digest.update(tail)
        return digest.hexdigest(), None
    digest.update(SEAL)
    intact = tail[len(SEAL) :] == digest.hexdigest().encode()
    digest.update(tail[len(SEAL) :])
    return digest.hexdigest(), intact


class UnreadObject:
    """Replaces an object of a class that torch does not know; contains nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load(path: str | os.PathLike[str], *, unknown_objects: bool = False) -> Any:
    """Read tensors and plain containers with torch without running code, and check the digest or the CRCs.

    Args:
        unknown_objects: replace objects of unknown classes by an `UnreadObject` instead of rejecting the file.

    Raises:
        CheckpointError: the file is missing, contains anything else, or is damaged.
    """
    with opened(path, unknown_objects=unknown_objects) as (content, _):
        return content


@contextlib.contextmanager
def opened(path: str | os.PathLike[str], *, unknown_objects: bool = False) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Read a torch file as `load` does, and check its digest while the body of the `with` statement runs.

    Yields:
        The content, and a function that waits for the SHA-256 of the file and returns it.

    Raises:
        CheckpointError: see `load`; also if the body raised another error.
    """
    check_file(path, "The checkpoint", CheckpointError, "name a file such as drn.pt")
    if Path(path).suffix in (".onnx", ".engine"):
        raise CheckpointError(
            f"Expected a checkpoint such as drn.pt, got {path}. Give the checkpoint that it was exported from.",
            code="not_a_torch_file",
        )
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(sha256_and_seal, path)
        try:
            content = read(path, unknown_objects=unknown_objects)
            yield content, lambda: hashing.result()[0]
        except CheckpointError as error:
            if hashing.result()[1] is False:
                raise _damaged(path) from error
            raise
        sealed = hashing.result()[1]
        if sealed is None:
            _check_unsealed(path, content)
        elif not sealed:
            raise _damaged(path)


def check(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if a torch file is missing, contains code, or is damaged."""
    check_file(path, "The checkpoint", CheckpointError, "name a file such as drn.pt")
    if not sha256_and_seal(path)[1]:
        load(path)


def _check_unsealed(path: str | os.PathLike[str], content: Any) -> None:
    """Raise CheckpointError if a file without an appended digest does not match that in its content, or its CRCs."""
    if not (isinstance(content, dict) and DIGEST in content and content.get("format") in FORMATS):
        check_records(Path(path))
    elif content[DIGEST] != content_digest({name: value for name, value in content.items() if name != DIGEST}):
        raise _damaged(path)


def _damaged(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"{path} does not match its recorded digest: it is damaged, or another tool changed it. Copy it again, or "
        "train or convert again.",
        code="digest_mismatch",
    )


def read(path: str | os.PathLike[str], *, unknown_objects: bool = False) -> Any:
    """Return the content of a torch file without checking its digest; see `load` for arguments and errors."""
    path = Path(path)
    check_file(path, "The checkpoint", CheckpointError)
    names = torch_reader.check(path)
    replaced: list[Any] = [(UnreadObject, name) for name in names] if unknown_objects else []
    with reading(path, "a torch checkpoint", CheckpointError, "copy it again"):
        try:
            # torch still rejects classes of the modules that it blocks.
            with torch.serialization.safe_globals(replaced):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch.serialization.get_unsafe_globals_in_checkpoint supports neither legacy files nor protocol 4.
            unknown = sorted(name for name in names if not name.startswith("torch._utils."))
            raise CheckpointError(
                f"{path} contains more than tensors and plain values ({', '.join(unknown[:3])}); no code was run. "
                "Convert published DRN checkpoints with `python -m train.convert`.",
                code="code_in_file",
            ) from error
