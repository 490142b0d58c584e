"""The commands of `docs/serving.md` run as they stand, against a service of a small model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.service import h11_protocol, middleware, video_cache
from runtime.service.service import ServiceOptions
from tests.films import film
from tests.runtime.service.conftest import Running

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
LINES = [
    line
    for line in PAGE.split("test_serving_docs.py runs this block")[1].split("```")[1].splitlines()
    if line.startswith("curl ")
]


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
        f"times sentences | {video_cache.MAX_WINDOWS} |",
        f"{options.gate.json_bytes >> 10} KiB of JSON; `--upload-mib` {options.gate.upload_bytes >> 20} ",
        f"unpacked | {options.uploads.features_bytes >> 20} MiB |",
        f"`--uploads-mib` {options.uploads.total_bytes >> 20}, {options.uploads.max_uploads} at most",
        f"`--keep-minutes` {options.uploads.keep_s / 60:g} ",
        f"one at a time, {options.uploads.max_extractions} wait; {options.uploads.extract_s / 60:g} minutes",
        f"`--cache-mib` {options.cache_bytes >> 20},",
        f"{middleware.HEADER_BYTES >> 10} KiB, within {h11_protocol.HEADER_SECONDS:g} s |",
        f"{middleware.BODY_BYTES_PER_SECOND >> 10} KiB a second on the whole, "
        f"no pause above {middleware.BODY_SECONDS:g} s |",
        f"connections | {h11_protocol.MAX_CONNECTIONS} |",
    ):
        assert value in PAGE, value
