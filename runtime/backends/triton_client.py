"""A model behind Triton, asked from here: the address of a front takes the place of a model file."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np

from runtime.backends import Device
from runtime.backends.triton_backend import PARAMETER, About, TritonBackend, TritonPair, open_networks
from runtime.core.errors import DeviceError, ModelFileError, ServerError, excerpt
from runtime.core.moments import Moment
from runtime.core.video import Video
from runtime.grounding.grounder import BATCH_SIZE, Grounder, Subject, check_asked
from runtime.triton import front

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
    """Where a model is served.

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
        found = ADDRESS.fullmatch(os.fspath(text))
        if found is None:
            raise ModelFileError(
                f"{os.fspath(text)} should be triton://HOST:PORT/MODEL (gRPC), or begin with triton+http://, "
                "triton+https:// or triton+grpcs://; check the address."
            )
        protocol = found["protocol"] or "grpc"
        port = int(found["port"] or PORTS[protocol])
        return cls(protocol, bool(found["secure"]), found["host"], port, found["model"])


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
                "run `pip install 'drn-deploy[triton]'`."
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

    def about(self) -> About:
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
            raise ServerError(self._not_ready(name, [_fields(entry) for entry in _entries(known)]))
        json = {"as_json": True} if self.address.protocol == "grpc" else {}
        with self._explained(f"describe {name}"):
            config = self._client.get_model_config(name, **json, **self._options)
        parameters = config.get("config", config).get("parameters", {})
        if PARAMETER not in parameters:
            raise ModelFileError(
                f"{name} at {self.address} is no front that `python -m export.triton` wrote; give the name of one."
            )
        return About.from_json(parameters[PARAMETER]["string_value"], f"{name} at {self.address}")

    def call(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Run a model of the server; ServerError if it cannot be reached or refuses."""
        tensors = []
        for name, value in inputs.items():
            array = np.ascontiguousarray(value)
            tensors.append(self._library.InferInput(name, array.shape, self._utils.np_to_triton_dtype(array.dtype)))
            tensors[-1].set_data_from_numpy(array)
        wanted = [self._library.InferRequestedOutput(name) for name in outputs]
        with self._explained(f"answer as {model}"):
            answer = self._client.infer(model, tensors, outputs=wanted, **self._options)
        return [answer.as_numpy(name) for name in outputs]

    def _not_ready(self, name: str, known: Sequence[Mapping[str, str]]) -> str:
        """Say why a model does not answer, from what the server has."""
        ours = [entry for entry in known if entry["name"] == name]
        if not ours:
            names = ", ".join(sorted({entry["name"] for entry in known})) or "none"
            return f"The Triton server at {self.address} has no model {excerpt(name)}; it has {names}."
        why = " ".join(ours[-1]["reason"].split()).rstrip(".") or "it does not say why"
        return (
            f"{name} at {self.address} is not loaded ({ours[-1]['state'] or 'UNKNOWN'}): {why}; see the server's log."
        )

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except self._utils.InferenceServerException as error:
            status, said = str(error.status()), " ".join(str(error.message()).split()).rstrip(".")
            if status == "StatusCode.DEADLINE_EXCEEDED":
                raise ServerError(self._too_long(doing)) from error
            if status == "StatusCode.UNAVAILABLE":
                raise ServerError(self._unreachable(said)) from error
            raise ServerError(f"The Triton server at {self.address} did not {doing}: {said}.") from error
        except TimeoutError as error:
            raise ServerError(self._too_long(doing)) from error
        # The second is what an answer is that is not HTTP.
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(self._unreachable(str(error))) from error

    def _too_long(self, doing: str) -> str:
        return (
            f"The Triton server at {self.address} did not {doing} within {TIMEOUT_SECONDS:g} s; see the server's log."
        )

    def _unreachable(self, said: str) -> str:
        return (
            f"No Triton server answers {self.address.protocol} at {self.address} ({said.rstrip('.')}); start it, or "
            f"check host and port (usually {PORTS['grpc']} for triton://, {PORTS['http']} for triton+http://)."
        )


class ServedGrounder(Grounder):
    """A model behind Triton: sentences are asked of its front, and tensors of the networks behind that."""

    def __init__(self, connection: Connection) -> None:
        about = connection.about()
        super().__init__(open_networks(about, connection.call))
        self._connection = connection

    def ground_batch(
        self,
        pairs: Sequence[tuple[Subject, str]],
        top_k: int = 5,
        batch_size: int = BATCH_SIZE,
        *,
        presence: bool = True,
    ) -> list[list[Moment]]:
        """Answer as a model file does, with one request for each video; see `Grounder.ground_batch`.

        Raises:
            ServerError: the server cannot be reached, or fails.
        """
        check_asked(pairs, top_k, batch_size)
        if not all(isinstance(video, Video) for video, _ in pairs):
            # The front accepts features, and no encodings.
            return super().ground_batch(pairs, top_k, batch_size, presence=presence)
        for query in dict.fromkeys(query for _, query in pairs):
            # Refused, and warned of, here as there.
            self.encode_query(query)
        videos = {id(video): cast(Video, video) for video, _ in pairs}
        for video in videos.values():
            self.check_fits(video)
        answers: list[list[Moment]] = [[] for _ in pairs]
        for key, video in videos.items():
            places = [index for index, (asked, _) in enumerate(pairs) if id(asked) == key]
            found = self._ask_front(video, [pairs[index][1] for index in places], top_k, not presence)
            for index, moments in zip(places, found):
                answers[index] = moments
        return answers

    def _ask_front(self, video: Video, queries: Sequence[str], top_k: int, always: bool) -> Iterator[list[Moment]]:
        inputs = {
            front.QUERY: np.array([[query.encode() for query in queries]], np.object_),
            front.FEATURES: video.features[None].astype(np.float32, copy=False),
            front.DURATION: np.array([[video.duration]], np.float64),
            front.NUM_FRAMES: np.array([[video.num_frames]], np.int32),
            front.TOP_K: np.array([[top_k]], np.int32),
            front.ALWAYS_ANSWER: np.array([[always]]),
        }
        if self.windows != self.manifest.windows:
            sizes = dataclasses.astuple(self.windows) if self.windows else front.WHOLE
            inputs[front.WINDOWS] = np.array([sizes], np.float64)
        model = self._connection.address.model
        found, counts = self._connection.call(model, inputs, (front.MOMENTS, front.COUNT))
        for rows, count in zip(found[0], counts[0]):
            # The front counts from the first picture.
            yield [
                Moment(video.offset + float(start), video.offset + float(end), float(score))
                for start, end, score in rows[:count]
            ]


def connect(address: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> ServedGrounder:
    """Return the model at an address.

    Raises:
        ModelFileError: it is no address, or what is there is no front of this toolkit.
        ServerError: no server answers, or it has no such model, or has not loaded it.
        DeviceError: a device or threads were asked for, which the server decides; or tritonclient is not installed.
    """
    parsed = Address.parse(address)
    if device != "auto" or threads is not None:
        raise DeviceError(
            f"The server at {parsed} decides on what its networks run; leave --device and --threads out, and pass them "
            "to `python -m export.triton`."
        )
    return ServedGrounder(Connection(parsed))


def open_served(
    address: str | os.PathLike[str], device: Device = "auto", threads: int | None = None
) -> TritonBackend | TritonPair:
    """Return the networks behind the front at an address; see `connect`."""
    return cast("TritonBackend | TritonPair", connect(address, device, threads).backend)


def _entries(index: Any) -> Sequence[Any]:
    return index if isinstance(index, list) else index.models


def _fields(entry: Any) -> dict[str, str]:
    """Return name, state and reason of a model in the server's index, over either protocol."""
    if isinstance(entry, dict):
        return {name: entry.get(name, "") for name in ("name", "state", "reason")}
    return {name: getattr(entry, name) for name in ("name", "state", "reason")}
