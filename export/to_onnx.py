"""A checkpoint becomes ONNX: traced, tidied, proven equal to torch, and only then kept."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import platform
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.graph.conv_padding import padding_apart
from calib.graph.split_model import pair_paths, prepared_graphs, prepared_paths, split_graph, write_pair
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import sealed
from runtime.core.batch import ENCODED_FEATURES, PREPARED_FEATURES, VIDEO_INDEX, Batch, Heads
from runtime.core.cli import command, next_command
from runtime.core.errors import DeviceError, OutputError, PromiseBroken, ShapeError
from runtime.core.io.files import check_writable, replace_when_whole

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from train.network.model import DRN, DRNConfig

log = logging.getLogger("drn")

INPUTS = tuple(field.name for field in dataclasses.fields(Batch))
OUTPUTS = tuple(field.name for field in dataclasses.fields(Heads))

OLDEST_OPSET, TRACED_OPSET, NEWEST_OPSET = 17, 18, 23

TOLERANCE = 1e-4
"""Largest difference between ONNX Runtime and torch, as a share of the output's largest value (or of 1 where that is
smaller). Folded and merged layers round once more, over sums of up to 12,288 products; ten times less is usual."""

BATCH_SIZES = (1, 2, 3, 8, 17)


def to_onnx(
    checkpoint: Path,
    output: Path,
    *,
    split: bool = False,
    prepare: bool = False,
    opset: int = OLDEST_OPSET,
    max_query_length: int | None = None,
) -> Path:
    """Export a checkpoint to one self-sufficient ONNX file, once ONNX Runtime is seen to answer as torch does.

    Batch size and query length are free. The largest differences are printed; beyond the tolerance nothing is kept.

    Args:
        checkpoint: a `drn.pt`, of `python -m train` or `python -m train.convert`; or a `c3d.pt` of the latter, which
            becomes an extractor of clip features: of the other flags only --opset concerns it.
        output: the ONNX file to write.
        split: also write the model in two files, NAME.video.onnx and NAME.query.onnx, so that a video is encoded once
            and asked often; the second is the one to give as --model.
        prepare: with --split, also write what makes dozens of queries on one video at once faster still on a CPU,
            NAME.prepare.onnx and NAME.prepared.onnx.
        opset: of the graph, 17 to 23; TensorRT 8.6 reads 17 at most.
        max_query_length: most words of a query; every length up to it is checked. When not given, 64 or the longest
            query of the data set that the network learnt from.

    Returns:
        `output`.

    Raises:
        CheckpointError: `checkpoint` cannot be read or is not one of ours.
        OutputError: `output` cannot be written.
        PromiseBroken: the graph and torch differ by more than the tolerance.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ShapeError(
            f"Opset {opset} was asked for and {OLDEST_OPSET} to {NEWEST_OPSET} can be written; leave --opset out."
        )
    if max_query_length is not None and max_query_length < 1:
        raise ShapeError(f"A query has at least 1 word, and --max-query-length {max_query_length} was asked for.")
    if output.suffix != ".onnx" and not output.is_dir():
        raise OutputError(f"--output {output} should end in .onnx: models are told apart by their names.")
    try:
        import onnx  # noqa: F401 - needed by what is called below
        import onnxruntime

        from train.checkpoints import load_checkpoint, source_hash
        from train.network.c3d import is_c3d_file
    except ImportError as error:
        raise DeviceError(
            f"Exporting needs torch, onnx, onnxscript and onnxruntime, and one cannot be imported ({error}); "
            "run `pip install 'drn-deploy[export]'`."
        ) from error

    if output.resolve() == checkpoint.resolve():
        raise OutputError(f"--output {output} is the checkpoint itself; choose another.")
    if is_c3d_file(checkpoint):
        from export.tracing.extractor_to_onnx import export_extractor

        if split:
            raise ShapeError(f"{checkpoint} is an extractor of clip features, which is not split; leave --split out.")
        return export_extractor(checkpoint, output, opset=opset)
    if prepare and not split:
        raise ShapeError("--prepare writes parts of a model that is split; pass --split too.")
    parts = (*pair_paths(output), *(prepared_paths(output) if prepare else ())) if split else ()
    for part in parts:
        check_writable(part, checkpoint)
    log.info("Reading %s ...", checkpoint)
    loaded = load_checkpoint(checkpoint)
    max_query_length = max_query_length or loaded.longest_query
    manifest = loaded.manifest(max_query_length, sources=source_hash(checkpoint), producer=producer())
    model = loaded.model()
    # Entered before the work, so that an unwritable output is known at once.
    with replace_when_whole(output) as temporary:
        log.info("Tracing the network (10 to 30 s) ...")
        exported = export_model(model, manifest, opset=opset)
        temporary.write_bytes(sealed(padding_apart(exported).SerializeToString()))
        differences = check_against_torch(temporary, model, max_query_length)
        size = temporary.stat().st_size
        query = output
        if split:
            pair = split_graph(exported)
            for name, difference in check_pair_against_torch(*pair, model, max_query_length, prepare=prepare).items():
                differences[name] = max(differences[name], difference)
            *_, query = write_pair(*pair, output, prepare=prepare)
    print(report(differences))
    log.info(
        "%s: %.1f MB, opset %d, checked against torch in ONNX Runtime %s for batches of %s and every query length "
        "from 1 to %d.",
        output,
        size / 1e6,
        opset,
        onnxruntime.__version__,
        ", ".join(map(str, BATCH_SIZES)),
        max_query_length,
    )
    if split:
        log.info("%s: the same in parts, checked likewise.", ", ".join(path.name for path in parts))
    if not manifest.vocabulary.words:
        log.warning(
            "%s has no words, so sentences cannot be asked of it: convert its checkpoint again with --vocabulary.",
            output,
        )
    next_command("runtime.evaluate", "--model", query, "--data", "DIR")
    return output


