"""Load the inputs of a training run: queries, pooled features, vocabulary, and the shape of the network."""

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
    """The data and options of a run that its checkpoints contain besides the weights.

    Attributes:
        data_set: where features and moments come from.
        training: the queries to learn from.
        validation: the queries to validate on; none if nothing is validated.
        vocabulary: encodes the sentences.
        features: width, clip timing and pooling.
        decoding: how validation decodes.
        windows: how a model that learns from these queries splits longer videos.
        record: what else the checkpoints record of the training.
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
        training: to learn from, one for each moment.
        validation: to validate on.
        record: what checkpoints record, so that `train.fit_presence` can use the same videos.
    """

    validate_on: str
    training: list[Annotation]
    validation: list[Annotation]
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class NetworkInputs:
    """The shape of a network, and the features and word ids that it takes."""

    config: DRNConfig
    features: Features
    vocabulary: Vocabulary


def split_annotations(options: TrainingOptions, data_set: DataSet) -> AnnotationSplit:
    """Return the queries to train on and to validate on."""
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
    # A sentence with several moments is one query, and learns from each.
    return AnnotationSplit(validate_on, one_per_moment(training), validation, record)


def network_inputs(options: TrainingOptions, data_set: DataSet, loaded: Checkpoint | None) -> NetworkInputs:
    """Return the shape of the network: that of the loaded checkpoint, or a new one.

    Raises:
        GroundingError: the options or the features contradict the loaded checkpoint.
    """
    vocabulary = loaded.vocabulary if loaded and len(loaded.vocabulary) else data_set.vocabulary
    # A network keeps the pooling that it was trained with.
    pooling = loaded.features.pooling if loaded else options.preset.pooling
    features = dataclasses.replace(data_set.features(), pooling=pooling)
    if loaded is None:
        sizes = {"num_segments": data_set.preset.num_segments, **options.sizes}
        return NetworkInputs(
            DRNConfig(vocab_size=len(vocabulary), feature_dim=features.dim, **sizes), features, vocabulary
        )
    for name, size in options.sizes.items():
        if getattr(loaded.config, name) != size:
            raise GroundingError(
                f"--{name.replace('_', '-')} {size} was given and the network of --load has "
                f"{getattr(loaded.config, name)}; leave the flag out.",
                code="conflicting_options",
            )
    if loaded.config.feature_dim != features.dim:
        raise GroundingError(
            f"The network of --load takes features of width {loaded.config.feature_dim} and {options.data} holds "
            f"features of width {features.dim}; use the features it was trained on.",
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

    Raises:
        GroundingError: a feature file or a sentence cannot be used.
    """
    config, vocabulary = network.config, network.vocabulary
    # Before the first epoch, not after it. A sentence without a known word is a miss in validation.
    known = [split.validation[row] for row in askable_rows(vocabulary, split.validation)]
    if split.validation and not known:
        raise AnnotationError(
            f"None of the {len(split.validation)} sentences to validate on has a known word, so no epoch can be "
            "chosen. Correct the split, or pass --validate-on held-out.",
            code="empty_split",
        )
    encode(known, vocabulary)
    videos = sorted({annotation.video for annotation in (*split.training, *split.validation)})
    pooling = (data_set, videos, config.num_segments, network.features, options.cache or Path(options.data) / "cache")
    # The main process writes the cache, and the others read it.
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
            # As published for 32 segments: no level drops a proposal before NMS.
            pre_nms_top_n=max(Decoding.pre_nms_top_n, config.num_segments),
            protocol=options.preset.protocol,
        ),
        windows=windows_of(data_set, split.training),
        record={**split.record, "query_length_quantiles": list(length_quantiles(map(len, training.queries)))},
    )


def check_enough_queries(inputs: TrainingInputs, settings: TrainingSettings) -> None:
    """Raise GroundingError if there are too few videos for --negatives, or too few queries for one step."""
    annotations = inputs.training.annotations
    if settings.negatives and len({annotation.video for annotation in annotations}) < 2:
        raise GroundingError(
            "--negatives asks other videos, and there is only one; leave it out.", code="too_few_videos"
        )
    step = settings.batch_size * settings.processes
    if len(annotations) < step:
        raise GroundingError(
            f"{len(annotations)} queries do not fill one step of {step}; lower --batch-size.", code="too_few_queries"
        )


def run_identity(
    options: TrainingOptions, split: AnnotationSplit, network: NetworkInputs, inputs: TrainingInputs
) -> dict[str, Any]:
    """Return what decides the weights besides the settings, as `run.json` records it under `inputs`."""
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
