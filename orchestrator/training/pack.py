"""A pack worker: one base model, K slots, one loop for K >= 1.

In: a PackSpec, then directives. Out: events. `advance` trains until there is something to report;
its caller (a Ray actor, or the process itself) hands the events to the sweep's controller and comes
back with the controller's directives. Knows nothing of Ray.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.data.manifest import load_manifest
from orchestrator.data.reader import Batch, BlockReader
from orchestrator.data.tokenizing import IGNORED
from orchestrator.errors import BaseModelError, TrialFailed
from orchestrator.files import write_json
from orchestrator.records import (
    Assign,
    Checkpointed,
    Directive,
    Evaluated,
    Event,
    Leave,
    PackLeft,
    PackReady,
    PackSpec,
    Progress,
    TrialDone,
    TrialOpened,
    TrialStopped,
)
from orchestrator.training.adapter import save_adapter
from orchestrator.training.base_model import enable_recomputation, load_base_model
from orchestrator.training.engine import Engine, RowEngine
from orchestrator.training.evaluation import Evaluation, evaluate
from orchestrator.training.loss import slot_losses
from orchestrator.training.memory import peak_memory_bytes
from orchestrator.training.slot import Slot
from orchestrator.training.slots import Slots

REPORT_EVERY_S = 1.0


class PackWorker:
    def __init__(self, spec: PackSpec) -> None:
        self.spec = spec
        self.slots: dict[int, Slot] = {}  # occupied ones, by slot number
        self._meters: dict[int, _Meter] = {}
        self._reported = 0.0

    def load(self) -> PackReady:
        """Load the base and measure it; must come before the first `advance`."""
        started = time.monotonic()
        spec = self.spec
        if spec.device == "cpu":
            torch.set_num_threads(spec.cpus)
        strategy = StrategyConfig.model_validate(spec.strategy)
        self.base = load_base_model(
            spec.base_model, QuantConfig.model_validate(spec.quant), spec.device, strategy
        )
        if spec.gradient_checkpointing:
            enable_recomputation(self.base.model)
        self.rows = Slots(
            self.base.model, spec.target_modules, spec.num_slots, spec.max_rank, spec.device
        )
        self.engine = self._build_engine(strategy)
        self.train_reader = BlockReader(load_manifest(Path(spec.train_manifest)))
        self.held_out_reader = BlockReader(load_manifest(Path(spec.held_out_manifest)))
        (baseline,) = self._evaluate([])
        if not math.isfinite(baseline.loss):
            raise BaseModelError(
                f"{spec.base_model.source}: its held-out loss is {baseline.loss}: use another "
                "quant.compute_dtype or bit_width, or another base model"
            )
        self.baseline = baseline.loss
        return PackReady(
            spec.pack,
            self.base.num_bytes,
            self.base.num_params,
            baseline.loss,
            time.monotonic() - started,
        )

    def advance(self, directives: Sequence[Directive]) -> list[Event]:
        """Carry out the directives, then train until something is to be reported."""
        opened: list[Event] = []
        for directive in directives:
            if isinstance(directive, Leave):
                return self._leave(directive.save)
            opened += self._open(directive)
        reports: list[Event] = []
        while self.slots and not reports:
            reports = self._round()
        return opened + reports

    def _build_engine(self, strategy: StrategyConfig) -> Engine:
        if strategy.kind == "replicated":
            return RowEngine(self.rows)
        from orchestrator.training.zero import ZeroEngine

        spec = self.spec
        return ZeroEngine(self.base.model, self.rows, strategy, spec.micro_batch_size, spec.device)

    def _open(self, directive: Assign) -> list[Event]:
        number = next(n for n in range(self.spec.num_slots) if n not in self.slots)
        slot = Slot(number, directive.task, self.rows, self.engine, self.train_reader)
        self.slots[number] = slot
        self._meters[number] = _Meter(slot.tokens)
        trial, attempt = slot.task.trial, slot.task.attempt
        opened = TrialOpened(trial, attempt, slot.step, tuple(slot.refused_checkpoints))
        if slot.step:
            return [opened]
        # An adapter that was not trained yet changes nothing: its loss is the base's.
        return [opened, Evaluated(trial, attempt, time.time(), 0, 0, self.baseline)]

    def _leave(self, save: bool) -> list[Event]:
        events: list[Event] = []
        for slot in self.slots.values():
            if self._meters[slot.number].has_news:
                events.append(self._progress(slot))
            if save:
                events.append(self._save(slot))
            slot.close()
        self.slots.clear()
        self.engine.close()
        return [*events, PackLeft(self.spec.pack)]

    def _round(self) -> list[Event]:
        """One micro-batch for every occupied slot."""
        started = time.monotonic()
        members = list(self.slots.values())
        losses = self._losses_and_gradients(members)
        failed: list[Event] = []
        stepped: list[Slot] = []
        for slot, loss in zip(members, losses, strict=True):
            try:
                if slot.finish_micro_batch(loss):
                    stepped.append(slot)
            except TrialFailed as error:
                failed.append(self._stop(slot, error))
        elapsed = time.monotonic() - started
        for slot in members:
            slot.train_s += elapsed
        for slot in stepped:
            self._meters[slot.number].add(slot.step_loss)
        return failed + self._after_steps(list(self.slots.values()), stepped)

    def _losses_and_gradients(self, members: Sequence[Slot]) -> list[float]:
        parts = [slot.next_micro_batch() for slot in members]
        losses = self.engine.forward(lambda: self._losses(members, parts))
        self.engine.backward(losses.sum())
        values: list[float] = losses.tolist()
        return values

    def _losses(self, members: Sequence[Slot], parts: Sequence[tuple[Batch, float]]) -> Tensor:
        device = self.spec.device
        batch = Batch.concatenate([part for part, _ in parts])
        input_ids = torch.from_numpy(batch.input_ids).long().to(device)
        position_ids = torch.from_numpy(batch.position_ids).long().to(device)
        kept = batch.labels != IGNORED
        owners = np.repeat(np.arange(len(members)), [len(part.labels) for part, _ in parts])
        slot_of_label = np.broadcast_to(owners[:, None], kept.shape)[kept]
        self.rows.activate(
            [slot.number for slot in members],
            [slot.scaling for slot in members],
            [slot.dropout for slot in members],
        )
        hidden = self.base.hidden(input_ids, position_ids)
        return slot_losses(
            hidden[torch.from_numpy(kept).to(device)],
            torch.from_numpy(batch.labels[kept]).long().to(device),
            torch.from_numpy(slot_of_label.copy()).to(device),
            torch.tensor([weight for _, weight in parts], device=device),
            self.base.head,
        )

    def _after_steps(self, members: Sequence[Slot], stepped: Sequence[Slot]) -> list[Event]:
        events: list[Event] = []
        every = self.spec.evaluation.every_steps
        due = [slot for slot in stepped if slot.done or (every and slot.step % every == 0)]
        now = time.monotonic()
        if due or now - self._reported >= REPORT_EVERY_S:
            self._reported = now
            reporting = [slot for slot in members if self._meters[slot.number].has_news]
            events += [self._progress(slot) for slot in reporting]
        evaluations: dict[int, Evaluation] = {}  # finite ones, by slot number
        for slot, evaluation in zip(due, self._evaluate(due) if due else [], strict=True):
            try:
                events.append(self._evaluated(slot, evaluation))
                evaluations[slot.number] = evaluation
            except TrialFailed as error:
                events.append(self._stop(slot, error))
        going_on = [slot for slot in stepped if slot.number in self.slots]
        for slot in going_on:
            if not slot.done and slot.step % self.spec.checkpoint_every_steps == 0:
                events.append(self._save(slot))
        for slot in going_on:
            if slot.done:
                events.append(self._finish(slot, evaluations[slot.number]))
        if due:  # an evaluation's time is not training time
            for meter in self._meters.values():
                meter.started = time.monotonic()
        return events

    def _evaluate(self, members: Sequence[Slot]) -> list[Evaluation]:
        return evaluate(
            self.base,
            self.engine,
            self.rows,
            [(slot.number, slot.scaling) for slot in members],
            self.held_out_reader,
            self.spec.evaluation.batch_size,
        )

    def _progress(self, slot: Slot) -> Progress:
        loss, rate = self._meters[slot.number].take(slot.tokens)
        return Progress(
            slot.task.trial,
            slot.task.attempt,
            time.time(),
            slot.step,
            slot.tokens,
            loss,
            slot.learning_rate,
            slot.grad_norm,
            rate,
        )

    def _evaluated(self, slot: Slot, evaluation: Evaluation) -> Evaluated:
        """Raises TrialFailed, having written nothing, if the loss is not finite."""
        if not math.isfinite(evaluation.loss):
            raise TrialFailed(
                "loss_not_finite",
                f"step {slot.step}: held-out loss {evaluation.loss}: lower "
                "optimizer.learning_rate or raise schedule.warmup_steps",
            )
        write_json(
            Path(slot.task.attempt_dir) / "evaluation.json",
            evaluation.to_json(self.held_out_reader) | {"step": slot.step},
        )
        return Evaluated(
            slot.task.trial,
            slot.task.attempt,
            time.time(),
            slot.step,
            slot.tokens,
            evaluation.loss,
        )

    def _save(self, slot: Slot) -> Checkpointed:
        folder = slot.save()
        return Checkpointed(slot.task.trial, slot.task.attempt, slot.step, str(folder))

    def _stop(self, slot: Slot, error: TrialFailed) -> TrialStopped:
        self._close(slot)
        return TrialStopped(
            slot.task.trial, slot.task.attempt, time.time(), error.reason, error.message
        )

    def _finish(self, slot: Slot, evaluation: Evaluation) -> TrialDone:
        folder = Path(slot.task.attempt_dir) / "adapter"
        tensors = slot.adapter_tensors()
        num_params = sum(tensor.numel() for tensor in tensors.values())
        facts = {
            "compute_dtype": self.spec.quant["compute_dtype"],
            "template": self.spec.template,
            "train_manifest": self.train_reader.manifest.digest,
            "held_out_manifest": self.held_out_reader.manifest.digest,
        }
        digest = save_adapter(folder, tensors, slot.trial, self.spec.base_model, facts)
        memory = self.base.num_bytes + num_params * slot.state_bytes_per_param()
        last_loss = self._meters[slot.number].last
        self._close(slot)
        return TrialDone(
            trial=slot.task.trial,
            attempt=slot.task.attempt,
            time=time.time(),
            eval_loss=evaluation.loss,
            baseline_eval_loss=self.baseline,
            train_loss=last_loss,
            steps=slot.step,
            tokens=slot.tokens,
            tokens_per_s=slot.tokens / max(slot.train_s, 1e-9),
            train_s=slot.train_s,
            peak_memory_bytes=peak_memory_bytes(self.spec.device),
            model_memory_bytes=round(memory),
            num_adapter_params=num_params,
            adapter_bytes=sum(path.stat().st_size for path in folder.iterdir()),
            adapter_dir=str(folder),
            adapter_digest=digest,
        )

    def _close(self, slot: Slot) -> None:
        slot.close()
        del self.slots[slot.number]
        del self._meters[slot.number]


class _Meter:
    """Mean loss and tokens per second since the last report of one slot."""

    def __init__(self, tokens: int) -> None:
        self.last = float("nan")
        self.started = time.monotonic()
        self._losses: list[float] = []
        self._tokens = tokens

    @property
    def has_news(self) -> bool:
        return bool(self._losses)

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    def take(self, tokens: int) -> tuple[float, float]:
        self.last = sum(self._losses) / len(self._losses)
        rate = (tokens - self._tokens) / max(1e-9, time.monotonic() - self.started)
        self._losses, self._tokens, self.started = [], tokens, time.monotonic()
        return self.last, rate
