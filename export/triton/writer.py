"""Write a model repository for Triton, completely or not at all.

    drn/           the front model, which calls the networks   config.pbtxt  1/model.py  1/about.json
    drn_network/   the network                                 config.pbtxt  1/model.onnx or model.plan  warmup/
    drn_video/, drn_query/   the two parts of a split model, instead of drn_network/

Each configuration is converted to Triton's `ModelConfig` message first, which rejects unknown fields.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.triton.model_config import FORMAT_PARAMETER, TritonModel, is_features
from runtime.backends.exact_int8 import for_any_cpu
from runtime.backends.triton_backend import FORMAT, PARAMETER, FrontConfig
from runtime.core.errors import ModelFileError, OutputError, importing, one_line
from runtime.core.interrupts import deferred
from runtime.core.io.atomic_files import atomic_write, locked, staging_directory
from runtime.core.io.digests import sha256

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

# Fields of the configuration that all versions of a model share.
SHARED_FIELDS = ("platform", "backend", "max_batch_size", "input", "output")


def message(config: Mapping[str, Any]) -> ModelConfig:
    """Return a `ModelConfig` in its JSON form as Triton's protobuf message.

    Raises:
        DeviceError: `tritonclient`, which defines the message, is not installed.
    """
    definitions = _definitions()
    from google.protobuf import json_format

    return json_format.ParseDict(dict(config), definitions.ModelConfig())


def _definitions() -> Any:
    with importing("tritonclient", "triton"):
        from tritonclient.grpc import model_config_pb2
    return model_config_pb2


def config_text(config: ModelConfig, header: str) -> str:
    """Return the text of a config.pbtxt, with the long parameters at the end."""
    from google.protobuf import text_format

    parts = [type(config)(), type(config)()]
    for part in parts:
        part.CopyFrom(config)
    parts[0].ClearField("parameters")
    for descriptor, _ in parts[1].ListFields():
        if descriptor.name != "parameters":
            parts[1].ClearField(descriptor.name)
    return header + "".join(text_format.MessageToString(part) for part in parts)


def read_config(path: Path) -> ModelConfig:
    """Read a config.pbtxt; raise ModelFileError if Triton could not read it."""
    definitions = _definitions()
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), definitions.ModelConfig())
    except FileNotFoundError:
        raise ModelFileError(
            f"{path} does not exist, so {path.parent} is not a Triton model. Remove that directory.",
            code="missing_file",
        ) from None
    except (text_format.ParseError, OSError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"{path} is not a Triton configuration ({one_line(error)}). Correct the file, or remove {path.parent}.",
            code="invalid_model_config",
        ) from error


def next_version(repository: Path, parts: Sequence[TritonModel]) -> int:
    """Return the version number of new models: 1, or the next one of models that exist.

    Raises:
        OutputError: a model with the same name exists that was not written by this command, or has other inputs or
            outputs.
    """
    existing = [part for part in parts if (repository / part.name).exists()]
    if not existing:
        return 1
    for part in parts:
        directory = repository / part.name
        if part not in existing:
            raise OutputError(
                f"{repository} contains {', '.join(other.name for other in existing)} without {part.name}, so the "
                "model cannot be a new version of them. Choose another --name.",
                code="version_mismatch",
            )
        known, expected = read_config(directory / "config.pbtxt"), message(part.config)
        if known.parameters[FORMAT_PARAMETER].string_value != FORMAT:
            raise OutputError(
                f"{directory} exists and was not written by export.triton. Choose another --name.",
                code="output_exists",
            )
        for field in SHARED_FIELDS:
            if getattr(known, field) != getattr(expected, field):
                raise OutputError(
                    f"{directory} has another {field}, which all versions of a model share. "
                    "Choose another --name, or remove the old model.",
                    code="version_mismatch",
                )
        if PARAMETER in known.parameters:
            old, new = (
                FrontConfig.from_json(config.parameters[PARAMETER].string_value, str(directory))
                for config in (known, expected)
            )
            if old.manifest.max_query_length != new.manifest.max_query_length:
                raise OutputError(
                    f"Expected a maximum query length of {old.manifest.max_query_length} tokens as in {directory}, got "
                    f"{new.manifest.max_query_length}. Choose another --name.",
                    code="version_mismatch",
                )
    versions = [
        int(version.name)
        for part in parts
        for version in (repository / part.name).iterdir()
        if version.is_dir() and version.name.isdigit()
    ]
    return 1 + max(versions, default=0)


def write(repository: Path, parts: Sequence[TritonModel], origin: Path) -> tuple[int, list[Path]]:
    """Write models to a repository, completely or not at all.

    A model that exists gets a new version. Its configuration stays the same, except for the parameters of the front.
    The files are written next to the repository and moved into it, first the networks and then the front that calls
    them, so that a running server never reads an incomplete model.

    Args:
        repository: directory of the repository; created if it does not exist.
        origin: model file from which the models were made.

    Returns:
        The version of the models, and the written files, relative to the repository.

    Raises:
        OutputError: see `next_version`; or the directory cannot be written.
    """
    repository = repository.resolve()
    if repository.exists() and not repository.is_dir():
        raise OutputError(f"{repository} is a file. Choose a directory as --output.", code="output_is_file")
    # Two processes would choose the same version.
    with locked(repository.parent, repository.name):
        version = next_version(repository, parts)
        header = (
            f"# Written by `python -m export.triton` for {origin.name} (SHA-256 {sha256(origin)[:12]}...).\n"
            "# Fields: model_config.proto of triton-inference-server/common.\n"
        )
        with _staging_directory(repository) as staged:
            for part in parts:
                _write_model(staged / part.name, part, version, header)
            moves = [(staged / part.name, repository / part.name) for part in parts]
            if version > 1:
                moves = [(source / str(version), target / str(version)) for source, target in moves]
            sources = (path for source, _ in moves for path in sorted(source.rglob("*")) if path.is_file())
            files = [path.relative_to(staged) for path in sources]
            # A signal takes effect after the moves, and then undoes them.
            with _removed_on_error() as moved, deferred():
                for source, target in moves:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(source, target)
                    moved.append(target)
                if version > 1:
                    files.append(Path(parts[-1].name, "config.pbtxt"))
                    _update_front_parameters(repository / files[-1], parts[-1], header)
    return version, files


def _write_model(directory: Path, part: TritonModel, version: int, header: str) -> None:
    location = directory / str(version)
    location.mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config_text(message(part.config), header), encoding="utf-8")
    for name, content in part.files.items():
        if isinstance(content, Path):
            # The CPU of the server is not known, so the file must be exact on any CPU.
            on_cpu = content.suffix == ".onnx" and part.config["instance_group"][0]["kind"] != "KIND_GPU"
            exact = for_any_cpu(content) if on_cpu else None
            if exact is None:
                shutil.copyfile(content, location / name)
            else:
                (location / name).write_bytes(exact)
        else:
            (location / name).write_text(content, encoding="utf-8")
    stored = {name: value for name, value in part.warmup.items() if not is_features(name)}
    for name, value in stored.items():
        (directory / "warmup").mkdir(exist_ok=True)
        (directory / "warmup" / name).write_bytes(value.tobytes())


def _update_front_parameters(path: Path, part: TritonModel, header: str) -> None:
    config = read_config(path)
    config.parameters[PARAMETER].string_value = part.config["parameters"][PARAMETER]["string_value"]
    with atomic_write(path) as temporary:
        temporary.write_text(config_text(config, header), encoding="utf-8")


@contextlib.contextmanager
def _staging_directory(repository: Path) -> Iterator[Path]:
    """Yield a temporary directory next to the repository, or inside it if it is a mount point."""
    exists = repository.exists()
    try:
        with staging_directory(repository if os.path.ismount(repository) else repository.parent) as staged:
            yield staged
    except OSError as error:
        raise OutputError(
            f"{repository} cannot be written ({error.strerror or error}). Choose another --output."
        ) from error
    finally:
        if not exists:
            with contextlib.suppress(OSError):
                repository.rmdir()


@contextlib.contextmanager
def _removed_on_error() -> Iterator[list[Path]]:
    """Yield a list for directories; after an error they are removed."""
    directories: list[Path] = []
    try:
        yield directories
    except BaseException:
        for path in reversed(directories):
            shutil.rmtree(path, ignore_errors=True)
        raise
