"""Convert published DRN, C3D and I3D checkpoints to `drn.pt`, `c3d.pt` and `i3d.pt`, without running code in them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from runtime.artifacts.manifest import Features
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.decoding import Decoding
from runtime.core.errors import CheckpointError, excerpt, reading
from runtime.core.io.array_files import read_archive
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file, is_same_file, read_json
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from train.checkpoints import FORMAT, Checkpoint, check_weights, load, save_checkpoint, some
from train.extractors.checkpoint import from_published, is_published_extractor, save_extractor
from train.extractors.published import ExtractorCheckpoint
from train.network.model import BACKBONE_CHANNELS, DRN, POSITION_CHANNELS, DRNConfig

log = logging.getLogger("drn")

Layout = Literal["mmaction2", "drn"]

# The authors' names to mmaction2's, which this toolkit uses. Source: both code bases; the outputs are equal.
_RENAMES = (
    (re.compile(r"query_encoder\.qInput\."), lambda match: "query_encoder.W3."),
    (re.compile(r"query_encoder\.qInput(\d+)\."), lambda match: f"query_encoder.W2.{match[1]}."),
    (re.compile(r"query_encoder\.cmd_inter2logits\."), lambda match: "query_encoder.W1."),
    (re.compile(r"backbone_net\.forward_conv(\d+)\."), lambda match: f"backbone_net.layers.{match[1]}."),
    (re.compile(r"fpn\.fpn_inner(\d+)\."), lambda match: f"fpn.inner_blocks.{int(match[1]) - 1}."),
    (re.compile(r"fpn\.fpn_layer(\d+)\."), lambda match: f"fpn.layer_blocks.{int(match[1]) - 1}."),
    (re.compile(r"qInput(\d+)\."), lambda match: f"qInput.{match[1]}."),
)
# Those of Charades-STA's training videos and moments (`windows_of`), which the published networks were trained on.
CHARADES_STA = Windows(longest=194.42, length=43.0, overlap=14.5)
# Maximum number of arrays in an .npz file; I3D has 230.
MAX_ARRAYS = 1000
# Modules of the authors' network that its forward pass never uses.
_UNUSED = ("query_encoder.textualAttention.", "fcos.head.centerness.")


@dataclasses.dataclass(frozen=True)
class PublishedCheckpoint:
    """The content of a published checkpoint, under the names of mmaction2.

    Attributes:
        weights: name to array, as stored.
        layout: code base whose names the file has.
        unused: names of the tensors that were removed, as the file spells them.
        stage: training stage, if its configuration records one.
        epoch: number of epochs trained, if recorded.
    """

    weights: Mapping[str, np.ndarray]
    layout: Layout
    unused: tuple[str, ...]
    stage: int | None
    epoch: int | None


def convert(
    checkpoint: tyro.conf.Positional[Path],
    output: Path | None = None,
    vocabulary: Path | None = None,
    stage: Literal[1, 2, 3] | None = None,
) -> Checkpoint | ExtractorCheckpoint:
    """Convert a published DRN checkpoint to drn.pt, or a published extractor to c3d.pt or i3d.pt.

    Accepts mmaction2's published file, its training checkpoints (epoch_N.pth), the authors' .pth.tar; for C3D
    mmaction2's files and c3d.pickle; and for I3D rgb_imagenet.pt of pytorch-i3d and the flat .npz layout of Flax.
    The kind of file and all sizes of the network are read from its tensors. Code in the file is not run.

    Example:
        python -m train.convert drn_published.pth --vocabulary Charades_word2id.json

    Args:
        checkpoint: file to convert.
        output: checkpoint to write. Default: drn.pt, c3d.pt or i3d.pt.
        vocabulary: word table of the network, such as Charades_word2id.json. Published checkpoints do not contain
            it, and without it the converted network accepts no sentences.
        stage: training stage of the checkpoint. After stage 1 the IoU head is untrained and is not used in scores.
            Default: recorded in the checkpoint, else 3.

    Raises:
        CheckpointError: the file cannot be read, is not a DRN, or a tensor is missing, unexpected or has the wrong
            shape; or the word table does not fit the network.
    """
    for path in (Path("drn.pt"), Path("c3d.pt"), Path("i3d.pt")) if output is None else (output,):
        if is_same_file(path, checkpoint):
            raise CheckpointError(
                f"--output {path} is the checkpoint to convert. Choose another --output.", code="output_is_input"
            )
    table = None if vocabulary is None else read_json(vocabulary, "the word table", CheckpointError)
    published = read(checkpoint)
    if is_published_extractor(published.weights):
        if table is not None or stage is not None:
            raise CheckpointError(
                f"{checkpoint} is a feature extractor, which has no words and no stages. Remove --vocabulary and "
                "--stage.",
                code="inapplicable_option",
            )
        return _convert_extractor(published.weights, checkpoint, output)
    return _convert_drn(published, checkpoint, output or Path("drn.pt"), table, vocabulary, stage)


def _convert_drn(
    published: PublishedCheckpoint,
    checkpoint: Path,
    output: Path,
    table: Any,
    vocabulary: Path | None,
    stage: Literal[1, 2, 3] | None,
) -> Checkpoint:
    """Convert and write a DRN checkpoint; `table` is the content of the file `vocabulary`."""
    config = read_config(published.weights, checkpoint)
    check_weights(published.weights, lambda: DRN(config), str(checkpoint))
    words = Vocabulary({}) if table is None else load_vocabulary(table, config, vocabulary)
    stage_number = stage or published.stage or 3
    training: dict[str, Any] = {
        "stage": stage_number,
        "recipe": published.layout,
        "converted_from": {checkpoint.name: sha256(checkpoint)},
    }
    if published.epoch is not None:
        training["epoch"] = published.epoch
    converted = Checkpoint(
        config=config,
        features=Features(
            kind="C3D" if config.feature_dim == 4096 else "unknown", dim=config.feature_dim, pooling=published.layout
        ),
        vocabulary=words,
        decoding=Decoding(
            num_segments=config.num_segments,
            strides=config.strides,
            use_iou_scores=stage_number > 1,
            protocol=published.layout,
        ),
        weights=tensors(published.weights, checkpoint),
        training=training,
        # Networks of other data sets have other vocabularies, and do not record the lengths of their videos.
        windows=CHARADES_STA if config.vocab_size == DRNConfig().vocab_size else None,
    )
    save_checkpoint(output, converted)
    print(report(converted, published, output))
    report_written(output)
    if table is None:
        log.warning(
            "%s has no vocabulary and accepts no sentences. Convert again with --vocabulary and a table of %d words "
            "(Charades_word2id.json for the published checkpoints).",
            output,
            config.vocab_size,
        )
        suggest_next_command("train.convert", checkpoint, "--vocabulary", "word2id.json", "--output", output)
    else:
        suggest_next_command("export.to_onnx", "--model", output, "--output", output.with_suffix(".onnx"))
    return converted


def _convert_extractor(weights: Mapping[str, np.ndarray], checkpoint: Path, output: Path | None) -> ExtractorCheckpoint:
    converted = from_published(weights, str(checkpoint), {checkpoint.name: sha256(checkpoint)})
    config, manifest = converted.config, converted.manifest({})
    output = output or Path(f"{config.KIND.lower()}.pt")
    save_extractor(output, converted)
    red, green, blue = converted.mean
    height, width = manifest.crop
    print(
        f"{output}: {config.KIND} from a checkpoint in {converted.layout}\n"
        f"  parameters   {sum(tensor.numel() for tensor in converted.weights.values()):,}\n"
        f"  sizes        {config.summary}\n"
        f"  features     {config.dim:,} channels, of {manifest.window} frames every {manifest.stride}\n"
        f"  frames       {height} x {width}, minus the mean red {red:g}, green {green:g}, blue {blue:g}"
    )
    report_written(output)
    suggest_next_command("export.to_onnx", "--model", output, "--output", output.with_suffix(".onnx"))
    return converted


def read(path: Path) -> PublishedCheckpoint:
    """Return the content of a published checkpoint, with the tensor names of `train.network.model`.

    Raises:
        CheckpointError: the file cannot be read or contains no state dict.
    """
    if path.suffix == ".npz":
        check_file(path, "The checkpoint", CheckpointError)
        with reading(path, "an archive of arrays", CheckpointError, "copy it again"):
            arrays = read_archive(path, MAX_ARRAYS)
        if not is_published_extractor(arrays):
            raise CheckpointError(
                f"{path} contains no I3D, the only network that is read from .npz files. Pass another checkpoint.",
                code="not_a_state_dict",
            )
        return PublishedCheckpoint(arrays, "mmaction2", (), None, None)
    content = load(path, unknown_objects=True)
    if isinstance(content, dict) and content.get("format") == FORMAT:
        raise CheckpointError(
            f"{path} is already converted. Export it with `python -m export.to_onnx`.", code="already_converted"
        )
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not (isinstance(state, dict) and state and all(isinstance(name, str) for name in state)):
        raise CheckpointError(
            f"{path} contains no state_dict. Pass mmaction2's .pth or the authors' .pth.tar, as they were saved.",
            code="not_a_state_dict",
        )
    arrays = {name: _array(value, name, path) for name, value in state.items() if isinstance(value, torch.Tensor)}
    others = [excerpt(name) for name in state if name not in arrays]
    if others:
        raise CheckpointError(
            f"{path}: expected names with tensors, got other values for {some(others)}. Pass a DRN checkpoint.",
            code="not_a_state_dict",
        )
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): value for name, value in arrays.items()}
    metadata = content if state is not content else {}
    meta = metadata.get("meta")
    metadata = {**metadata, **(meta if isinstance(meta, dict) else {})}
    weights, unused, layout = _to_mmaction2_names(arrays, path)
    epoch = metadata.get("epoch")
    return PublishedCheckpoint(
        weights, layout, unused, _recorded_stage(metadata.get("cfg")), epoch if isinstance(epoch, int) else None
    )


def _array(tensor: torch.Tensor, name: str, path: Path) -> np.ndarray:
    """Return a tensor as an array; CheckpointError if it is quantized, sparse or 8-bit, which NumPy does not have."""
    try:
        # NumPy has no bfloat16.
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor.detach()).numpy()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} holds {excerpt(name)} as {tensor.dtype} ({tensor.layout}, {tensor.device}). Save the "
            "network's weights as dense FP32 tensors.",
            code="impossible_weights",
        ) from error


def _to_mmaction2_names(
    arrays: Mapping[str, np.ndarray], path: Path
) -> tuple[dict[str, np.ndarray], tuple[str, ...], Layout]:
    """Return the tensors under mmaction2's names, the authors' names of unused tensors, and the layout of the file."""
    if not any(pattern.match(name) for name in arrays for pattern, _ in _RENAMES):
        return dict(arrays), (), "mmaction2"
    weights: dict[str, np.ndarray] = {}
    unused = []
    for name, array in arrays.items():
        if name.startswith(_UNUSED):
            unused.append(name)
            continue
        new_name = name
        for pattern, renamed in _RENAMES:
            if match := pattern.match(name):
                new_name = renamed(match) + name[match.end() :]
        if new_name in weights:
            raise CheckpointError(
                f"{path} contains {excerpt(new_name)} twice, under the authors' and under mmaction2's name. Pass the "
                "checkpoint as it was saved.",
                code="duplicate_tensor",
            )
        weights[new_name] = array
    return weights, tuple(unused), "drn"


def _recorded_stage(configuration: Any) -> int | None:
    """Return the stage in mmaction2's configuration text; stage 3 if neither of its two flags is set."""
    if not isinstance(configuration, str) or "is_first_stage" not in configuration:
        return None
    flags = dict(re.findall(r"is_(first|second)_stage\s*=\s*(True|False)", configuration))
    if flags.get("first") == "True":
        return 1
    return 2 if flags.get("second") == "True" else 3


