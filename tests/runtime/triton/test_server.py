"""A real Triton serves what `export.triton` wrote, as it is.

The server is the one inside nvidia-pytriton, Triton 2.51 with its Python backend for a CPU; `make pytriton` brings it.
It has no backend for ONNX files, so that a Python-based backend of that name stands in for it, with ONNX Runtime; the
front, the calls from it, batching, versions and both protocols are the server's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as tritonclient

from export.triton import triton
from runtime import Grounder
from runtime.backends.triton_client import Address, Connection
from runtime.core.errors import GroundingError
from tests import tolerances
from tests.processes import free_port
from tests.raising import quotes, raises
from tests.runtime.triton.conftest import BOTH, QUERIES, video

ROOT = Path(__file__).parents[3]
PLACE = Path(os.environ.get("DRN_PYTRITON", ROOT / ".venv" / "pytriton"))
BACKEND = """
import json
from pathlib import Path
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        place = Path(args["model_repository"], args["model_version"], config["default_model_filename"])
        self.session = onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])
        self.inputs = {value["name"]: "reshape" in value for value in config["input"]}
        self.outputs = [value["name"] for value in config["output"]]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        feed = {name: value.reshape(len(value)) if self.inputs[name] else value for name, value in feed.items()}
        found = self.session.run(self.outputs, feed)
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(self.outputs, found)])
"""


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's backends, with one for ONNX files, and the runtime where they find it; skips without a server."""
    packages = next(iter(PLACE.glob("lib/python*/site-packages/pytriton/tritonserver")), None)
    if packages is None:
        pytest.skip(f"there is no Triton server at {PLACE}; bring it with `make pytriton`, or set DRN_PYTRITON")
    version = packages.parents[2].name.removeprefix("python")
    directory = tmp_path_factory.mktemp("triton") / "backends"
    shutil.copytree(packages / "backends", directory)
    stub = packages / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, directory / "python")
    (directory / "python" / "runtime").symlink_to(ROOT / "runtime")
    (directory / "onnxruntime").mkdir()
    (directory / "onnxruntime" / "model.py").write_text(BACKEND)
    return directory


