"""Connect to a model on a Triton server, whose address replaces the path of a model file."""

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
from runtime.core.errors import DeviceError, ModelFileError, ServerError, excerpt, importing
from runtime.core.moments import Moment
from runtime.core.sliding_windows import Windows
from runtime.core.video import Video

TIMEOUT_SECONDS = 60.0
INDEX_FIELDS = ("name", "state", "reason")
# Default ports of Triton.
PORTS = {"grpc": 8001, "http": 8000}
# An address that a command has converted to a path has one slash instead of two.
ADDRESS = re.compile(
    r"triton(?:\+(?P<protocol>grpc|http)(?P<secure>s?))?://?(?P<host>[^/:\[\]]+|\[[0-9a-fA-F:.]+\])"
    r"(?::(?P<port>[0-9]{1,5}))?/(?P<model>[A-Za-z0-9][\w.-]*)"
)


@dataclasses.dataclass(frozen=True)
class Address:
    """The address of a served model.

    Attributes:
        secure: whether TLS is used and the certificate is verified.
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
        """Parse `triton://host:port/model`, or an address with `triton+http`, `triton+https` or `triton+grpcs`.

        Raises:
            ModelFileError: the address is invalid.
        """
        match = ADDRESS.fullmatch(os.fspath(text))
        if match is None:
            raise ModelFileError(
                f"Expected triton://HOST:PORT/MODEL (or triton+http, triton+https, triton+grpcs), got "
                f"{os.fspath(text)}. Correct the address.",
                code="invalid_address",
            )
        protocol = match["protocol"] or "grpc"
        port = int(match["port"] or PORTS[protocol])
        return cls(protocol, bool(match["secure"]), match["host"], port, match["model"])


class Connection:
    """A connection to a Triton server; DeviceError if `tritonclient` is not installed."""

    def __init__(self, address: Address) -> None:
        self.address = address
        with importing("tritonclient", "triton"):
            self._library = importlib.import_module(f"tritonclient.{address.protocol}")
            self._utils = importlib.import_module("tritonclient.utils")
        self._options: dict[str, Any] = {}
        if address.protocol == "grpc":
            self._client = self._library.InferenceServerClient(str(address), ssl=address.secure)
            self._options["client_timeout"] = TIMEOUT_SECONDS
        else:
            limits = dict.fromkeys(("connection_timeout", "network_timeout"), TIMEOUT_SECONDS)
            context = {}
            if address.secure:
                # The default context of tritonclient accepts any certificate.
                context["ssl_context_factory"] = importlib.import_module("gevent.ssl").create_default_context
            self._client = self._library.InferenceServerClient(str(address), ssl=address.secure, **limits, **context)

    def about(self) -> FrontConfig:
        """Return the configuration that the front model publishes.

        Raises:
            ServerError: the server cannot be reached, or has not loaded the model.
            ModelFileError: the model is no front model of this toolkit.
        """
        name = self.address.model
        with self._translate_errors("list its models"):
            ready = self._client.is_model_ready(name, **self._options)
            index = None if ready else self._client.get_model_repository_index(**self._options)
        if index is not None:
            raise self._not_ready(name, index)
        json = {"as_json": True} if self.address.protocol == "grpc" else {}
        with self._translate_errors(f"describe {name}"):
            config = self._client.get_model_config(name, **json, **self._options)
        parameters = config.get("config", config).get("parameters", {})
        if PARAMETER not in parameters:
            raise ModelFileError(
                f"{name} at {self.address} is no front model. Give the name of one that `python -m export.triton` "
                "wrote.",
                code="wrong_model_kind",
            )
        return FrontConfig.from_json(parameters[PARAMETER]["string_value"], f"{name} at {self.address}")

    def call(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Run a model of the server; see `runtime.backends.triton_backend.Call`."""
        tensors = []
        for name, value in inputs.items():
            array = np.ascontiguousarray(value)
            tensors.append(self._library.InferInput(name, array.shape, self._utils.np_to_triton_dtype(array.dtype)))
            tensors[-1].set_data_from_numpy(array)
        requested = [self._library.InferRequestedOutput(name) for name in outputs]
        with self._translate_errors(f"run {model}"):
            response = self._client.infer(model, tensors, outputs=requested, **self._options)
        return [response.as_numpy(name) for name in outputs]

    def _not_ready(self, name: str, index: Any) -> ServerError:
        """Return the error for a model that is missing or not loaded, from the repository index of either protocol."""
        entries = [
            {
                field: entry.get(field, "") if isinstance(entry, dict) else getattr(entry, field)
                for field in INDEX_FIELDS
            }
            for entry in (index if isinstance(index, list) else index.models)
        ]
        versions = [entry for entry in entries if entry["name"] == name]
        if not versions:
            names = ", ".join(sorted({entry["name"] for entry in entries})) or "none"
            return ServerError(
                f"The Triton server at {self.address} has no model {excerpt(name)}. Give one of its models: {names}.",
                code="missing_model",
            )
        state, reason = versions[-1]["state"], " ".join(versions[-1]["reason"].split()).rstrip(".")
        return ServerError(
            f"{name} at {self.address} is not loaded ({state or 'UNKNOWN'}): {reason or 'no reason is given'}. See the "
            "log of the server.",
            code="model_not_loaded",
        )

    @contextlib.contextmanager
    def _translate_errors(self, action: str) -> Iterator[None]:
        """Raise ServerError for the errors of tritonclient and the network in the block."""
        try:
            yield
        except self._utils.InferenceServerException as error:
            status, message = str(error.status()), " ".join(str(error.message()).split()).rstrip(".")
            if status == "StatusCode.DEADLINE_EXCEEDED":
                raise self._timeout(action) from error
            if status == "StatusCode.UNAVAILABLE":
                raise self._unreachable(message) from error
            raise ServerError(
                f"The Triton server at {self.address} did not {action}: {message}. See the log of the server."
            ) from error
        except TimeoutError as error:
            raise self._timeout(action) from error
        # HTTPException: the response is not HTTP.
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(str(error)) from error

    def _timeout(self, action: str) -> ServerError:
        return ServerError(
            f"The Triton server at {self.address} did not {action} within {TIMEOUT_SECONDS:g} s. See the log of the "
            "server.",
            code="server_timeout",
        )

    def _unreachable(self, message: str) -> ServerError:
        return ServerError(
            f"No Triton server answers {self.address.protocol} at {self.address} ({message.rstrip('.')}). Start the "
            f"server, or check host and port (usually {PORTS['grpc']} for triton://, {PORTS['http']} for triton+http://).",
            code="server_unreachable",
        )


