"""A pack worker: one base model, K slots, one loop for K >= 1.

In: a PackSpec, then directives. Out: events. `advance` trains until there is something to report;
its caller (a Ray actor, or the process itself) hands the events to the sweep's controller and comes
back with the controller's directives. Knows nothing of Ray.
"""

import math
import platform
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.data.manifest import fetch_manifest
from orchestrator.data.reader import BlockReader
from orchestrator.errors import BaseModelError, OrchestratorError, TrialFailed
from orchestrator.files import write_json
from orchestrator.records import (
    ALONE,
    Answered,
    Assign,
    Checkpointed,
    Directive,
    Evaluated,
    Event,
    GroupPlace,
    Leave,
    PackLeft,
    PackReady,
    PackSpec,
    Progress,
    Prune,
    TrialDone,
    TrialOpened,
    TrialStopped,
)
from orchestrator.training.adapter import save_adapter
from orchestrator.training.base_model import LoadedBase, enable_recomputation, load_base_model
from orchestrator.training.engine import Engine, RowEngine
from orchestrator.training.evaluation import Evaluation, evaluate
from orchestrator.training.feed import Feed
from orchestrator.training.gated_mlp import join_gated_mlps
from orchestrator.training.lanes import BASE_ALONE, Lanes, Served
from orchestrator.training.libraries import import_libraries
from orchestrator.training.loftq import Corrections
from orchestrator.training.memory import PeakMemory, cap_memory, memory_gauge
from orchestrator.training.meter import Meter
from orchestrator.training.model_source import local_folder
from orchestrator.training.program import EagerProgram, check_lanes
from orchestrator.training.program_builder import ProgramBuilder
from orchestrator.training.replicas import Replicas, agree, join
from orchestrator.training.slot import Slot
from orchestrator.training.slots import Slots
from orchestrator.training.step import StepRunner
from orchestrator.training.task import Answers, Task

REPORT_EVERY_S = 1.0


