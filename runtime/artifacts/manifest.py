"""Define the manifest of a model file: all that grounding needs besides the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from runtime.core.decoding import Decoding
from runtime.core.errors import ModelFileError, excerpt, reading
from runtime.core.io.text_files import check_format, parse_json
from runtime.core.presence import Presence
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from runtime.core.video import ClipTiming, Pooling

FORMAT = "drn-manifest/1"
AGAIN = "export the model again with `python -m export.to_onnx`"
METADATA_KEY = "drn.manifest"

Part = Literal["whole", "video", "query", "prepare", "prepared"]
PARTS: tuple[Part, ...] = get_args(Part)
# Of features in channels and frames, and of queries in tokens.
MAX_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Features:
    """The clip features a model was trained on.

    Attributes:
        kind: name of the extractor, for people.
        dim: D.
        window, stride: frames a clip saw, frames from clip to clip.
        pooling: whose rule pools clips into segments.
    """

    kind: str = "C3D"
    dim: int = 4096
    window: int = 16
    stride: int = 8
    pooling: Pooling = "mmaction2"

    def __post_init__(self) -> None:
        sizes = (self.dim, self.window, self.stride)
        if not all(type(size) is int and 1 <= size <= MAX_SIZE for size in sizes):
            raise ModelFileError(
                f"Width, window and stride of features are whole numbers from 1 to {MAX_SIZE}, and {excerpt(sizes)} "
                "was given; write the file again.",
                code="invalid_setting",
            )
        if not isinstance(self.kind, str) or self.pooling not in get_args(Pooling):
            raise ModelFileError(
                f"Features have a name and are pooled as mmaction2 or drn, and {excerpt((self.kind, self.pooling))} "
                "was given; write the file again.",
                code="invalid_setting",
            )

    @property
    def clock(self) -> ClipTiming:
        return ClipTiming(self.window, self.stride)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know of a model.

    Attributes:
        vocabulary: word table, and what happens to other words.
        decoding: how heads become moments.
        features: what clip features it takes.
        stage: the last training stage, 1 to 3.
        precision: of the weights and arithmetic: fp32, fp16, bf16, int8.
        max_query_length: most tokens of a query.
        sources: what the file was made of: name to SHA-256.
        producer: what made it: package to version.
        training: how the weights came to be, for people.
        part: `whole`, or which of the two files that a model was split into.
        video_part: of a query part: the file of its video part, in the same directory, to SHA-256.
        prepared_parts: of a query part of version 0.1: two more files, to SHA-256, which nothing reads any longer.
        windows: how videos longer than the training videos are cut; None for files of before, which take them whole.
        presence: the score below which no moment is found; None for a model that always answers.
    """

    vocabulary: Vocabulary
    decoding: Decoding
    features: Features
    stage: int = 3
    precision: str = "fp32"
    max_query_length: int = 64
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    producer: Mapping[str, str] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    part: Part = "whole"
    video_part: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prepared_parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    windows: Windows | None = None
    presence: Presence | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ModelFileError(
                f"A model file is one of {', '.join(PARTS)}, and {excerpt(self.part)} was given.",
                code="invalid_setting",
            )
        if self.stage not in (1, 2, 3) or not 1 <= self.max_query_length <= MAX_SIZE:
            raise ModelFileError(
                f"A model has a stage from 1 to 3 and takes queries of 1 to {MAX_SIZE} tokens, and "
                f"{excerpt((self.stage, self.max_query_length))} was given.",
                code="invalid_setting",
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "stage": self.stage,
            "precision": self.precision,
            "features": dataclasses.asdict(self.features),
            "decoding": self.decoding.to_dict(),
            "max_query_length": self.max_query_length,
            "sources": dict(self.sources),
            "producer": dict(self.producer),
            "training": dict(self.training),
            "vocabulary": self.vocabulary.to_dict(),
            # Files of before there were parts say nothing, and are whole.
            **({} if self.part == "whole" else {"part": self.part, "video_part": dict(self.video_part)}),
            **({"prepared_parts": dict(self.prepared_parts)} if self.prepared_parts else {}),
            **({"windows": self.windows.to_dict()} if self.windows else {}),
            **({"presence": self.presence.to_dict()} if self.presence else {}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, value: Any, source: str = "the manifest") -> Manifest:
        """Read a manifest; `source` names it in messages.

        Raises:
            ModelFileError: it is of another version, or something is missing or of the wrong kind.
        """
        check_format(value, FORMAT, f"The manifest of {source}", ModelFileError, AGAIN)
        with reading(f"The manifest of {source}", "complete", ModelFileError, AGAIN):
            return cls(
                vocabulary=Vocabulary.from_dict(value["vocabulary"]),
                decoding=Decoding.from_dict(value["decoding"]),
                features=Features(**value["features"]),
                stage=int(value["stage"]),
                precision=str(value["precision"]),
                max_query_length=int(value["max_query_length"]),
                sources=dict(value["sources"]),
                producer=dict(value["producer"]),
                training=dict(value["training"]),
                part=value.get("part", "whole"),
                video_part=dict(value.get("video_part", {})),
                prepared_parts=dict(value.get("prepared_parts", {})),
                windows=Windows.from_dict(value["windows"]) if "windows" in value else None,
                presence=Presence.from_dict(value["presence"]) if "presence" in value else None,
            )

    @classmethod
    def from_json(cls, text: str | None, source: str = "the manifest") -> Manifest:
        """Read a manifest from JSON text; see `from_dict`. None stands for a file that carries none."""
        if text is None:
            raise ModelFileError(
                f"{source} carries no {METADATA_KEY!r}, so it was not exported by drn-deploy; "
                "export the checkpoint with `python -m export.to_onnx`.",
                code="missing_manifest",
            )
        return cls.from_dict(parse_json(text, f"The manifest of {source}", ModelFileError, advice=AGAIN), source)