class ServedModel:
    """The Triton front of a model, which grounds complete queries, so that only features and moments are sent."""

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
        """Yield at most `top_k` moments of each query in seconds, best first.

        Args:
            windows: how the video is split; "model" for the windows of the model, None for one window.
            always: whether moments below the model's presence threshold are returned too.

        Raises:
            ServerError: the server cannot be reached, or fails.
        """
        inputs = {
            triton_protocol.QUERY: np.array([[query.encode() for query in queries]], np.object_),
            triton_protocol.FEATURES: video.features[None].astype(np.float32, copy=False),
            triton_protocol.DURATION: np.array([[video.duration]], np.float64),
            triton_protocol.NUM_FRAMES: np.array([[video.num_frames]], np.int32),
            triton_protocol.TOP_K: np.array([[top_k]], np.int32),
            triton_protocol.ALWAYS_ANSWER: np.array([[always]]),
        }
        if windows != "model":
            sizes = dataclasses.astuple(windows) if windows else triton_protocol.NO_WINDOWS
            inputs[triton_protocol.WINDOWS] = np.array([sizes], np.float64)
        outputs = (triton_protocol.MOMENTS, triton_protocol.COUNT)
        moments, counts = self._connection.call(self._connection.address.model, inputs, outputs)
        for rows, count in zip(moments[0], counts[0]):
            # The front model returns seconds from the first frame.
            yield [
                Moment(video.offset + float(start), video.offset + float(end), float(score))
                for start, end, score in rows[:count]
            ]


def connect(
    address: str | os.PathLike[str], device: Device = "auto", threads: int | None = None
) -> tuple[TritonBackend | TritonPair, ServedModel]:
    """Connect to a front model on a Triton server.

    Args:
        device, threads: must be `auto` and None, because the server decides.

    Returns:
        A backend for the networks behind the front model, and the front model.

    Raises:
        ModelFileError: the address is invalid, or the model is no front model of this toolkit.
        ServerError: the server cannot be reached, or has not loaded the model.
        DeviceError: a device or threads were given, or tritonclient is not installed.
    """
    parsed = Address.parse(address)
    if device != "auto" or threads is not None:
        raise DeviceError(
            f"--device and --threads do not apply to a model on the server {parsed}. Remove both; `python -m "
            "export.triton` has these options.",
            code="inapplicable_option",
        )
    connection = Connection(parsed)
    return open_networks(connection.about(), connection.call), ServedModel(connection)
