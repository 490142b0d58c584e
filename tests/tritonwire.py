"""The stand-in for Triton on a port of this machine: as much of the KServe protocol as clients use."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.server
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

from tests.tritonserver import Refused, Server


class Wire:
    """What both protocols do with a server.

    Attributes:
        unready: why no model is ready, if none is.
        delay_s: how long an answer takes.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.unready = ""
        self.delay_s = 0.0
        self.requests: list[tuple[str, Mapping[str, np.ndarray]]] = []

    def ready(self, name: str) -> bool:
        time.sleep(self.delay_s)
        return name in self.server.models and not self.unready

    def index(self) -> list[dict[str, str]]:
        state = {"state": "UNAVAILABLE", "reason": self.unready} if self.unready else {"state": "READY", "reason": ""}
        return [{"name": name, "version": "1", **state} for name in self.server.models]

    def infer(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self.delay_s)
        self.requests.append((name, inputs))
        return self.server.infer(name, inputs)


def array_of(raw: bytes, kind: str, shape: list[int]) -> np.ndarray:
    flat = deserialize_bytes_tensor(raw) if kind == "BYTES" else np.frombuffer(raw, triton_to_np_dtype(kind))
    return flat.reshape(shape)


def raw_of(array: np.ndarray) -> bytes:
    return serialize_byte_tensor(array) if array.dtype == np.object_ else array.tobytes()


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.wire.ready(request.name))

    def RepositoryIndex(self, request: Any, context: Any) -> Any:
        models = [service_pb2.RepositoryIndexResponse.ModelIndex(**entry) for entry in self.wire.index()]
        return service_pb2.RepositoryIndexResponse(models=models)

    def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self.wire.server.model(request.name).config)

    def ModelInfer(self, request: Any, context: Any) -> Any:
        inputs = {
            value.name: array_of(raw, value.datatype, list(value.shape))
            for value, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        try:
            outputs = self.wire.infer(request.model_name, inputs)
        except Refused as refused:
            context.abort(getattr(grpc.StatusCode, refused.status), str(refused))
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        for output in request.outputs:
            array = outputs[output.name]
            response.outputs.add(name=output.name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            response.raw_output_contents.append(raw_of(array))
        return response


@contextlib.contextmanager
def over_grpc(wire: Wire) -> Iterator[int]:
    """Serve over gRPC, and yield the port."""
    options = [("grpc.max_receive_message_length", -1)]
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), options=options)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(wire), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


@contextlib.contextmanager
def over_http(wire: Wire) -> Iterator[int]:
    """Serve over HTTP, and yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None: ...

        def do_GET(self) -> None:
            name, what = self.path.split("/")[-2:]
            if what == "ready":
                self.answer(200 if wire.ready(name) else 400)
            else:
                self.answer(200, json_format.MessageToJson(wire.server.model(name).config, True).encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path.endswith("/index"):
                self.answer(200, json.dumps(wire.index()).encode())
                return
            length = int(self.headers["Inference-Header-Content-Length"])
            requests, raw = json.loads(body[:length]), body[length:]
            inputs = {}
            for value in requests["inputs"]:
                size = value["parameters"]["binary_data_size"]
                inputs[value["name"]] = array_of(raw[:size], value["datatype"], value["shape"])
                raw = raw[size:]
            try:
                results = wire.infer(self.path.split("/")[-2], inputs)
            except Refused as refused:
                self.answer(400, json.dumps({"error": str(refused)}).encode())
                return
            outputs, binary = [], b""
            for output in requests["outputs"]:
                array = results[output["name"]]
                raw = raw_of(array)
                about = {"name": output["name"], "datatype": np_to_triton_dtype(array.dtype), "shape": array.shape}
                outputs.append({**about, "parameters": {"binary_data_size": len(raw)}})
                binary += raw
            header = json.dumps({"model_name": "drn", "outputs": outputs}).encode()
            self.answer(200, header + binary, {"Inference-Header-Content-Length": str(len(header))})

        def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    class Quiet(http.server.ThreadingHTTPServer):
        # A client that gave up is no news.
        def handle_error(self, request: Any, address: Any) -> None: ...

    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
