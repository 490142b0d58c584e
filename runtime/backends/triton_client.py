"""A model behind Triton, asked from here: the address of a front takes the place of a model file."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from runtime.backends import triton_protocol
from runtime.backends.base import Device
from runtime.backends.triton_backend import PARAMETER, FrontConfig, TritonBackend, TritonPair, open_networks
from runtime.core.errors import DeviceError, ModelFileError, ServerError, excerpt
from runtime.core.moments import Moment
from runtime.core.sliding_windows import Windows
from runtime.core.video import Video

TIMEOUT_SECONDS = 60.0
# Where Triton listens by default.
PORTS = {"grpc": 8001, "http": 8000}
# A path in place of the address, which a command may have made of it, has lost one of two slashes.
ADDRESS = re.compile(
    r"triton(?:\+(?P<protocol>grpc|http)(?P<secure>s?))?://?(?P<host>[^/:\[\]]+|\[[0-9a-fA-F:.]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?/(?P<model>[A-Za-z0-9][\w.-]*)"
)


@dataclasses.dataclass(frozen=True)
class Address:
    """The address of a served model.

    Attributes:
        protocol: `grpc` or `http`.
        secure: whether through TLS, certified by an authority that this machine trusts.
        host, port: of the server.
        model: the name of the front.
    """

    protocol: str
    secure: bool
    host: str
    port: int
    model: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> Address:
        """Read `triton://host:port/model`; `triton+http://`, `triton+grpcs://` and `triton+https://` go other ways.

        Raises:
            ModelFileError: it is none.
        """
        result = ADDRESS.fullmatch(os.fspath(text))
        if result is None:
            raise ModelFileError(
                f"{os.fspath(text)} should be triton://HOST:PORT/MODEL (gRPC), or begin with triton+http://, "
                "triton+https:// or triton+grpcs://; check the address.",
                code="invalid_address",
            )
        protocol = result["protocol"] or "grpc"
        port = int(result["port"] or PORTS[protocol])
        return cls(protocol, bool(result["secure"]), result["host"], port, result["model"])


class Connection:
    """A Triton server.

    Raises:
        DeviceError: `tritonclient` is not installed.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        try:
            self._library = importlib.import_module(f"tritonclient.{address.protocol}")
            self._utils = importlib.import_module("tritonclient.utils")
        except ImportError as error:
            raise DeviceError(
                f"A model behind Triton is asked through tritonclient, which cannot be imported ({error}); "
                "run `pip install '.[triton]'` in the drn-deploy directory.",
                code="missing_library",
            ) from error
        self._options: dict[str, Any] = {}
        if address.protocol == "grpc":
            self._client = self._library.InferenceServerClient(str(address), ssl=address.secure)
            self._options["client_timeout"] = TIMEOUT_SECONDS
        else:
            limits = dict.fromkeys(("connection_timeout", "network_timeout"), TIMEOUT_SECONDS)
            context = {}
            if address.secure:
                # Without it any certificate would do.
                context["ssl_context_factory"] = importlib.import_module("gevent.ssl").create_default_context
            self._client = self._library.InferenceServerClient(str(address), ssl=address.secure, **limits, **context)

    def about(self) -> FrontConfig:
        """Return what the front publishes for clients.

        Raises:
            ServerError: no server answers, or it has no such model, or has not loaded it.
            ModelFileError: the model is not a front of this toolkit.
        """
        name = self.address.model
        with self._explained("list its models"):
            ready = self._client.is_model_ready(name, **self._options)
            known = None if ready else self._client.get_model_repository_index(**self._options)
        if known is not None:
            raise self._not_ready(name, [_fields(entry) for entry in _entries(known)])
        json = {"as_json": True} if self.address.protocol == "grpc" else {}
        with self._explained(f"describe {name}"):
            config = self._client.get_model_config(name, **json, **self._options)
        parameters = config.get("config", config).get("parameters", {})
        if PARAMETER not in parameters:
            raise ModelFileError(
                f"{name} at {self.address} is no front that `python -m export.triton` wrote; give the name of one.",
                code="wrong_model_kind",
            )
        return FrontConfig.from_json(parameters[PARAMETER]["string_value"], f"{name} at {self.address}")

    def call(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Run a model of the server; ServerError if it cannot be reached or refuses."""
        tensors = []
        for name, value in inputs.items():
            array = np.ascontiguousarray(value)
            tensors.append(self._library.InferInput(name, array.shape, self._utils.np_to_triton_dtype(array.dtype)))
            tensors[-1].set_data_from_numpy(array)
        expected = [self._library.InferRequestedOutput(name) for name in outputs]
        with self._explained(f"answer as {model}"):
            answer = self._client.infer(model, tensors, outputs=expected, **self._options)
        return [answer.as_numpy(name) for name in outputs]

    def _not_ready(self, name: str, known: Sequence[Mapping[str, str]]) -> ServerError:
        """Return the error that says why a model does not answer, from what the server has."""
        ours = [entry for entry in known if entry["name"] == name]
        if not ours:
            names = ", ".join(sorted({entry["name"] for entry in known})) or "none"
            return ServerError(
                f"The Triton server at {self.address} has no model {excerpt(name)}; it has {names}.",
                code="missing_model",
            )
        why = " ".join(ours[-1]["reason"].split()).rstrip(".") or "it does not say why"
        return ServerError(
            f"{name} at {self.address} is not loaded ({ours[-1]['state'] or 'UNKNOWN'}): {why}; see the server's log.",
            code="model_not_loaded",
        )

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self._utils.InferenceServerException as error:
            status, said = str(error.status()), " ".join(str(error.message()).split()).rstrip(".")
            if status == "StatusCode.DEADLINE_EXCEEDED":
                raise ServerError(self._too_long(doing), code="server_timeout") from error
            if status == "StatusCode.UNAVAILABLE":
                raise ServerError(self._unreachable(said), code="server_unreachable") from error
            raise ServerError(f"The Triton server at {self.address} did not {doing}: {said}.") from error
        except TimeoutError as error:
            raise ServerError(self._too_long(doing), code="server_timeout") from error
        # The second is what an answer is that is not HTTP.
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(self._unreachable(str(error)), code="server_unreachable") from error

    def _too_long(self, doing: str) -> str:
        return (
            f"The Triton server at {self.address} did not {doing} within {TIMEOUT_SECONDS:g} s; see the server's log."
        )

    def _unreachable(self, said: str) -> str:
        return (
            f"No Triton server answers {self.address.protocol} at {self.address} ({said.rstrip('.')}); start it, or "
            f"check host and port (usually {PORTS['grpc']} for triton://, {PORTS['http']} for triton+http://)."
        )


class ServedModel:
    """The Triton front of a model, which answers whole queries; see `runtime.backends.base.QueryServer`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ground(
        self,
        video: Video,
        queries: Sequence[str],
        top_k: int,
        *,
        windows: Windows | Literal["model"] | None,
        always: bool,
    ) -> Iterator[list[Moment]]:
        """Yield the moments of each query, best first; ServerError if the server cannot be reached, or fails."""
        inputs = {
            triton_protocol.QUERY: np.array([[query.encode() for query in queries]], np.object_),
            triton_protocol.FEATURES: video.features[None].astype(np.float32, copy=False),
            triton_protocol.DURATION: np.array([[video.duration]], np.float64),
            triton_protocol.NUM_FRAMES: np.array([[video.num_frames]], np.int32),
            triton_protocol.TOP_K: np.array([[top_k]], np.int32),
            triton_protocol.ALWAYS_ANSWER: np.array([[always]]),
        }
        if windows != "model":
            sizes = dataclasses.astuple(windows) if windows else triton_protocol.WHOLE
            inputs[triton_protocol.WINDOWS] = np.array([sizes], np.float64)
        outputs = (triton_protocol.MOMENTS, triton_protocol.COUNT)
        moments, counts = self._connection.call(self._connection.address.model, inputs, outputs)
        for rows, count in zip(moments[0], counts[0]):
            # The front counts from the first picture.
            yield [
                Moment(video.offset + float(start), video.offset + float(end), float(score))
                for start, end, score in rows[:count]
            ]


def connect(
    address: str | os.PathLike[str], device: Device = "auto", threads: int | None = None
) -> tuple[TritonBackend | TritonPair, ServedModel]:
    """Return the networks behind the front at an address, and the front itself.

    Raises:
        ModelFileError: it is no address, or what is there is no front of this toolkit.
        ServerError: no server answers, or it has no such model, or has not loaded it.
        DeviceError: a device or threads were asked for, which the server decides; or tritonclient is not installed.
    """
    parsed = Address.parse(address)
    if device != "auto" or threads is not None:
        raise DeviceError(
            f"The server at {parsed} decides on what its networks run; leave --device and --threads out, and pass them "
            "to `python -m export.triton`.",
            code="inapplicable_option",
        )
    connection = Connection(parsed)
    return open_networks(connection.about(), connection.call), ServedModel(connection)


def _entries(index: Any) -> Sequence[Any]:
    return index if isinstance(index, list) else index.models


def _fields(entry: Any) -> dict[str, str]:
    """Return name, state and reason of a model in the server's index, over either protocol."""
    if isinstance(entry, dict):
        return {name: entry.get(name, "") for name in ("name", "state", "reason")}
    return {name: getattr(entry, name) for name in ("name", "state", "reason")}
