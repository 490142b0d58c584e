"""`python -m runtime.benchmark`: measure the latency and throughput of models, and what takes the time."""

from __future__ import annotations

from pathlib import Path

from runtime.backends.base import Device
from runtime.benchmarking.plots import draw
from runtime.benchmarking.report import Report
from runtime.benchmarking.runner import SAMPLES, BenchmarkOptions, BenchmarkRun
from runtime.core.cli import check_plots, command, suggest_next_command
from runtime.core.io.atomic_files import check_report, write_json
from runtime.datasets.dataset import DataSet


def benchmark(
    model: Path | None = None,
    *,
    compare: tuple[Path, ...] = (),
    data: Path | None = None,
    video: str | None = None,
    query: tuple[str, ...] = (),
    samples: int = SAMPLES,
    batch: int = 32,
    device: Device = "auto",
    threads: int | None = None,
    output: Path | None = None,
    plot: Path | None = None,
) -> Report:
    """Time a model: on the GPU, on the host, end to end; over batch sizes, queries per video, query lengths, phases.

    Several models take turns, call by call, and are compared in ratios of one run. Ctrl-C ends it early and keeps what
    was measured.

    Args:
        model: .onnx, .engine or .pt file; of a model that was split, the query part.
        compare: more models, which take turns with it; ratios are against the first of all.
        data: directory of a data set (docs/formats.md), whose videos and sentences are asked; made up when not given.
        video: a video of it, in place of many.
        query: sentences to ask about that video, in place of its own.
        samples: calls of every case of one query; the other cases take as many, or what fits into five seconds.
        batch: largest batch, and most queries per video.
        device: auto, cpu or cuda.
        threads: CPU threads for each network.
        output: JSON file for everything that was found.
        plot: PNG file for percentiles and curves.

    Raises:
        GroundingError: an input is wrong; said before anything is measured, where it can be known then.
    """
    models = tuple(path for path in (model, *compare) if path is not None)
    options = BenchmarkOptions(models, data, video, query, samples, batch, device, threads)
    options.validate()
    _check_outputs(options, output, plot)
    run = BenchmarkRun(options)
    interruption: KeyboardInterrupt | None = None
    try:
        run.measure()
    except KeyboardInterrupt as error:
        interruption = error
    report = run.report(interruption is not None)
    print(report.text())
    if output:
        write_json(output, report.to_dict())
    if plot:
        draw(report, plot)
    if interruption is not None:
        raise interruption
    suggest_next_command("runtime.evaluate", "--model", models[0], "--data", data or "DIR")
    return report


def _check_outputs(options: BenchmarkOptions, output: Path | None, plot: Path | None) -> None:
    """Check the paths to write before any model is opened."""
    inputs = (*options.models, *(DataSet(options.data).files if options.data else ()))
    check_report(output, *inputs, plot)
    check_report(plot, *inputs)
    if plot:
        check_plots(plot)


if __name__ == "__main__":
    command(benchmark)
