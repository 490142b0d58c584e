"""Read and check the manifest of a feature extractor, in an ONNX file or beside an engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.artifacts.manifest import Features
from runtime.core.errors import FeatureError, GroundingError, ModelFileError, VideoFileError, invalid_setting, reading
from runtime.core.io.text_files import check_format, is_number
from runtime.core.pooling import ClipTiming

FORMAT = "drn-extractor/1"
METADATA_KEY = "drn.extractor"

ADVICE = "correct the manifest of the extractor"
# A clip of 64 frames of 448 x 448 pixels has 39 MB. Far larger clips are mistakes, or fill the memory.
MAX_CLIP_BYTES, MAX_SIDE = 1 << 28, 1 << 16
# Minimum and maximum of `std` and `white`, for which scaled pixels stay within float32.
SCALES = (1e-6, 1e6)


@dataclasses.dataclass(frozen=True)
class ExtractorManifest:
    """The manifest of an extractor: metadata key "drn.extractor", or NAME.onnx.json next to the file.

    Attributes:
        kind: name of the network in reports: C3D, I3D, CLIP.
        dim: D, number of channels of a feature.
        window, stride: number of frames of a clip, and of frames from the start of a clip to the next.
        resize: height and width of a frame before the crop, or its shorter side, in pixels.
        crop: height and width of the input of the network, in pixels.
        mean, std: means of red, green and blue to subtract from pixels, and the divisors after that. The graph of a
            clip extractor contains both; pixels of image encoders are normalized by `runtime.media.extractors`.
        white: value of white in `mean` and `std`: 255, or 1 for most image encoders.
        sources: source files: name to SHA-256.
        precision: precision of weights and arithmetic: fp32, fp16, bf16.
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
            raise invalid_setting("1 or more for dim, window and stride", counts, ADVICE)
        low, high = SCALES
        scales = (self.mean, self.std, self.white)
        if not (
            all(map(is_number, (*self.mean, *self.std, self.white)))
            and len(self.mean) == len(self.std) == 3
            and all(abs(value) <= high for value in self.mean)
            and all(low <= value <= high for value in (*self.std, self.white))
        ):
            raise invalid_setting(
                f"three numbers each for mean and std, with std and white from {low:g} to {high:g}", scales, ADVICE
            )
        texts = (self.kind, self.precision, *self.sources, *self.sources.values())
        if not all(isinstance(text, str) for text in texts):
            raise invalid_setting("text for kind, precision and sources", texts, ADVICE)
        try:
            height, width = self.framing.crop
        except GroundingError as error:
            raise ModelFileError(str(error), code=error.code) from error
        if 3 * self.window * height * width > MAX_CLIP_BYTES:
            raise invalid_setting(f"clips of at most {MAX_CLIP_BYTES} bytes", (self.window, height, width), ADVICE)

    @property
    def framing(self) -> ResizeCrop:
        """Return the preprocessing of frames."""
        return ResizeCrop(self.resize, self.crop)

    @property
    def part(self) -> str:
        """Return the kind of inputs of its engine: a key of `runtime.backends.batch_shapes.AXES`."""
        return "clips"

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, value: Any, source: str) -> ExtractorManifest:
        """Return the manifest of a JSON value.

        Raises:
            ModelFileError: the value is of another format, or a key is missing or invalid.
        """
        check_format(value, FORMAT, f"The extractor manifest of {source}", ModelFileError, "export it again")
        with reading(source, "the manifest of an extractor", ModelFileError, "see docs/your-own-video.md"):
            # `runtime.artifacts.onnx_metadata` checks the digest when the file is opened.
            return cls(**{name: item for name, item in value.items() if name not in ("format", "digest")})

    def check_fits(self, features: Features) -> None:
        """Raise FeatureError unless the features of this extractor match those of a model."""
        if self.dim != features.dim:
            raise FeatureError(
                f"Expected {features.kind} features of {features.dim} channels, as in the training of the model, got "
                f"{self.dim}. Use the extractor of the training.",
                code="feature_width_mismatch",
            )
        if (self.window, self.stride) != (features.window, features.stride):
            raise FeatureError(
                f"Expected clips of {features.clock}, as in the training of the model, got "
                f"{ClipTiming(self.window, self.stride)}. Use the extractor of the training.",
                code="extractor_mismatch",
            )


def no_model(path: str | Path) -> ModelFileError:
    """Return the error for an extractor that was given as a model."""
    return ModelFileError(
        f"Expected a DRN, got the feature extractor {path}. Use it as --extractor, and a DRN as --model.",
        code="wrong_model_kind",
    )


@dataclasses.dataclass(frozen=True)
class ResizeCrop:
    """The preprocessing of a frame: resize, then center crop.

    Attributes:
        resize: height and width in pixels for frames of any shape; or one number, the shorter side.
        crop: height and width of the crop, in pixels.
    """

    resize: tuple[int, int] | int = (128, 171)
    crop: tuple[int, int] = (112, 112)

    def __post_init__(self) -> None:
        sides = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        counts = len(sides) == len(self.crop) == 2 and all(type(side) is int for side in (*sides, *self.crop))
        if not counts or not all(0 < cut <= side <= MAX_SIDE for cut, side in zip(self.crop, sides)):
            expected = f"a resize of at most {MAX_SIDE} pixels, and a crop within it"
            raise invalid_setting(expected, (self.resize, self.crop), ADVICE, VideoFileError)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of a resized frame of this height and width."""
        if not isinstance(self.resize, int):
            return self.resize
        shorter = min(height, width)
        return round(height * self.resize / shorter), round(width * self.resize / shorter)
