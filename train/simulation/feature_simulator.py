"""Simulate clip features with the statistics of C3D fc6 from the events of a video.

The features of a clip are a fixed function, random by seed, of a latent vector: the sum of embeddings of the scene, the
objects, the video and the current actions, and noise. The function is a projection, a threshold at the 80 % quantile of
each channel, the power 1.3, and a gain per channel. As in C3D fc6, about 80 % of the values are zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from train.simulation.scenario import CLIP_TIMING, Scenario, SimulationPlan, seeded_generator

LATENT_DIM = 128
ZERO_FRACTION, POWER, GAIN_SPREAD = 0.8, 1.3, 0.5
NOISE_SECONDS = 1.0  # time constant of the noise


@dataclass(frozen=True)
class Difficulty:
    """The difficulty of recognizing actions; an action adds a vector of length 1 to the latent vector of a clip.

    Attributes:
        identity: standard deviation per latent dimension of a vector that is constant in a video.
        noise: standard deviation per latent dimension of the noise in time.
        jitter: standard deviation of the start and of the end of an action, in seconds.
        drop: fraction of the actions that are not visible.
        confuse: fraction of the actions that look like a confusable one, with the same object or verb.
    """

    identity: float
    noise: float
    jitter: float
    drop: float
    confuse: float


# Chosen on Charades-STA: in features of test videos, actions are localized far, moderately and slightly better than by
# the best constant moment.
DIFFICULTIES = {
    "easy": Difficulty(identity=0.10, noise=0.15, jitter=0.5, drop=0.03, confuse=0.03),
    "medium": Difficulty(identity=0.20, noise=0.30, jitter=0.9, drop=0.10, confuse=0.10),
    "hard": Difficulty(identity=0.25, noise=0.37, jitter=1.2, drop=0.15, confuse=0.15),
}


def latent_dim(feature_dim: int) -> int:
    """Return the dimension of the latent vectors, lower for features of few channels."""
    return min(LATENT_DIM, max(8, feature_dim // 2))


class Simulator:
    """Computes features of scenarios with the embeddings, projection, thresholds and gains of one seed."""

    def __init__(self, plan: SimulationPlan, difficulty: Difficulty, feature_dim: int, seed: int) -> None:
        self.difficulty, self.seed, self.width = difficulty, seed, latent_dim(feature_dim)
        self.action_parts, self.confusable_actions = plan.action_parts, plan.confusable_actions
        self.embedding = functools.cache(self._embedding)
        rng = seeded_generator(seed, "channels", feature_dim)
        projection = rng.standard_normal((self.width, feature_dim), dtype=np.float32)
        gains = np.exp(GAIN_SPREAD * rng.standard_normal(feature_dim, dtype=np.float32))
        latents = np.concatenate(
            [self.latents(scenario)[:: 1 + scenario.num_clips // 32] for scenario in plan.reference]
        )
        thresholds, spreads = _channel_statistics(latents, projection)
        # gain * max((u - threshold) / spread, 0) ** POWER, with the constants folded into the projection. The factor 2
        # scales active channels to about 1, as in C3D.
        scales = (2 * gains) ** (1 / POWER) / spreads
        self.projection, self.thresholds = projection * scales, thresholds * scales

    def features(self, scenario: Scenario) -> np.ndarray:
        """Return the clip features of a scenario, (num_clips, feature_dim) float32, all at least 0."""
        features = self.latents(scenario) @ self.projection
        features -= self.thresholds
        np.maximum(features, 0, out=features)
        # x ** POWER, several times faster than np.power; exp(log(0)) is exactly 0.
        with np.errstate(divide="ignore"):
            np.log(features, out=features)
        features *= np.float32(POWER)
        return np.exp(features, out=features)

    def latents(self, scenario: Scenario) -> np.ndarray:
        """Return the latent vectors of the clips of a scenario, (num_clips, K) float32, K from `latent_dim`."""
        rng = seeded_generator(self.seed, "video", scenario.name)
        clip_seconds = CLIP_TIMING.stride * scenario.duration / scenario.num_frames
        constant = self.embedding("scene", scenario.scene).copy()
        for item in scenario.objects:
            constant += self.embedding("object", item) / np.float32(len(scenario.objects) ** 0.5)
        constant += self.difficulty.identity * rng.standard_normal(self.width, dtype=np.float32)
        latents = self._noise(rng, scenario.num_clips, clip_seconds)
        latents += constant
        if scenario.actions:
            starts = np.arange(scenario.num_clips) * clip_seconds
            vectors, weights = zip(
                *(self._action(rng, action, starts, clip_seconds) for action in scenario.actions), strict=True
            )
            latents += np.stack(weights, axis=1).astype(np.float32) @ np.stack(vectors)
        return latents

    def _action(
        self,
        rng: np.random.Generator,
        action: tuple[str, float, float],
        clip_starts: np.ndarray,
        clip_seconds: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the vector of an action, (K,), and its weight in each clip, (num_clips,), from 0 to 1."""
        name, start, end = action
        chance, choice, jitter = rng.random(), rng.random(), rng.standard_normal(2) * self.difficulty.jitter
        start, end = start + jitter[0], max(end + jitter[1], start + jitter[0])
        window_seconds = CLIP_TIMING.window / CLIP_TIMING.stride * clip_seconds
        shared = np.minimum(clip_starts + window_seconds, end) - np.maximum(clip_starts, start)
        weights = np.clip(shared / window_seconds, 0, 1)
        if chance < self.difficulty.drop:
            weights = np.zeros_like(weights)
        elif chance < self.difficulty.drop + self.difficulty.confuse:
            confusable = self.confusable_actions(name)
            name = confusable[int(choice * len(confusable))] if confusable else name
        return self.embedding("action", name), weights

    def _noise(self, rng: np.random.Generator, num_clips: int, clip_seconds: float) -> np.ndarray:
        """Return stationary AR(1) noise, (num_clips, K) float32."""
        white = rng.standard_normal((num_clips, self.width), dtype=np.float32) * np.float32(self.difficulty.noise)
        retained = np.float32(np.exp(-clip_seconds / NOISE_SECONDS))
        new = np.sqrt(1 - retained**2)
        for clip in range(1, num_clips):
            white[clip] = retained * white[clip - 1] + new * white[clip]
        return white

    def _embedding(self, kind: str, name: str) -> np.ndarray:
        """Return the vector of a scene, an object or an action, (K,) float32, of length about 1."""
        parts = self.action_parts(name) if kind == "action" else [(f"{kind} {name}", 1.0)]
        vectors = [
            np.float32(share**0.5)
            * seeded_generator(self.seed, "embedding", part).standard_normal(self.width, dtype=np.float32)
            for part, share in parts
        ]
        return np.stack(vectors).sum(axis=0) / np.float32(self.width**0.5)


def _channel_statistics(latents: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ZERO_FRACTION quantile and the standard deviation of each channel; 256 channels at a time."""
    thresholds, spreads = [], []
    rank = int(ZERO_FRACTION * len(latents))
    for first in range(0, projection.shape[1], 256):
        channels = np.ascontiguousarray((latents @ projection[:, first : first + 256]).T)
        spreads.append(channels.std(axis=1))
        channels.partition(rank, axis=1)
        thresholds.append(channels[:, rank])
    return np.concatenate(thresholds), np.concatenate(spreads) + np.float32(1e-6)
