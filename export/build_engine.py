"""Build an engine from a checkpoint or a graph: `python -m export.build_engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from calib.range_estimation import MethodOption
from export.build.build_config import BuildRequest, Target
from export.build.fastest_precision import run_fastest
from export.build.reduced_precision import Precision
from export.build.run_build import run
from export.engine.profiles import DEFAULT_BATCH, DEFAULT_CACHED_VIDEOS
from runtime.core.cli import command


def build_engine(
    model: Path,
    *,
    precision: Precision | Literal["auto"] = "fp16",
    target: Target | Literal["cpu"] = "auto",
    data: Path | None = None,
    output: Path | None = None,
    vocabulary: Path | None = None,
    batch: tuple[int, int, int] = DEFAULT_BATCH,
    query_length: tuple[int, int, int] | None = None,
    table: Path | None = None,
    plan: Path | None = None,
    keep: tuple[str, ...] = (),
    calib_samples: int = 512,
    calib_method: MethodOption = "auto",
    calib_videos: tuple[Path, ...] = (),
    max_drop: float = 0.2,
    min_speedup: float | None = None,
    split: bool = False,
    videos: int = DEFAULT_CACHED_VIDEOS,
    unroll: tuple[int, ...] = (),
    parity_split: str = "test",
    limit: int | None = None,
    profiles: Literal[1, 2] = 2,
    optimization_level: int | None = None,
    workspace: float | None = None,
    timing_cache: Path | None = None,
    version_compatible: bool = False,
    hardware_compatible: bool = False,
    tf32: bool = False,
    compute_capability: tuple[str, ...] = (),
    threads: int | None = None,
    dry_run: bool = False,
) -> Path:
    """Build an engine: convert, export, calibrate, change precision, build, and check accuracy.

    The graph in the requested precision is written as MODEL.PRECISION.onnx, which ONNX Runtime runs on any machine;
    the engine is built from it. The command exits with 1 if a check fails: the precision of the graph and of the
    engine, and with --data the accuracy compared with the FP32 graph. The rejected model is saved as
    MODEL.PRECISION.rejected, and the final name is not written. It also exits with 1 if an int8 or fp8 model is
    written but not faster on this machine.

    With --data the command also writes MODEL.PRECISION.parity.json and the HTML report
    MODEL.PRECISION.passport.html. int8 and fp8 also write their calibration table and, if modules were restored,
    the quantization plan.

    Example:
        python -m export.build_engine --model drn.pt --precision int8 --target tensorrt --data charades

    Args:
        model: drn.pt, an FP32 drn.onnx, or a published checkpoint (.pth, .pth.tar); or a clip feature extractor
            (c3d.pt, i3d.pt, their .onnx, or a published C3D), whose features are compared with FP32.
        precision: fp32, fp16, bf16, int8 (other layers in FP16; FP32 on a CPU) or fp8 (other layers in
            FP16); auto is int8 if that is accurate and faster on this machine, else fp16, or on a CPU fp32.
            openvino supports int8 and fp32.
        target: runtime of the engine; auto selects TensorRT on a machine with TensorRT and a GPU, else ONNX
            Runtime. cpu builds for ONNX Runtime and OpenVINO, and names the faster model within --max-drop.
        data: directory of a data set (docs/formats.md) for calibration, the search for modules that overflow in FP16,
            and the accuracy check.
        output: engine to write, or for onnxruntime and openvino the graph. Default: next to MODEL.
        vocabulary: word table of a published checkpoint.
        batch: MIN OPT MAX of the number of queries, or of clips for an extractor.
        query_length: MIN OPT MAX of the number of tokens. Default: those of the training data set (Charades-STA: 1
            8 32).
        table: calibration table of this graph, to skip the calibration.
        plan: quantization plan from `python -m calib.restore`, with the modules to leave out of INT8.
        keep: DRN modules to keep in higher precision: FP16 for int8 and fp8, FP32 for fp16 and bf16.
        calib_samples: number of training queries to calibrate on.
        calib_method: how to choose activation ranges; auto takes the method whose answers agree best with FP32
            on held-out training videos, and for an extractor that with the smallest error of the features.
        calib_videos: video files for an extractor: int8 is calibrated on every second clip of them and compared with
            FP32 on the others, other precisions are compared on all.
        max_drop: maximum drop of R@1 IoU=0.7 and of mIoU compared with FP32, in points. For int8 and fp8 the
            smallest set of modules is restored to FP16 until the drop on held-out training videos is within it; the
            final check uses the parity split.
        min_speedup: speed that the model must reach on this machine, for one query or for 32, relative to the FP32
            graph, or for an engine relative to the FP16 engine next to it. A slower model is written, but the command
            exits with 1. Default: 1.05 for int8 and fp8; 0, the default for the others, does not measure.
        split: also split the model for videos with several queries: MODEL.PRECISION.video encodes a video, and
            MODEL.PRECISION.query answers queries and is the file to run.
        videos: number of encoded videos that a split engine keeps in GPU memory.
        unroll: query lengths, such as 6 10: build one more engine for each, with an unrolled LSTM, for queries of
            at most that many tokens. TensorRT's LSTM is a loop; it handles longer queries, but cannot be captured
            in a CUDA graph. Default for tensorrt: the 90 % and 99 % quantiles of the query lengths in the training
            split of --data, or of the model's training data set. 0, the default for tensorrt-rtx, builds none.
        parity_split: split to check the accuracy on.
        limit: use only the first N queries of --parity-split.
        profiles: number of optimization profiles: 2, for one query and for several, or 1 for both. Engines of
            TensorRT 8.6 with two profiles may fail to load; then an engine with one is built automatically.
        optimization_level: TensorRT's builder optimization level, 0 to 5.
        workspace: maximum scratch memory of the builder, in GiB.
        timing_cache: file of measured kernel times to read, if it exists, and update.
        version_compatible: build a TensorRT plan that later minor versions can load.
        hardware_compatible: build a TensorRT plan for Ampere and later GPUs.
        tf32: allow TF32 (10-bit mantissa) for FP32 operations, in engines and in ONNX Runtime on a GPU.
        compute_capability: for tensorrt-rtx, GPU architectures such as 8.6 8.9. Default: the GPU of this machine.
        threads: number of CPU threads for calibration and the accuracy check. Default: set by the library.
        dry_run: print what would be built, and stop.

    Returns:
        The path of the engine, or of the graph for onnxruntime and openvino.

    Raises:
        GroundingError: an input is missing, or options contradict each other.
        CheckFailed: the precision, the accuracy or the speed check failed.
    """
    options = locals()
    return run_fastest(options) if precision == "auto" or target == "cpu" else run(BuildRequest(**options))


if __name__ == "__main__":
    command(build_engine)
