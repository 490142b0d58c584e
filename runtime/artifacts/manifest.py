"""Define the manifest of a model file: everything that grounding needs besides the weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from runtime.core.decoding import Decoding
from runtime.core.errors import ModelFileError, from_fields, invalid_setting, reading
from runtime.core.io.text_files import check_format, parse_json
from runtime.core.pooling import ClipTiming, Pooling
from runtime.core.presence import Presence
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary

FORMAT = "drn-manifest/1"
ADVICE = "export the model again with `python -m export.to_onnx`"
METADATA_KEY = "drn.manifest"

Part = Literal["whole", "video", "query", "prepare", "prepared"]
PARTS: tuple[Part, ...] = get_args(Part)
# Libraries that run ONNX files.
Library = Literal["onnxruntime", "openvino"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
# Maximum number of channels, frames of a clip, and tokens of a query.
MAX_SIZE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Features:
    """The clip features a model was trained on.

    Attributes:
        kind: name of the extractor in reports.
        dim: D, number of channels.
        window, stride: number of frames of a clip, and of frames from the start of a clip to the next.
        pooling: rule by which clips are pooled into segments, `mmaction2` or `drn`; see `Video.segments`.
    """

    kind: str = "C3D"
    dim: int = 4096
    window: int = 16
    stride: int = 8
    pooling: Pooling = "mmaction2"

    def __post_init__(self) -> None:
        sizes = (self.dim, self.window, self.stride)
        if not all(type(size) is int and 1 <= size <= MAX_SIZE for size in sizes):
            raise invalid_setting(f"dim, window and stride from 1 to {MAX_SIZE} for features", sizes, ADVICE)
        if not isinstance(self.kind, str) or self.pooling not in get_args(Pooling):
            raise invalid_setting(
                f"a name and a pooling of {get_args(Pooling)} for features", (self.kind, self.pooling), ADVICE
            )

    @property
    def clock(self) -> ClipTiming:
        """Return the clip timing."""
        return ClipTiming(self.window, self.stride)


@dataclasses.dataclass(frozen=True)
class MomentOutput:
    """The decoding and NMS in a graph that returns moments; see `calib.graph.moments`.

    Attributes:
        count: number of moments of a query.
        nms: `soft` or `hard`.
        constants: constants of the NMS by name.
    """

    count: int
    nms: Literal["soft", "hard"]
    constants: Mapping[str, float]

    def __post_init__(self) -> None:
        numbers = self.constants.values() if isinstance(self.constants, Mapping) else [None]
        is_valid = type(self.count) is int and self.count >= 1 and self.nms in ("soft", "hard")
        if not is_valid or not all(type(number) in (int, float) for number in numbers):
            values = (self.count, self.nms, self.constants)
            raise invalid_setting("a count, an nms of soft or hard, and constants for moments", values, ADVICE)

    def __str__(self) -> str:
        constants = ", ".join(f"{name} {value:g}" for name, value in self.constants.items())
        return f"the best {self.count} of each query, by {self.nms} NMS ({constants})"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The properties of a model besides its weights.

    Attributes:
        vocabulary: word table, and policy for unknown words.
        decoding: parameters of decoding.
        features: clip features of the training.
        stage: last training stage, 1 to 3.
        precision: precision of weights and arithmetic: fp32, fp16, bf16, int8.
        max_query_length: maximum number of tokens of a query.
        sources: source files: name to SHA-256.
        producer: packages that wrote the file: name to version.
        training: settings of the training, for reports.
        library: library that runs the ONNX file.
        part: `whole`, or `video` or `query` for a part of a split model.
        video_part: for a query part, name of its video part in the same directory, to SHA-256; else empty.
        prepared_parts: for a query part of version 0.1, names of two more files, to SHA-256; they are not read.
        windows: windows of videos longer than the training videos; None for older files, which do not split videos.
        presence: score below which no moment is found; None for a model that always returns moments.
        moments: decoding and NMS in the graph; None for a graph that returns heads only.
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
    library: Library = "onnxruntime"
    part: Part = "whole"
    video_part: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prepared_parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    windows: Windows | None = None
    presence: Presence | None = None
    moments: MomentOutput | None = None

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise invalid_setting(f"a part of {PARTS}", self.part, ADVICE)
        if self.library not in LIBRARIES:
            raise invalid_setting(f"a library of {LIBRARIES}", self.library, ADVICE)
        if self.stage not in (1, 2, 3) or not 1 <= self.max_query_length <= MAX_SIZE:
            sizes = (self.stage, self.max_query_length)
            raise invalid_setting(f"a stage of 1 to 3 and a max_query_length of 1 to {MAX_SIZE}", sizes, ADVICE)

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
            **({} if self.library == "onnxruntime" else {"library": self.library}),
            # Files of version 0.1 have no part and are whole.
            **({} if self.part == "whole" else {"part": self.part, "video_part": dict(self.video_part)}),
            **({"prepared_parts": dict(self.prepared_parts)} if self.prepared_parts else {}),
            **({"windows": self.windows.to_dict()} if self.windows else {}),
            **({"presence": self.presence.to_dict()} if self.presence else {}),
            **({"moments": dataclasses.asdict(self.moments)} if self.moments else {}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, value: Any, source: str = "the manifest") -> Manifest:
        """Return the manifest of a JSON value.

        Raises:
            ModelFileError: the value is of another format, or a key is missing or invalid.
        """
        check_format(value, FORMAT, f"The manifest of {source}", ModelFileError, ADVICE)
        with reading(f"The manifest of {source}", "a complete manifest", ModelFileError, ADVICE):
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
                library=value.get("library", "onnxruntime"),
                part=value.get("part", "whole"),
                video_part=dict(value.get("video_part", {})),
                prepared_parts=dict(value.get("prepared_parts", {})),
                windows=Windows.from_dict(value["windows"]) if "windows" in value else None,
                presence=Presence.from_dict(value["presence"]) if "presence" in value else None,
                moments=from_fields(MomentOutput, value["moments"]) if "moments" in value else None,
            )

    @classmethod
    def from_json(cls, text: str | None, source: str = "the manifest") -> Manifest:
        """Return the manifest of a JSON text; see `from_dict`. None represents a file without one."""
        if text is None:
            raise ModelFileError(
                f"{source} has no {METADATA_KEY!r}, because drn-deploy did not export it. Export the checkpoint with "
                "`python -m export.to_onnx`.",
                code="missing_manifest",
            )
        return cls.from_dict(parse_json(text, f"The manifest of {source}", ModelFileError, advice=ADVICE), source)
