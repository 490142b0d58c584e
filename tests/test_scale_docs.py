"""The commands of `docs/scale.md` run as they stand, on a small corpus and a Ray that they start themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from export.tracing.tracer import export_model
from runtime.datasets.dataset import DataSet
from tests.documented import ROOT, arguments, lines_run_by
from tests.export.conftest import TINY, lively, manifest
from tests.tolerances import DETECTIONS

onnx = pytest.importorskip("onnx")
pytest.importorskip("ray.data", reason="Ray needs the extra [corpus]")


def test_walkthrough_commands_run_unchanged(tmp_path: Path, golden: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data = DataSet(shutil.copytree(golden / "mini", tmp_path / "data"))
    onnx.save(export_model(lively(TINY), manifest(TINY)), tmp_path / "drn.onnx")
    words = list(manifest(TINY).vocabulary.words)
    rows = [{"query": " ".join(words[:3])}, {"query": words[0], "vid": "AAAA1"}]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    videos = [data.video(name) for name in sorted(data.durations)]
    columns = {name: [getattr(video, name) for video in videos] for name in ("duration", "num_frames")}
    columns |= {"video": [video.name for video in videos], "features": [video.features.tolist() for video in videos]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "features.parquet", row_group_size=2)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = []
    for line in lines_run_by("tests/test_scale_docs.py"):
        result = subprocess.run(arguments(line.text), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        said.append(result.stdout)
    assert len(said) == 3
    assert "7 grounded in" in said[0]
    assert "all were grounded already" in said[1]
    found = [json.loads(line) for line in (tmp_path / "corpus" / "shard-00001-of-00001.jsonl").read_text().splitlines()]
    assert [row["qid"] for row in found] == [1, 2, 1, 1, 1, 1, 1]
    assert {row["error"] for row in found} == {None}
    table = pyarrow.parquet.read_table(tmp_path / "table" / "shard-00001-of-00001.parquet").to_pylist()
    assert [row["vid"] for row in table] == [row["vid"] for row in found]
    for row, other in zip(found, table, strict=True):
        np.testing.assert_allclose(row["pred_relevant_windows"], other["pred_relevant_windows"], rtol=DETECTIONS)
