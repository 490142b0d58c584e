"""`python -m export.verify`: does one model answer as another, in seconds and in recall?"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.layers import Layers, compare_layers, load_graph, precision_of, require_polygraphy
from export.layers import table as layer_table
from export.parity import CONFIDENCE, Budget, Parity, check_comparable, compare, points, verdict
from export.passport import VISIBLE_S, ModelFile, Table, lineage, passport
from runtime.annotations import Annotation, DataSet
from runtime.backends import Device
from runtime.command import command, next_command
from runtime.decoding import Protocol
from runtime.errors import GroundingError, ModelFileError, OutputError, PromiseBroken
from runtime.evaluation import batches_of
from runtime.files import write_json, write_text
from runtime.grounder import BATCH_SIZE, Grounder
from runtime.metrics import table as recall_table

log = logging.getLogger("drn")

LAYER_QUERIES, LAYER_BATCH = 8, 4
"""Queries whose every tensor is compared by --layers, and how many at a time: a query has some 10 MB of tensors."""


def verify(
    reference: Path,
    model: Path,
    data: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    max_drop: float = 0.2,
    boundary_p99: float | None = None,
    protocol: Protocol | None = None,
    batch_size: int = BATCH_SIZE,
    device: Device = "auto",
    threads: int | None = None,
    output: Path | None = None,
    html: Path | None = None,
    layers: bool = False,
) -> Parity:
    """Ask two models every query of a split and judge what changed: heads, seconds, order, each answer gained or lost.

    Exit code 0 says that the budget holds, 1 that it does not. Reports are written either way.

    Args:
        reference: .pt, .onnx or .engine whose answers are to be kept.
        model: .pt, .onnx or .engine to judge.
        data: directory in the Charades-STA layout.
        split: train or test.
        limit: ask only the first so many queries.
        max_drop: points of R@1 IoU=0.7, and of mIoU, that may be lost.
        boundary_p99: seconds that 99 % of the boundaries of best moments must stay within; 0.1 for an FP32 or FP16
            model when not given, and not judged for a narrower one.
        protocol: mmaction2 or drn, for both; the reference's own when not given.
        batch_size: queries that go through the networks together; changes nothing but speed.
        device: auto, cpu or cuda.
        threads: CPU threads for each network.
        output: JSON file for everything that was found.
        html: the model's passport: one HTML page, complete in itself.
        layers: also compare every tensor that two .onnx files share, and name the DRN module that goes wrong first.

    Returns:
        What was found.

    Raises:
        GroundingError: a file cannot be read, or the two models cannot be asked the same questions.
        PromiseBroken: more is lost than the budget allows.
    """
    reference, model, data = Path(reference), Path(model), Path(data)
    _check(reference, model, batch_size, limit, max_drop, boundary_p99, output, html, layers)
    data_set = DataSet(data)
    annotations = data_set.annotations(split)[:limit]
    sides = [open_model(path, device, threads) for path in (reference, model)]
    # Before gigabytes are hashed, and again where it counts.
    check_comparable(sides[0].manifest, sides[1].manifest)
    files = [ModelFile.of(path, side.manifest) for path, side in zip((reference, model), sides, strict=True)]
    with tqdm(total=len(annotations), desc="asking both", unit="query", leave=False, disable=None) as bar:
        parity = compare(
            *sides, data_set, annotations, protocol=protocol, batch_size=batch_size, on_progress=bar.update
        )
    by_layer = _compare_layers(reference, model, sides[0], data_set, annotations) if layers else None
    budget = Budget.of(files[1].manifest.precision, max_drop, boundary_p99)
    broken = verdict(parity, budget)

    print(summary(parity, (reference.name, model.name), split))
    print(lineage(files[0], files[1])[1])
    if by_layer:
        print(f"\n{layer_table(by_layer)}\n{by_layer.sentence()}")
    again = _again(reference, model, data, split, limit, max_drop, boundary_p99, protocol, layers)
    if output:
        write_json(
            output,
            {
                **parity.to_dict(),
                "reference": files[0].to_dict(),
                "model": files[1].to_dict(),
                "lineage": lineage(files[0], files[1])[1],
                "split": split,
                "budget": dataclasses.asdict(budget),
                "broken": broken,
                "layers": by_layer.to_dict() if by_layer else None,
                "command": again,
            },
        )
    if html:
        evaluate = f"python -m runtime.evaluate --model {shlex.quote(str(model))} --data {shlex.quote(str(data))}"
        page = passport(
            parity,
            files[0],
            files[1],
            broken,
            budget=budget,
            split=split,
            census=census_of(model),
            layers=by_layer,
            commands=(again, f"{evaluate} --split {split}", f"python -m runtime.describe {shlex.quote(str(model))}"),
        )
        write_text(html, page)
        log.info("The passport is in %s.", html)
    if broken:
        where = "" if layers or {reference.suffix, model.suffix} != {".onnx"} else " Add --layers to see where."
        raise PromiseBroken(f"{model.name} does not answer as {reference.name}: {'; '.join(broken)}.{where}")
    print(f"{model.name} answers as {reference.name}: every promise is kept.")
    next_command(_next(model, files[1], data, annotations[0]))
    return parity


def summary(parity: Parity, names: Sequence[str], split: str) -> str:
    """Return what was found, for a terminal."""
    rows = [(f"{names[0]} (reference)", parity.reference), (names[1], parity.other)]
    if parity.prior:
        rows.append(("prior (constant moments)", parity.prior))
    lines = [
        recall_table(rows),
        f"{parity.queries} queries of {split}, protocol {parity.protocol}, percent.",
    ]
    if parity.simulated:
        lines.append("Features are simulated: not comparable with published numbers.")
    lines += ["", f"{'head':<20} {'largest error':>13} {'99 % within':>12} {'largest value':>13}"]
    for name, error in parity.heads.items():
        bad = f"  {error.not_finite} values not finite" if error.not_finite else ""
        lines.append(f"{name:<20} {error.max:>13.1e} {error.p99:>12.1e} {error.largest:>13.3g}{bad}")
    lines += ["", f"{'boundaries':<20} {'half within':>13} {'99 % within':>12} {'largest':>13}"]
    for label, shift in (("of best moments", parity.boundaries), ("at each location", parity.locations)):
        lines.append(f"{label:<20} {shift.p50:>11.2g} s {shift.p99:>10.2g} s {shift.max:>11.2g} s")
    overlap, order = parity.overlap, parity.order
    lines += [
        "",
        f"Best moments overlap by {overlap.mean:.4f} on average, 1 % by less than {overlap.p1:.4f}, one by "
        f"{overlap.min:.4f}.",
        f"The same moment comes first for {100 * order.first:.2f} % of the queries, the same five in the same order "
        f"for {100 * order.five:.2f} %.",
        "",
        f"{'':<12} {'gained':>7} {'lost':>7} {'McNemar p':>10} {'points':>8}  {100 * CONFIDENCE:g} % interval",
    ]
    for name, interval in parity.differences.items():
        flips = parity.flips.get(name)
        counts = f"{len(flips.gained):>7} {len(flips.lost):>7} {flips.p_value:>10.3g}" if flips else " " * 26
        spread = f"{points(interval.low)} to {points(interval.high)}"
        lines.append(f"{name:<12} {counts} {points(interval.mean):>8}  {spread}")
    shown = [row for row in parity.worst if row.shift >= VISIBLE_S]
    if shown:
        lines += [
            "",
            "Worst queries, in seconds:",
            f"{'line':>6}  {'truth':>13}  {'reference':>13}  {'model':>13}  query",
        ]
    for row in shown:
        spans = [row.truth, *((m.start, m.end) if m else None for m in (row.reference, row.other))]
        cells = (f"{f'{span[0]:.1f} - {span[1]:.1f}' if span else 'none':>13}" for span in spans)
        lines.append(f"{row.line:>6}  {'  '.join(cells)}  {row.query}")
    return "\n".join(lines)


def census_of(model: Path) -> tuple[str, Table] | None:
    """Return what an .onnx file is computed in, in a sentence and by DRN module; None for other files."""
    if model.suffix != ".onnx":
        return None
    try:
        import onnx
    except ImportError:
        log.warning("The passport holds no precision census: onnx is not installed.")
        return None
    from export.census import census

    found = census(onnx.load(model))
    total = found.total()
    kinds = sorted(total, key=total.__getitem__, reverse=True)
    shares = ", ".join(f"{100 * found.share(kind):.1f} % in {kind}" for kind in kinds)
    weights = ", ".join(f"{size / 2**20:.1f} MiB in {kind}" for kind, size in found.weight_bytes.items())
    counts = {**found.macs, "all": total}
    rows = [
        [module, *(f"{by_kind[kind] / 1e6:.2f}" if by_kind.get(kind) else "" for kind in kinds)]
        for module, by_kind in counts.items()
    ]
    sentence = f"Of its multiply-adds {shares}; of its weights {weights}."
    return sentence, (("million multiply-adds of one query", *kinds), rows)


def _check(
    reference: Path,
    model: Path,
    batch_size: int,
    limit: int | None,
    max_drop: float,
    boundary_p99: float | None,
    output: Path | None,
    html: Path | None,
    layers: bool,
) -> None:
    """Refuse what cannot work before anything is opened."""
    if batch_size < 1 or (limit is not None and limit < 1):
        raise GroundingError(f"--limit and --batch-size must be at least 1, and {limit} and {batch_size} were given.")
    # `not >=` also refuses NaN.
    if not max_drop >= 0 or not (boundary_p99 is None or boundary_p99 >= 0):
        raise GroundingError(
            f"--max-drop and --boundary-p99 cannot be negative; {max_drop} and {boundary_p99} were given."
        )
    taken = {path.resolve() for path in (reference, model)}
    for path in (output, html):
        if path is None:
            continue
        if Path(path).resolve() in taken:
            raise OutputError(f"{path} is named twice, and would be written over; choose another --output or --html.")
        taken.add(Path(path).resolve())
        if Path(path).is_dir():
            raise OutputError(f"{path} is a directory; name the file to write instead.")
    if layers:
        for path in (reference, model):
            if path.suffix != ".onnx":
                raise ModelFileError(
                    f"--layers looks into .onnx files and {path.name} is none; compare with the .onnx file it was made "
                    "from or into."
                )
        require_polygraphy()


def open_model(path: Path, device: Device, threads: int | None) -> Grounder:
    """Open a model as it is to be judged: on a CPU, a graph narrower than FP16 is computed as it stands.

    ONNX Runtime has no BF16 kernels there, and its fusions of Q/DQ add errors of up to 2.7e-2 that no engine has.
    """
    if path.suffix == ".onnx" and path.is_file() and device != "cuda" and importlib.util.find_spec("onnx"):
        graph = load_graph(path)
        precision = precision_of(graph, path)
        if precision not in ("fp32", "fp16"):
            from calib.graphs import GraphBackend
            from export.precision import emulated

            log.info("%s is %s: computed on the CPU as it stands, without ONNX Runtime's fusions.", path, precision)
            return Grounder(GraphBackend(emulated(graph), threads, optimised=precision == "bf16"))
    return Grounder.load(path, device, threads)


def _compare_layers(
    reference: Path, model: Path, grounder: Grounder, data_set: DataSet, annotations: Sequence[Annotation]
) -> Layers:
    # Spread over the split, whose neighbours ask about one video.
    chosen = annotations[:: max(1, len(annotations) // LAYER_QUERIES)][:LAYER_QUERIES]
    batches = [batch for _, batch in batches_of(grounder, data_set, chosen, LAYER_BATCH)]
    with tqdm(total=len(batches), desc="comparing layers", unit="batch", leave=False, disable=None) as bar:
        return compare_layers(reference, model, batches, on_progress=bar.update)


def _again(
    reference: Path,
    model: Path,
    data: Path,
    split: str,
    limit: int | None,
    max_drop: float,
    boundary_p99: float | None,
    protocol: Protocol | None,
    layers: bool,
) -> str:
    """Return the command that finds the same again."""
    parts: list[Any] = ["python", "-m", "export.verify", "--reference", reference, "--model", model, "--data", data]
    parts += ["--split", split, "--max-drop", max_drop]
    for option, value in (("--limit", limit), ("--boundary-p99", boundary_p99), ("--protocol", protocol)):
        if value is not None:
            parts += [option, value]
    return shlex.join(map(str, parts + (["--layers"] if layers else [])))


def _next(model: Path, file: ModelFile, data: Path, first: Annotation) -> str:
    if model.suffix == ".onnx" and file.manifest.precision == "fp32":
        return f"python -m export.build_engine --model {model} --precision fp16 --data {data}"
    return f'python -m runtime.infer --model {model} --data {data} --video {first.video} --query "{first.sentence}"'


if __name__ == "__main__":
    command(verify)
