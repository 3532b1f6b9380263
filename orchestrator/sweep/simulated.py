"""A pack worker that trains nothing: a stand-in for tests of everything around training.

Its loss is a closed form of the trial's rank, learning rate and step, so that who wins is known. It
writes the files that a real worker writes, in the same order, and can be told to fail.
"""

import ctypes
import errno
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.config import QuantConfig, TrialConfig
from orchestrator.errors import DataError, TrialFailed
from orchestrator.files import read_json, record_digest, write_json
from orchestrator.records import (
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
    SlotTask,
    TrialDone,
    TrialOpened,
    TrialStopped,
)

BASELINE_LOSS = 4.0
TOKENS_PER_STEP = 100


def simulated_loss(trial: TrialConfig, step: int) -> float:
    """Falls with steps, rank and bits, and is least at a learning rate of 1e-3."""
    mistuned = abs(math.log10(trial.optimizer.learning_rate) + 3)
    floor = 1.0 + 1.0 / trial.adapter.rank + 0.4 / trial.quant.mean_bits + 0.2 * mistuned
    return floor + (BASELINE_LOSS - floor) * math.exp(-3 * step / trial.steps)


class SimulatedWorker:
    """`faults` maps a trial number to what befalls it at its second step: raise, die, hang, nan,
    bad_shard or disk_full. A fault of -1 befalls the loading. Of several workers the last one meets
    it; the others then wait for that one without end, as they would in a sum of gradients."""

    def __init__(
        self,
        spec: PackSpec,
        place: GroupPlace,
        faults: Mapping[int, str] | None = None,
        step_s: float = 0.0,
        tokens_per_s: float = 1000.0,
    ) -> None:
        self._spec = spec
        self._place = place
        self._faults = faults or {}
        self._step_s = step_s
        self._tokens_per_s = tokens_per_s
        self._slots: dict[int, _SimulatedSlot] = {}

    def load(self) -> PackReady:
        self._befall(-1)
        mean_bits = QuantConfig.model_validate(self._spec.quant).mean_bits
        num_bytes = round(1e6 * mean_bits / 8)
        return PackReady(self._spec.pack, num_bytes, 10**6, BASELINE_LOSS, 0.0)

    def advance(self, directives: Sequence[Directive]) -> list[Event]:
        events: list[Event] = []
        writes = self._place.world_rank == 0
        for directive in directives:
            match directive:
                case Assign(task):
                    assert len(self._slots) < self._spec.num_slots, "no slot is free"
                    taken = {slot.place for slot in self._slots.values()}
                    place = next(n for n in range(self._spec.num_slots) if n not in taken)
                    slot = self._slots[task.trial] = _SimulatedSlot(
                        task, writes, place, self._tokens_per_s
                    )
                    node = platform.node()
                    events.append(
                        TrialOpened(task.trial, task.attempt, slot.step, slot=place, node=node)
                    )
                case Prune(trial):
                    self._slots.pop(trial, None)
                case Leave(save):
                    saved = [slot.save() for slot in self._slots.values()] if save else []
                    return [*saved, PackLeft(self._spec.pack)]
        for slot in list(self._slots.values()):
            time.sleep(self._step_s)
            events += self._step(slot)
        return events

    def _step(self, slot: "_SimulatedSlot") -> list[Event]:
        task = slot.task
        slot.step += 1
        if slot.step == 2:
            try:
                self._befall(task.trial)
            except TrialFailed as error:
                del self._slots[task.trial]
                now = time.time()
                return [TrialStopped(task.trial, task.attempt, now, error.reason, error.message)]
        events: list[Event] = [slot.progress()]
        if slot.step in task.rungs:
            events.append(slot.evaluated())
        if slot.step < task.config.steps:
            if slot.step % self._spec.checkpoint_every_steps == 0:
                events.append(slot.save())
        else:
            del self._slots[task.trial]
            events += [slot.evaluated(), slot.done()]
        return events

    def _befall(self, trial: int) -> None:
        fault = self._faults.get(trial, "")
        last = self._place.world_rank == self._place.world_size - 1
        while fault and fault != "nan" and not last:  # a loss is everyone's
            time.sleep(1.0)
        match fault:
            case "raise":
                raise ValueError("a simulated error")
            case "die":
                os._exit(1)
            case "hang":  # within a call that lets no other thread of this process run Python
                while True:
                    ctypes.PyDLL(None).pause()
            case "nan":
                raise TrialFailed("loss_not_finite", "step 2: loss nan")
            case "bad_shard":
                raise DataError("train-00000: the shard is missing or damaged")
            case "disk_full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case _:
                pass


class _SimulatedSlot:
    def __init__(self, task: SlotTask, writes: bool, place: int, tokens_per_s: float) -> None:
        self.task = task
        self.place = place
        self._writes = writes
        self._tokens_per_s = tokens_per_s
        self.step = 0
        if task.checkpoint_dirs:
            self.step = read_json(Path(task.checkpoint_dirs[0]) / "checkpoint.json")["step"]

    @property
    def loss(self) -> float:
        return simulated_loss(self.task.config, self.step)

    @property
    def tokens(self) -> int:
        return TOKENS_PER_STEP * self.step

    def save(self) -> Checkpointed:
        folder = Path(self.task.attempt_dir) / f"checkpoint-{self.step:08d}"
        if self._writes:
            write_json(folder / "checkpoint.json", {"step": self.step})
        return Checkpointed(self.task.trial, self.task.attempt, self.step, str(folder))

    def progress(self) -> Progress:
        rate = self.task.config.optimizer.learning_rate
        return Progress(
            self.task.trial,
            self.task.attempt,
            time.time(),
            self.step,
            self.tokens,
            self.loss,
            rate,
            1.0,
            self._tokens_per_s,
        )

    def evaluated(self) -> Evaluated:
        return Evaluated(
            self.task.trial, self.task.attempt, time.time(), self.step, self.tokens, self.loss
        )

    def done(self) -> TrialDone:
        folder = Path(self.task.attempt_dir) / "adapter"
        config = self.task.config.model_dump(mode="json")
        if self._writes:
            write_json(folder / "adapter_config.json", config)
        num_params = 1000 * self.task.config.adapter.rank
        return TrialDone(
            trial=self.task.trial,
            attempt=self.task.attempt,
            time=time.time(),
            eval_loss=self.loss,
            baseline_eval_loss=BASELINE_LOSS,
            train_loss=self.loss,
            steps=self.step,
            tokens=self.tokens,
            tokens_per_s=self._tokens_per_s,
            train_s=self.tokens / self._tokens_per_s,
            peak_memory_bytes=10**9,
            model_memory_bytes=round(10**6 * self.task.config.quant.mean_bits),
            num_adapter_params=num_params,
            adapter_bytes=4 * num_params,
            adapter_dir=str(folder),
            adapter_digest=record_digest(config),
        )
