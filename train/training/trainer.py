"""Train in three stages: epochs, validation, checkpoints, and the resumption of an interrupted run."""

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
from runtime.core.errors import CheckpointError, GroundingError, ModelFileError, OutputError, reading
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
from train.training.distributed import Processes, synchronise_batch_norm
from train.training.inputs import TrainingInputs
from train.training.options import TrainingSettings
from train.training.recipes import Stage
from train.training.resume import extended_stage, first_difference
from train.training.stage_trainer import StageTrainer

log = logging.getLogger("drn")

SELECTION = recall_name(1, 0.5)
# A graph is exported for queries up to some length; torch takes any.
ANY_LENGTH = 1 << 20


class TrainingRun:
    """A training run in its directory: `stageK/best.pt`, `stageK/last.pt`, `history.jsonl`, `run.json`, `drn.pt`.

    Every file is whole at any moment. After each epoch `stageK/last.pt` holds what is needed to go on exactly as if
    nothing had happened.
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
        self._whole: Source | None = None

    def open(self, resume: bool, identity: dict[str, Any]) -> None:
        """Claim the directory, or check that it holds this very run.

        Args:
            resume: whether to go on with what is there.
            identity: what else decides the weights: data, held-out videos, checkpoint loaded.

        Raises:
            OutputError: there is a run already, or it was made with other settings.
        """
        description = json.loads(json.dumps({"settings": dataclasses.asdict(self.settings), "inputs": identity}))
        path = self.output / "run.json"
        begun = path.is_file()
        # All have looked before the first of them writes.
        self.processes.wait()
        if begun:
            if not resume:
                raise OutputError(
                    f"{self.output} holds a training run; pass --resume to go on with it, or choose another --output.",
                    code="output_holds_run",
                )
            recorded = read_json(path, "settings of a run", OutputError)
            if recorded != description:
                extended = extended_stage(recorded, description)
                if extended is None:
                    raise OutputError(
                        f"{self.output} was trained with other settings ({first_difference(recorded, description)}); "
                        "give the same ones to resume. Only the epochs of a stage may become more.",
                        code="settings_mismatch",
                    )
                self._check_whole()
                self.processes.wait()
                if self.processes.is_main:
                    self._extend(extended)
                    write_json(path, description)
            else:
                self._check_whole()
        elif checkpoints := sorted(self.output.glob("stage*/*.pt")):
            raise OutputError(
                f"{self.output} holds {checkpoints[0].relative_to(self.output)} and no run.json, which records with "
                "which settings it was trained. Restore run.json, or choose another --output.",
                code="output_holds_run",
            )
        elif self.processes.is_main:
            if resume:
                log.warning("%s holds no run yet; starting one.", self.output)
            write_json(path, description)
        self.processes.wait()

    def _check_whole(self) -> None:
        """Raise CheckpointError if a checkpoint of this run is damaged, before anything is written beside it."""
        for stage in self.settings.stages:
            for name in ("best.pt", "last.pt"):
                path = self._directory(stage) / name
                if path.is_file():
                    check(path)
        # Before an epoch is computed that could not be added to it.
        self._history()

    def _history(self) -> list[dict[str, Any]]:
        path = self.output / "history.jsonl"
        return read_history(path) if path.is_file() else []

    def _extend(self, number: int) -> None:
        """Prepare for more epochs of a stage: later stages, which start from its best checkpoint, start again.

        No learning rate depends on the number of epochs, so the run ends as if it had been started with this one.
        """
        later = [stage for stage in self.settings.stages if stage.number > number]
        begun = [stage for stage in later if (self._directory(stage) / "last.pt").is_file()]
        if begun:
            log.warning(
                "Stage %d gets more epochs, so what was trained of stage %s is repeated from its best checkpoint.",
                number, " and ".join(str(stage.number) for stage in begun),
            )  # fmt: skip
        for stage in later:
            for name in ("last.pt", "best.pt"):
                (self._directory(stage) / name).unlink(missing_ok=True)
        if history := self._history():
            lines = [json.dumps(record) for record in history if record["stage"] <= number]
            write_text(self.output / "history.jsonl", "".join(f"{line}\n" for line in lines))

    def train(self, model: DRN) -> Path:
        """Train every stage and return the path of `drn.pt`, the best of the last one.

        Each stage starts from the best checkpoint of the one before, as published.
        """
        model = model.to(self.device)
        if self.processes.count > 1 and self.settings.synchronised:
            synchronise_batch_norm(model)
        for index, stage in enumerate(self.settings.stages):
            if index > 0:
                self._load_best(self.settings.stages[index - 1], model)
            self._train_stage(stage, model)
        if self.processes.is_main:
            with atomic_write(self.output / "drn.pt") as temporary:
                shutil.copyfile(self._directory(self.settings.stages[-1]) / "best.pt", temporary)
        self.processes.wait()
        return self.output / "drn.pt"

    def _train_stage(self, stage: Stage, model: DRN) -> None:
        trainer = StageTrainer(stage, self.settings, self.processes, model)
        done, best = self._restore(stage, model, trainer)
        if done >= stage.epochs:
            return
        source, network = self._source(trainer)
        trainer.set_network(network)
        for epoch in range(done, stage.epochs):
            rate = stage.learning_rate_at(epoch)
            for group in trainer.optimizer.param_groups:
                group["lr"] = rate
            record = {"stage": stage.number, "epoch": epoch + 1, "learning_rate": rate}
            record |= self._train_epoch(stage, epoch, source, trainer)
            # Without validation, the last step of an epoch may go unnoticed.
            if not torch.stack([parameter.detach().sum() for parameter in model.parameters()]).isfinite().all():
                raise self._diverged("The weights are not finite", stage, epoch)
            record |= self._validate(stage, epoch, model)
            # Every process sees the leader's figure, so that all agree on the best.
            score = record.get(SELECTION, float(epoch))
            improved = best is None or score > best
            best = score if improved else best
            if self.processes.is_main:
                directory = self._directory(stage)
                if improved:
                    save_checkpoint(directory / "best.pt", self.checkpoint(stage, model, record))
                self._append_history(record)
                state = {
                    "format": RESUME_FORMAT,
                    "epoch": epoch + 1,
                    "best": best,
                    "model": model.state_dict(),
                    "optimizer": trainer.optimizer.state_dict(),
                    "scaler": trainer.scaler.state_dict(),
                }
                # Last, so that a run killed before this line repeats the epoch to the same end.
                save(directory / "last.pt", state)
                self._log(record, improved)
            self.processes.wait()

    def _source(self, trainer: StageTrainer) -> tuple[Source, nn.Module]:
        """Return where the batches of a stage come from, and the part of the network that takes them."""
        data, stage, model = self.inputs.training, trainer.stage, trainer.model
        # Every process computes the stems of all pairs, which pays when it would otherwise come by that many.
        pays = stage.epochs >= self.processes.count
        if (
            stage.freezes_stem
            and not trainer.accumulates_stale_gradients
            and pays
            and stems_fit(data, model, self.device)
        ):
            return CachedStemSource(data, model, self.device, trainer.autocast), StemContinuation(model)
        if self._whole is None:
            self._whole = open_source(data, self.device)
        return self._whole, model

    def _train_epoch(self, stage: Stage, epoch: int, source: Source, trainer: StageTrainer) -> dict[str, Any]:
        settings, processes, data = self.settings, self.processes, self.inputs.training
        trainer.model.train()
        epoch_seed = (settings.seed, 2, stage.number, epoch)
        order = data.epoch(settings.batch_size, epoch_seed, processes.rank, processes.count)
        mismatched = None
        if settings.mismatched and stage.learns_from_mismatched:
            mismatched = data.mismatched(order, settings.mismatched, epoch_seed, processes.rank, processes.count)
        seen = torch.zeros(5, device=self.device)
        started = time.perf_counter()
        progress = tqdm(
            source.batches(order, mismatched),
            f"stage {stage.number} epoch {epoch + 1}/{stage.epochs}",
            len(order),
            unit="step",
            leave=False,
            disable=None if processes.is_main else True,
        )
        for step, (batch, truth) in enumerate(progress):
            taken = trainer.step(batch, truth)
            seen += taken
            if step % 20 == 0 and not progress.disable:
                # A figure fetched at every step would let a GPU wait.
                progress.set_postfix(loss=f"{float(taken[:3].sum()):.3f}", refresh=False)
        if not settings.synchronised:
            seen /= processes.count
        *sums, norms, steps = processes.sum(seen).tolist()
        means = [*(loss / len(order) for loss in sums), norms / steps if steps else math.nan]
        if not all(map(math.isfinite, means)):
            raise self._diverged("The loss is not a number", stage, epoch)
        names = ("loss_matching", "loss_boundary", "loss_iou", "gradient_norm")
        seconds = time.perf_counter() - started
        record = {**dict(zip(names, means, strict=True)), "steps": len(order), "seconds": round(seconds, 2)}
        return record | ({"steps_left_out": len(order) - round(steps)} if trainer.scaler.is_enabled() else {})

    def _validate(self, stage: Stage, epoch: int, model: DRN) -> dict[str, float]:
        annotations = self.inputs.validation
        if not annotations:
            return {}
        # Every process validates the whole set, so that no figure is sent about; only the leader's is kept.
        checkpoint = self.checkpoint(stage, model, {})
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
                    # Said once, before the first epoch.
                    warn=False,
                )
            except ModelFileError as error:
                if error.code != NON_FINITE:
                    raise
                # The weights are in memory, so no file is damaged.
                raise self._diverged("The network's output is not finite", stage, epoch) from error
        return dict(evaluation.report.values)

    def _diverged(self, what: str, stage: Stage, epoch: int) -> GroundingError:
        """Return the error of a training whose numbers are not finite."""
        advice = "" if self.settings.precision == "fp32" else ", or with --precision fp32"
        return GroundingError(
            f"{what} in stage {stage.number}, epoch {epoch + 1}, with --lr {stage.learning_rate:g}: the training has "
            f"diverged. Start again with a lower --lr{advice}.",
            code="training_diverged",
        )

    def checkpoint(self, stage: Stage, model: DRN, record: dict[str, Any]) -> Checkpoint:
        """Return the network with all that it needs, and how it came to be."""
        inputs = self.inputs
        return Checkpoint(
            config=model.config,
            features=inputs.features,
            vocabulary=inputs.vocabulary,
            decoding=dataclasses.replace(inputs.decoding, use_iou_scores=stage.use_iou_scores),
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

    def _load_best(self, stage: Stage, model: DRN) -> None:
        model.load_state_dict(dict(load_checkpoint(self._directory(stage) / "best.pt").weights))

    def _restore(self, stage: Stage, model: DRN, trainer: StageTrainer) -> tuple[int, float | None]:
        """Return how many epochs of `stage` are done and the best score so far; the state is put back."""
        path = self._directory(stage) / "last.pt"
        if not path.is_file():
            return 0, None
        state = load(path)
        check_format(state, RESUME_FORMAT, f"{path}", CheckpointError, "start again with another --output")
        advice = "copy the checkpoints of this run again, or choose another --output"
        with reading(path, f"the state of stage {stage.number}", CheckpointError, advice):
            check_weights(state["model"], model.config, str(path))
            model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.scaler.load_state_dict(state["scaler"])
        if self.processes.is_main:
            log.info("Stage %d: going on after epoch %d of %d.", stage.number, state["epoch"], stage.epochs)
        return state["epoch"], state["best"]

    def _append_history(self, record: dict[str, Any]) -> None:
        # An epoch that is repeated after a kill replaces its line.
        same = ("stage", "epoch")
        records = [known for known in self._history() if any(known[key] != record[key] for key in same)]
        write_text(self.output / "history.jsonl", "".join(json.dumps(each) + "\n" for each in (*records, record)))

    def _log(self, record: dict[str, Any], improved: bool) -> None:
        losses = " + ".join(f"{record[f'loss_{name}']:.3f}" for name in ("matching", "boundary", "iou"))
        scores = ", ".join(
            f"{name} {100 * record[name]:.2f}" for name in (SELECTION, recall_name(1, 0.7), "mIoU") if name in record
        )
        log.info(
            "Stage %d epoch %d: losses %s; %s; %.0f s%s",
            record["stage"],
            record["epoch"],
            losses,
            scores or "not validated",
            record["seconds"],
            "; best" if improved else "",
        )


def fresh_model(config: DRNConfig, seed: int, initialise: Callable[[DRN], Any] = lambda model: None) -> DRN:
    """Return an untrained network; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DRN(config)
        initialise(model)
    return model
