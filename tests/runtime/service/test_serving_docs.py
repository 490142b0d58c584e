"""Run the commands and the nginx configuration of `docs/serving.md` with a service of a small model."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.service import clips, h11_protocol, isolated, middleware, video_cache
from runtime.service.service import ServiceOptions
from tests.documented import lines_run_by
from tests.films import film
from tests.runtime.service.conftest import Running

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
LINES = [line.text for line in lines_run_by("tests/runtime/service/test_serving_docs.py")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("client")
    np.save(directory / "clip.npy", np.random.default_rng(0).random((115, 32), np.float32))
    film(directory / "clip.mp4", 60)
    return directory


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", LINES)
def test_documented_curl_commands_succeed(service: Running, directory: Path, line: str) -> None:
    here = line.replace("http://127.0.0.1:8000/", service.url)
    result = subprocess.run(["sh", "-c", here], cwd=directory, capture_output=True, text=True, check=True)
    if line.endswith("/metrics"):
        assert "drn_requests_total" in result.stdout
        return
    answer: Any = json.loads(result.stdout)
    assert "error" not in answer
    if "/v1/ground" in line:
        assert all(one["moments"] for one in answer)


@pytest.fixture
def proxied(start: Callable[..., Running], model: Path, planted: Path, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The TLS port and the certificate of the documented nginx in front of a service."""
    if shutil.which("nginx") is None or shutil.which("openssl") is None:
        pytest.skip("nginx or openssl is not installed")
    host = "grounding.example.com"
    service = start("--model", model, "--data", planted, "--uploads", tmp_path / "uploads", "--allow-host", host)
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    words = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", f"/CN={host}"]
    words += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *words], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    block = PAGE.split("runs nginx with this block")[1].split("```nginx")[1].split("```")[0]
    for before, after in (
        ("127.0.0.1:8000", f"127.0.0.1:{service.port}"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        (f"/etc/ssl/certs/{host}.pem", str(certificate)),
        (f"/etc/ssl/private/{host}.key", str(key)),
    ):
        assert before in block
        block = block.replace(before, after)
    temporary = "".join(
        f"{name}_temp_path {tmp_path / name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = tmp_path / "nginx.conf"
    configuration.write_text(
        f"daemon off;\nmaster_process off;\npid {tmp_path / 'pid'};\nerror_log {tmp_path / 'error.log'};\n"
        f"events {{}}\nhttp {{\naccess_log {tmp_path / 'access.log'};\n{temporary}{block}}}\n"
    )
    command = ["nginx", "-p", str(tmp_path), "-c", str(configuration)]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, (tmp_path / "error.log").read_text()
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.01)
        yield port, certificate
    finally:
        process.terminate()
        process.wait(10)


def test_documented_nginx_forwards_a_query_over_tls(proxied: tuple[int, Path]) -> None:
    port, certificate = proxied
    host = "grounding.example.com"
    context = ssl.create_default_context(cafile=str(certificate))
    with context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=30), server_hostname=host) as stream:
        connection = http.client.HTTPConnection(host)
        connection.sock = stream
        body = json.dumps({"video": "SIM00001", "query": "person opens the door"})
        # Pages of the proxy's own origin may send queries.
        connection.request(
            "POST", "/v1/ground", body, {"Content-Type": "application/json", "Origin": f"https://{host}"}
        )
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert json.loads(response.read())[0]["moments"]


def test_documented_metrics_exist(service: Running) -> None:
    text = service.get("/metrics").body.decode()
    named = re.findall(r"`(drn_[a-z_]+)", PAGE)
    assert len(named) >= 10
    for name in named:
        assert f"# TYPE {name} " in text, name


def test_documented_limits_match_the_code() -> None:
    options = ServiceOptions()
    for value in (
        f"| {options.max_queries}, {options.max_query_chars} |",
        f"`--queue-size` {options.batching.queue_size};",
        f"`--timeout` {options.timeout_s:g} s",
        f"times queries | {video_cache.MAX_WINDOWS} |",
        f"{options.gate.json_bytes >> 10} KiB of JSON; `--upload-mib` {options.gate.upload_bytes >> 20} ",
        f"uncompressed | {options.uploads.features_bytes >> 20} MiB |",
        f"`--uploads-mib` {options.uploads.total_bytes >> 20}, {options.uploads.max_uploads} at most",
        f"`--keep-minutes` {options.uploads.keep_s / 60:g} ",
        f"one at a time, {options.uploads.max_extractions} wait; {options.uploads.extract_s / 60:g} minutes",
        f"| clips | {clips.MAX_SECONDS:g} s each; one at a time, {clips.MAX_CLIPS} cut or wait; "
        f"{isolated.MAX_MEMORY >> 30} GiB of memory |",
        f"`--cache-mib` {options.cache_bytes >> 20},",
        f"{middleware.HEADER_BYTES >> 10} KiB, within {h11_protocol.HEADER_SECONDS:g} s |",
        f"{middleware.BODY_BYTES_PER_SECOND >> 10} KiB a second on average, "
        f"no pause above {middleware.BODY_SECONDS:g} s |",
        f"connections | {h11_protocol.MAX_CONNECTIONS} |",
    ):
        assert value in PAGE, value