def export_model(
    model: DRN, manifest: Manifest, *, opset: int = OLDEST_OPSET, graph: nn.Module | None = None
) -> onnx.ModelProto:
    """Return the inference graph of `model` with `manifest` inside.

    A node is called `<module>/<operator>`, as `fcos.head.mix_fc/Conv`, where the module is the one of
    `export.tracing.exportable_model.ExportableDRN`; a tensor is called after the node it comes from, and a weight after
    its module, as `fcos.head.mix_fc.weight`. `drn_modules` turns a node's name into the names of DRN's own modules.

    Args:
        model: the network, in any mode, on the CPU; it stays as it is.
        manifest: what the file says of itself.
        opset: of the graph, 17 to 23.
        graph: what is traced; `export.tracing.exportable_model.ExportableDRN` of the model when None.
    """
    from export.tracing.exportable_model import ExportableDRN

    traced = _traced(graph or ExportableDRN(model), model.config, max(opset, TRACED_OPSET))
    return finished(
        traced,
        opset,
        {METADATA_KEY: manifest.to_json()},
        "Dense Regression Network: where in a video a sentence happens. All that is needed to use it "
        f"stands under the metadata key {METADATA_KEY!r}.",
    )


def finished(traced: onnx.ModelProto, opset: int, metadata: dict[str, str], doc_string: str) -> onnx.ModelProto:
    """Return what the exporter traced, tidied, in the opset asked for, with its metadata, and checked."""
    import onnx

    _tidy(traced.graph)
    if opset < TRACED_OPSET:
        _lower(traced.graph)
    exported = onnx.helper.make_model(
        traced.graph,
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)]),
        producer_name="drn-deploy",
        producer_version=producer()["drn-deploy"],
        doc_string=doc_string,
    )
    onnx.helper.set_model_props(exported, metadata)
    onnx.checker.check_model(exported, full_check=True)
    return exported


def check_against_torch(path: Path, model: DRN, max_query_length: int) -> dict[str, float]:
    """Return, for each output, the largest difference between an ONNX file and torch, relative as in `TOLERANCE`.

    Raises:
        PromiseBroken: one is beyond `TOLERANCE`, or the graph does not run.
    """
    session = open_session(str(path))
    questions = ((batch, list(range(len(batch)))) for batch in check_batches(model.config, max_query_length))
    return _differences(model, questions, lambda batch, _: session.run(list(OUTPUTS), vars(batch)))


def check_pair_against_torch(
    video: onnx.ModelProto, query: onnx.ModelProto, model: DRN, max_query_length: int, *, prepare: bool = False
) -> dict[str, float]:
    """Return the largest differences between a split graph and torch, as `check_against_torch`.

    The queries of a batch ask fewer videos than there are queries, some several times, in any order. With `prepare`,
    those about one video alone go the way of `calib.graph.split_model.prepared_graphs`.
    """
    parts = (video, query, *(prepared_graphs(query) if prepare else ()))
    encoder, asker, *prepared = (open_session(part.SerializeToString()) for part in parts)

    def ask(batch: Batch, videos: list[int]) -> list[np.ndarray]:
        distinct, index = np.unique(videos, return_inverse=True)
        (encoded,) = encoder.run([ENCODED_FEATURES], {"segment_features": batch.segment_features[distinct]})
        feed = {
            "query_tokens": batch.query_tokens,
            "query_length": batch.query_length,
            VIDEO_INDEX: index.astype(np.int32),
            ENCODED_FEATURES: encoded,
            "segment_spans": batch.segment_spans[distinct],
        }
        if prepared and len(distinct) == 1:
            (features,) = prepared[0].run([PREPARED_FEATURES], {ENCODED_FEATURES: encoded})
            for name in (VIDEO_INDEX, ENCODED_FEATURES):
                del feed[name]
            return prepared[1].run(list(OUTPUTS), {**feed, PREPARED_FEATURES: features})
        return asker.run(list(OUTPUTS), feed)

    def questions() -> Iterator[tuple[Batch, list[int]]]:
        rng = np.random.default_rng(1)
        for batch in check_batches(model.config, max_query_length):
            # Every second batch asks one video alone.
            kinds = rng.integers(1, len(batch) + 1) if batch.query_tokens.shape[1] % 2 else 1
            yield batch, rng.integers(0, kinds, len(batch)).tolist()

    return _differences(model, questions(), ask)


