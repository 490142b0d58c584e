"""Test `runtime.backends.triton_client`: a model behind Triton gives the answers of its file, over both protocols."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Grounder, open_backend
from runtime.backends import triton_client
from runtime.backends.triton_client import Address
from runtime.core.errors import DeviceError, FeatureError, ModelFileError, QueryError, ServerError
from runtime.core.sliding_windows import Windows
from runtime.evaluate import evaluate
from runtime.infer import infer
from tests import tolerances
from tests.export.conftest import TINY
from tests.processes import free_port
from tests.raising import raises, records
from tests.runtime.triton.conftest import BOTH, QUERIES, video
from tests.tritonserver import Server
from tests.tritonwire import Wire, over_grpc, over_http

PREFIXES = {"grpc": "triton://", "http": "triton+http://"}


@pytest.fixture(scope="module")
def servers(repositories: dict[str, Path]) -> dict[str, Server]:
    return {name: Server(repository) for name, repository in repositories.items()}


@pytest.fixture
def wire(servers: dict[str, Server], network: str) -> Wire:
    servers[network].broken = None
    return Wire(servers[network])


@pytest.fixture(params=["grpc", "http"])
def address(request: pytest.FixtureRequest, wire: Wire) -> Iterator[str]:
    """The address of the front, over gRPC and over HTTP."""
    with {"grpc": over_grpc, "http": over_http}[request.param](wire) as port:
        yield f"{PREFIXES[request.param]}127.0.0.1:{port}/drn"


@pytest.fixture
def here(wire: Wire) -> Iterator[str]:
    """The address over gRPC."""
    with over_grpc(wire) as port:
        yield f"triton://127.0.0.1:{port}/drn"


def flat(answers: Any) -> list[list[float]]:
    return [[moment.start, moment.end, moment.score] for one in answers for moment in one]


@BOTH
def test_served_model_equals_model_file(address: str, wire: Wire, direct: Grounder) -> None:
    served = Grounder.load(address)
    assert served.manifest.vocabulary == direct.manifest.vocabulary
    pairs = [(video(30 + seed, seed), query) for query in QUERIES for seed in range(2)]
    actual, expected = served.ground_batch(pairs, 3), direct.ground_batch(pairs, 3)
    assert [len(one) for one in actual] == [len(one) for one in expected]
    np.testing.assert_allclose(flat(actual), flat(expected), atol=tolerances.BATCHED_SECONDS)
    # Each pair has another video, so there is one request per pair.
    assert [name for name, _ in wire.requests] == ["drn"] * len(pairs)


def test_queries_of_one_video_are_sent_in_one_request(here: str, wire: Wire) -> None:
    subject = video(30)
    Grounder.load(here).ground_batch([(subject, query) for query in QUERIES])
    ((_, inputs),) = wire.requests
    assert inputs["QUERY"].tolist() == [[query.encode() for query in QUERIES]]


def test_offset_video_moments_are_in_player_time(here: str, direct: Grounder) -> None:
    subject = video(30)
    late = dataclasses.replace(subject, offset=4.0)
    unshifted = direct.ground_batch([(subject, query) for query in QUERIES])
    for grounder in (Grounder.load(here), direct):
        actual = grounder.ground_batch([(late, query) for query in QUERIES])
        expected = np.array(flat(unshifted)) + np.array([4.0, 4.0, 0.0])
        np.testing.assert_allclose(flat(actual), expected, atol=tolerances.BATCHED_SECONDS)


def test_served_model_uses_requested_windows(here: str, direct: Grounder) -> None:
    long = video(300)
    served, file = Grounder.load(here), Grounder(direct.backend)
    for windows in (served.windows, None, Windows(50.0, 20.0, 5.0)):
        served.windows = file.windows = windows
        actual, expected = (one.ground_batch([(long, query) for query in QUERIES]) for one in (served, file))
        np.testing.assert_allclose(flat(actual), flat(expected), atol=tolerances.BATCHED_SECONDS)


@BOTH
def test_open_backend_uses_networks_behind_the_front(address: str, wire: Wire, direct: Grounder) -> None:
    subject = video(30)
    served = Grounder(open_backend(address))
    actual, expected = (one.ground_batch([(subject, query) for query in QUERIES]) for one in (served, direct))
    np.testing.assert_allclose(flat(actual), flat(expected), atol=tolerances.BATCHED_SECONDS)
    assert "drn" not in {name for name, _ in wire.requests}
    if served.is_pair:
        assert served.ground(served.encode(subject), "word1") == pytest.approx(served.ground(subject, "word1"))
        wire.requests.clear()
        front = Grounder.load(address)
        assert front.ground(front.encode(subject), "word1")
        assert "drn" not in {name for name, _ in wire.requests}


def test_invalid_query_is_rejected_before_sending(here: str, wire: Wire, caplog: Any) -> None:
    served = Grounder.load(here)
    with raises(QueryError, "unknown_content_words", "'zorbs'"):
        served.ground(video(9), "zorbs")
    wide = type(video(9))(np.zeros((9, TINY.feature_dim + 1), np.float32), 90, 3.0)
    with raises(FeatureError, "feature_width_mismatch", 17, 16):
        served.ground(wide, "word1")
    assert not wire.requests
    served.ground(video(9), "word1 zorbs")
    assert records(caplog, logging.WARNING, "'zorbs'")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_unreachable_server_is_named_with_default_port(protocol: str) -> None:
    port = free_port()
    with raises(ServerError, "server_unreachable", protocol, f"127.0.0.1:{port}", 8001):
        Grounder.load(f"{PREFIXES[protocol]}127.0.0.1:{port}/drn")


@pytest.mark.parametrize(("serving", "asking"), [(over_http, "triton://"), (over_grpc, "triton+http://")])
def test_port_of_other_protocol_is_unreachable(serving: Any, asking: str, wire: Wire) -> None:
    with serving(wire) as port, raises(ServerError, "server_unreachable", f"127.0.0.1:{port}"):
        Grounder.load(f"{asking}127.0.0.1:{port}/drn")


def test_missing_other_unloaded_and_failing_models_are_named(address: str, wire: Wire) -> None:
    with raises(ServerError, "missing_model", "'gone'", "drn"):
        Grounder.load(address.replace("/drn", "/gone"))
    network = next(name for name in wire.server.models if name != "drn")
    with raises(ModelFileError, "wrong_model_kind", network, "python -m export.triton"):
        Grounder.load(address.replace("/drn", f"/{network}"))
    served = Grounder.load(address)
    wire.server.broken = "no memory"
    with raises(ServerError, "server_error", "drn", 1, "no memory"):
        served.ground(video(9), "word1")
    wire.unready = "Internal: ModuleNotFoundError:\n No module named 'runtime'"
    with raises(ServerError, "model_not_loaded", "drn", "UNAVAILABLE", "No module named 'runtime'"):
        Grounder.load(address)


def test_slow_server_times_out(address: str, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_client, "TIMEOUT_SECONDS", 1.0)
    served = Grounder.load(address)
    wire.delay_s = 1.5
    with raises(ServerError, "server_timeout", "drn", 1):
        served.ground(video(9), "word1")
    with raises(ServerError, "server_timeout", 1):
        Grounder.load(address)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("triton://localhost/drn", Address("grpc", False, "localhost", 8001, "drn")),
        ("triton://localhost:9001/drn", Address("grpc", False, "localhost", 9001, "drn")),
        ("triton+grpcs://a.b-c.de/x_y.2", Address("grpc", True, "a.b-c.de", 8001, "x_y.2")),
        ("triton+http://[::1]/drn", Address("http", False, "[::1]", 8000, "drn")),
        ("triton+https://host:443/drn", Address("http", True, "host", 443, "drn")),
        (Path("triton://localhost:9001/drn"), Address("grpc", False, "localhost", 9001, "drn")),
    ],
)
def test_address_parses_protocol_host_port_and_model(text: str | Path, address: Address) -> None:
    assert Address.parse(text) == address


@pytest.mark.parametrize(
    "text", ["triton://", "triton://host", "triton://host:x/drn", "triton+ftp://h/drn", "triton:/"]
)
def test_invalid_address_is_rejected_with_expected_form(text: str) -> None:
    with raises(ModelFileError, "invalid_address", text, "triton://HOST:PORT/MODEL"):
        open_backend(text)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device": "cuda"}, {"threads": 2}])
def test_device_and_thread_options_are_rejected(options: dict[str, Any]) -> None:
    with raises(DeviceError, "inapplicable_option", "--device", "--threads"):
        Grounder.load("triton://localhost/drn", **options)


def test_missing_tritonclient_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with raises(DeviceError, "missing_library", "pip install '.[triton]'"):
        Grounder.load("triton://localhost/drn")


def test_infer_output_for_address_equals_model_file(
    here: str, graph: Path, tmp_path: Path, run_command: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "drn")
    np.save(tmp_path / "clip.npy", video(300).features)
    line = ("--features", tmp_path / "clip.npy", "--duration", 96, "--query", *QUERIES)
    for more in ((), ("--window", 0, "--top-k", 2), ("--window", 30, "--format", "srt", "--always-answer")):
        served, file = (run_command(infer, "--model", model, *line, *more) for model in (here, graph))
        assert (served.out, served.err, file.err) == (file.out, "", "")
    assert f"--model {here}" in caplog.text


def test_evaluate_of_served_model_is_equal(tiny_model: Path, mini: Path, tmp_path: Path, run_command: Any) -> None:
    from export.triton import triton

    wire = Wire(Server(triton(tiny_model, tmp_path / "repository")))
    with over_grpc(wire) as port:
        reports = []
        for model in (f"triton://127.0.0.1:{port}/drn", tiny_model):
            output = tmp_path / "report.json"
            run_command(evaluate, "--model", model, "--data", mini, "--output", output)
            reports.append(json.loads(output.read_text()))
    assert {**reports[0], "model": ""} == {**reports[1], "model": ""}
    assert reports[0]["queries"] == 5
    assert {name for name, _ in wire.requests} == {"drn_network"}


def test_served_model_reports_no_match(graph: Path, tmp_path: Path, direct: Grounder) -> None:
    import onnx

    from export.triton import triton
    from runtime.artifacts.manifest import METADATA_KEY
    from runtime.core.presence import Presence

    pairs = [(video(30 + seed, seed), query) for query in QUERIES for seed in range(2)]
    best = sorted(moments[0].score for moments in direct.ground_batch(pairs))
    presence = Presence(best[len(best) // 2], 0.5, 0.5, 1, 1)
    model = onnx.load(graph)
    about = dataclasses.replace(direct.manifest, presence=presence)
    onnx.helper.set_model_props(model, {METADATA_KEY: about.to_json()})
    onnx.save(model, tmp_path / "drn.onnx")
    with over_grpc(Wire(Server(triton(tmp_path / "drn.onnx", tmp_path / "repository")))) as port:
        served, file = Grounder.load(f"triton://127.0.0.1:{port}/drn"), Grounder.load(tmp_path / "drn.onnx", "cpu")
        for expected in (True, False):
            actual, known = (one.ground_batch(pairs, presence=expected) for one in (served, file))
            assert [len(one) for one in actual] == [len(one) for one in known]
            assert (0 in [len(one) for one in actual]) == expected
