"""A stand-in for Triton: serves a repository that `export.triton` wrote, and is as strict about its configurations.

Networks run in ONNX Runtime; for the front it does the part of Triton's Python backend.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from export.triton.writer import read_config
from tests.file_modules import load_module

KINDS = {
    "TYPE_INT32": np.int32,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_BOOL": np.bool_,
    "TYPE_STRING": np.object_,
}


class Refused(Exception):
    """What Triton answers in place of outputs, and the status that it has."""

    def __init__(self, said: str, status: str = "INVALID_ARGUMENT") -> None:
        super().__init__(said)
        self.status = status


class Model:
    """One model of the repository in one version."""

    def __init__(self, server: Server, directory: Path, version: int) -> None:
        self.config = read_config(directory / "config.pbtxt")
        assert self.config.name == directory.name
        version_directory = directory / str(version)
        kind = type(self.config).DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
        self._kinds = {
            number: KINDS[value.name] for number, value in kind.values_by_number.items() if value.name in KINDS
        }
        if self.config.backend == "python":
            self._run = self._python(server, version_directory, version)
        else:
            assert (self.config.platform, self.config.backend) == ("onnxruntime_onnx", "onnxruntime")
            self._run = self._onnx(version_directory)
        for sample in self.config.model_warmup:
            self._warm(directory / "warmup", sample)

    def execute(self, requests: Sequence[Mapping[str, np.ndarray]], names: Sequence[str] = ()) -> list[Any]:
        """Return outputs by name, or Refused, for requests that arrived together."""
        answers: list[Any] = [None] * len(requests)
        for index, inputs in enumerate(requests):
            try:
                self._check(inputs)
            except Refused as refused:
                answers[index] = refused
        fine = [index for index, answer in enumerate(answers) if answer is None]
        for index, answer in zip(fine, self._run([requests[i] for i in fine], names), strict=True):
            if not isinstance(answer, Refused):
                self._check_outputs(requests[index], answer)
            answers[index] = answer
        return answers

    def _check(self, inputs: Mapping[str, np.ndarray]) -> None:
        missing = [value.name for value in self.config.input if not value.optional and value.name not in inputs]
        if missing:
            raise Refused(f"expected inputs are missing: {missing}")
        known = {value.name: value for value in self.config.input}
        batches = set()
        for name, array in inputs.items():
            if name not in known:
                raise Refused(f"unexpected inference input {name!r} for model {self.config.name!r}")
            shape = self._without_batch(array, batches)
            if array.dtype != self._kinds[known[name].data_type] or not fits(shape, known[name].dims):
                raise Refused(f"unexpected shape or type for input {name!r}: {array.dtype} {array.shape}")
        if self.config.max_batch_size and (len(batches) != 1 or not 1 <= batches.pop() <= self.config.max_batch_size):
            raise Refused("inference request batch-size must be from 1 to max_batch_size, the same of every input")

    def _check_outputs(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        known = {value.name: value for value in self.config.output}
        for name, array in outputs.items():
            shape = self._without_batch(array, set())
            assert array.dtype == self._kinds[known[name].data_type], name
            assert fits(shape, known[name].dims), (name, array.shape)
            assert 0 not in array.shape
            if self.config.max_batch_size:
                assert len(array) == len(next(iter(inputs.values())))

    def _without_batch(self, array: np.ndarray, batches: set[int]) -> tuple[int, ...]:
        if not self.config.max_batch_size:
            return array.shape
        batches.add(array.shape[0] if array.ndim else -1)
        return array.shape[1:]

    def _warm(self, directory: Path, sample: Any) -> None:
        inputs = {}
        for name, value in sample.inputs.items():
            kind, shape = self._kinds[value.data_type], tuple(value.dims)
            if value.input_data_file:
                array = np.frombuffer((directory / value.input_data_file).read_bytes(), kind).reshape(shape)
            else:
                assert value.zero_data
                array = np.zeros(shape, kind)
            inputs[name] = np.stack([array] * sample.batch_size) if self.config.max_batch_size else array
        assert set(inputs) == {value.name for value in self.config.input}
        (answer,) = self.execute([inputs])
        assert not isinstance(answer, Refused), answer
        assert all(np.isfinite(value).all() for value in answer.values())

    def _onnx(self, directory: Path) -> Any:
        session = onnxruntime.InferenceSession(
            directory / self.config.default_model_filename, providers=["CPUExecutionProvider"]
        )
        scalars = {value.name for value in self.config.input if value.HasField("reshape")}

        def run(requests: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]) -> list[Any]:
            output = list(names) or [value.name for value in self.config.output]
            feeds = [{n: v.reshape(len(v)) if n in scalars else v for n, v in inputs.items()} for inputs in requests]
            return [dict(zip(output, session.run(output, feed), strict=True)) for feed in feeds]

        return run

    def _python(self, server: Server, directory: Path, version: int) -> Any:
        """Load model.py as the Python backend does, with its module of tools."""
        pb = tools(server)
        sys.modules["triton_python_backend_utils"] = pb
        try:
            module = load_module(directory / self.config.default_model_filename)
        finally:
            del sys.modules["triton_python_backend_utils"]
        model = module.TritonPythonModel()
        model.initialize({"model_name": self.config.name, "model_version": str(version)})

        def run(requests: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]) -> list[Any]:
            wrapped = [Request([pb.Tensor(name, array) for name, array in inputs.items()]) for inputs in requests]
            responses = model.execute(wrapped)
            assert len(responses) == len(requests)
            # The server's memory does not outlive the request.
            for request in wrapped:
                for tensor in request.tensors:
                    if tensor.as_numpy().dtype != np.object_:
                        tensor.as_numpy().fill(0)
            return [
                Refused(response.error().message(), response.error().code)
                if response.has_error()
                else {tensor.name(): tensor.as_numpy() for tensor in response.tensors}
                for response in responses
            ]

        return run


def fits(shape: Sequence[int], dims: Sequence[int]) -> bool:
    return len(shape) == len(dims) and all(expected in (-1, size) for size, expected in zip(shape, dims, strict=True))


class Server:
    """Serves a repository; what was asked of its networks is kept in `calls`, by name, version and inputs."""

    def __init__(self, repository: Path) -> None:
        self.calls: list[tuple[str, int, Mapping[str, np.ndarray]]] = []
        self.broken: str | None = None
        self.models: dict[str, dict[int, Model]] = {}
        self.started = False
        for directory in sorted(repository.iterdir(), key=lambda path: path.name):
            versions = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
            kept = read_config(directory / "config.pbtxt").version_policy.latest.num_versions
            self.models[directory.name] = {
                version: Model(self, directory, version) for version in sorted(versions)[-kept:]
            }
        self.started = True

    def is_ready(self, name: str, version: int) -> bool:
        # Triton 2.51 may crash of this.
        assert self.started, "a model asks for another while the server starts"
        return version in self.models.get(name, {})

    def model(self, name: str, version: int = -1) -> Model:
        versions = self.models.get(name, {})
        if version not in (-1, *versions) or not versions:
            raise Refused(f"Request for unknown model: '{name}' version {version} is not found", "NOT_FOUND")
        return versions[max(versions) if version == -1 else version]

    def execute(self, name: str, requests: Sequence[Mapping[str, np.ndarray]], version: int = -1) -> list[Any]:
        copies = [{key: np.array(value) for key, value in inputs.items()} for inputs in requests]
        return self.model(name, version).execute(copies)

    def infer(self, name: str, inputs: Mapping[str, np.ndarray], version: int = -1) -> dict[str, np.ndarray]:
        """Answer one request; Refused as Triton would."""
        (answer,) = self.execute(name, [inputs], version)
        if isinstance(answer, Refused):
            raise answer
        return answer

    def call(self, request: Any) -> Any:
        """Answer a call from within the server."""
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs}
        self.calls.append((request.model_name, request.model_version, inputs))
        if self.broken:
            return Response(error=Error(self.broken, Error.INTERNAL))
        (answer,) = self.model(request.model_name, request.model_version).execute([inputs], request.names)
        if isinstance(answer, Refused):
            return Response(error=Error(str(answer), answer.status))
        return Response([Tensor(name, answer[name]) for name in request.names])


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class Request:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def request_id(self) -> str:
        return ""


class Error:
    INTERNAL, INVALID_ARG = "INTERNAL", "INVALID_ARGUMENT"

    def __init__(self, said: str, code: str = INTERNAL) -> None:
        self._said, self.code = said, code

    def message(self) -> str:
        return self._said


class Response:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: Error | None = None) -> None:
        self.tensors, self._error = output_tensors, error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> Error | None:
        return self._error


def tools(server: Server) -> Any:
    """Return what stands for `triton_python_backend_utils`: the names of it that the front uses, and no others."""

    def by_name(tensors: Sequence[Tensor], name: str) -> Tensor | None:
        return next((tensor for tensor in tensors if tensor.name() == name), None)

    class InferenceRequest:
        def __init__(
            self, *, model_name: str, model_version: int, requested_output_names: list[str], inputs: list[Tensor],
            preferred_memory: Any,
        ) -> None:  # fmt: skip
            assert preferred_memory == ("CPU", 0)
            self.model_name, self.model_version = model_name, model_version
            self.names, self.inputs = requested_output_names, inputs

        def exec(self) -> Response:
            return server.call(self)

    module: Any = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, Error, Response
    module.InferenceRequest = InferenceRequest
    module.TRITONSERVER_MEMORY_CPU = "CPU"
    module.is_model_ready = lambda model_name, model_version: server.is_ready(model_name, int(model_version))
    module.PreferredMemory = lambda kind, identity: (kind, identity)
    module.get_input_tensor_by_name = lambda request, name: by_name(request.tensors, name)
    module.get_output_tensor_by_name = lambda response, name: by_name(response.tensors, name)
    return module