def read_config(weights: Mapping[str, np.ndarray], path: Path) -> DRNConfig:
    """Return the configuration of the network that has these tensors, under the names of `train.network.model`.

    If tensors disagree, the majority decides, so that `check_weights` names the one that differs.

    Raises:
        CheckpointError: no DRN has these tensors.
    """
    published = DRNConfig()

    def majority(default: int, *axes: tuple[str, int, int]) -> int:
        """Return the most frequent size; `axes` are triples of a tensor name, its axis, and a number to add."""
        sizes = Counter(
            weights[name].shape[axis] + offset
            for name, axis, offset in axes
            if name in weights and weights[name].ndim > axis and weights[name].shape[axis] + offset > 0
        )
        return sizes.most_common(1)[0][0] if sizes else default

    def count(*patterns: str, step: int = 1) -> int:
        """Return the number of modules in a series numbered 0, step, 2 step, ... without gaps, at least 1."""
        numbers = itertools.takewhile(
            lambda number: any(pattern.format(number) in weights for pattern in patterns), itertools.count(0, step)
        )
        return max(len(list(numbers)), 1)

    parts = ("cls_logits", "bbox_pred", "cls_tower.0", "bbox_tower.0")
    blocks = [(f"fpn.{kind}_blocks.{level}.0.weight", 0, 0) for kind in ("inner", "layer") for level in range(3)]
    layers = "query_encoder.biLSTM.weight_ih_l{}"
    try:
        return DRNConfig(
            vocab_size=majority(published.vocab_size, ("query_encoder.embedding.weight", 0, -1)),
            embed_dim=majority(
                published.embed_dim,
                ("query_encoder.embedding.weight", 1, 0),
                (layers.format(0), 1, 0),
                (layers.format("0_reverse"), 1, 0),
            ),
            feature_dim=majority(
                published.feature_dim,
                ("prop_fc.weight", 0, 0),
                ("prop_fc.weight", 1, 0),
                ("prop_fc.bias", 0, 0),
                ("qInput.0.weight", 0, 0),
                ("qInput.0.bias", 0, 0),
                ("backbone_net.layers.0.0.weight", 1, -POSITION_CHANNELS),
            ),
            hidden_dim=majority(
                published.hidden_dim,
                ("query_encoder.biLSTM.weight_hh_l0", 1, 0),
                ("query_encoder.biLSTM.weight_hh_l0_reverse", 1, 0),
                ("query_encoder.W3.bias", 0, 0),
                ("query_encoder.W2.0.weight", 1, 0),
            ),
            fpn_dim=majority(published.fpn_dim, *((f"fcos.head.{part}.weight", 1, 0) for part in parts), *blocks),
            # A batch norm and a ReLU follow each convolution.
            head_convs=count(*(f"fcos.head.{tower}_tower.{{}}.weight" for tower in ("cls", "bbox")), step=3),
            lstm_layers=count(layers),
        )
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a DRN: {error} Pass a DRN checkpoint.", code="unknown_network_shape"
        ) from error


