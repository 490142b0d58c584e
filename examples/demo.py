"""Simulate a data set, train, export, answer queries, evaluate, quantize and compare. `make demo` runs it.

    python examples/demo.py [DIRECTORY]

Every step is a command of the toolkit; it is printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path


def show(*arguments: str | Path) -> None:
    """Print a command of the toolkit, run it, and stop if it fails."""
    words = ["-m", *map(str, arguments)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    started = time.perf_counter()
    code = subprocess.run([sys.executable, *words]).returncode
    if code:
        sys.exit(code)
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def main(directory: Path) -> None:
    started = time.perf_counter()
    data, run = directory / "data", directory / "run"
    model = run / "drn.onnx"
    # Full-width features and network; few videos and short stages, so that it ends in minutes on two cores.
    show("train.simulate", "--output", data, "--videos", "160", "--difficulty", "easy")
    stages = ("--epochs", "5", "1", "1", "--lr", "5e-4", "1e-4", "1e-5", "--iou-target", "all")
    show("train", "--data", data, "--output", run, *stages, "--resume")
    show("export.to_onnx", "--model", run / "drn.pt", "--output", model)
    video, sentences = longest_story(data)
    show("runtime.infer", "--model", model, "--data", data, "--video", video, "--query", *sentences, "--top-k", "3",
         "--plot", directory / "moments.png")  # fmt: skip
    show("runtime.evaluate", "--model", model, "--data", data, "--output", directory / "report.json")
    smaller = []
    for precision in ("fp16", "int8"):
        show(
            "export.build_engine", "--model", model, "--precision", precision, "--data", data, "--target", "onnxruntime"
        )
        smaller.append(model.with_name(f"drn.{precision}.onnx"))
    show("runtime.benchmarking.compare", model, *smaller, "--data", data, "--samples", "100",
         "--markdown", directory / "comparison.md", "--plot", directory / "comparison.png")  # fmt: skip
    report = json.loads((directory / "report.json").read_text())
    lead = 100 * (report["R@1 IoU=0.5"] - report["prior"]["R@1 IoU=0.5"])
    print(f"\nR@1 IoU=0.5 is {lead:+.1f} points above the best constant moments, after a training of minutes.")
    print((directory / "comparison.md").read_text())
    pictures = (directory / "moments.png", directory / "comparison.png", run / "curves.png")
    print(f"Pictures: {', '.join(map(str, pictures))}. {time.perf_counter() - started:.0f} s in total.")


def longest_story(data: Path) -> tuple[str, list[str]]:
    """Return the test video with the most sentences, and up to three of them."""
    sentences: dict[str, list[str]] = {}
    for line in (data / "Charades_sta_test.txt").read_text().splitlines():
        moment, sentence = line.split("##")
        sentences.setdefault(moment.split()[0], []).append(sentence)
    video = max(sentences, key=lambda name: len(set(sentences[name])))
    return video, list(dict.fromkeys(sentences[video]))[:3]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
