"""Train a network in stages, with validation and a checkpoint after every epoch, and resume interrupted runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from runtime.core.decoding import NON_FINITE
from runtime.core.errors import CheckpointError, GroundingError, ModelFileError, OutputError, excerpt, reading
from runtime.core.io.atomic_files import atomic_write, write_json, write_text
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format
from runtime.core.metrics import recall_name
from runtime.grounding.evaluation import evaluate
from runtime.grounding.grounder import Grounder
from train.backend import TorchBackend
from train.checkpoints import (
    RESUME_FORMAT,
    Checkpoint,
    check,
    check_weights,
    load,
    load_checkpoint,
    save,
    save_checkpoint,
)
from train.history import read_history
from train.network.model import DRN, DRNConfig
from train.training.batch_sources import CachedStemSource, Source, StemContinuation, open_source, stems_fit
from train.training.distributed import Processes, synchronize_batch_norm
from train.training.inputs import TrainingInputs
from train.training.metric_loggers import MetricLogger
from train.training.options import TrainingSettings
from train.training.recipes import Stage
from train.training.resume import extended_stage, first_difference
from train.training.stage_trainer import StageTrainer

log = logging.getLogger("drn")

SELECTION = recall_name(1, 0.5)
NUM_STAGES = 3
# Name in `history.jsonl` to name in log lines.
LOSS_NAMES = {"loss_matching": "matching", "loss_boundary": "boundary", "loss_iou": "IoU"}
# Unlike exported graphs, the torch network has no maximum query length.
ANY_LENGTH = 1 << 20


@dataclasses.dataclass
class StageProgress:
    """The state of a stage: finished epochs, best validation score, and epochs since then."""

    epochs: int = 0
    best: float | None = None
    since_best: int = 0

    def add_epoch(self, score: float) -> bool:
        """Count an epoch, and return whether its score is the best."""
        self.epochs += 1
        improved = self.best is None or score > self.best
        self.best = score if improved else self.best
        self.since_best = 0 if improved else self.since_best + 1
        return improved

    def is_complete(self, stage: Stage, patience: int | None) -> bool:
        """Return whether all epochs are finished, or `patience` of them have not improved the score."""
        return self.epochs >= stage.epochs or (patience is not None and self.since_best >= patience)


class TrainingRun:
    """A training run in its directory: `stageK/best.pt`, `stageK/last.pt`, `history.jsonl`, `run.json`, `drn.pt`.

    All files are written atomically. A run that resumes from `stageK/last.pt` ends with the same weights as one that
    was not interrupted.

    Args:
        output: directory of the run.
        settings: everything that determines the weights besides the data.
        inputs: queries, features and settings of decoding.
        device: device to train on.
        processes: the training processes.

    Attributes:
        log_metrics: called after every epoch with the history.
    """

    def __init__(
        self,
        output: Path,
        settings: TrainingSettings,
        inputs: TrainingInputs,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self.output = output
        self.settings = settings
        self.inputs = inputs
        self.device = device
        self.processes = processes
        self.log_metrics: MetricLogger = lambda history: None
        self._pair_source: Source | None = None

    def open(self, resume: bool, identity: dict[str, Any]) -> None:
        """Create `run.json`, or check that it records this run, whose inputs `run_identity` returned.

        Raises:
            OutputError: the directory contains a run that is not resumed, or one with other settings.
            CheckpointError: a file of the run is damaged.
        """
        # Without settings that are None, because older versions do not record them.
        settings = {name: value for name, value in dataclasses.asdict(self.settings).items() if value is not None}
        description = json.loads(json.dumps({"settings": settings, "inputs": identity}))
        path = self.output / "run.json"
        exists = path.is_file()
        # All processes look before the main process writes.
        self.processes.wait()
        if exists:
            if not resume:
                raise holds_run(self.output)
            self._check_resumable(path, description)
        elif checkpoints := sorted(self.output.glob("stage*/*.pt")):
            raise OutputError(
                f"{self.output} contains {checkpoints[0].relative_to(self.output)} but not run.json, which records its "
                "settings. Restore run.json, or choose another --output.",
                code="output_holds_run",
            )
        elif self.processes.is_main:
            if resume:
                log.warning("%s contains no run; starting one.", self.output)
            write_json(path, description)
        self.processes.wait()

    def _check_resumable(self, path: Path, description: dict[str, Any]) -> None:
        """Raise an error unless the run with this `run.json` can resume, and prepare for more epochs."""
        recorded = read_json(path, "settings of a run", OutputError)
        extended = extended_stage(recorded, description)
        if recorded != description and extended is None:
            raise OutputError(
                f"{self.output} was trained with other settings ({first_difference(recorded, description)}). Resume "
                "with the same settings; only --epochs may increase.",
                code="settings_mismatch",
            )
        for stage in self.settings.stages:
            best, last = (self._directory(stage) / name for name in ("best.pt", "last.pt"))
            if best.is_file():
                load_checkpoint(best)
            if last.is_file():
                check(last)
        # Read only to check it, before an epoch is computed.
        self._history()
        self.processes.wait()
        if extended is not None and self.processes.is_main:
            self._extend(extended)
            write_json(path, description)

    def _history(self) -> list[dict[str, Any]]:
        path = self.output / "history.jsonl"
        return read_history(path) if path.is_file() else []

    def _extend(self, number: int) -> None:
        """Prepare for more epochs of a stage: delete later stages, which start from its best checkpoint.

        No learning rate depends on the number of epochs, so that the run ends with the same weights as one that was
        started with the new number.
        """
        later = [stage for stage in self.settings.stages if stage.number > number]
        repeated = [stage for stage in later if (self._directory(stage) / "last.pt").is_file()]
        if repeated:
            log.warning(
                "Stage %d gets more epochs. Later stages (%s) are trained again from its best checkpoint.",
                number, ", ".join(str(stage.number) for stage in repeated),
            )  # fmt: skip
        for stage in later:
            for name in ("last.pt", "best.pt"):
                (self._directory(stage) / name).unlink(missing_ok=True)
        if history := self._history():
            self._write_history([record for record in history if record["stage"] <= number])

    def train(self, model: DRN) -> Path:
        """Train every stage, each from the best checkpoint of the previous one, as published.

        Returns:
            The path of `drn.pt`, the best checkpoint of the last stage.

        Raises:
            GroundingError: the training has diverged.
        """
        model = model.to(self.device)
        if self.processes.count > 1 and self.settings.synchronised:
            synchronize_batch_norm(model)
        for index, stage in enumerate(self.settings.stages):
            if index > 0:
                best = self._directory(self.settings.stages[index - 1]) / "best.pt"
                model.load_state_dict(dict(load_checkpoint(best).weights))
            self._train_stage(stage, model)
        if self.processes.is_main:
            with atomic_write(self.output / "drn.pt") as temporary:
                shutil.copyfile(self._directory(self.settings.stages[-1]) / "best.pt", temporary)
        self.processes.wait()
        return self.output / "drn.pt"

    def _train_stage(self, stage: Stage, model: DRN) -> None:
        trainer = StageTrainer(stage, self.settings, self.processes, model)
        progress = self._restore(stage, model, trainer)
        if progress.is_complete(stage, self.settings.patience):
            return
        source, network = self._source(trainer)
        trainer.set_network(network)
        first, started = progress.epochs, time.perf_counter()
        while not progress.is_complete(stage, self.settings.patience):
            epoch = progress.epochs
            rate = stage.learning_rate_at(epoch)
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate
            record = {"stage": stage.number, "epoch": epoch + 1, "learning_rate": rate}
            record |= self._train_epoch(stage, epoch, source, trainer)
            # Without validation, nothing else would notice the last step of an epoch.
            if not torch.stack([parameter.detach().sum() for parameter in model.parameters()]).isfinite().all():
                raise self._diverged("The weights are not finite", stage, epoch)
            record |= self._validate(stage, epoch, model)
            # Scores of processes could differ in the last digit, but all must stop at the same epoch.
            improved = progress.add_epoch(self.processes.of_main(record.get(SELECTION, float(epoch)), self.device))
            if self.processes.is_main:
                self._save_epoch(trainer, progress, record, improved)
                seconds = (time.perf_counter() - started) / (progress.epochs - first)
                self._log(stage, record, improved, seconds * self._epochs_left(stage, progress.epochs))
            self.processes.wait()
        if self.processes.is_main and progress.epochs < stage.epochs:
            best = progress.epochs - progress.since_best
            log.info("Stage %d: stopped after epoch %d; the best is epoch %d.", stage.number, progress.epochs, best)

    def _save_epoch(
        self, trainer: StageTrainer, progress: StageProgress, record: dict[str, Any], improved: bool
    ) -> None:
        stage, model = trainer.stage, trainer.model
        directory = self._directory(stage)
        if improved:
            save_checkpoint(directory / "best.pt", self._checkpoint(stage, model, record))
        self.log_metrics(self._append_history(record))
        state = {
            "format": RESUME_FORMAT,
            "stage": stage.number,
            "epoch": progress.epochs,
            "best": progress.best,
            "since_best": progress.since_best,
            "model": model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
        }
        # Written last, so that a run killed before this line repeats the epoch.
        save(directory / "last.pt", state)

    def _epochs_left(self, stage: Stage, done: int) -> int:
        """Return the number of epochs left in all stages, without early stopping."""
        return stage.epochs - done + sum(later.epochs for later in self.settings.stages if later.number > stage.number)

    def _source(self, trainer: StageTrainer) -> tuple[Source, nn.Module]:
        """Return the source of the batches of a stage, and the part of the network that they are inputs of."""
        data, stage, model = self.inputs.training, trainer.stage, trainer.model
        # Every process computes the stems of all pairs, as many as its share of that number of epochs.
        saves_time = stage.epochs >= self.processes.count
        frozen = stage.freezes_stem and not trainer.accumulates_stale_gradients
        if frozen and saves_time and stems_fit(data, model, self.device):
            return CachedStemSource(data, model, self.device, trainer.autocast), StemContinuation(model)
        if self._pair_source is None:
            self._pair_source = open_source(data, self.device)
        return self._pair_source, model

    def _train_epoch(self, stage: Stage, epoch: int, source: Source, trainer: StageTrainer) -> dict[str, Any]:
        """Train one epoch, and return its record: mean losses and gradient norm, steps, and seconds."""
        settings, processes, data = self.settings, self.processes, self.inputs.training
        trainer.model.train()
        epoch_seed = (settings.seed, 2, stage.number, epoch)
        order = data.epoch(settings.batch_size, epoch_seed, processes.rank, processes.count)
        mismatched = None
        if settings.mismatched and stage.learns_from_mismatched:
            mismatched = data.mismatched(order, settings.mismatched, epoch_seed, processes.rank, processes.count)
        totals = torch.zeros(5, device=self.device)
        started = time.perf_counter()
        progress = tqdm(
            source.batches(order, mismatched),
            f"stage {stage.number}/{NUM_STAGES} epoch {epoch + 1}/{stage.epochs}",
            len(order),
            unit="step",
            leave=False,
            disable=None if processes.is_main else True,
        )
        for step, (batch, truth) in enumerate(progress):
            values = trainer.step(batch, truth)
            totals += values
            # Not at every step, because reading a value synchronizes with the GPU.
            if step % 20 == 0 and not progress.disable:
                losses = zip(LOSS_NAMES.values(), values.tolist(), strict=False)
                progress.set_postfix({name: f"{value:.3f}" for name, value in losses}, refresh=False)
        if not settings.synchronised:
            totals /= processes.count
        *sums, norms, steps = processes.sum(totals).tolist()
        means = [*(loss / len(order) for loss in sums), norms / steps if steps else math.nan]
        if not all(map(math.isfinite, means)):
            raise self._diverged("The loss is not a number", stage, epoch)
        names = (*LOSS_NAMES, "gradient_norm")
        seconds = time.perf_counter() - started
        record = {**dict(zip(names, means, strict=True)), "steps": len(order), "seconds": round(seconds, 2)}
        return record | ({"steps_left_out": len(order) - round(steps)} if trainer.scaler.is_enabled() else {})

    def _validate(self, stage: Stage, epoch: int, model: DRN) -> dict[str, float]:
        """Return the metrics on the validation queries, none if there are no queries."""
        annotations = self.inputs.validation
        if not annotations:
            return {}
        # Every process validates on all queries, which avoids communication.
        checkpoint = self._checkpoint(stage, model, {})
        grounder = Grounder(TorchBackend(model, checkpoint.manifest(max_query_length=ANY_LENGTH)))
        quiet = None if self.processes.is_main else True
        with tqdm(total=len(annotations), desc="validating", unit="query", leave=False, disable=quiet) as bar:
            try:
                evaluation = evaluate(
                    grounder,
                    self.inputs.data_set,
                    annotations,
                    segments_of=self.inputs.training.segments,
                    on_progress=bar.update,
                    # `load_inputs` has already warned.
                    warn=False,
                )
            except ModelFileError as error:
                if error.code != NON_FINITE:
                    raise
                # The weights are in memory, so no file is damaged.
                raise self._diverged("The network's output is not finite", stage, epoch) from error
        return dict(evaluation.report.values)

    def _diverged(self, reason: str, stage: Stage, epoch: int) -> GroundingError:
        """Return the error of a training with values that are not finite."""
        advice = "" if self.settings.precision == "fp32" else ", or with --precision fp32"
        return GroundingError(
            f"{reason} in stage {stage.number}, epoch {epoch + 1}, with --lr {stage.learning_rate:g}. Start again with "
            f"a lower --lr{advice}.",
            code="training_diverged",
        )

    def _checkpoint(self, stage: Stage, model: DRN, record: dict[str, Any]) -> Checkpoint:
        """Return the checkpoint of the network; `record` is that of the last epoch."""
        inputs = self.inputs
        return Checkpoint(
            config=model.config,
            features=inputs.features,
            vocabulary=inputs.vocabulary,
            decoding=dataclasses.replace(inputs.decoding, use_iou_scores=stage.trains_iou_head),
            weights=model.state_dict(),
            training={
                "stage": stage.number,
                "recipe": self.settings.recipe,
                "seed": self.settings.seed,
                **({"negatives": self.settings.negatives} if self.settings.negatives else {}),
                "simulated_features": inputs.data_set.simulated,
                **inputs.record,
                "data_set": inputs.data_set.preset.title,
                "query_length": list(inputs.data_set.preset.query_length),
                "validation": record,
            },
            windows=inputs.windows,
        )

    def _directory(self, stage: Stage) -> Path:
        return self.output / f"stage{stage.number}"

    def _restore(self, stage: Stage, model: DRN, trainer: StageTrainer) -> StageProgress:
        """Load `last.pt` of a stage, if it exists."""
        path = self._directory(stage) / "last.pt"
        if not path.is_file():
            return StageProgress()
        state = load(path)
        check_format(state, RESUME_FORMAT, f"{path}", CheckpointError, "start again with another --output")
        # States of older versions do not record their stage.
        if state.get("stage", stage.number) != stage.number:
            raise CheckpointError(
                f"{path}: expected the state of stage {stage.number}, got stage {excerpt(state['stage'])}. Restore the "
                "file of this stage, or choose another --output.",
                code="stage_mismatch",
            )
        advice = "copy the checkpoints of this run again, or choose another --output"
        with reading(path, f"the state of stage {stage.number}", CheckpointError, advice):
            check_weights(state["model"], lambda: DRN(model.config), str(path))
            model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.scaler.load_state_dict(state["scaler"])
        if self.processes.is_main:
            log.info("Stage %d: continuing after epoch %d of %d.", stage.number, state["epoch"], stage.epochs)
        # Older versions do not record `since_best`, and have no --patience.
        return StageProgress(state["epoch"], state["best"], state.get("since_best", 0))

    def _append_history(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Add a record to the history, or replace that of an epoch that was repeated after the process was killed."""
        epoch = (record["stage"], record["epoch"])
        history = [*(each for each in self._history() if (each["stage"], each["epoch"]) != epoch), record]
        self._write_history(history)
        return history

    def _write_history(self, records: list[dict[str, Any]]) -> None:
        write_text(self.output / "history.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))

    def _log(self, stage: Stage, record: dict[str, Any], improved: bool, seconds_left: float) -> None:
        """Log an epoch: losses, validation scores, and the time left in all stages."""
        losses = ", ".join(f"{label} {record[name]:.3f}" for name, label in LOSS_NAMES.items())
        scores = ", ".join(
            f"{name} {100 * record[name]:.2f}" for name in (SELECTION, recall_name(1, 0.7), "mIoU") if name in record
        )
        log.info(
            "Stage %d of %d, epoch %d of %d: %s; %s%s; %.0f s, %s left%s",
            stage.number, NUM_STAGES, record["epoch"], stage.epochs, losses, scores or "not validated",
            " (best)" if improved else "", record["seconds"], tqdm.format_interval(seconds_left),
            "" if self.settings.patience is None else " at most",
        )  # fmt: skip


def fresh_model(config: DRNConfig, seed: int, initialize: Callable[[DRN], Any] = lambda model: None) -> DRN:
    """Return an untrained network, whose weights depend on `seed` only.

    Args:
        initialize: changes the initial weights, with the random state of the seed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DRN(config)
        initialize(model)
    return model


def holds_run(output: Path) -> OutputError:
    """Return the error for an output directory that contains a run, which `--resume` would continue."""
    return OutputError(
        f"{output} contains a training run. Pass --resume to continue it, or choose another --output.",
        code="output_holds_run",
    )
