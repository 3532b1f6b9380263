"""The run folder: the single source of truth of one sweep.

    sweep.json                 id, configuration, device, versions
    base_model.json data.json  what was prepared
    plan.json                  packs, with reasons
    decisions.jsonl            what the controller decided, and why
    packs.jsonl                what each pack and slot did, when and where, and how fast
    speeds.json                what earlier sweeps had measured when it was started
    environment.json           machine, Python, packages and commit it was started from
    system/NODE.jsonl          use of a node's CPUs, memory and GPUs while it trained
    trials/007/trial.json      the trial
    trials/007/progress.jsonl  its loss curve
    trials/007/attempts/2/     what attempt 2 wrote: checkpoints, adapter, evaluation.json,
                               answers.json, which of the task's questions it answered rightly;
                               arithmetic.json, what its pack chose before it started;
                               and done.json, once it was trained to its end
    trials/007/result.json     final; when it is there, the trial is over
    winner.json registration.json report.html
    driver.log                 what the driver of a submitted sweep has printed
    done.json                  written last: nothing is left to do

One process owns the folder at a time, by a lock that dies with it. Writes are atomic.
"""

import logging
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from orchestrator.config import SweepConfig
from orchestrator.errors import RunFolderError
from orchestrator.files import (
    append_json_line,
    read_json,
    read_json_lines,
    write_json,
)
from orchestrator.records import (
    Arithmetic,
    Decision,
    Evaluated,
    PackEvent,
    Progress,
    TrialDone,
    TrialResult,
    TrialSpec,
)

log = logging.getLogger(__name__)

DRIVER_LOG = "driver.log"
# Fields that may differ between a start and a resume: they do not change what is trained.
RESUMABLE_FIELDS = ("resources", "tracking", "registry", "max_restarts", "runs_dir")
# Beginnings of fields that add trials: all that there are stay, and a sampler learns from them.
EXTENDING_FIELDS = (
    "search.space.",
    "search.conditions.",
    "search.sampler:",
    "search.ahead:",
    "search.num_trials:",
)


@dataclass(frozen=True)
class SweepRecord:
    run_id: str
    created: float
    config: SweepConfig
    device: str
    compute_dtype: str
    backend: str
    """What runs the packs: ray | in_process."""
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "created": self.created,
            "config": self.config.model_dump(mode="json"),
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "backend": self.backend,
            "versions": self.versions,
        }


