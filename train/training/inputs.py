"""Load the inputs of a training run: queries, pooled features, vocabulary, and network configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.artifacts.manifest import Features
from runtime.core.decoding import Decoding
from runtime.core.errors import AnnotationError, GroundingError
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from runtime.datasets.dataset import Annotation, DataSet, one_per_moment
from runtime.datasets.presets import length_quantiles
from runtime.grounding.evaluation import askable_rows
from train.checkpoints import Checkpoint, source_hash
from train.network.model import DRNConfig
from train.training.dataset import TrainingData, encode, pool, split_by_video, windows_of
from train.training.distributed import Processes
from train.training.options import TrainingOptions, TrainingSettings


@dataclasses.dataclass(frozen=True)
class TrainingInputs:
    """The data of a run, and the parts of its checkpoints besides the weights.

    Attributes:
        data_set: source of features and moments.
        training: queries to train on.
        validation: queries to validate on; may be empty.
        vocabulary: encodes the sentences.
        features: width, clip timing and pooling rule.
        decoding: how validation decodes heads.
        windows: how the model splits videos that are longer than the training videos.
        record: other entries of the training record of checkpoints.
    """

    data_set: DataSet
    training: TrainingData
    validation: list[Annotation]
    vocabulary: Vocabulary
    features: Features
    decoding: Decoding
    windows: Windows | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class AnnotationSplit:
    """The queries of a run.

    Attributes:
        validate_on: held-out, val, test or none.
        training: queries to train on, one per moment.
        validation: queries to validate on.
        record: entries for the training record of checkpoints, by which `train.fit_presence` selects the same videos.
    """

    validate_on: str
    training: list[Annotation]
    validation: list[Annotation]
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class NetworkInputs:
    """The configuration of a network, and the features and vocabulary of its inputs."""

    config: DRNConfig
    features: Features
    vocabulary: Vocabulary


def split_annotations(options: TrainingOptions, data_set: DataSet) -> AnnotationSplit:
    """Return the queries to train on and to validate on, by `validate_on`, `held_out`, `seed` and `faithful`."""
    annotations = data_set.annotations("train", invalid="keep" if options.faithful else "drop")
    validate_on = options.validate_on or ("val" if "val" in data_set.splits else "held-out")
    record: dict[str, Any] = {}
    if validate_on == "held-out":
        training, validation = split_by_video(annotations, options.held_out, options.seed)
        record = {
            "held_out": options.held_out,
            "faithful": options.faithful,
            "annotations": data_set.digest("train"),
        }
    else:
        training = annotations
        validation = [] if validate_on == "none" else data_set.annotations(validate_on, invalid="drop")
    # Training uses each moment of a query with several moments.
    return AnnotationSplit(validate_on, one_per_moment(training), validation, record)


def network_inputs(options: TrainingOptions, data_set: DataSet, loaded: Checkpoint | None) -> NetworkInputs:
    """Return the configuration of the network, and the features and vocabulary of its inputs.

    Args:
        loaded: checkpoint of --load, which determines the configuration; None for a new network.

    Raises:
        GroundingError: the options or the features conflict with the loaded checkpoint.
    """
    vocabulary = loaded.vocabulary if loaded and len(loaded.vocabulary) else data_set.vocabulary
    # A loaded network is trained with its own pooling rule.
    pooling = loaded.features.pooling if loaded else options.recipe
    features = dataclasses.replace(data_set.features(), pooling=pooling)
    if loaded is None:
        sizes: dict[str, Any] = {"num_segments": data_set.preset.num_segments, **options.sizes}
        return NetworkInputs(
            DRNConfig(vocab_size=len(vocabulary), feature_dim=features.dim, **sizes), features, vocabulary
        )
    for name, size in options.sizes.items():
        if getattr(loaded.config, name) != size:
            raise GroundingError(
                f"--{name.replace('_', '-')} {size} conflicts with --load, whose network has "
                f"{getattr(loaded.config, name)}. Remove the flag.",
                code="conflicting_options",
            )
    if loaded.config.feature_dim != features.dim:
        raise GroundingError(
            f"Expected features of width {loaded.config.feature_dim} for the network of --load, got {features.dim} in "
            f"{options.data}. Use the features that it was trained on.",
            code="feature_width_mismatch",
        )
    return NetworkInputs(loaded.config, features, vocabulary)


def load_inputs(
    options: TrainingOptions,
    data_set: DataSet,
    split: AnnotationSplit,
    network: NetworkInputs,
    processes: Processes,
) -> TrainingInputs:
    """Pool the features of all videos and encode all queries.

    Args:
        processes: training processes; the main one writes the cache of the features.

    Raises:
        GroundingError: a feature file or a sentence cannot be used.
    """
    config, vocabulary = network.config, network.vocabulary
    # Checked before the first epoch. In validation, a sentence without a known word counts as a miss.
    known = [split.validation[row] for row in askable_rows(vocabulary, split.validation)]
    if split.validation and not known:
        raise AnnotationError(
            f"None of the {len(split.validation)} sentences to validate on has a known word. Correct the split, or "
            "pass --validate-on held-out.",
            code="empty_split",
        )
    encode(known, vocabulary)
    videos = sorted({annotation.video for annotation in (*split.training, *split.validation)})
    pooling = (data_set, videos, config.num_segments, network.features, options.cache or Path(options.data) / "cache")
    # The main process writes the cache, then the others read it.
    pooled = pool(*pooling) if processes.is_main else None
    processes.wait()
    if pooled is None:
        pooled = pool(*pooling)
    training = TrainingData(data_set, split.training, pooled, vocabulary, options.blind)
    return TrainingInputs(
        data_set=data_set,
        training=training,
        validation=split.validation,
        vocabulary=vocabulary,
        features=network.features,
        decoding=Decoding(
            num_segments=config.num_segments,
            strides=config.strides,
            # As published for 32 segments, no level drops a proposal before NMS.
            pre_nms_top_n=max(Decoding.pre_nms_top_n, config.num_segments),
            protocol=options.recipe,
        ),
        windows=windows_of(data_set, split.training),
        record={**split.record, "query_length_quantiles": list(length_quantiles(map(len, training.queries)))},
    )


def check_enough_queries(inputs: TrainingInputs, settings: TrainingSettings) -> None:
    """Raise GroundingError if there is one video only for --negatives, or too few queries for one step."""
    annotations = inputs.training.annotations
    if settings.negatives and len({annotation.video for annotation in annotations}) < 2:
        raise GroundingError(
            "--negatives needs at least 2 videos, but there is one. Remove the flag.", code="too_few_videos"
        )
    step = settings.batch_size * settings.processes
    if len(annotations) < step:
        raise GroundingError(
            f"Expected at least {step} queries for one step, got {len(annotations)}. Pass a smaller --batch-size.",
            code="too_few_queries",
        )


def run_identity(
    options: TrainingOptions, split: AnnotationSplit, network: NetworkInputs, inputs: TrainingInputs
) -> dict[str, Any]:
    """Return everything that determines the weights besides the settings, as JSON values.

    `run.json` records it under `inputs`.
    """
    validate_on = split.validate_on
    splits = ("train", *((validate_on,) if validate_on in ("val", "test") else ()))
    return {
        "network": dataclasses.asdict(network.config),
        "validate_on": validate_on,
        "held_out": options.held_out if validate_on == "held-out" else None,
        "queries": [len(split.training), len(split.validation)],
        "annotations": [inputs.data_set.digest(name) for name in splits],
        "features": inputs.training.pooled.key,
        "glove": source_hash(options.glove) if options.glove else None,
        "load": source_hash(options.load) if options.load else None,
        "blind": options.blind,
    }