def tensors(weights: Mapping[str, np.ndarray], path: Path) -> dict[str, torch.Tensor]:
    """Return the weights, name to array, as float32 tensors, and counters as int64.

    Raises:
        CheckpointError: a tensor has another data type, or a value is not finite.
    """
    converted, invalid = {}, []
    for name, array in weights.items():
        counter = name.endswith("num_batches_tracked")
        if array.dtype.kind not in ("iu" if counter else "f"):
            invalid.append(f"{name} ({array.dtype})")
            continue
        with np.errstate(over="ignore"):
            # A copy, because tensors of the file may share memory.
            copy = np.array(array, np.int64 if counter else np.float32, order="C")
        if not np.isfinite(copy).all():
            invalid.append(f"{name} (not finite)")
        converted[name] = torch.from_numpy(copy)
    if invalid:
        raise CheckpointError(
            f"{path}: expected finite floating-point weights, got {some(invalid)}. Pass an undamaged checkpoint.",
            code="impossible_weights",
        )
    return converted


def load_vocabulary(table: Any, config: DRNConfig, path: Path | None) -> Vocabulary:
    """Return the vocabulary of a word table; `path` names the file in messages.

    Raises:
        CheckpointError: the table does not number exactly as many words as the network has.
    """
    if not (
        isinstance(table, dict)
        and all(isinstance(number, int) and not isinstance(number, bool) for number in table.values())
    ):
        raise CheckpointError(
            f"{path} does not map words to integers. Pass a word table such as Charades_word2id.json.",
            code="invalid_word_table",
        )
    if len(table) != config.vocab_size:
        raise CheckpointError(
            f"{path}: expected {config.vocab_size:,} words, got {len(table):,}. Pass the word table that the network "
            "was trained with.",
            code="vocabulary_mismatch",
        )
    if sorted(table.values()) != list(range(1, len(table) + 1)):
        raise CheckpointError(
            f"{path} does not number its words from 1 to {len(table)}, each number once. Pass the original word table.",
            code="word_numbers_not_consecutive",
        )
    return Vocabulary(table)