class RunStore:
    """Reads and writes of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    @classmethod
    def create(cls, folder: Path, record: SweepRecord) -> "RunStore":
        """Raises RunFolderError if the folder already holds a sweep."""
        store = cls(folder)
        store.check_free(record.config)
        write_json(store._path("sweep.json"), record.to_json())
        return store

    def check_free(self, config: SweepConfig) -> None:
        """Raises RunFolderError if the folder already holds a sweep, this one or another."""
        if self._path("sweep.json").exists():
            raise RunFolderError(_why_not_empty(self, config))

    @classmethod
    def open(cls, folder: Path) -> "RunStore":
        store = cls(folder)
        if not store._path("sweep.json").exists():
            raise RunFolderError(f"{folder} is no run folder: it has no sweep.json")
        return store

    def _path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    @property
    def sweep(self) -> SweepRecord:
        """Raises RunFolderError if its record cannot be read."""
        path = self._path("sweep.json")
        try:
            record = read_json(path)
            return SweepRecord(**{**record, "config": SweepConfig.model_validate(record["config"])})
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{path} is damaged, or of another version: {str(error).splitlines()[0]}"
            ) from error

    def extension(self, config: SweepConfig) -> list[str]:
        """What a changed configuration adds trials by, in words; empty where it adds none.

        Raises:
            RunFolderError: it differs in a field that decides what the present trials train.
        """
        differences = config_differences(self.sweep.config, config)
        extending = [words for words in differences if words.startswith(EXTENDING_FIELDS)]
        if others := [words for words in differences if words not in extending]:
            names = [name.rstrip(".:") for name in EXTENDING_FIELDS]
            raise RunFolderError(
                f"a resume may change {', '.join(RESUMABLE_FIELDS)}, and to add trials "
                f"{', '.join(names)}, but got {'; '.join(others)}: start a new sweep for that"
            )
        return extending

    def change_config(self, config: SweepConfig) -> None:
        """Raises RunFolderError: see extension."""
        extending = self.extension(config)
        if extending:
            # Before the new configuration: without it, a resume makes them again as they were.
            for name in ("done", "registration", "winner"):
                self._path(f"{name}.json").unlink(missing_ok=True)
        write_json(self._path("sweep.json"), replace(self.sweep, config=config).to_json())
        if extending:
            self.add_decision(Decision(time.time(), "extend", "sweep", "; ".join(extending)))

    @contextmanager
    def locked(self, wait_s: float = 0) -> Iterator[None]:
        """Own the folder. The lock is the operating system's: it ends with the process."""
        lock = FileLock(self._path("lock"))
        try:
            lock.acquire(timeout=wait_s)
        except Timeout as error:
            raise RunFolderError(
                f"{self.folder} is in use by another process: wait for it, or end it first"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def write(self, name: str, record: Any) -> None:
        """Write one of the sweep's own records, such as plan or data."""
        write_json(self._path(f"{name}.json"), record)

    def read(self, name: str) -> Any | None:
        path = self._path(f"{name}.json")
        return read_json(path) if path.exists() else None

    def add_decision(self, decision: Decision) -> None:
        # With facts it is one that a resume goes by.
        append_json_line(self._path("decisions.jsonl"), decision.to_json(), bool(decision.facts))

    @property
    def decisions(self) -> list[dict[str, Any]]:
        return read_json_lines(self._path("decisions.jsonl"))

    def add_pack_event(self, event: PackEvent) -> None:
        row = {name: value for name, value in asdict(event).items() if value is not None}
        append_json_line(self._path("packs.jsonl"), row)

    @property
    def pack_events(self) -> list[dict[str, Any]]:
        return read_json_lines(self._path("packs.jsonl"))

    def trial_dir(self, number: int) -> Path:
        return self._path("trials", f"{number:03d}")

    def attempt_dir(self, number: int, attempt: int) -> Path:
        return self.trial_dir(number) / "attempts" / str(attempt)

    def add_trial(self, trial: TrialSpec, refused: TrialResult | None = None) -> None:
        """`refused`: the result of one that is not taken. It is there before the trial is, so that
        a trial without a result is one that was taken."""
        path = self.trial_dir(trial.number) / "trial.json"
        if path.exists():
            return
        result = path.with_name("result.json")
        result.unlink(missing_ok=True)  # of a start that was killed between the two
        if refused is not None:
            write_json(result, refused.to_json())
        write_json(path, trial.to_json())

    @property
    def trials(self) -> list[TrialSpec]:
        return [self.trial(number) for number in self.trial_numbers]

    @property
    def trial_numbers(self) -> list[int]:
        """Cheaper than the trials, for who looks often."""
        return self._numbers("trial.json")

    def trial(self, number: int) -> TrialSpec:
        return TrialSpec.from_json(read_json(self.trial_dir(number) / "trial.json"))

    def start_attempt(self, number: int, arithmetic: Arithmetic) -> tuple[int, Path]:
        """The number and folder of a new attempt. Earlier attempts' folders stay as they are."""
        attempt = max(self._attempts(number), default=0) + 1
        folder = self.attempt_dir(number, attempt)
        folder.mkdir(parents=True)
        write_json(folder / "arithmetic.json", asdict(arithmetic))
        return attempt, folder

    def checkpoints(self, number: int, before: int | None = None) -> list[Path]:
        """Folders of complete checkpoints of all attempts, the furthest first; `before` a step."""
        folders = self.trial_dir(number).glob("attempts/*/checkpoint-*")
        return sorted(
            (
                folder
                for folder in folders
                if (folder / "checkpoint.json").exists()
                and (before is None or checkpoint_step(folder) < before)
            ),
            key=lambda folder: (folder.name, int(folder.parent.name)),
            reverse=True,
        )

    def arithmetic(self, number: int) -> Arithmetic | None:
        """Of the attempt that got furthest; None if there is no checkpoint to go on from."""
        for folder in self.checkpoints(number):
            return Arithmetic(**read_json(folder.parent / "arithmetic.json"))
        return None

    def drop_files(self, result: TrialResult) -> None:
        """What a trial that is over needs no more: its checkpoints, each a row with its optimizer
        states, and the adapter of one that was stopped after it was trained to its end."""
        names = ["checkpoint-*"] + ["adapter"] * (result.state == "pruned")
        for name in names:
            for folder in self.trial_dir(result.number).glob(f"attempts/*/{name}"):
                try:
                    shutil.rmtree(folder)
                except OSError as error:  # as of a worker that is being killed and writes there yet
                    log.warning("%s: the next start of the sweep removes it: %s", folder, error)

    def _attempts(self, number: int) -> list[int]:
        return [int(path.name) for path in self.trial_dir(number).glob("attempts/*")]

    def add_point(self, point: Progress | Evaluated) -> None:
        row = {"kind": type(point).__name__.lower(), **point.__dict__}
        # Verdicts go by evaluations, and what is written after them is durable, too.
        path = self.trial_dir(point.trial) / "progress.jsonl"
        append_json_line(path, row, durable=isinstance(point, Evaluated))

    def all_points(self, number: int) -> list[dict[str, Any]]:
        """Of all attempts, as they came in."""
        return read_json_lines(self.trial_dir(number) / "progress.jsonl")

    def points(self, number: int) -> list[dict[str, Any]]:
        """The trial's curve, by step: where attempts overlap, the latest one's rows."""
        latest = {(row["kind"], row["step"]): row for row in self.all_points(number)}
        return sorted(latest.values(), key=lambda row: (row["step"], row["kind"]))

    def add_done_event(self, event: TrialDone) -> None:
        """A trial that is trained to its end; whether it may stay so can be still undecided."""
        write_json(self.attempt_dir(event.trial, event.attempt) / "done.json", asdict(event))

    @property
    def done_events(self) -> dict[int, TrialDone]:
        """By trial."""
        paths = self._path("trials").glob("*/attempts/*/done.json")
        events = [TrialDone(**read_json(path)) for path in paths]
        return {event.trial: event for event in events}

    def finish_trial(self, result: TrialResult) -> None:
        path = self.trial_dir(result.number) / "result.json"
        if path.exists():
            raise RunFolderError(f"trial {result.number} is over and cannot change ({path})")
        write_json(path, result.to_json())

    def result(self, number: int) -> TrialResult | None:
        path = self.trial_dir(number) / "result.json"
        return TrialResult.from_json(read_json(path)) if path.exists() else None

    @property
    def results(self) -> list[TrialResult]:
        numbers = set(self.trial_numbers).intersection(self._numbers("result.json"))
        paths = (self.trial_dir(number) / "result.json" for number in sorted(numbers))
        return [TrialResult.from_json(read_json(path)) for path in paths]

    def _numbers(self, name: str) -> list[int]:
        """Of trials that have a file of this name, in order: 1000 comes after 101."""
        return sorted(int(path.parent.name) for path in self._path("trials").glob(f"*/{name}"))


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def holds_sweep(folder: Path) -> bool:
    return (folder / "sweep.json").exists()


def new_run_id(name: str, now: float) -> str:
    """Unique also for two starts in one second and for two folders of one name."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(2)}"


def config_differences(old: SweepConfig, new: SweepConfig) -> list[str]:
    """Fields that decide what is trained and differ, as `field: old -> new`."""
    before = _flat(old.model_dump(mode="json", exclude=set(RESUMABLE_FIELDS)))
    after = _flat(new.model_dump(mode="json", exclude=set(RESUMABLE_FIELDS)))
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _why_not_empty(store: RunStore, config: SweepConfig) -> str:
    differences = config_differences(store.sweep.config, config)
    if not differences:
        return (
            f"{store.folder} already holds this sweep: go on with "
            f"`orchestrator resume {shlex.quote(str(store.folder))}`"
        )
    return (
        f"{store.folder} holds another sweep ({'; '.join(differences)}): choose another --run-dir"
    )


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