def open_session(source: str | bytes, threads: int | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def _differences(
    model: DRN,
    questions: Iterator[tuple[Batch, list[int]]],
    answer: Callable[[Batch, list[int]], Sequence[np.ndarray]],
) -> dict[str, float]:
    """Return the largest difference of each output between `answer` and torch; see `check_against_torch`.

    A question is a batch, and for each of its queries the row of the batch whose video it is about.
    """
    import torch
    from tqdm import tqdm

    differences = dict.fromkeys(OUTPUTS, 0.0)
    training = model.training
    model.eval()
    try:
        for batch, videos in tqdm(
            list(questions), desc="Checking against torch", unit="batch", leave=False, disable=None
        ):
            asked = Batch(
                batch.query_tokens, batch.query_length, batch.segment_features[videos], batch.segment_spans[videos]
            )
            with torch.inference_mode():
                inputs = [torch.from_numpy(getattr(asked, name)) for name in INPUTS]
                wanted = model(*inputs)
                _check_finite(model, inputs, wanted)
            try:
                found = answer(batch, videos)
            # ONNX Runtime's exceptions share no base class below Exception.
            except Exception as error:
                raise PromiseBroken(
                    f"The graph does not run for {len(batch)} queries of up to {batch.query_tokens.shape[1]} words "
                    f"({str(error).splitlines()[0]}); nothing was kept."
                ) from error
            for name, ours, theirs in zip(OUTPUTS, found, wanted):
                difference = relative_difference(ours, theirs.numpy())
                # `not <=` also refuses NaN.
                if not difference <= TOLERANCE:
                    raise PromiseBroken(
                        f"{name} of the graph differs from torch by {difference:.1e} of its largest value for "
                        f"{len(batch)} queries of {batch.query_length.tolist()} words, and {TOLERANCE:.0e} is allowed; "
                        "nothing was kept."
                    )
                differences[name] = max(differences[name], difference)
    finally:
        model.train(training)
    return differences


def _check_finite(model: DRN, inputs: Sequence[Any], heads: Sequence[Any]) -> None:
    """Raise PromiseBroken, naming the first module that gives it, if torch computes a number that is not finite."""
    if all(bool(head.isfinite().all()) for head in heads):
        return
    import torch

    culprits: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: Any, given: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if any(isinstance(entry, torch.Tensor) and not entry.isfinite().all() for entry in tensors):
                culprits.append(name)

        return look

    # Modules with modules inside end after these: the first that is heard of is the innermost.
    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    first = f"first in {culprits[0]}" if culprits else "after its last module"
    raise PromiseBroken(
        f"The network computes numbers that are not finite in torch, {first}, for made-up queries; nothing was kept. "
        "Train or convert the checkpoint again.",
    )


def relative_difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference of two arrays of one shape over the largest of `wanted`, or over 1 if larger."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.abs(found - wanted).max() / max(1.0, np.abs(wanted).max()))


def report(differences: dict[str, float]) -> str:
    """Return the table of largest differences per output."""
    lines = [f"{'output':<20} {'largest difference':>18} {'allowed':>8}"]
    lines += [f"{name:<20} {difference:>18.1e} {TOLERANCE:>8.0e}" for name, difference in differences.items()]
    return "\n".join(lines)


def producer() -> dict[str, str]:
    """Return the versions of what makes a file, for its manifest."""
    return {"python": platform.python_version()} | {
        name: _version(name) for name in ("drn-deploy", "torch", "onnx", "onnxscript")
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep torch's exporter quiet: it warns of packages that we do not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _traced(graph: nn.Module, config: DRNConfig, opset: int) -> onnx.ModelProto:
    import torch

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("query_length", min=1)
    # Any sizes but 0 and 1, which torch would take for special.
    example = (
        torch.ones(3, 5, dtype=torch.int32),
        torch.tensor([5, 2, 4], dtype=torch.int32),
        torch.zeros(3, config.num_segments, config.feature_dim),
        torch.zeros(3, config.num_segments, 2),
    )
    with silence(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: batch, 1: length}, {0: batch}, {0: batch}, {0: batch}),
            input_names=INPUTS,
            output_names=OUTPUTS,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _tidy(graph: onnx.GraphProto) -> None:
    """Drop what the exporter noted (stack traces, with paths of this machine), and name everything after its module."""
    graph.name = "drn"
    scopes = _scopes(list(graph.node))

    names: dict[str, str] = {value.name: value.name for value in (*graph.input, *graph.output)}
    taken: dict[str, int] = {}
    produced: set[str] = set()
    for node, scope in zip(graph.node, scopes):
        name = f"{scope}/{node.op_type}"
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for index, output in enumerate(node.output):
            produced.add(output)
            names.setdefault(output, node.name if len(node.output) == 1 else f"{node.name}:{index}")

    for tensor in graph.initializer:
        # Weights have their module's name; the exporter's own constants are numbered.
        if re.fullmatch(r"\w+", tensor.name):
            names[tensor.name] = f"constant_{sum(name.startswith('constant_') for name in names.values())}"
        names.setdefault(tensor.name, tensor.name)
        tensor.name = names[tensor.name]
        del tensor.metadata_props[:]
        tensor.doc_string = ""

    for node in graph.node:
        node.input[:] = [names[name] if name else "" for name in node.input]
        node.output[:] = [names[name] for name in node.output]
        del node.metadata_props[:]
        node.doc_string = ""
    shapes = [value for value in graph.value_info if value.name in produced]
    for value in shapes:
        value.name = names[value.name]
    for value in (*graph.input, *graph.output, *shapes):
        del value.metadata_props[:]
        value.doc_string = ""

    del graph.value_info[:]
    graph.value_info.extend(shapes)
    del graph.metadata_props[:]
    graph.doc_string = ""


def _lower(graph: onnx.GraphProto) -> None:
    """Turn opset 18, the exporter's least, into 17: our operators read the same in both, as the checker confirms."""
    # Attributes that came with 18 and here only say what 17 does anyway: equal parts, as many as there are outputs;
    # no smoothing, scales as given.
    news = {"Split": ("num_outputs",), "Resize": ("antialias", "keep_aspect_ratio_policy")}
    for node in graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name not in news.get(node.op_type, ())]
        del node.attribute[:]
        node.attribute.extend(kept)