class PackWorker:
    def __init__(
        self, spec: PackSpec, place: GroupPlace = ALONE, report_every_s: float = REPORT_EVERY_S
    ) -> None:
        self.spec = spec
        self.place = place
        self._report_every_s = report_every_s
        # All workers of a pack train the same slots and come to the same events; one writes.
        self._writes = place.world_rank == 0
        self.slots: dict[int, Slot] = {}  # occupied ones, by slot number
        self._meters: dict[int, Meter] = {}
        self._answers: dict[int, Answers] = {}  # of slots that are trained to their end
        self.memory = PeakMemory(memory_gauge(spec.device))
        self._reported = 0.0
        self._round_s = 0.0

    def load(self) -> PackReady:
        """Load the base and measure it; must come before the first `advance`."""
        started = time.monotonic()
        import_libraries()
        spec = self.spec
        if spec.device == "cpu":
            torch.set_num_threads(spec.cpus)
        else:
            cap_memory(spec.memory_fraction)
            _compute_alike()
        strategy = StrategyConfig.model_validate(spec.strategy)
        self.replicas = self._join()
        corrections = Corrections(spec.max_rank)
        self.base = self._load_base(strategy, corrections)
        self.replicas.loaded()
        if spec.gradient_checkpointing:
            enable_recomputation(self.base.model, spec.kept_layers)
        if spec.step_program in ("compiled", "graph"):
            join_gated_mlps(self.base)
        self.rows = Slots(
            self.base.model,
            spec.target_modules,
            spec.num_slots,
            spec.max_rank,
            self.base.device,
            self.base.wide_dtype,
            spec.dora,
        )
        self.rows.corrections = corrections.by_layer
        train_reader = BlockReader(fetch_manifest(spec.data_place, "train"))
        self.held_out_reader = BlockReader(fetch_manifest(spec.data_place, "held_out"))
        self.feed = Feed(
            train_reader, spec.micro_batch_size, self.place.world_rank, self.place.world_size
        )
        if spec.num_slots > 1:
            check_lanes(self.base, self.rows)
        self.programs = ProgramBuilder(
            spec, self.base, self.rows, (train_reader, self.held_out_reader)
        )
        self.engine = self._build_engine(strategy)
        self._runner = StepRunner(self.base, self.engine, self.replicas)
        self.task = self._load_task()
        began = time.monotonic()
        (baseline,) = self._evaluate([BASE_ALONE])
        evaluation_s = time.monotonic() - began
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
            self.programs.kind,
            self.programs.note,
            evaluation_s,
            self.base.note,
        )

    def advance(self, directives: Sequence[Directive]) -> list[Event]:
        """Carry out the directives, then train until something is to be reported, or for a second:
        a step of many micro-batches may take an hour, and silence is taken for a hang."""
        opened: list[Event] = []
        for directive in directives:
            match directive:
                case Leave(save):
                    return opened + self._leave(save)
                case Prune(trial):
                    self._prune(trial)
                case Assign():
                    opened += self._open(directive)
        self._fit_lanes()
        reports: list[Event] = []
        due = False
        while self.slots and not reports and not due:
            reports, due = self._round()
        return opened + reports

    def _program(self) -> str:
        """All that the last digits of a trial's numbers depend on now, but for the hardware."""
        spec = self.spec
        words = [
            self.programs.kind,
            f"micro_batch_size={spec.micro_batch_size}",
            f"world_size={spec.world_size}",
            f"max_rank={spec.max_rank}",
        ]
        words += ["recomputation"] if spec.gradient_checkpointing else []
        words += [f"kept_layers={spec.kept_layers}"] if spec.kept_layers else []
        if (lanes := self.engine.program.num_lanes) is not None:
            # Kernels share out a lane's tokens by how many lanes there are, and an MLP is joined
            # with its adapters where all of its layers have some.
            words += [f"lanes={lanes}", f"layers={len(self.rows.layers)}"]
        return ", ".join(words)

    def _join(self) -> Replicas:
        return join(self.place, self.spec.device)

    def _load_base(self, strategy: StrategyConfig, corrections: Corrections) -> LoadedBase:
        spec = self.spec
        return load_base_model(
            spec.base_model,
            QuantConfig.model_validate(spec.quant),
            spec.device,
            strategy,
            spec.dequantise_once,
            corrections.add if spec.loftq else None,
            spec.quantised_cache_bytes,
        )

    def _build_engine(self, strategy: StrategyConfig) -> Engine:
        spec = self.spec
        if strategy.kind == "replicated":
            return RowEngine(self.rows, self.programs.build(spec.num_slots), self.replicas)
        from orchestrator.training.zero import ZeroEngine

        program = EagerProgram(
            self.base, self.rows, Lanes(self.rows, 1, self.base.dtype, over_rows=True)
        )
        return ZeroEngine(
            self.base,
            self.rows,
            program,
            strategy,
            spec.micro_batch_size,
            spec.device,
            self.replicas,
        )

    def _load_task(self) -> Task | None:
        if self.spec.evaluation.task is None:
            return None
        return Task(
            self.spec.evaluation.task,
            self.held_out_reader,
            local_folder(self.spec.base_model),
            self.base,
            self.rows,
            self.replicas,
        )

    def _open(self, directive: Assign) -> list[Event]:
        number = next(n for n in range(self.spec.num_slots) if n not in self.slots)
        task = directive.task
        try:
            check = partial(self._check_resumed, task.trial)
            slot = Slot(number, task, self.rows, self.engine, self.feed, self._program, check)
        except OrchestratorError as error:
            if self.place.world_size > 1 and not isinstance(error, TrialFailed):
                raise  # it may be this worker's alone, and the others would wait for it
            failed = TrialFailed.by(error)
            if failed.reason in ("out_of_memory", "worker_lost"):  # the pack's own
                raise
            self.rows.clear(number)
            words = failed.reason, failed.message
            return [TrialStopped(task.trial, task.attempt, time.time(), *words)]
        self.slots[number] = slot
        self._meters[number] = Meter(slot.tokens)
        self.memory.join(number)
        trial, attempt = slot.task.trial, slot.task.attempt
        refused = tuple(slot.refused_checkpoints)
        opened = TrialOpened(trial, attempt, slot.step, refused, slot.note, number, platform.node())
        if slot.done:  # its worker was lost while it answered questions
            return [opened, *self._after_steps(list(self.slots.values()), [slot], False)]
        if slot.step:
            return [opened]
        # An adapter that was not trained yet changes nothing: its loss is the base's.
        loss = self.baseline
        if slot.trial.adapter.init == "loftq":
            loss = self._evaluate([slot.evaluated])[0].loss
        return [opened, Evaluated(trial, attempt, time.time(), 0, 0, loss)]

    def _check_resumed(self, trial: int, step: int) -> None:
        """A shared disk may show one worker a checkpoint that another does not see yet."""
        if not agree(self.replicas, step, self.base.device):
            words = f"trial {trial}: the pack's workers found different checkpoints"
            raise TrialFailed("worker_lost", words)

    def _fit_lanes(self) -> None:
        """Where most lanes would idle for long, or some are missing: a program with others."""
        if not self.slots:
            return
        rounds_left = max(slot.rounds_left for slot in self.slots.values())
        engine = self.engine
        lanes = self.programs.resized(engine.program, len(self.slots), rounds_left, self._round_s)
        if lanes is not None:
            with self.memory.recording():
                del engine.program  # its memory is needed for the next one
                engine.program = self.programs.build(lanes)

    def _leave(self, save: bool) -> list[Event]:
        events: list[Event] = []
        for slot in self.slots.values():
            if self._meters[slot.number].has_news:
                events.append(self._progress(slot))
            if save:
                events.append(self._save(slot))
            slot.close()
        self.slots.clear()
        self.feed.close()
        self.engine.close()
        self.replicas.close()
        return [*events, PackLeft(self.spec.pack)]

    def _round(self) -> tuple[list[Event], bool]:
        """One micro-batch for every occupied slot, or questions for one that has some to answer;
        and whether to report in any case, on which all workers agree."""
        if self._answers:
            return self._answer(), True
        started = time.monotonic()
        members = list(self.slots.values())
        outcome = self._runner.run(members, started - self._reported >= self._report_every_s)
        self._round_s = outcome.round_s
        failed: list[Event] = []
        stepped: list[Slot] = []
        for slot, loss, norm in zip(members, outcome.losses, outcome.grad_norms, strict=True):
            try:
                slot.finish_micro_batch(loss, norm)
            except TrialFailed as error:
                failed.append(self._stop(slot, error))
            else:
                if norm is not None:
                    stepped.append(slot)
        elapsed = time.monotonic() - started
        for slot in members:
            slot.train_s += elapsed
        for slot in stepped:
            self._meters[slot.number].add(slot.step_loss)
        events = self._after_steps(list(self.slots.values()), stepped, outcome.flag)
        return failed + events, outcome.flag

    def _after_steps(
        self, members: Sequence[Slot], stepped: Sequence[Slot], report: bool
    ) -> list[Event]:
        events: list[Event] = []
        due = [slot for slot in stepped if self._is_due(slot)]
        if due or report:
            self._reported = time.monotonic()
            reporting = [slot for slot in members if self._meters[slot.number].has_news]
            events += [self._progress(slot) for slot in reporting]
        evaluations: dict[int, Evaluation] = {}  # finite ones, by slot number
        found = self._evaluate([slot.evaluated for slot in due]) if due else []
        for slot, evaluation in zip(due, found, strict=True):
            try:
                events.append(self._evaluated(slot, evaluation))
                evaluations[slot.number] = evaluation
            except TrialFailed as error:
                events.append(self._stop(slot, error))
        going_on = [slot for slot in stepped if slot.number in self.slots]
        for slot in going_on:
            answers = slot.done and self.task is not None  # which takes long: it may be cut short
            if answers or (not slot.done and slot.step % self.spec.checkpoint_every_steps == 0):
                events.append(self._save(slot))
        for slot in going_on:
            if slot.done and self.task is not None:
                self._answers[slot.number] = Answers(evaluations[slot.number], self.task)
            elif slot.done:
                events.append(self._finish(slot, evaluations[slot.number]))
        if due:  # an evaluation's time is not training time
            self._restart_meters()
        return events

    def _answer(self) -> list[Event]:
        """The next questions for the slot that came first."""
        assert self.task is not None
        number, answers = next(iter(self._answers.items()))
        slot = self.slots[number]
        self.task.go_on(answers, slot.evaluated, self.engine.program)
        trial, attempt = slot.task.trial, slot.task.attempt
        done, total = answers.num_answered, len(self.task.questions)
        events: list[Event] = [Answered(trial, attempt, time.time(), done, total)]
        if answers.complete:
            if self._writes:
                write_json(Path(slot.task.attempt_dir) / "answers.json", answers.to_json())
            events.append(self._finish(slot, answers.evaluation, answers.score))
        self._restart_meters()
        return events

    def _restart_meters(self) -> None:
        for meter in self._meters.values():
            meter.started = time.monotonic()

    def _is_due(self, slot: Slot) -> bool:
        """For an evaluation."""
        every = self.spec.evaluation.every_steps
        at_interval = every is not None and slot.step % every == 0
        return slot.done or at_interval or slot.step in slot.task.rungs

    def _evaluate(self, members: Sequence[Served]) -> list[Evaluation]:
        return evaluate(
            self.base,
            self.engine,
            self.replicas,
            members,
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
        if self._writes:
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
        folder = slot.save(self._writes) or ""
        return Checkpointed(slot.task.trial, slot.task.attempt, slot.step, str(folder))

    def _stop(self, slot: Slot, error: TrialFailed) -> TrialStopped:
        self._close(slot)
        return TrialStopped(
            slot.task.trial, slot.task.attempt, time.time(), error.reason, error.message
        )

    def _prune(self, trial: int) -> None:
        """It may have ended before the directive came."""
        for slot in list(self.slots.values()):
            if slot.task.trial == trial:
                self._close(slot)

    def _finish(
        self, slot: Slot, evaluation: Evaluation, task_score: float | None = None
    ) -> TrialDone | TrialStopped:
        folder = Path(slot.task.attempt_dir) / "adapter"
        tensors = slot.adapter_tensors()
        num_params = sum(tensor.numel() for tensor in tensors.values())
        facts = {
            "compute_dtype": self.spec.quant["compute_dtype"],
            "template": self.spec.template,
            "reading": self.spec.reading,
            "train_manifest": self.feed.reader.manifest.digest,
            "held_out_manifest": self.held_out_reader.manifest.digest,
        }
        digest, adapter_bytes = "", 0
        if self._writes:
            try:
                digest = save_adapter(
                    folder,
                    tensors,
                    slot.trial,
                    self.spec.base_model,
                    facts,
                    self.rows.names_elsewhere,
                )
            except OrchestratorError as error:
                # Of this worker alone, but the others close the slot as well and keep no event.
                return self._stop(slot, TrialFailed.by(error))
            adapter_bytes = sum(path.stat().st_size for path in folder.iterdir())
        memory = self.base.num_bytes + num_params * slot.state_bytes_per_param()
        last_loss = self._meters[slot.number].last
        peak = self._close(slot)
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
            peak_memory_bytes=peak,
            model_memory_bytes=round(memory),
            num_adapter_params=num_params,
            adapter_bytes=adapter_bytes,
            adapter_dir=str(folder),
            adapter_digest=digest,
            task_score=task_score,
        )

    def _close(self, slot: Slot) -> int:
        slot.close()
        del self.slots[slot.number]
        del self._meters[slot.number]
        self._answers.pop(slot.number, None)
        return self.memory.leave(slot.number)


def _compute_alike() -> None:
    """A resumed trial ends with the same bits on a GPU too. This is for torch's own operators, such
    as the loss's index_add_; attention's kernels have one order in any case. It only warns where an
    operator has none, and it changes nothing in torch's flash attention, whose backward pass takes
    its one-order path only if that is an error."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would fill every new tensor, which is only to find reads of what was never written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
