"""`python -m runtime.benchmark`: measure the latency and throughput of models, by batch size and phase."""

from __future__ import annotations

from pathlib import Path

from runtime.backends.base import Device
from runtime.benchmarking.plots import draw
from runtime.benchmarking.report import Report
from runtime.benchmarking.runner import SAMPLES, BenchmarkOptions, BenchmarkRun
from runtime.core.cli import check_plots, command, report_written, suggest_next_command
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
    """Measure latency and throughput of a model by batch size, queries per video, query length and phase.

    Several models take turns, call by call, and are compared by ratios from one run. Ctrl-C ends the run early and
    keeps the completed measurements.

    Example:
        python -m runtime.benchmark --model drn.query.onnx --compare drn.int8.query.onnx --data charades

    Args:
        model: .onnx, .engine or .pt file. For a split model give the query part.
        compare: further models to measure in turn with the first; ratios are relative to the first.
        data: directory of a data set (docs/formats.md) to take videos and queries from. Default: synthetic data.
        video: use this video of --data only.
        query: use these queries only; requires --video.
        samples: calls per case with one query; other cases take as many calls, or what fits into five seconds.
        batch: largest batch size, and largest number of queries per video.
        device: device that runs the model; auto selects cuda if it is available.
        threads: number of CPU threads per network. Default: set by the library that runs the model.
        output: JSON file to write all results to.
        plot: PNG file to draw percentiles and curves in.

    Raises:
        GroundingError: an input is wrong. Inputs are checked before anything is measured.
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
    report_written(output, plot)
    if interruption is not None:
        raise interruption
    suggest_next_command("runtime.serve", "--model", models[-1], "--data", data or "DIR")
    return report


def _check_outputs(options: BenchmarkOptions, output: Path | None, plot: Path | None) -> None:
    """Check the paths to write before any model is opened."""
    inputs = (*options.models, *(DataSet(options.data).files if options.data else ()))
    check_report(output, *inputs, plot)
    check_report(plot, *inputs)
    check_plots(plot)


if __name__ == "__main__":
    command(benchmark)