def _scopes(nodes: list[onnx.NodeProto]) -> list[str]:
    """Return the module of each node; one whose module the exporter lost belongs where its result is used."""
    scopes: list[str] = []
    used_in: dict[str, str] = {}
    for node in reversed(nodes):
        noted = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "")
        # The list of enclosing modules, outermost first, then the operation: "['', 'fpn', 'relu_3']".
        enclosing = [name for name in re.findall(r"'([^']*)'", noted)[:-1] if name and not name.startswith("_")]
        scope = enclosing[-1] if enclosing else next((used_in[name] for name in node.output if name in used_in), "drn")
        scopes.insert(0, scope)
        used_in.update(dict.fromkeys(node.input, scope))
    return scopes


def check_batches(config: DRNConfig, max_query_length: int) -> Iterator[Batch]:
    """Yield batches of random queries and videos: every query length, and the batch sizes of `BATCH_SIZES`."""
    rng = np.random.default_rng(0)
    for longest in range(1, max_query_length + 1):
        # Alone and beside a shorter or equal one, which comes first half of the time.
        others = rng.integers(1, longest + 1, longest % 2)
        yield _check_batch(config, rng.permutation([longest, *others]), rng)
    for size in BATCH_SIZES:
        lengths = rng.integers(1, max_query_length + 1, size)
        lengths[rng.integers(size)] = max_query_length
        yield _check_batch(config, lengths, rng)


def _check_batch(config: DRNConfig, lengths: np.ndarray, rng: np.random.Generator) -> Batch:
    """Return random words, and features as C3D gives them: about 80 % zeros, the others positive, some large."""
    count, segments, channels = len(lengths), config.num_segments, config.feature_dim
    tokens = rng.integers(1, config.vocab_size + 1, (count, lengths.max()), dtype=np.int32)
    tokens[np.arange(lengths.max()) >= lengths[:, None]] = 0
    gains = rng.lognormal(0, 0.5, channels).astype(np.float32)
    features = np.maximum(rng.standard_normal((count, segments, channels), dtype=np.float32) - 0.84, 0) ** 1.3 * gains
    borders = np.linspace(0, 1, segments + 1) * (1 - rng.uniform(0, 0.01, (count, 1)))
    spans = np.stack((borders[:, :-1], borders[:, 1:]), axis=-1).astype(np.float32)
    return Batch(tokens, lengths.astype(np.int32), features, spans)


if __name__ == "__main__":
    command(to_onnx)
