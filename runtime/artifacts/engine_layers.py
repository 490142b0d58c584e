"""Read the output of TensorRT's engine inspector: which layers multiply, and in which data types.

Three kinds of evidence show the data type that a layer computes in. In order of priority:

1. The name of its kernel (`TacticName`), as `sm80_xmma_gemm_f16f16_f16f32_f32_...`.
2. The type of its weights (`"Weights": {"Type": "Half", ...}`).
3. The types of the tensors that it reads. An inspector without an execution context, or without all input shapes,
   does not report them (`IEngineInspector::setExecutionContext` in NvInferRuntime.h).
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.core.errors import ModelFileError, one_line, reading
from runtime.core.io.text_files import check_format

FORMAT = "drn-layers/1"
SUFFIX = ".layers.json.gz"

PROVEN, NOT_PROVEN, CONTRADICTED = "proven", "not proven", "contradicted"
VERDICTS = (PROVEN, NOT_PROVEN, CONTRADICTED)


@dataclasses.dataclass(frozen=True)
class ProfileView:
    """The inspector's output for one optimization profile, with a context at its opt shapes.

    Attributes:
        shapes: input name to shape.
        text: JSON of the inspector; None if no context could be created.
        reason: reason for the missing `text`, else "".
    """

    name: str
    shapes: Mapping[str, Sequence[int]]
    text: str | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The complete output of the inspector for one engine.

    Attributes:
        unbound: JSON without an execution context.
        profiles: JSON for each profile.
    """

    unbound: str
    profiles: tuple[ProfileView, ...] = ()

    def views(self) -> list[str]:
        """Return the JSON of each profile, without an execution context if none could be created."""
        return [self.unbound if view.text is None else view.text for view in self.profiles] or [self.unbound]

    def reason(self) -> str:
        """Return the reason why a profile has no JSON; "" if all have one."""
        return next((view.reason for view in self.profiles if view.text is None), "")

    def to_dict(self) -> dict[str, Any]:
        return {
            "unbound": _parsed(self.unbound),
            "profiles": [
                {
                    "name": view.name,
                    "shapes": {name: list(shape) for name, shape in view.shapes.items()},
                    "bound": None if view.text is None else _parsed(view.text),
                    "reason": view.reason,
                }
                for view in self.profiles
            ],
        }


def _parsed(text: str) -> Any:
    """Return the value of JSON, or the text itself if it is not JSON."""
    try:
        return _loads(text)
    except (ValueError, RecursionError):
        return text


