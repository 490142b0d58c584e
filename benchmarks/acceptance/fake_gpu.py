"""Run the legs `cuda` and `tensorrt` of the GPU acceptance on the doubles of CUDA's driver and of TensorRT.

    python -m benchmarks.acceptance.fake_gpu tensorrt --output DIR --device cpu --small --stand-in --inside

`benchmarks.gpu --stand-in` starts this module. It needs only the packages of the leg.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.acceptance.run_config import Job
from benchmarks.acceptance.step_log import Found, Leg
from benchmarks.fake_tensorrt import Driver, Library, write_plan
from runtime.artifacts.engine_layers import Inspection, layers_path, packed
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.backends.batch_shapes import AXES
from runtime.backends.cuda_driver import Cuda
from runtime.core.gpu_info import Gpu
from runtime.core.io.digests import sha256

# The newest complete TensorRT on PyPI, which is also the strictest.
VERSION = "8.6.1"
# Steps that run in another process, where there is no double.
SEPARATE = ("fault", "gpu_absent", "_compare_speeds", "_tests")


@contextlib.contextmanager
def stood_in(job: Job, leg: str = "tensorrt") -> Iterator[None]:
    """Replace CUDA by its double, and for the leg `tensorrt` also TensorRT and the builds."""
    driver = Driver()
    gpu = functools.partial(Cuda, driver)
    changes: dict[str, Any] = {"benchmarks.acceptance.leg_cuda.open_gpu": gpu}
    modules: dict[str, Any] = {}
    if leg == "tensorrt":
        library = Library(driver, VERSION)
        # A build starts with tensorrt.Builder(logger). torch looks for the specs of modules.
        library.Builder = lambda logger: SimpleNamespace(logger=logger)  # type: ignore[attr-defined]
        library.__spec__ = ModuleSpec("tensorrt", None)  # type: ignore[attr-defined]
        modules["tensorrt"] = library
        changes |= {
            "runtime.backends.tensorrt_backend.Cuda": gpu,
            "runtime.backends.cuda_driver.Cuda": gpu,
            "benchmarks.acceptance.leg_tensorrt.cuda_gpu": lambda: Gpu("NVIDIA double"),
            "export.engine.builder.cuda_gpu": lambda: Gpu("NVIDIA double"),
            "export.engine.builder.unavailable_reason": lambda target: (
                None if target == "tensorrt" else "It is not installed."
            ),
            "export.engine.builder.check_options": lambda options: None,
            "export.engine.builder.load_library": lambda target: library,
            # torch has no double, and runs on the CPU.
            "benchmarks.acceptance.leg_tensorrt.device_of": lambda job: "cpu",
            "benchmarks.acceptance.leg_tensorrt.torch_baselines": _torch_baselines,
            "benchmarks.acceptance.engines.run_module": functools.partial(build, job),
        }
    with contextlib.ExitStack() as stack:
        for target, value in changes.items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        yield


def separate(name: str) -> Callable[..., Found]:
    """Return a replacement of a step that runs in another process."""
    return lambda *_: Found(f"{name} runs in another process, where there is no double.", judged=False)


def _torch_baselines(job: Job, kinds: Sequence[str]) -> Mapping[str, Any]:
    import torch

    from benchmarks.acceptance.torch_baselines import TorchBaseline
    from train.checkpoints import load_checkpoint

    model = load_checkpoint(job.checkpoint).model()
    names = {"graphs": "CUDA graphs", "compile": "torch.compile"}
    return {
        f"{names[kind]}, FP32{suffix}": TorchBaseline(model, "eager", torch.float32, encoded)
        for kind in kinds
        for suffix, encoded in (("", False), (", encoded videos", True))
    }


def build(job: Job, _: Job, leg: Leg, module: str, *words: Any, **options: Any) -> str:
    """Write plans that represent graphs; the replacement of the build command."""
    import onnx

    from calib.graph.unroll_lstm import unroll_lstm

    assert module == "export.build_engine"
    output, precision = words[words.index("--output") + 1], words[words.index("--precision") + 1]
    output.parent.mkdir(exist_ok=True)
    twin = output.with_name(f"drn.{precision}.onnx")
    twin.write_bytes(job.graph.read_bytes())
    parts = [(output, job.query_graph)] if "--split" in words else [(output, job.graph)]
    if "--split" in words:
        video = output.with_name(f"drn.{precision}.video.onnx")
        video.write_bytes(job.graph.with_name("drn.video.onnx").read_bytes())
        parts.append((video.with_suffix(".engine"), video))
    for plan, path in parts:
        graph = onnx.load(path).graph
        known = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        manifest = Manifest.from_json(known[METADATA_KEY], str(path))
        if manifest.part == "query":
            manifest = dataclasses.replace(manifest, video_part={video.name: sha256(video)})
        axes = AXES[manifest.part]
        longest = job.sizes.query_length
        ranges = {"batch": (1, 2, job.sizes.batches[-1]), "query_length": longest, "video": (1, 4, 16)}
        tails = {
            value.name: [size.dim_value for size in value.type.tensor_type.shape.dim if size.dim_value]
            for value in graph.input
        }
        shapes = {
            name: [[*(ranges[axis][index] for axis in free), *tails[name]] for index in range(3)]
            for name, free in axes.items()
        }
        profile = {"name": "p", "batch": ranges["batch"], "query_length": longest, "shapes": shapes}
        census = {"twin": {"shares": {precision: 1.0}}, "engine": {"layers": {precision: 3}, "quantised_inputs": {}}}
        named = {}
        for tokens in numbers_after("--unroll", words) if plan == output else ():
            written = path.with_name(f"{path.stem}.{tokens}.onnx")
            onnx.save(unroll_lstm(onnx.load(path), tokens), written)
            shorter = plan.with_name(f"{plan.stem}.{tokens}.engine")
            write_plan(shorter, written, [of_length(profile, tokens)], manifest, VERSION, census=census)
            layers_path(shorter).write_bytes(packed(Inspection("{}"), shorter.name, sha256(shorter), VERSION))
            named[shorter.name] = sha256(shorter)
        write_plan(plan, path, [profile], manifest, VERSION, census=census, **({"unrolled": named} if named else {}))
        layers_path(plan).write_bytes(packed(Inspection("{}"), plan.name, sha256(plan), VERSION))
    return ""


def of_length(profile: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Return a profile for queries that are padded to `tokens`."""
    shapes = {**profile["shapes"], "query_tokens": [[size[0], tokens] for size in profile["shapes"]["query_tokens"]]}
    return {**profile, "query_length": (tokens,) * 3, "shapes": shapes}


def numbers_after(flag: str, words: Sequence[Any]) -> list[int]:
    """Return the integers that follow a flag."""
    after = words[words.index(flag) + 1 :] if flag in words else ()
    return [number for number in itertools.takewhile(lambda word: isinstance(word, int), after) if number]


def main() -> int:
    """Run one leg in this process, as `benchmarks.gpu --inside` does."""
    from benchmarks import gpu

    job, given = gpu.parse()
    # Legs use the doubles as a GPU.
    job = dataclasses.replace(job, device="cuda")
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    with contextlib.ExitStack() as stack:
        (leg,) = given.legs
        stack.enter_context(stood_in(job, leg))
        for name in SEPARATE if leg == "tensorrt" else ():
            stack.enter_context(mock.patch(f"benchmarks.acceptance.leg_tensorrt.{name}", separate(name)))
        gpu.run_inside(job, leg, given.limit, given.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
