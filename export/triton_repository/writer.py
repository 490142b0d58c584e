"""A model repository for Triton, written whole or not at all.

    drn/           the front: Python, calls the networks     config.pbtxt  1/model.py  1/about.json
    drn_network/   the network                               config.pbtxt  1/model.onnx or model.plan  warmup/
    drn_video/, drn_query/   in its place, of a model that was split

Every configuration is made into Triton's own `ModelConfig` message before it is written, so that a field that Triton
does not know cannot get in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.triton_repository.model_config import FORMAT_PARAMETER, TritonModel, is_features
from runtime.backends.exact_int8 import for_any_cpu
from runtime.backends.triton_backend import FORMAT, PARAMETER, FrontConfig
from runtime.core.errors import DeviceError, ModelFileError, OutputError, one_line
from runtime.core.interrupts import deferred
from runtime.core.io.atomic_files import atomic_write, locked, staging_directory
from runtime.core.io.digests import sha256

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

# What must not differ between versions of one model: the configuration is of them all.
SHARED = ("platform", "backend", "max_batch_size", "input", "output")


def message(config: Mapping[str, Any]) -> ModelConfig:
    """Return a configuration as Triton's own message.

    Raises:
        DeviceError: `tritonclient`, which has that message, is not installed.
    """
    definitions = _definitions()
    from google.protobuf import json_format

    return json_format.ParseDict(dict(config), definitions.ModelConfig())


def _definitions() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise DeviceError(
            f"Triton's definitions cannot be imported ({error}); "
            "run `pip install '.[triton]'` in the drn-deploy directory.",
            code="missing_library",
        ) from error
    return model_config_pb2


def config_text(config: ModelConfig, header: str) -> str:
    """Return the text of a config.pbtxt; what is long, and for programs, comes last."""
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
    """Return the configuration in a config.pbtxt; ModelFileError if Triton could not read it."""
    definitions = _definitions()
    from google.protobuf import text_format

    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), definitions.ModelConfig())
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist, so {path.parent} is no model of Triton's; remove it.") from None
    except (text_format.ParseError, OSError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"{path} is no configuration that Triton reads: {one_line(error)}.", code="invalid_model_config"
        ) from error


def next_version(repository: Path, parts: Sequence[TritonModel]) -> int:
    """Return the version that models are to be written as: 1, or the next of a model that is there.

    Raises:
        OutputError: a model of such a name is there that is not ours, or takes and gives something else.
    """
    there = [part for part in parts if (repository / part.name).exists()]
    if not there:
        return 1
    for part in parts:
        directory = repository / part.name
        if part not in there:
            raise OutputError(
                f"{repository} holds {', '.join(result.name for result in there)} but no {part.name}, so this would be "
                "no new version of one model; choose another --name.",
                code="version_mismatch",
            )
        known, expected = read_config(directory / "config.pbtxt"), message(part.config)
        if known.parameters[FORMAT_PARAMETER].string_value != FORMAT:
            raise OutputError(
                f"{directory} is there already and is not ours; choose another --name.", code="output_exists"
            )
        for field in SHARED:
            if getattr(known, field) != getattr(expected, field):
                raise OutputError(
                    f"{directory} is there with another {field}, and versions of one model share it; choose another "
                    "--name, or remove the old model.",
                    code="version_mismatch",
                )
        if PARAMETER in known.parameters:
            before, now = (
                FrontConfig.from_json(config.parameters[PARAMETER].string_value, str(directory))
                for config in (known, expected)
            )
            if before.manifest.max_query_length != now.manifest.max_query_length:
                raise OutputError(
                    f"{directory} takes queries of up to {before.manifest.max_query_length} tokens, and this model "
                    f"{now.manifest.max_query_length}; versions of one model share that: choose another --name.",
                    code="version_mismatch",
                )
    versions = [
        int(version.name)
        for part in parts
        for version in (repository / part.name).iterdir()
        if version.is_dir() and version.name.isdigit()
    ]
    return 1 + max(versions, default=0)


def write(repository: Path, parts: Sequence[TritonModel], origin: Path) -> int:
    """Write models to a repository, whole or not at all, and return their version.

    A model that is there gets a new version, and keeps its configuration but for what the front tells clients.
    A running server never sees half a model: what is new is written beside the repository and moved into it, networks
    before the front that calls them.

    Args:
        repository: a directory, or where one is to be made.
        parts: of `build_models`.
        origin: the file that they serve.

    Raises:
        OutputError: see `next_version`; or the place cannot be written.
    """
    repository = repository.resolve()
    if repository.exists() and not repository.is_dir():
        raise OutputError(f"{repository} is a file; name a directory for the repository.", code="output_is_file")
    # Two writers would choose the same version.
    with locked(repository.parent, repository.name):
        version = next_version(repository, parts)
        header = (
            f"# Written by `python -m export.triton` for {origin.name} (SHA-256 {sha256(origin)[:12]}...).\n"
            "# Fields: model_config.proto of triton-inference-server/common.\n"
        )
        with _staging_directory(repository) as staged:
            for part in parts:
                _lay(staged / part.name, part, version, header)
            moves = [(staged / part.name, repository / part.name) for part in parts]
            if version > 1:
                moves = [(ours / str(version), there / str(version)) for ours, there in moves]
            # A signal waits for the moves, and undoes all of them.
            with _undone_on_error() as done, deferred():
                for ours, there in moves:
                    there.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(ours, there)
                    done.append(there)
                if version > 1:
                    _update_front_parameters(repository / parts[-1].name / "config.pbtxt", parts[-1], header)
    return version


def _lay(directory: Path, part: TritonModel, version: int, header: str) -> None:
    location = directory / str(version)
    location.mkdir(parents=True)
    (directory / "config.pbtxt").write_text(config_text(message(part.config), header), encoding="utf-8")
    for name, content in part.files.items():
        if isinstance(content, Path):
            # Triton opens the file itself, on a CPU that is not known here.
            on_cpu = content.suffix == ".onnx" and part.config["instance_group"][0]["kind"] != "KIND_GPU"
            exact = for_any_cpu(content) if on_cpu else None
            if exact is None:
                shutil.copyfile(content, location / name)
            else:
                (location / name).write_bytes(exact)
        else:
            (location / name).write_text(content, encoding="utf-8")
    files = {name: value for name, value in part.warmup.items() if not is_features(name)}
    for name, value in files.items():
        (directory / "warmup").mkdir(exist_ok=True)
        (directory / "warmup" / name).write_bytes(value.tobytes())


def _update_front_parameters(path: Path, part: TritonModel, header: str) -> None:
    """Change in a front's configuration what it tells clients; all else stays as it is."""
    config = read_config(path)
    config.parameters[PARAMETER].string_value = part.config["parameters"][PARAMETER]["string_value"]
    with atomic_write(path) as temporary:
        temporary.write_text(config_text(config, header), encoding="utf-8")


@contextlib.contextmanager
def _staging_directory(repository: Path) -> Iterator[Path]:
    """Yield a temporary directory beside the repository, on the same disk unless the repository is a mount."""
    parent = repository.parent
    created = [path for path in (repository, *repository.parents) if not path.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        inside = repository.is_dir() and os.path.ismount(repository)
        with staging_directory(repository if inside else parent) as staged:
            yield staged
    except OSError as error:
        raise _unwritable(repository, error) from error
    finally:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()


def _unwritable(repository: Path, error: OSError) -> OutputError:
    return OutputError(f"{repository} cannot be written: {error.strerror or error}. Choose another place.")


@contextlib.contextmanager
def _undone_on_error() -> Iterator[list[Path]]:
    """Yield a list for directories that were moved into place; after an error they are removed again."""
    done: list[Path] = []
    try:
        yield done
    except BaseException:
        for path in reversed(done):
            shutil.rmtree(path, ignore_errors=True)
        raise