def _loads(text: str) -> Any:
    """Return the value of the inspector's JSON. TensorRT 8.6 separates metadata by unescaped control characters."""
    return json.loads(text, strict=False)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        name: name in TensorRT, which includes the names of the graph nodes that it computes.
        nodes: names of these graph nodes, from `name` and the metadata.
        multiplies: whether it is a convolution or a matrix product, alone or fused.
        foreign: whether it is a Myelin ForeignNode: a part of the graph that is compiled as one, of which the inspector
            reports inputs and outputs only.
        computes: data type of its multiplications; None if unknown.
        reads, writes: known data types of its inputs and outputs.
    """

    name: str
    nodes: tuple[str, ...]
    multiplies: bool
    foreign: bool
    computes: str | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def read_layers(text: str, profile: int = 0) -> list[Layer]:
    """Return the layers of one profile from the inspector's JSON; empty if it lists layer names only.

    Args:
        text: result of `IEngineInspector.get_engine_information`. Up to TensorRT 10 a tensor has one
            "Format/Datatype"; from 11 on "Format" and "Datatype" are separate.
        profile: index of the profile. TensorRT 8 lists the layers of all profiles, with " [profile N]" after their
            names.

    Raises:
        ModelFileError: the text is not such JSON.
    """
    try:
        entries = _loads(text)["Layers"]
        layers = [entry for entry in entries if isinstance(entry, dict)]
        names = [str(entry.get("Name", "")) for entry in layers]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(
            f"Expected the JSON of TensorRT's engine inspector, got other text ({one_line(error)}). Build the engine "
            "again.",
            code="damaged_file",
        ) from error
    indices = [int(result[1]) if (result := _PROFILE.search(name)) else 0 for name in names]
    selected = profile if any(indices) else 0
    return [_layer(entry) for entry, index in zip(layers, indices) if index == selected]


_PROFILE = re.compile(r"\[profile (\d+)\]\s*\Z")


def _layer(entry: Mapping[str, Any]) -> Layer:
    name = str(entry.get("Name", ""))
    kind = f"{entry.get('LayerType', '')} {entry.get('ParameterType', '')}".lower()
    tactic = str(entry.get("TacticName", "")).lower()
    foreign = "myelin" in kind.split() or "ForeignNode[" in name
    moves = any(word in kind for word in _MOVES)
    multiplies = not moves and bool(_MULTIPLIES.search(kind) or _KERNELS.search(tactic))
    inputs, outputs = (_tensor_types(entry.get(side)) for side in ("Inputs", "Outputs"))
    computes = None
    if multiplies or foreign:
        weights = entry.get("Weights")
        computes = _tactic_type(tactic) or _type(weights.get("Type") if isinstance(weights, dict) else None)
    if computes is None and multiplies and not foreign:
        # The first input of a convolution is its data. Of a matrix product the wider factor counts, because weights
        # that are only stored in 8 bits are multiplied in the type of the other factor.
        factors = inputs[:1] if "conv" in kind else inputs[:2]
        computes = max((factor for factor in factors if factor), key=WIDTHS.__getitem__, default=None)
    # A ForeignNode without a known type may not multiply at all.
    return Layer(
        name,
        _nodes(name, str(entry.get("Metadata", ""))),
        multiplies or (foreign and computes is not None),
        foreign,
        computes,
        tuple(sorted({kind for kind in inputs if kind})),
        tuple(sorted({kind for kind in outputs if kind})),
    )


# Layers that only change layout or type, even if their kernels have names of multiplications.
_MOVES = ("reformat", "shuffle", "noop", "slice", "constant")
_MULTIPLIES = re.compile(r"conv(?!er)|gemm|matrixmultiply|matmul|fullyconnected|\brnn|lstm")
_KERNELS = re.compile(r"gemm|gemv|fprop|dgrad|cudnn|mma|_mha|conv(?!er)")

WIDTHS = {"int8": 1, "fp8": 1, "fp16": 2, "bf16": 2, "tf32": 3, "fp32": 4}
"""Data types of multiplications, and their order from narrow to wide."""

_NAMES = {
    "s8": "int8", "i8": "int8", "u8": "int8", "e4m3": "fp8", "e5m2": "fp8", "f16": "fp16", "bf16": "bf16",
    "tf32": "tf32", "f32": "fp32",
}  # fmt: skip
_T = r"(bf16|tf32|f16|f32|i32|i8|u8|e4m3|e5m2)"
# Names of xmma kernels: input and output, factors and accumulator, epilogue. i8f32_i8i32_f32 multiplies INT8 and writes
# FP32; f32f32_tf32f32_f32 multiplies TF32.
_XMMA = re.compile(rf"_{_T}{_T}_{_T}{_T}_{_T}(?![a-z0-9])")
# Names of cuBLAS kernels: sm50_xmma_cublas_gemvx_f16f16_f32.
_CUBLAS = re.compile(rf"_{_T}{_T}_{_T}(?![a-z0-9])")
# Names of CUTLASS 3 kernels: both factors and accumulator, as in
# cutlass3x_sm100_tensorop_i128x128x32gemm_s8_s8_s32_f16_f16.
_FACTOR = r"(bf16|tf32|f16|f32|s8|u8|e4m3|e5m2)"
_CUTLASS = re.compile(rf"_{_FACTOR}_{_FACTOR}_(s32|f32|f16)(?![a-z0-9])")
# Other kernels (cuDNN, CUTLASS 2, generated). Narrow types first, because names also contain accumulator and output.
_KERNEL_TYPES = (
    (r"int8|i8i8|imma|i8816|i16816|i16832|(?<![a-z0-9])i8(?![0-9])", "int8"),
    (r"e4m3|e5m2|fp8|f8f8|qmma", "fp8"),
    (r"bf16|bfloat16", "bf16"),
    (r"tf32", "tf32"),
    (r"fp16|f16|half|hmma|h16816|h1688|h884|hgemm|hcudnn", "fp16"),
    (r"fp32|f32f32|float32|sgemm|scudnn", "fp32"),
)


def _tactic_type(tactic: str) -> str | None:
    """Return the data type that a kernel multiplies, by its name in lower case; None if the name does not show it.

    Source: names of cuDNN, cuBLAS, CUTLASS and xmma kernels in trtexec --exportLayerInfo and Nsight Systems.
    """
    for pattern, group in ((_XMMA, 3), (_CUBLAS, 1), (_CUTLASS, 1)):
        result = pattern.search(tactic)
        if result and result[group] in _NAMES:
            return _NAMES[result[group]]
    return next((name for pattern, name in _KERNEL_TYPES if re.search(pattern, tactic)), None)


# Longest first, since "Float" begins more than one.
_TENSOR_TYPES = (
    (r"bfloat16|bf16", "bf16"),
    (r"half|fp16|float16", "fp16"),
    (r"fp8|float8|e4m3", "fp8"),
    (r"int8", "int8"),
    (r"fp32|float32|float", "fp32"),
)


def _type(text: Any) -> str | None:
    lowered = str(text or "").lower()
    return next((name for pattern, name in _TENSOR_TYPES if re.search(pattern, lowered)), None)


def _tensor_types(tensors: Any) -> list[str | None]:
    """Return the type of each tensor; None if it is unknown or not a type of multiplications.

    TensorRT 8.6 and 10 write "N/A due to dynamic shapes" for unknown types.
    """
    results = []
    for tensor in tensors if isinstance(tensors, list) else ():
        known = tensor if isinstance(tensor, dict) else {}
        results.append(_type(known.get("DataType") or known.get("Datatype") or known.get("Format/Datatype")))
    return results


def _nodes(name: str, metadata: str) -> tuple[str, ...]:
    """Return the graph nodes that a layer computes, from its metadata or, if these name none, from its name.

    `a/Conv + PWN(b/Relu, c/Mul) [profile 1]` computes a/Conv, b/Relu and c/Mul.
    """
    recorded = re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata)
    split = re.split(r"\s*\+\s*|[(),\[\]{}]|\s*\|\|\s*|\.\.\.", _PROFILE.sub("", name))
    return tuple(node.strip() for node in recorded or split if "/" in node)


@dataclasses.dataclass(frozen=True)
class EngineLayerStats:
    """The layers of an engine by data type.

    Attributes:
        layers: data type to number of layers that write it.
        quantised_inputs: data type to number of layers that read it; int8 kernels may write wider types.
        arithmetic: data type to number of convolutions and matrix products that compute in it.
        unknown: number of convolutions and matrix products of unknown type.
        foreign: number of ForeignNodes of unknown type.
    """

    layers: Mapping[str, int]
    quantised_inputs: Mapping[str, int]
    plan_bytes: int = 0
    arithmetic: Mapping[str, int] = dataclasses.field(default_factory=dict)
    unknown: int = 0
    foreign: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return the arithmetic layers as text: "9 in fp16, 1 in fp32, 2 of unknown type"."""
        parts = [f"{count} in {kind}" for kind, count in self.arithmetic.items()]
        parts += [f"{self.unknown} of unknown type"] if self.unknown else []
        if self.foreign:
            parts.append("1 ForeignNode that shows" if self.foreign == 1 else f"{self.foreign} ForeignNodes that show")
            parts[-1] += " nothing"
        return ", ".join(parts) or "none that multiplies is shown"


