"""Measure the accuracy of quantized graphs: recall and boundary shift on held-out training videos."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from calib.calibration_set import CalibrationSet, ManifestOnlyBackend, forbid_test_videos
from calib.calibration_table import CalibrationTable, calibration_key
from calib.graph.onnx_graph import graph_hash, read_manifest, weights_hash
from calib.graph.onnx_session import InMemorySplitBackend
from calib.graph.split_model import split_graph
from calib.qdq_quantizer import QuantDtype, QuantizationPolicy, insert_qdq
from calib.range_estimation import METHODS, ActivationStatistics, Method
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.core.agreement import FLIP_THRESHOLDS, compare_answers
from runtime.core.pooling import Segments
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.evaluation import Evaluation, evaluate
from runtime.grounding.grounder import Grounder

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")


# Standard errors on each side of the mean that contain 95 % of a normal distribution.
Z_95 = 1.96


@dataclasses.dataclass(frozen=True)
class AccuracyDelta:
    """The accuracy loss of a graph against the FP32 graph on the same queries.

    Attributes:
        drop_50, drop_70: loss of R@1 at IoU 0.5 and 0.7, in points (percent); negative for a gain.
        drop_miou: loss of mIoU, in points.
        lost_50, gained_50, lost_70, gained_70: number of queries whose R@1 flips.
        shift_median, shift_p99: shift of the ends of the top moment, in seconds.
        agreement: mean temporal IoU of the top moments of the two graphs; 1 if they are equal.
        queries: number of queries.
        miou_error: standard error of drop_miou, in points.
        agreement_error: standard error of agreement.
    """

    drop_50: float
    drop_70: float
    drop_miou: float
    lost_50: int
    gained_50: int
    lost_70: int
    gained_70: int
    shift_median: float
    shift_p99: float
    agreement: float
    queries: int
    miou_error: float = 0.0
    agreement_error: float = 0.0

    def within(self, max_drop: float) -> bool:
        """Return whether the loss is within the budget.

        One query of N is 100 / N points. If that is more than the budget, a single changed answer would exceed it. Then
        only a loss beyond chance counts: one whose 95 % interval lies above the budget.

        Args:
            max_drop: points of R@1 IoU=0.7 and of mIoU. 0 accepts no loss, for any N.
        """
        if not 0 < max_drop < 100 / self.queries:
            return self.worst_drop <= max_drop
        flips, balance = self.lost_70 + self.gained_70, self.lost_70 - self.gained_70
        recall_error = 100 * (flips - balance**2 / self.queries) ** 0.5 / self.queries
        drops = ((self.drop_70, recall_error), (self.drop_miou, self.miou_error))
        return all(drop - Z_95 * error <= max_drop for drop, error in drops)

    @property
    def worst_drop(self) -> float:
        """Return the larger drop of R@1 IoU=0.7 and mIoU."""
        return max(self.drop_70, self.drop_miou)

    def to_dict(self) -> dict[str, Any]:
        return {
            "drop of R@1 IoU=0.5, points": round(self.drop_50, 4),
            "drop of R@1 IoU=0.7, points": round(self.drop_70, 4),
            "drop of mIoU, points": round(self.drop_miou, 4),
            "flips at 0.5, lost and gained": [self.lost_50, self.gained_50],
            "flips at 0.7, lost and gained": [self.lost_70, self.gained_70],
            "boundary shift, median s": round(self.shift_median, 4),
            "boundary shift, p99 s": round(self.shift_p99, 4),
            "agreement with FP32, mean IoU": round(self.agreement, 6),
            "queries": self.queries,
        }


def format_deltas(rows: Sequence[tuple[str, AccuracyDelta]]) -> str:
    """Return labeled losses as text, one line each."""
    width = max(len(label) for label, _ in rows)
    lines = [
        f"{'':<{width}}  {'R@1 0.5':>8} {'R@1 0.7':>8} {'mIoU':>7} {'flips 0.5':>10} {'flips 0.7':>10} "
        f"{'shift p50':>10} {'p99':>8} {'agreement':>10}"
    ]
    for label, cost in rows:
        lines.append(
            f"{label:<{width}}  {0 - cost.drop_50:>+8.2f} {0 - cost.drop_70:>+8.2f} {0 - cost.drop_miou:>+7.2f} "
            f"{f'-{cost.lost_50} +{cost.gained_50}':>10} {f'-{cost.lost_70} +{cost.gained_70}':>10} "
            f"{cost.shift_median:>8.3f} s {cost.shift_p99:>6.2f} s {cost.agreement:>10.4f}"
        )
    return "\n".join(lines)


class AccuracyEvaluator:
    """Measures the accuracy loss of graphs against an FP32 graph on held-out training queries.

    Args:
        model: FP32 graph.
        data_set: data set of the queries.
        annotations: queries of training videos that no table was measured on.
        threads: number of CPU threads.

    Raises:
        CalibrationError: a video of `annotations` is in the test split.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        data_set: DataSet,
        annotations: Sequence[Annotation],
        threads: int | None = None,
    ) -> None:
        forbid_test_videos(data_set, {annotation.video for annotation in annotations}, "The held-out set")
        self.data_set = data_set
        self.annotations = list(annotations)
        self.threads = threads
        self._preparer = Grounder(ManifestOnlyBackend(read_manifest(model)))
        self._segments: dict[str, Segments] = {}
        # Graph and weights of a video part to the encodings of videos: the FP32 part, and the last other one.
        self._encoded: dict[tuple[str, str], dict[str, EncodedVideo]] = {}
        self.durations = np.array([data_set.durations[entry.video] for entry in annotations])
        self.reference = self._answers(model, "FP32")

    def cost(self, model: onnx.ModelProto, label: str) -> AccuracyDelta:
        """Return the accuracy loss of a graph on the queries of this evaluator; `label` describes the progress bar."""
        return self.compare(self._answers(model, label))

    def compare(self, result: Evaluation) -> AccuracyDelta:
        """Return the accuracy loss of a result of `runtime.grounding.evaluation.evaluate` on the same queries."""
        expected, count = self.reference, len(self.annotations)
        paired = compare_answers(
            expected.detections, result.detections, expected.truth, self.durations, expected.report.protocol
        )
        lost, gained = (
            [int(flips(threshold).sum()) for threshold in FLIP_THRESHOLDS] for flips in (paired.lost, paired.gained)
        )
        drops = paired.ious[0] - paired.ious[1]
        return AccuracyDelta(
            drop_50=100 * (lost[0] - gained[0]) / count,
            drop_70=100 * (lost[1] - gained[1]) / count,
            drop_miou=float(100 * drops.mean()),
            lost_50=lost[0],
            gained_50=gained[0],
            lost_70=lost[1],
            gained_70=gained[1],
            shift_median=float(np.quantile(paired.shifts, 0.5)),
            shift_p99=float(np.quantile(paired.shifts, 0.99)),
            agreement=float(paired.overlaps.mean()),
            queries=count,
            miou_error=float(100 * drops.std() / count**0.5),
            agreement_error=float(paired.overlaps.std() / count**0.5),
        )

    def _read(self, video: str) -> Segments:
        """Return the segments of a video, which are read once."""
        if video not in self._segments:
            self._segments[video] = self._preparer.segments(self.data_set.video(video))
        return self._segments[video]

    def _encodings(self, video: onnx.ModelProto, grounder: Grounder) -> Callable[[str], EncodedVideo]:
        """Return a function from the name of a video to its encoding, each computed once.

        Graphs that quantize only the query part share the encodings of the FP32 graph.
        """
        key = (graph_hash(video), weights_hash(video))
        if key not in self._encoded:
            for other in list(self._encoded)[1:]:
                del self._encoded[other]
        known = self._encoded.setdefault(key, {})

        def encoding_of(name: str) -> EncodedVideo:
            if name not in known:
                known[name] = grounder.encode_segments(self._read(name), self.data_set.durations[name], name)
            return known[name]

        return encoding_of

    def _answers(self, model: onnx.ModelProto, label: str) -> Evaluation:
        video, query = split_graph(model)
        grounder = Grounder(InMemorySplitBackend(video, query, self.threads))
        with tqdm(
            total=len(self.annotations), desc=f"answering, {label}", unit="query", leave=False, disable=None
        ) as bar:
            return evaluate(
                grounder,
                self.data_set,
                self.annotations,
                segments_of=self._encodings(video, grounder),
                on_progress=bar.update,
            )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A calibration method, with or without channel equalization; `str` gives its label."""

    method: Method
    equalize: bool = True

    def __str__(self) -> str:
        return self.method if self.equalize else f"{self.method}, not equalized"


def choose_candidate(
    model: onnx.ModelProto,
    statistics: ActivationStatistics,
    samples: CalibrationSet,
    evaluator: AccuracyEvaluator,
    policy: QuantizationPolicy | None = None,
    kind: QuantDtype = "int8",
    methods: Sequence[Method] = METHODS,
) -> tuple[Candidate, dict[Candidate, AccuracyDelta]]:
    """Return the candidate whose graph agrees best with the FP32 graph on held-out queries, and the loss of each.

    All methods are tried with channel equalization, then the best one without it, which must agree better by more than
    a standard error: equalization lowers the quantization noise on the networks that were measured. Agreement is the
    mean temporal IoU with the FP32 moments. Recall on some hundred queries changes in steps of a flip (0.4 points of
    250 queries), so the method with the best recall would be a random one.

    Args:
        model: FP32 graph.
        policy: layers to quantize; the default policy when None.
        methods: methods to try.
    """
    policy = policy or QuantizationPolicy()
    costs: dict[Candidate, AccuracyDelta] = {}

    def agreement(candidate: Candidate) -> float:
        table = table_of(model, statistics, samples, candidate, policy)
        costs[candidate] = evaluator.cost(insert_qdq(model, table, policy, kind), str(candidate))
        return costs[candidate].agreement

    best = max(map(Candidate, methods), key=agreement)
    other = Candidate(best.method, equalize=False)
    if statistics.gains and agreement(other) > costs[best].agreement + costs[best].agreement_error:
        best = other
    return best, costs


def table_of(
    model: onnx.ModelProto,
    statistics: ActivationStatistics,
    samples: CalibrationSet,
    candidate: Candidate,
    policy: QuantizationPolicy | None = None,
    choice: Mapping[str, Any] | None = None,
) -> CalibrationTable:
    """Return the calibration table of one candidate.

    Args:
        model: FP32 graph.
        candidate: method, and whether channels are equalized.
        policy: policy whose `unsigned` decides how many steps a range has; the default policy when None.
        choice: how the candidate was chosen, as JSON values.
    """
    unsigned = policy is not None and policy.unsigned
    gains = statistics.gains if candidate.equalize else {}
    return CalibrationTable(
        statistics.ranges(candidate.method, candidate.equalize, unsigned),
        calibration_key(model, samples.digest, candidate.method),
        tuple(samples.videos),
        samples.coverage,
        choice or {},
        {name: tuple(row) for name, row in gains.items()},
    )
