"""Count the multiply-adds of DRN and C3D from their sizes."""

from __future__ import annotations

from runtime.core.pooling import ClipTiming
from train.extractors.c3d import CROP, WINDOW, C3DConfig
from train.network import model
from train.network.model import DRNConfig

FRAMES_PER_SECOND = 30
# Factors by which the inputs of C3D's convolutions are smaller than its clips, in time and in space; see
# `train.extractors.c3d`.
C3D_REDUCTIONS = ((1, 1), (1, 2), (2, 4), (2, 4), (4, 8), (4, 8), (8, 16), (8, 16))


def drn_multiply_adds(config: DRNConfig, query_length: float) -> dict[str, float]:
    """Return the multiply-adds of one query, without those of positions and of the gaps between levels.

    Args:
        config: sizes of the network.
        query_length: number of words.

    Returns:
        `video`: prop_fc. `first`: the first convolution over gated features. `rest`: everything else.
    """
    width, segments, pyramid, hidden = config.feature_dim, config.num_segments, config.fpn_dim, config.hidden_dim
    lengths = [segments // stride for stride in config.strides]
    locations = sum(lengths)
    # Looked up at each call, because tests build networks with a narrow backbone.
    channels = first, second, third = model.BACKBONE_CHANNELS
    backbone = 3 * first * second * lengths[1] + 3 * second * third * lengths[2]
    lateral = sum(inputs * pyramid * length for inputs, length in zip(channels, lengths, strict=True))
    towers = 2 * config.head_convs * 3 * pyramid**2 * locations
    head = (3 * 3 * pyramid + 2 * pyramid**2 + 3 * pyramid * pyramid // 2 + pyramid // 2) * locations
    words = query_length * 2 * 4 * hidden * (config.embed_dim + hidden)
    words += (config.lstm_layers - 1) * query_length * 2 * 4 * hidden * 3 * hidden
    sentence = 4 * hidden * hidden + 3 * hidden * 2 * hidden + 2 * hidden * (width + first + second)
    return {
        "video": width**2 * segments,
        "first": 3 * first * width * segments,
        "rest": backbone + lateral + 3 * pyramid**2 * locations + towers + head + words + sentence,
    }


def c3d_multiply_adds(config: C3DConfig) -> float:
    """Return the multiply-adds of the features of one clip."""
    total, inputs = 0.0, 3
    for channels, (in_time, in_space) in zip(config.widths, C3D_REDUCTIONS, strict=True):
        positions = (WINDOW // in_time) * (CROP[0] // in_space) * (CROP[1] // in_space)
        total += 27 * inputs * channels * positions
        inputs = channels
    # fc6 of one frame of 4 x 4.
    return total + 16 * inputs * config.dim


def clips_per_hour() -> int:
    """Return the number of clips of an hour of video."""
    return ClipTiming().num_clips(3600 * FRAMES_PER_SECOND)