def count_layers(layers: Iterable[Layer], plan_bytes: int = 0) -> EngineLayerStats:
    """Count layers by data type."""
    written: collections.Counter[str] = collections.Counter()
    read: collections.Counter[str] = collections.Counter()
    arithmetic: collections.Counter[str] = collections.Counter()
    unknown = foreign = 0
    for layer in layers:
        written.update(layer.writes[:1])
        read.update(layer.reads)
        if layer.computes is not None:
            arithmetic[layer.computes] += 1
        elif layer.foreign:
            foreign += 1
        elif layer.multiplies:
            unknown += 1
    return EngineLayerStats(dict(written), dict(read), plan_bytes, dict(arithmetic), unknown, foreign)


def layers_path(engine: str | os.PathLike[str]) -> Path:
    """Return the path of the layers file of an engine: drn.fp16.layers.json.gz for drn.fp16.engine."""
    engine = Path(engine)
    return engine.with_name(f"{engine.stem}{SUFFIX}")


def packed(inspection: Inspection, engine: str, digest: str, library: str) -> bytes:
    """Return the compressed content of a layers file.

    Args:
        engine: file name of the plan.
        digest: SHA-256 of the plan.
        library: name and version of the library of the inspector.
    """
    content = {
        "format": FORMAT,
        "engine": engine,
        "sha256": digest,
        "library": library,
        **inspection.to_dict(),
    }
    # Without a modification time, equal content gives equal bytes.
    return gzip.compress(json.dumps(content).encode(), mtime=0)


MAX_LAYERS_BYTES = 256 << 20
"""Maximum size of a decompressed layers file; engines of DRN have some hundred layers."""


def read_layers_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a layers file; ModelFileError if the file is damaged, of another format, or too large."""
    path = Path(path)
    advice = "build the engine again, or delete the file"
    with reading(path, "the layers of an engine", ModelFileError, advice):
        unpacker = zlib.decompressobj(wbits=31)
        text = unpacker.decompress(path.read_bytes(), MAX_LAYERS_BYTES)
        if not unpacker.eof:
            raise ValueError(f"it is truncated, or has more than {MAX_LAYERS_BYTES >> 20} MiB")
        content = json.loads(text)
        check_format(content, FORMAT, f"{path}", ModelFileError, advice)
        if not all(isinstance(view, dict) for view in content["profiles"]):
            raise ValueError("its profiles are not objects")
    return content


def layer_stats_of_file(content: Mapping[str, Any]) -> list[tuple[str, EngineLayerStats | None]]:
    """Return the name and the layer counts of each profile in a layers file.

    Returns:
        A name and counts for each profile; None for the counts if the inspector described no layer.
    """
    results: list[tuple[str, EngineLayerStats | None]] = []
    views = content["profiles"] or [{"name": "no profile"}]
    for index, view in enumerate(views):
        bound = view.get("bound")
        text = json.dumps(content.get("unbound") if bound is None else bound)
        try:
            layers = read_layers(text, index)
        except ModelFileError:
            layers = []
        results.append((str(view.get("name", index))[:80], count_layers(layers) if layers else None))
    return results
