"""Imitate the output of the engine inspectors of TensorRT 8.6, 10, 11 and TensorRT-RTX, without a GPU.

Rules and their sources:

- Formats, and up to TensorRT 10 the types beside them, are shown only with an execution context and all input shapes
  set: `IEngineInspector::setExecutionContext` in NvInferRuntime.h ("Otherwise ... format information will not be
  shown").
- 8.6 and 10 then write "N/A due to dynamic shapes" as "Format/Datatype" (Polygraphy, backend/trt/util.py: "N/A").
- 8.6 hides sizes and types also with a context bound and all shapes set. Weights and kernel names stay (TensorRT 8.6.0
  on an H200, 2026-11-29: `recorded/inspector-8.6.0-*.layers.json.gz`).
- 8.6 separates the nodes in "Metadata" by the control character 0x1E, which it does not escape (the same engines).
- 11 and TensorRT-RTX write "Format": "Format not available due to dynamic shapes" beside "Datatype": both strings are
  in libtensorrt_rtx.so of 1.7.1 (`test_rtx_library_contains_messages_of_the_fake`).
- 8.6 lists the layers of each profile, from 10 on those of one (Polygraphy, backend/trt/util.py: "In TRT 10, layer
  information is not specified per profile").
- A Myelin ForeignNode shows its border tensors alone (NVIDIA/TensorRT#2577).
- A convolution shows "Weights": {"Type": ...} and "TacticName" (NVIDIA's Developer Guide, "Engine Inspector"). Kernels
  that Myelin generated are "gemm" and "kgen", with the graph's nodes under "Metadata" (10.x).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

SCENARIOS = ("convolutions", "generated", "foreign", "mixed", "int8", "wide", "names")
"""What an engine may look like.

convolutions: FP16 convolutions with weights and named kernels. generated: FP16 kernels of Myelin, without either.
foreign: one ForeignNode. mixed: FP16 convolutions, and a ForeignNode in place of the LSTM. int8: INT8 convolutions with
FP16 borders, and FP16 matrix products. wide: 30 FP32 convolutions and one FP16 copy. names: layer names only.
"""

_WORDS = {"fp32": "Float", "fp16": "Half", "int8": "Int8", "int32": "Int32"}
_KERNELS = {
    "fp32": "sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc_tilesize128x64x16_stage4",
    "fp16": "sm80_xmma_fprop_implicit_gemm_indexed_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64x32_stage4",
    # It multiplies INT8 and accumulates in FP32: its name contains both.
    "int8": "sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_tilesize128x32x64",
}
# The nodes are those of DRN graphs.
CONVOLUTIONS = ("prop_fc.conv/Conv", "backbone_net.layers.0/Conv", "fpn.layer_blocks.0/Conv", "fcos.head.towers.0/Conv")
PRODUCTS = ("query_encoder.W1/MatMul", "query_encoder.attention/MatMul")


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes layers in the form of one version.

    Attributes:
        version: of TensorRT: 8.6, 10.16, 11.4, or 1.7 for TensorRT-RTX.
        bound: whether a context is bound and all input shapes are set.
        hides: whether types are hidden in any case, as in 8.6.
    """

    version: str
    bound: bool
    hides: bool = False

    @property
    def old(self) -> bool:
        return self.version.startswith("8.")

    @property
    def apart(self) -> bool:
        """Return whether type and format are separate fields."""
        return self.version.startswith(("11.", "1."))

    def tensor(self, name: str, kind: str) -> dict[str, Any]:
        """Return a tensor, with its sizes and format only if they are known."""
        shown = self.bound and not (self.hides or self.old)
        about = {"Name": name, "Location": "Device", "Dimensions": [8 if shown else -1, 4096, 1, 32]}
        word = _WORDS[kind]
        if self.apart:
            form = "Row major linear" if shown else "Format not available due to dynamic shapes"
            return {**about, "Format": form, "Datatype": word}
        return {**about, "Format/Datatype": word if shown else "N/A due to dynamic shapes"}

    def layer(self, name: str, kind: str, reads: str, writes: str, **more: Any) -> dict[str, Any]:
        inputs, outputs = [self.tensor(f"{name}_in", reads)], [self.tensor(f"{name}_out", writes)]
        return {"Name": name, "LayerType": kind, "Inputs": inputs, "Outputs": outputs, **more}

    def convolution(self, node: str, kind: str, writes: str | None = None) -> dict[str, Any]:
        return self.layer(
            f"{node} + PWN({node.rpartition('/')[0]}/Relu)", "CaskConvolution", kind, writes or kind,
            ParameterType="Convolution", Weights={"Type": _WORDS[kind], "Count": 131072},
            Bias={"Type": "Float", "Count": 256}, TacticName=_KERNELS[kind], TacticValue="0x3e2b881168d9689d",
            Metadata=f"[ONNX Layer: {node}]\x1e[ONNX Layer: {node.rpartition('/')[0]}/Relu]",
        )  # fmt: skip

    def generated(self, node: str, kind: str) -> dict[str, Any]:
        name = f"__myl_Fc_myl0_{len(node)}"
        return self.layer(name, "gemm", kind, kind, Metadata=f"[ONNX Layer: {node}]", TacticName=name)

    def foreign(self, first: str, last: str, reads: str = "fp32", writes: str = "fp32") -> dict[str, Any]:
        return self.layer(
            f"{{ForeignNode[{first}...{last}]}}", "Myelin", reads, writes, TacticValue="0x0000000000000000"
        )

    def copy(self, node: str, reads: str, writes: str) -> dict[str, Any]:
        name = f"Reformatting CopyNode for Input Tensor 0 to {node}"
        return self.layer(name, "Reformat", reads, writes, ParameterType="Reformat", Origin="REFORMAT")

    def around(self) -> list[dict[str, Any]]:
        """Return layers of every engine that do not multiply."""
        return [
            self.copy(CONVOLUTIONS[0], "fp32", "fp16"),
            self.layer("query_encoder/Range", "Shuffle", "int32", "int32"),
            self.layer("fcos.head/Exp", "PointWise", "fp32", "fp32", ParameterType="PointWise"),
        ]