@contextlib.contextmanager
def served(repository: Path, backends: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Start the server on a repository, and yield its ports for gRPC and HTTP once it is ready."""
    (packages,) = PLACE.glob("lib/python*/site-packages")
    ports = [free_port() for _ in range(2)]
    words = [
        str(packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        f"--grpc-port={ports[0]}",
        f"--http-port={ports[1]}",
        "--grpc-address=127.0.0.1",
        "--http-address=127.0.0.1",
        "--allow-metrics=false",
        *options,
    ]
    # Triton's Python uses the packages of the first python3 in PATH.
    environment = {
        "PATH": f"{PLACE / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "OMP_NUM_THREADS": "1",
        "HOME": str(backends.parent),
    }
    log = backends.parent / f"{repository.parent.name}.log"
    with log.open("w") as stream:
        server = subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            client = tritonclient.InferenceServerClient(f"127.0.0.1:{ports[0]}")
            for _ in range(600):
                with contextlib.suppress(Exception):
                    if client.is_server_ready() and client.is_model_ready("drn"):
                        break
                assert server.poll() is None, log.read_text()[-4000:]
                time.sleep(0.1)
            else:
                pytest.fail(f"the server did not become ready: {log.read_text()[-4000:]}")
            yield ports[0], ports[1]
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def flat(answers: Any) -> np.ndarray:
    return np.array([(moment.start, moment.end, moment.score) for one in answers for moment in one])


@BOTH
def test_grpc_and_http_answers_equal_model_file(repository: Path, backends: Path, direct: Grounder) -> None:
    pairs = [(video(30 + 7 * seed, seed), query) for query in QUERIES for seed in range(3)]
    pairs += [(video(300), query) for query in QUERIES]
    expected = direct.ground_batch(pairs)
    with served(repository, backends) as (grpc_port, http_port):
        for address in (f"triton://127.0.0.1:{grpc_port}/drn", f"triton+http://127.0.0.1:{http_port}/drn"):
            model = Grounder.load(address)
            actual = model.ground_batch(pairs)
            assert [len(one) for one in actual] == [len(one) for one in expected]
            np.testing.assert_allclose(flat(actual), flat(expected), atol=tolerances.BATCHED_SECONDS)
            complete = Grounder(model.backend).ground_batch(pairs[:4])
            np.testing.assert_allclose(flat(complete), flat(expected[:4]), atol=tolerances.BATCHED_SECONDS)
            with raises(GroundingError, "missing_model", "'gone'", "drn"):
                Grounder.load(address.replace("/drn", "/gone"))
        subject, query = pairs[0]
        plain = {
            "QUERY": ("BYTES", [[query]]),
            "FEATURES": ("FP32", [subject.features.tolist()]),
            "DURATION": ("FP64", [[subject.duration]]),
            "NUM_FRAMES": ("INT32", [[subject.num_frames]]),
        }
        inputs = [
            {"name": name, "datatype": kind, "shape": np.shape(data), "data": data}
            for name, (kind, data) in plain.items()
        ]
        url = f"http://127.0.0.1:{http_port}/v2/models/drn/infer"
        with urllib.request.urlopen(url, json.dumps({"inputs": inputs}).encode()) as answer:
            outputs = {value["name"]: value for value in json.load(answer)["outputs"]}
        actual = np.reshape(outputs["MOMENTS"]["data"], outputs["MOMENTS"]["shape"])[
            0, 0, : outputs["COUNT"]["data"][0]
        ]
        np.testing.assert_allclose(actual, flat(expected[:1]), atol=tolerances.BATCHED_SECONDS)


def test_mixed_shapes_are_batched_bad_one_fails(graph: Path, backends: Path, tmp_path: Path, direct: Grounder) -> None:
    # The delay lets all requests arrive before the first response.
    repository = triton(graph, tmp_path / "repository", instances=1, wait_ms=1000)
    subjects = [video(20 + seed, seed) for seed in range(6)]
    actual: dict[int, Any] = {}
    with served(repository, backends) as (port, _):

        def ask(index: int) -> None:
            model = Grounder.load(f"triton://127.0.0.1:{port}/drn")
            try:
                # Words that are unknown to the server only, as another client could send.
                if index == 5:
                    model.manifest.vocabulary.words["zorb"] = 1
                queries = ["zorb"] if index == 5 else QUERIES[: 1 + index % 3]
                actual[index] = model.ground_batch([(subjects[index], query) for query in queries])
            except GroundingError as error:
                actual[index] = str(error)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statistics = tritonclient.InferenceServerClient(f"127.0.0.1:{port}").get_inference_statistics("drn")
    assert quotes(actual.pop(5), "'zorb'")
    for index, answers in actual.items():
        expected = direct.ground_batch([(subjects[index], query) for query in QUERIES[: 1 + index % 3]])
        np.testing.assert_allclose(flat(answers), flat(expected), atol=tolerances.BATCHED_SECONDS)
    (front,) = statistics.model_stats
    assert front.execution_count < 6


def test_new_model_version_loses_no_requests(graph: Path, backends: Path, tmp_path: Path, direct: Grounder) -> None:
    repository = triton(graph, tmp_path / "repository", instances=1, wait_ms=0)
    subject = video(30)
    with served(repository, backends, "--model-control-mode=poll", "--repository-poll-secs=1") as (port, _):
        client = tritonclient.InferenceServerClient(f"127.0.0.1:{port}")
        model = Grounder.load(f"triton://127.0.0.1:{port}/drn")
        expected = direct.ground(subject, QUERIES[0])
        triton(graph, repository)
        answered = 0
        ready = False
        for _ in range(600):
            assert flat([model.ground(subject, QUERIES[0])]) == pytest.approx(flat([expected]), abs=1e-4)
            answered += 1
            if ready:
                break
            ready = client.is_model_ready("drn", "2")
            time.sleep(0.05)
        assert ready
        assert answered > 2
        assert Connection(Address.parse(f"triton://127.0.0.1:{port}/drn")).about().network == "drn_network"
