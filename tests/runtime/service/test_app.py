"""Test `runtime.service.app`: requests and responses of the HTTP API."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pytest

from runtime.core.io.digests import sha256
from runtime.core.moments import Moment
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from runtime.datasets.dataset import DataSet
from runtime.grounding.formatting import Answer, format_answers
from runtime.grounding.grounder import Grounder
from runtime.infer import infer
from runtime.service.service import has_encoder, unknown_words
from runtime.service.video_cache import VideoCatalog
from tests.array_bytes import npy
from tests.runtime.service.conftest import QUESTION, Running, alike


def test_service_answer_equals_infer_output(service: Running, model: Path, planted: Path) -> None:
    name = DataSet(planted).annotations("test")[0].video
    sentences = ("person opens the door", "person closes the door")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        infer(model, sentences, data=planted, video=name, format="json", top_k=3, threads=1)
    reply = service.ask({"video": name, "query": list(sentences), "top_k": 3})
    assert reply.status == 200
    assert alike(reply.json, json.loads(printed.getvalue()))
    assert [len(answer["moments"]) for answer in reply.json] == [3, 3]
    one, many = (service.ask({"video": name, "query": query}) for query in (sentences[0], sentences[:1]))
    assert one.status == many.status == 200
    assert one.body == many.body


def test_long_video_is_grounded_in_windows(
    start: Callable[..., Running], model: Path, planted: Path, tmp_path: Path, offline: Grounder
) -> None:
    words = ("--model", model, "--data", planted, "--uploads", tmp_path, "--window", 6, "--overlap", 2)
    cutting = start(*words)
    data = DataSet(planted)
    annotation = data.annotations("test")[0]
    grounder = Grounder(offline.backend)
    grounder.windows = Windows(6, 6, 2)
    video = data.video(annotation.video)
    assert len(grounder.cut(video)) > 1
    expected = [vars(moment) for moment in grounder.ground(video, annotation.sentence)]
    actual = cutting.ask({"video": annotation.video, "query": annotation.sentence}).json
    assert alike(actual[0]["moments"], expected)
    # Features with a clip timing that gives thousands of windows must not block the model.
    cutting.send(
        "/v1/ground", features=("x", npy(np.eye(2000, 32, dtype=np.float32))), duration=16000, query=annotation.sentence
    ).refused(422, "windows")


def test_head_request_returns_headers_without_body(service: Running) -> None:
    # Every response has its own time and ID.
    own = {"date": "", "x-request-id": ""}
    for path in ("/", "/docs", "/page/style.css", "/healthz"):
        complete, head = service.get(path), service.request("HEAD", path)
        assert (head.status, head.body) == (complete.status, b"")
        assert {**head.headers, **own} == {**complete.headers, **own}


def test_page_files_are_cached_by_etag(service: Running) -> None:
    for path in ("/", "/page/main.js", "/page/style.css", "/page/icon.svg"):
        first = service.get(path)
        assert first.status == 200
        again = service.get(path, **{"If-None-Match": first.headers["etag"]})
        assert (again.status, again.body) == (304, b"")


def test_video_list_is_paginated(service: Running, planted: Path) -> None:
    names = sorted(DataSet(planted).durations)
    actual, offset = [], 0
    while page := service.get(f"/v1/videos?offset={offset}&limit=10").json["videos"]:
        actual += page
        offset += 10
    assert [video["id"] for video in actual] == names
    assert actual[3] == service.get(f"/v1/videos/{names[3]}").json
    assert actual[3]["duration"] == DataSet(planted).durations[names[3]]
    some = service.get("/v1/videos?contains=sim0000&limit=3").json
    assert some["total"] == sum("SIM0000" in name for name in names)
    assert len(some["videos"]) == 3


def test_health_and_model_routes_describe_the_model(service: Running, model: Path, offline: Grounder) -> None:
    reply = service.get("/healthz")
    assert reply.status == 200
    assert reply.json == {"status": "ready", "model": "drn.onnx", "digest": sha256(model)}
    assert service.get("/v1/model").json == {
        "model": "drn.onnx",
        "digest": sha256(model),
        "precision": "fp32",
        "words": len(offline.manifest.vocabulary),
        "no_match_threshold": None,
        "accepts_videos": True,
        "writes_clips": has_encoder(),
    }


def test_words_route_completes_known_words(service: Running, offline: Grounder) -> None:
    known = sorted(word for word in offline.manifest.vocabulary.words if word.startswith("open"))
    assert len(known) >= 2
    assert service.get("/v1/words?prefix=OPEN").json == {"total": len(known), "words": known}
    assert service.get("/v1/words?prefix=open&limit=1").json == {"total": len(known), "words": known[:1]}
    assert service.get("/v1/words?prefix=zork").json == {"total": 0, "words": []}
    assert len(service.get("/v1/words").json["words"]) == min(20, len(offline.manifest.vocabulary))
    service.get("/v1/words?limit=1001").refused(422, "limit")


def test_examples_have_features_and_known_words(service: Running, planted: Path, offline: Grounder) -> None:
    examples = service.get("/v1/examples").json["examples"]
    videos = [example["video"]["id"] for example in examples]
    queries = [example["query"] for example in examples]
    annotated = {(annotation.video, annotation.sentence) for annotation in DataSet(planted).annotations("test")}
    assert 2 <= len(examples) == len(set(videos)) == len(set(queries)) <= 8
    assert set(zip(videos, queries, strict=True)) <= annotated
    assert all(offline.manifest.vocabulary.knows_all(query) for query in queries)
    assert examples[0]["video"] == service.get(f"/v1/videos/{videos[0]}").json


def test_examples_leave_out_videos_without_features(planted: Path, offline: Grounder, tmp_path: Path) -> None:
    data = Path(shutil.copytree(planted, tmp_path / "data"))
    before = VideoCatalog(DataSet(data)).examples(offline.manifest.vocabulary)
    DataSet(data).feature_path(before[0][0].name).unlink()
    after = VideoCatalog(DataSet(data)).examples(offline.manifest.vocabulary)
    assert before[0] not in after
    # Videos with a video file come first.
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / f"{before[-1][0].name}.webm").write_bytes(b"x")
    first, query = VideoCatalog(DataSet(data), tmp_path / "media").examples(offline.manifest.vocabulary)[0]
    assert (first.name, query) == (before[-1][0].name, before[-1][1])
    # Without sentences of known words, and without valid annotations, videos have no sentence.
    assert VideoCatalog(DataSet(data)).examples(Vocabulary({"zork": 1}))[0][1] is None
    DataSet(data).annotations_path("test").write_text("no annotation\n")
    assert VideoCatalog(DataSet(data)).examples(offline.manifest.vocabulary)[0][1] is None
    assert VideoCatalog(None).examples(offline.manifest.vocabulary) == []


@pytest.mark.parametrize(("form", "kind"), [("csv", "text/csv; charset=utf-8"), ("srt", "application/x-subrip")])
def test_answers_can_be_files_as_infer_prints_them(service: Running, planted: Path, form: Any, kind: str) -> None:
    data = DataSet(planted)
    sentences = ["person opens the door", "=person closes the door"]
    body = json.dumps({"video": "SIM00001", "query": sentences, "top_k": 3}).encode()
    reply = service.request("POST", f"/v1/ground?format={form}", body, {"content-type": "application/json"})
    assert (reply.status, reply.headers["content-type"]) == (200, kind)
    answers = [
        Answer(one["query"], one["video"], data.durations["SIM00001"], [Moment(**moment) for moment in one["moments"]])
        for one in service.ask(json.loads(body)).json
    ]
    assert reply.body.decode() == format_answers(answers, form) + "\n"
    sent = service.send(f"/v1/ground?format={form}", features=("x", npy(np.eye(40, 32, dtype=np.float32))), duration=12,
                        query="person opens the door")  # fmt: skip
    assert (sent.status, sent.headers["content-type"]) == (200, kind)
    service.request("POST", "/v1/ground?format=xml", body, {"content-type": "application/json"}).refused(422, "format")


def test_always_answer_ignores_the_no_match_threshold(choosy: Running, service: Running) -> None:
    assert choosy.get("/v1/model").json["no_match_threshold"] == 1.0
    assert choosy.ask(QUESTION).json[0]["moments"] == []
    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        replies = list(clients.map(lambda one: choosy.ask({**QUESTION, "always_answer": one}), 8 * [True, False]))
    expected = service.ask(QUESTION).json
    assert all(alike(reply.json, expected) for reply in replies[::2])
    assert [reply.json[0]["moments"] for reply in replies[1::2]] == 8 * [[]]
    assert service.ask({**QUESTION, "always_answer": True}).body == service.ask(QUESTION).body


def test_metrics_count_requests_and_pairs(service: Running) -> None:
    def count(name: str) -> float:
        lines = service.get("/metrics").body.decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = count('drn_requests_total{code="200",route="/v1/ground"}'), count("drn_batch_pairs_sum")
    service.ask({"video": "SIM00002", "query": ["person opens the door", "person closes the door"]})
    service.ask({"video": "SIM00002", "query": "person opens the door"})
    after = count('drn_requests_total{code="200",route="/v1/ground"}'), count("drn_batch_pairs_sum")
    assert (after[0] - before[0], after[1] - before[1]) == (2, 3)
    assert count("drn_queue_pairs") == 0
    before = count('drn_refused_total{reason="unknown_video"}')
    service.ask({"video": "nobody", "query": "person opens the door"}).refused(404)
    assert count('drn_refused_total{reason="unknown_video"}') == before + 1
    assert count('drn_video_cache_total{result="hit"}') >= 1
    assert count("process_resident_memory_bytes") > 0
    assert count('drn_model_info{digest="') == 1


@pytest.mark.parametrize(
    ("body", "status", "code", "values"),
    [
        (b"{", 422, "invalid", []),
        (b"\xff\xfe", 422, "invalid", []),
        ({"video": "SIM00001"}, 422, "invalid", ["query"]),
        ({**QUESTION, "qeury": 1}, 422, "invalid", ["qeury"]),
        ({**QUESTION, "query": []}, 422, "invalid", ["query", 1]),
        ({**QUESTION, "query": [3]}, 422, "invalid", ["query.0"]),
        ({**QUESTION, "query": "x" * 501}, 422, "invalid", ["query.0", 500]),
        ({**QUESTION, "query": ["person"] * 65}, 422, "invalid", ["query", 64]),
        ({**QUESTION, "query": "..."}, 422, "invalid_query", ["'...'"]),
        ({**QUESTION, "query": ["person", "zork"]}, 422, "invalid_query", [2, "'zork'"]),
        ({**QUESTION, "query": ["the zork"]}, 422, "invalid_query", ["'zork'"]),
        ({**QUESTION, "query": "person " * 21}, 422, "invalid_query", [21, 1, 20]),
        ({**QUESTION, "top_k": 101}, 422, "invalid", ["top_k"]),
        (b'{"video": "SIM00001", "query": "person", "top_k": NaN}', 422, "invalid", ["top_k"]),
        (b'{"video": "SIM00001", "query": "person", "video": "SIM00002"}', 422, "invalid", ["'video'"]),
        (b'{"video": "SIM00001", "query": "person", "qu\\u0065ry": "person"}', 422, "invalid", ["'query'"]),
        ({**QUESTION, "video": "nobody"}, 404, "unknown_video", ["'nobody'", "/v1/videos"]),
        ({**QUESTION, "video": "sim00001"}, 404, "unknown_video", ["'sim00001'", "'SIM00001'"]),
        ({**QUESTION, "video": "../SIM00001"}, 404, "unknown_video", []),
        ({**QUESTION, "video": "C3D_unit16_overlap0.5_merged/SIM00001"}, 404, "unknown_video", []),
        ({**QUESTION, "video": "SIM00001\0.pt"}, 404, "unknown_video", []),
        ({**QUESTION, "query": "person \ud800"}, 422, "invalid", []),
    ],
)
def test_malformed_request_is_rejected_with_reason(
    service: Running, body: Any, status: int, code: str, values: list[object]
) -> None:
    service.ask(body).refused(status, *values, code=code)
    assert service.ask(QUESTION).status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/videos/..%2f..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/videos/SIM00001/media", 404),
        ("GET", "/page/..%2fapp.py", 404),
        ("GET", "/v1/ground", 405),
        ("DELETE", "/healthz", 405),
        ("POST", "/v1/ground", 415),
        ("GET", "/v1/videos?limit=0", 422),
        ("GET", "/v1/videos?limit=many", 422),
        ("GET", "/v1/videos?offset=-1", 422),
    ],
)
def test_unknown_route_returns_json_error(service: Running, method: str, path: str, status: int) -> None:
    service.request(method, path).refused(status)


def test_responses_have_security_headers(service: Running) -> None:
    for reply in (service.get("/"), service.get("/nowhere"), service.ask(QUESTION), service.get("/metrics")):
        assert "default-src 'self'" in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in reply.headers
        assert "server" not in reply.headers


@pytest.mark.parametrize("word", ["zork", "\u732b", '"\\'])
def test_unknown_words_header_is_bounded_and_counts_the_rest(word: str) -> None:
    words = [f"{word}{number}" for number in range(500)]
    header, omitted = unknown_words(words)
    shown = json.loads(unquote(header))
    assert len(header) <= 2048
    assert shown == words[: len(shown)]
    assert (len(shown) + omitted, omitted > 0) == (500, True)
    assert unknown_words(words[:2]) == (quote(json.dumps(words[:2])), 0)
    assert unknown_words(["x" * 5000]) == (quote("[]"), 1)


def test_many_unknown_words_stay_within_header_bound(service: Running) -> None:
    words = [f"zork{number}" for number in range(400)]
    queries = ["person " + " ".join(words[start : start + 10]) for start in range(0, 400, 10)]
    reply = service.ask({"video": "SIM00001", "query": queries})
    assert reply.status == 200
    assert len(reply.headers["drn-unknown-words"]) <= 2048
    shown = json.loads(unquote(reply.headers["drn-unknown-words"]))
    assert len(shown) + int(reply.headers["drn-unknown-words-omitted"]) == 400