def report(checkpoint: Checkpoint, published: PublishedCheckpoint, output: Path) -> str:
    """Return a summary of a converted checkpoint as text; `output` is its file."""
    config = checkpoint.config
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in DRN(config).parameters())
    words = f"{config.vocab_size:,} words" + ("" if len(checkpoint.vocabulary) else " (word table not given)")
    owner = {"mmaction2": "mmaction2's", "drn": "the authors'"}[published.layout]
    used = "used" if checkpoint.decoding.use_iou_scores else "not used"
    epoch = "" if published.epoch is None else f", epoch {published.epoch}"
    levels = ", ".join(map(str, BACKBONE_CHANNELS))
    windows = checkpoint.windows
    splitting = f"{windows}; Charades-STA's" if windows else "not split: the training videos are unknown"
    lines = [
        f"{output}: a DRN from a checkpoint in {owner} layout, stage {checkpoint.training['stage']}{epoch}",
        f"  parameters   {parameters:,} in {len(checkpoint.weights)} tensors",
        f"  query        {words} x {config.embed_dim}, BiLSTM {config.hidden_dim} x {config.lstm_layers}",
        f"  features     {config.feature_dim:,} channels, {config.num_segments} segments, {owner} pooling",
        f"  pyramid      backbone {levels}; width {config.fpn_dim}; {config.head_convs} convolution(s) per tower",
        f"  long videos  {splitting}",
        f"  decoding     protocol {checkpoint.decoding.protocol}, IoU scores {used}",
    ]
    if published.unused:
        parts = sorted({part.rstrip(".") for part in _UNUSED if any(part in name for name in published.unused)})
        lines.append(f"  removed      {len(published.unused)} unused tensors: {', '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(convert)
