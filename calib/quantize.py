"""`python -m calib.quantize`: write an INT8 or FP8 graph from an FP32 graph and its calibration table."""

from __future__ import annotations

import logging
from pathlib import Path

from calib.calibration_table import CalibrationTable
from calib.graph.onnx_graph import load_fp32_graph
from calib.graph.precision_audit import MIN_SHARES, audit_graph
from calib.qdq_quantizer import QuantDtype, QuantizationPolicy, insert_qdq, modules
from calib.quantization_plan import QuantizationPlan
from runtime.artifacts.onnx_metadata import with_digest
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.errors import OutputError
from runtime.core.io.atomic_files import atomic_write
from runtime.core.io.input_files import is_same_file

log = logging.getLogger("drn")


def quantize(
    onnx: Path,
    table: Path,
    output: Path,
    *,
    keep: tuple[str, ...] = (),
    plan: Path | None = None,
    kind: QuantDtype = "int8",
    opset: int | None = None,
) -> Path:
    """Insert QuantizeLinear and DequantizeLinear nodes into an FP32 graph.

    Args:
        onnx: FP32 graph from `python -m export.to_onnx` that the table was measured on.
        table: calibration table from `python -m calib.calibrate`.
        output: ONNX file to write.
        keep: modules to leave in FP32, such as prop_fc, fpn, fcos.head.mix_fc.
        plan: quantization plan from `python -m calib.restore`, measured on this graph.
        kind: 8-bit data type to quantize to; fp8 is E4M3.
        opset: opset of the file. Default: the opset of the graph; fp8 uses 19. FP16 around INT8 requires 19.

    Returns:
        `output`.

    Raises:
        ModelFileError: `onnx` is not an FP32 graph of this toolkit.
        CalibrationError: the table or plan belongs to another graph, or a module is unknown.
    """
    for given in (onnx, table, plan):
        if is_same_file(output, given):
            raise OutputError(f"--output {output} is also an input. Choose another file name.", code="output_is_input")
    calibration = CalibrationTable.load(table)
    model = load_fp32_graph(onnx)
    calibration.check(model, str(onnx))
    if plan is not None:
        keep = (*keep, *QuantizationPlan.load(plan).checked(model, calibration, kind, str(onnx)).keep)
    policy = QuantizationPolicy(keep=tuple(dict.fromkeys(keep)))
    log.info("Quantizing ...")
    with atomic_write(output) as temporary:
        result = insert_qdq(model, calibration, policy, kind, opset)
        temporary.write_bytes(with_digest(result.SerializeToString()))
        size = temporary.stat().st_size
    share = audit_graph(result).share(kind)
    print(f"{kind.upper()}: {', '.join(modules(model, policy, kind))}")
    if policy.keep:
        print(f"kept: {', '.join(policy.keep)}")
    print(
        f"{100 * share:.1f} % of the multiply-adds in {kind.upper()}; {size / 1e6:.1f} MB, "
        f"{size / Path(onnx).stat().st_size:.3f} of FP32; opset {result.opset_import[0].version}."
    )
    if share < MIN_SHARES[kind]:
        log.warning(
            "Less than %.0f %% of the multiply-adds are in %s, so FP16 may be faster. Measure both, or shorten --keep.",
            *(100 * MIN_SHARES[kind], kind.upper()),
        )
    report_written(output)
    suggest_next_command("export.verify", "--reference", onnx, "--model", output, "--data", "DIR")
    return Path(output)


if __name__ == "__main__":
    command(quantize)
