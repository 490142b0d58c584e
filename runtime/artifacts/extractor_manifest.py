"""Read and check the manifest of a feature extractor, in an ONNX file or beside an engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.artifacts.manifest import Features
from runtime.core.errors import FeatureError, GroundingError, ModelFileError, VideoFileError, excerpt, reading
from runtime.core.io.text_files import check_format, is_number

FORMAT = "drn-extractor/1"
METADATA_KEY = "drn.extractor"

# A clip of 64 frames of 448 x 448 pixels takes 39 MB; a description of far more is a mistake, or fills the memory.
MAX_CLIP_BYTES, MAX_SIDE = 1 << 28, 1 << 16
# Of `mean`, `std` and `white`: beyond, float32 cannot hold scaled pixels.
SCALES = (1e-6, 1e6)


@dataclasses.dataclass(frozen=True)
class ExtractorManifest:
    """The manifest of an extractor: metadata key "drn.extractor", or NAME.onnx.json next to the file.

    Attributes:
        kind: its name, for people: C3D, CLIP.
        dim: D, channels of a feature.
        window, stride: frames that a clip sees, frames from clip to clip.
        resize: height and width of a frame before the crop, or its shorter side.
        crop: height and width of the network's picture.
        mean, std: of red, green and blue; taken off and divided by. A network of clips does so itself.
        white: what value stands for white in `mean` and `std`: 255, or 1 for most image encoders.
        sources: what the file was made of: name to SHA-256.
        precision: of its weights and arithmetic: fp32, fp16, bf16.
    """

    kind: str
    dim: int
    window: int
    stride: int
    resize: tuple[int, int] | int
    crop: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    white: float = 255.0
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("crop", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.resize, int):
            object.__setattr__(self, "resize", tuple(self.resize))
        counts = (self.dim, self.window, self.stride)
        if not all(type(count) is int and count > 0 for count in counts):
            raise ModelFileError(
                f"An extractor's dim, window and stride are 1 or more, and {excerpt(counts)} were given.",
                code="invalid_setting",
            )
        low, high = SCALES
        numbers = all(map(is_number, (*self.mean, *self.std, self.white)))
        if (
            not numbers
            or len(self.mean) != 3
            or len(self.std) != 3
            or not (
                all(abs(value) <= high for value in self.mean)
                and all(low <= value <= high for value in (*self.std, self.white))
            )
        ):
            raise ModelFileError(
                f"An extractor's mean and std are three numbers each, std and white from {low:g} to {high:g}, got "
                f"{excerpt(self.mean)}, {excerpt(self.std)} and {excerpt(self.white)}. Correct its description.",
                code="invalid_setting",
            )
        texts = (self.kind, self.precision, *self.sources, *self.sources.values())
        if not all(isinstance(text, str) for text in texts):
            raise ModelFileError(
                "An extractor's kind, precision and sources are texts. Correct its description.",
                code="invalid_setting",
            )
        try:
            height, width = self.framing.crop
        except GroundingError as error:
            raise ModelFileError(str(error), code=error.code) from error
        if 3 * self.window * height * width > MAX_CLIP_BYTES:
            raise ModelFileError(
                f"An extractor takes clips of at most {MAX_CLIP_BYTES} bytes, got {excerpt(self.window)} frames of "
                f"{height} x {width} pixels. Correct its description.",
                code="invalid_setting",
            )

    @property
    def framing(self) -> ResizeCrop:
        return ResizeCrop(self.resize, self.crop)

    @property
    def part(self) -> str:
        """Return the kind of inputs of its engine; see `runtime.backends.batch_shapes.AXES`."""
        return "clips"

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, value: Any, source: str) -> ExtractorManifest:
        """Read a manifest; `source` names it in the ModelFileError that says what is wrong with it."""
        check_format(value, FORMAT, f"The extractor manifest of {source}", ModelFileError, "export it again")
        with reading(source, "the description of an extractor", ModelFileError, "see docs/your-own-video.md"):
            # The digest is checked where the file is opened (`runtime.artifacts.onnx_metadata`).
            return cls(**{name: item for name, item in value.items() if name not in ("format", "digest")})

    def check_fits(self, features: Features) -> None:
        """Raise FeatureError unless a model that takes `features` can take this extractor's."""
        if self.dim != features.dim:
            raise FeatureError(
                f"The extractor gives features of {self.dim} channels and the model takes {features.dim} "
                f"({features.kind}); give the extractor that the model was trained with.",
                code="feature_width_mismatch",
            )
        if (self.window, self.stride) != (features.window, features.stride):
            raise FeatureError(
                f"The extractor's clips see {self.window} frames and start every {self.stride}, and the model was "
                f"trained with {features.window} and {features.stride}; give the extractor that it was trained with.",
                code="extractor_mismatch",
            )


@dataclasses.dataclass(frozen=True)
class ExtractorSidecar:
    """The content of an extractor engine's metadata file: the extractor's manifest and the data of the build."""

    manifest: ExtractorManifest
    content: Mapping[str, Any]


def no_model(path: Path) -> ModelFileError:
    """Return what is wrong where an extractor was given as a model."""
    return ModelFileError(
        f"{path} makes clip features and grounds no sentence; give it as --extractor, and a DRN as --model.",
        code="wrong_model_kind",
    )


@dataclasses.dataclass(frozen=True)
class ResizeCrop:
    """The preprocessing of a frame: resize, then center crop.

    Attributes:
        resize: height and width, whatever the shape of the frame; or one number, the shorter side.
        crop: height and width of what is cut out.
    """

    resize: tuple[int, int] | int = (128, 171)
    crop: tuple[int, int] = (112, 112)

    def __post_init__(self) -> None:
        sides = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        counts = len(sides) == len(self.crop) == 2 and all(type(side) is int for side in (*sides, *self.crop))
        if not counts or not all(0 < cut <= side <= MAX_SIDE for cut, side in zip(self.crop, sides)):
            raise VideoFileError(
                f"Frames are resized to a height and width (or to a shorter side) of at most {MAX_SIDE} that the crop "
                f"fits into, got {excerpt(self.resize)} and {excerpt(self.crop)}. Correct the description.",
                code="invalid_setting",
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width after the resizing of a frame of this size."""
        if not isinstance(self.resize, int):
            return self.resize
        shorter = min(height, width)
        return round(height * self.resize / shorter), round(width * self.resize / shorter)