def layers(writer: Writer, scenario: str) -> list[Any]:
    """Return the layers of one profile."""
    if scenario == "names":
        return [f"{node}" for node in CONVOLUTIONS]
    if scenario == "convolutions":
        layer_list = [writer.convolution(node, "fp16") for node in CONVOLUTIONS]
    elif scenario == "generated":
        layer_list = [writer.generated(node, "fp16") for node in (*CONVOLUTIONS, *PRODUCTS)]
    elif scenario == "foreign":
        return [writer.foreign("query_encoder/Gather", "fcos.head/Exp")]
    elif scenario == "mixed":
        layer_list = [writer.convolution(node, "fp16") for node in CONVOLUTIONS]
        layer_list.append(writer.foreign("query_encoder.biLSTM/LSTM", "query_encoder.W1/MatMul"))
    elif scenario == "int8":
        layer_list = [writer.convolution(node, "int8", "fp16") for node in CONVOLUTIONS]
        layer_list += [
            writer.layer(
                node, "MatrixMultiply", "fp16", "fp16", TacticName="ampere_h16816gemm_256x128_ldg8_stages_32x3_nn_v1"
            )
            for node in PRODUCTS
        ]
    else:
        assert scenario == "wide", scenario
        layer_list = [writer.convolution(f"backbone_net.layers.{index % 3}/Conv", "fp32") for index in range(30)]
        return [*layer_list, writer.copy(CONVOLUTIONS[0], "fp32", "fp16")]
    return [*writer.around(), *layer_list]


def document(version: str, scenario: str, *, bound: bool, profiles: int = 2, hides: bool = False) -> str:
    """Return the JSON text of `get_engine_information`.

    Args:
        version: of TensorRT.
        scenario: key of `SCENARIOS`.
        bound: whether a context is bound and all input shapes are set.
        profiles: of the engine.
        hides: whether types are hidden in any case.
    """
    writer = Writer(version, bound, hides)
    layer_list = layers(writer, scenario)
    if writer.old:
        layer_list = [_of_profile(layer, index) for index in range(profiles) for layer in layer_list]
    text = json.dumps({"Layers": layer_list, "Bindings": ["query_tokens", "query_length"]})
    return text.replace("\\u001e", "\x1e") if writer.old else text


def _of_profile(layer: Any, index: int) -> Any:
    if index == 0:
        return layer
    if isinstance(layer, str):
        return f"{layer} [profile {index}]"
    return {**layer, "Name": f"{layer['Name']} [profile {index}]"}


def names(text: str) -> Sequence[str]:
    """Return the names of the layers in the JSON text."""
    return [layer if isinstance(layer, str) else layer["Name"] for layer in json.loads(text, strict=False)["Layers"]]
