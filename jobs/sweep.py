"""`orchestrator sweep`, `resume` and `train`: compose the flow from its real parts and run it.

In: paths and options. Out: an exit code. What is wrong with the input is found before anything is
written or started; then comes the run folder, then the cluster, then the work.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from jobs.ahead import packs_come_first, tokenizer_ahead
from jobs.display import SweepDisplay, command_name, results_table, shown_path
from jobs.environment import describe_environment
from jobs.inputs import check_inputs, check_tracking
from jobs.interrupts import Interrupts, await_the_end, ignore_eviction
from jobs.settled import settled
from orchestrator import __version__
from orchestrator.config import SweepConfig
from orchestrator.data.prepare import RunTasks, run_in_process
from orchestrator.data.sources import is_small
from orchestrator.errors import (
    ConfigError,
    RegistryError,
    RunFolderError,
    TrackingError,
)
from orchestrator.loading import load_config, override_config
from orchestrator.planning.capacity import host_memory_bytes, worker_count, worker_memory_bytes
from orchestrator.planning.gpus import Gpu
from orchestrator.planning.kinds import WorkerKind, known_gpus, worker_kinds
from orchestrator.planning.machine import this_machine
from orchestrator.records import Notice, PackReady
from orchestrator.search.space import check_space, has_new_point, num_trials
from orchestrator.sweep.bits import RunOnWorker, run_here
from orchestrator.sweep.controller import Controller
from orchestrator.sweep.executor import Executor, InProcessExecutor
from orchestrator.sweep.flow import Services, auto_compute_dtype, run_sweep
from orchestrator.sweep.machine_use import SampleNodes, recorded_use, sample_this_node
from orchestrator.sweep.run_store import RunStore, SweepRecord, holds_sweep, new_run_id
from orchestrator.sweep.sharing import Alone, Claimant, Sharing
from orchestrator.tracking.follower import (
    CPU_FRACTION,
    CPU_FRACTION_BESIDE_TRAINING,
    TrackingFollower,
)
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.registry import Registration, Registry
from orchestrator.tracking.report import write_report
from orchestrator.tracking.stores import (
    FORWARDING_ENVIRONMENT,
    default_store,
    environment,
    resolve_tracking_uri,
    without_password,
)
from orchestrator.tracking.translation import trial_name
from orchestrator.wording import counted

RECORDED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "mlflow", "optuna")
INTERRUPTED = 130
DEVICES = {"cpu": "CPUs", "cuda": "GPUs"}
# Training waits no longer for a tracking server; a new SQLite store takes 8 s to set up.
CONNECT_TIMEOUT_S = 20.0
# A driver whose node was taken away holds the run folder until it is ended.
PREDECESSOR_S = 60.0


@dataclass(frozen=True)
class Backend:
    """What runs the packs and the sharding tasks."""

    name: str
    executor: Executor
    task_pool: Callable[[], AbstractContextManager[RunTasks]]
    num_workers: int
    device: str
    worker_memory_bytes: int
    kinds: tuple[WorkerKind, ...] = ()
    """Of the workers, the fastest first; empty where all are alike."""
    before_training: Callable[[], None] = lambda: None
    watch: Callable[[Notice], None] = lambda notice: None
    """Makes metrics of what the controller tells."""
    sample_nodes: SampleNodes = sample_this_node
    gpus: Mapping[str, Gpu] = field(default_factory=dict)
    """Of each kind of workers whose rates are known."""
    run_on_worker: RunOnWorker = run_here
    host_memory_bytes: int = 0
    sharing: Callable[[str], Sharing] = lambda run_id: Alone()
    """Of a run's workers, with other sweeps."""


@dataclass(frozen=True)
class Start:
    """How a sweep is started, beside its configuration."""

    run_dir: Path | None = None
    ray_address: str | None = None
    or_resume: bool = False
    """Go on with the sweep if the run folder holds it: a driver may be started twice."""
    await_workers_s: float = 0
    """Time for a cluster that grows by itself to have room for all workers."""


def start_sweep(path: Path, overrides: list[str], start: Start) -> int:
    if start.or_resume and start.run_dir is None:
        raise ConfigError(
            "--or-resume needs --run-dir, the folder that may hold the sweep: without it a new "
            "folder is made each time"
        )
    ignore_eviction()
    config = settled(load_config(path, overrides))
    check_inputs(config)
    if start.or_resume and start.run_dir is not None and holds_sweep(start.run_dir):
        return _go_on(RunStore.open(start.run_dir), config, start)
    folder = _free_folder(config, start.run_dir)
    with _ray_backend(config, start.ray_address, start.await_workers_s) as backend:
        return _run(_create(config, folder, backend), backend)


def _go_on(store: RunStore, config: SweepConfig, start: Start) -> int:
    with store.locked(PREDECESSOR_S):
        if _is_complete(store, config):
            return 0
    print(f"going on with {store.folder}")
    with _ray_backend(config, start.ray_address, start.await_workers_s) as backend:
        return _run_again(store, config, backend, PREDECESSOR_S)


def resume_sweep(
    run_dir: Path, ray_address: str | None, overrides: list[str], add_trials: int | None = None
) -> int:
    store = RunStore.open(run_dir)
    # A sweep that runs stays as it is, and who resumes it learns that before Ray starts.
    with store.locked():
        config = store.sweep.config
        if overrides or add_trials is not None:
            config = changed_config(store, overrides, add_trials)
        if _is_complete(store, config):
            return 0
        if store.extension(config):  # which asks for trials that need all of it
            check_inputs(config)
        else:
            check_tracking(config)
    if store.sweep.backend == "in_process":
        return _run_again(store, config, _in_process_backend(config))
    with _ray_backend(config, ray_address) as backend:
        return _run_again(store, config, backend)


def _is_complete(store: RunStore, config: SweepConfig) -> bool:
    """Whether nothing is left to do with this configuration; then it is said, and kept as it is.

    Raises:
        RunFolderError: it differs in a field that decides what the present trials train.
    """
    complete = not store.extension(config) and store.read("done") is not None
    if complete:
        print(f"{shown_path(store.folder)} is complete: nothing is left to do")
    return complete


def _run_again(
    store: RunStore, config: SweepConfig, backend: Backend, lock_wait_s: float = 0
) -> int:
    """What cannot be gone on with is refused before it is changed."""
    _check_device(store, backend.device)
    if config != store.sweep.config:
        with store.locked(lock_wait_s):
            store.change_config(config)
    return _run(store, backend, lock_wait_s)


def changed_config(store: RunStore, overrides: list[str], add_trials: int | None) -> SweepConfig:
    """A stored sweep's configuration, changed; `add_trials` to those that it has or will have.

    Raises:
        ConfigError: a value is not allowed, or no trial can be added.
    """
    if add_trials is not None:
        present = max(num_trials(store.sweep.config.search), len(store.trials))
        overrides = [*overrides, f"search.num_trials={present + add_trials}"]
    config = settled(override_config(store.sweep.config, overrides))
    check_space(config)
    if add_trials is not None and not has_new_point(config, store.trials, store.results):
        raise ConfigError(
            f"--add-trials {add_trials}: all points of the space are trained: widen it with --set "
            "search.space.FIELD=[...], or draw from a range with --set search.sampler=tpe --set "
            "'search.space.FIELD={low: ..., high: ...}'"
        )
    return config


def train_one(path: Path, overrides: list[str], run_dir: Path | None, register: bool) -> int:
    content = settled(load_config(path, overrides)).model_dump()
    content["search"] = {}
    content["registry"]["register_winner"] = register
    config = SweepConfig.model_validate(content)
    check_inputs(config)
    folder = _free_folder(config, run_dir)
    backend = _in_process_backend(config)
    return _run(_create(config, folder, backend), backend)


@contextmanager
def _ray_backend(
    config: SweepConfig, address: str | None, await_workers_s: float = 0
) -> Iterator[Backend]:
    from cluster.metrics import ray_metrics
    from cluster.node_use import node_sampler
    from cluster.one_job import run_on_worker
    from cluster.ray_executor import RayExecutor
    from cluster.ray_runtime import Awaited, ray_cluster, release_room, running_cluster
    from cluster.ray_sharing import RaySharing, pools
    from cluster.sharding import RayTasks

    address = running_cluster(address)
    print("starting Ray" if address is None else f"attaching to Ray at {address}")
    awaited = None
    if await_workers_s and config.resources.num_workers:
        print(f"waiting for room for {counted(config.resources.num_workers, 'worker')}")
        gpus = 1 if config.resources.device == "cuda" else 0
        cpus = config.resources.cpus_per_worker
        awaited = Awaited(config.resources.num_workers, cpus, gpus, await_workers_s)
    # Elsewhere, it is for the workers to see the shards: theirs show whether all share a folder.
    ahead = tokenizer_ahead(config) if address is None else nullcontext()
    with ahead as prepared_here, ray_cluster(address, awaited) as nodes:
        device = _device(config, "cuda" if any(node.num_gpus >= 1 for node in nodes) else "cpu")
        num_workers = worker_count(config.resources, device, nodes)
        num_cpus = int(sum(node.num_cpus for node in nodes))
        memory_bytes = worker_memory_bytes(config.resources, device, nodes, num_workers)
        executor = RayExecutor()
        alone = config.resources.workers_per_pack in (None, 1)
        if address is None and alone and packs_come_first(config):
            spares = min(num_workers, num_trials(config.search))
            executor.start_spares(spares, device, config.resources.cpus_per_worker)

        def task_pool() -> AbstractContextManager[RunTasks]:
            if prepared_here is not None and is_small(config.data):
                return prepared_here()
            return RayTasks(num_cpus)

        kinds = worker_kinds(config.resources, nodes, num_workers) if device == "cuda" else ()
        taken_from = pools(config.resources, device, kinds, nodes)

        def sharing(run_id: str) -> Sharing:
            if address is None:
                return Alone()
            priority = config.resources.priority
            return RaySharing(Claimant(run_id, priority, time.time(), taken_from))

        yield Backend(
            "ray",
            executor,
            task_pool,
            num_workers,
            device,
            memory_bytes,
            kinds,
            # From here on what packs reserve is what the cluster keeps.
            release_room if awaited else lambda: None,
            ray_metrics(config.name),
            node_sampler(),
            known_gpus(nodes),
            run_on_worker(device, config.resources.cpus_per_worker),
            host_memory_bytes(config.resources, nodes, num_workers),
            sharing,
        )


def _in_process_backend(config: SweepConfig) -> Backend:
    import torch

    device = _device(config, "cuda" if torch.cuda.is_available() else "cpu")
    machine = this_machine()
    return Backend(
        "in_process",
        InProcessExecutor(),
        lambda: nullcontext(run_in_process),
        1,
        device,
        worker_memory_bytes(config.resources, device, [machine], 1),
        gpus=known_gpus([machine]),
        host_memory_bytes=host_memory_bytes(config.resources, [machine], 1),
    )


def _device(config: SweepConfig, found: str) -> str:
    wanted = config.resources.device
    if wanted == "cuda" and found != "cuda":
        raise ConfigError("resources.device: cuda, but there is no GPU: set auto or cpu")
    return found if wanted == "auto" else wanted


def _free_folder(config: SweepConfig, run_dir: Path | None) -> Path | None:
    """The folder that the user named, if it is free; None for one named after the run."""
    if run_dir is not None:
        RunStore(run_dir).check_free(config)
    return run_dir


def _create(config: SweepConfig, folder: Path | None, backend: Backend) -> RunStore:
    dtype = config.trial.quant.compute_dtype
    now = time.time()
    run_id = new_run_id(config.name, now)
    record = SweepRecord(
        run_id,
        now,
        config,
        backend.device,
        auto_compute_dtype(backend.device) if dtype == "auto" else dtype,
        backend.name,
        {"orchestrator": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in RECORDED_PACKAGES},
    )
    folder = folder or Path(config.runs_dir) / run_id
    try:
        store = RunStore.create(folder, record)
    except PermissionError as error:
        raise RunFolderError(f"{folder} cannot be written: {error}: choose another") from error
    store.write("environment", describe_environment(Path.cwd()))
    print(f"run folder: {shown_path(folder)}")
    return store


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check_device(store: RunStore, found: str) -> None:
    """What was begun on GPUs does not end with the same bits elsewhere, and the other way round."""
    if found == (begun := store.sweep.device):
        return
    remedy = (
        "resume it with --set resources.device=cpu"
        if begun == "cpu"
        else "see with `orchestrator doctor` why none is found, or resume it where there are some"
    )
    raise ConfigError(
        f"{store.folder} was begun on {DEVICES[begun]}, but there are {DEVICES[found]} to go on "
        f"with: {remedy}"
    )


def _run(store: RunStore, backend: Backend, lock_wait_s: float = 0) -> int:
    view = MlflowView(store, resolve_tracking_uri(store.sweep.config))
    beside_training = backend.name == "in_process"
    cpu_fraction = CPU_FRACTION_BESIDE_TRAINING if beside_training else CPU_FRACTION
    follower = TrackingFollower(view, cpu_fraction=cpu_fraction)
    display = SweepDisplay(store)
    interrupts = Interrupts(display.say)
    status = "FAILED"

    def before_training(controller: Controller) -> None:
        backend.before_training()
        interrupts.reach(controller)

    def watch(notice: Notice) -> None:
        if isinstance(notice, PackReady):  # before it is given a trial
            follower.await_connection(CONNECT_TIMEOUT_S)
        backend.watch(notice)

    services = Services(
        backend.executor,
        backend.task_pool,
        backend.num_workers,
        display,
        before_training,
        watch,
        backend.worker_memory_bytes,
        backend.kinds,
        backend.gpus,
        backend.run_on_worker,
        backend.host_memory_bytes,
        backend.sharing(store.sweep.run_id),
    )
    try:
        with store.locked(lock_wait_s), interrupts.caught():
            with environment(FORWARDING_ENVIRONMENT):
                # A new SQLite store takes some seconds to set up; loading the base model does, too.
                follower.start()
                try:
                    with recorded_use(store.folder, backend.sample_nodes), display.shown():
                        outcome = run_sweep(store, services)
                    interrupts.release()
                    status = "FINISHED" if outcome.finished else "KILLED"
                except KeyboardInterrupt:
                    status = "KILLED"
                finally:
                    if status != "FINISHED":
                        _close_tracking(follower, view, status)
            if status == "FINISHED":
                return _conclude(store, follower, view, display)
    except KeyboardInterrupt:  # also while tracking is closed, or the winner registered
        pass
    code = _say_interrupted(store)
    if interrupts.is_evicted:  # the run folder is free now for the driver that comes next
        await_the_end()
    return code


def _conclude(
    store: RunStore, follower: TrackingFollower, view: MlflowView, display: SweepDisplay
) -> int:
    """Register, report, and bring MLflow to its end; each step may be run again by a resume. The
    report comes second, for no mistake in a plot may keep a winner from being registered."""
    registration = None
    try:
        with environment(FORWARDING_ENVIRONMENT):
            follower.stop()
        if store.sweep.config.registry.register_winner:
            display.say("registering the winner")
            registration = Registry(view.uri).register_winner(store, view)
        write_report(store)
        view.finish("FINISHED")
    except (TrackingError, RegistryError) as error:
        _say_summary(store, display, registration)
        write_report(store)
        raise type(error)(
            f"{error}\nall trials are trained; when MLflow is there again: "
            f"{command_name()} resume {shown_path(store.folder)}"
        ) from error
    store.write("done", {"time": time.time()})
    _say_summary(store, display, registration)
    return 0


def _close_tracking(follower: TrackingFollower, view: MlflowView, status: str) -> None:
    """At the end of a run that did not finish: tracking must not hide why."""
    try:
        follower.stop()
        view.finish(status)
    except TrackingError as error:
        print(f"warning: {error}; `orchestrator sync` brings MLflow up to date later")


def _say_interrupted(store: RunStore) -> int:
    done, known = len(store.results), len(store.trials)
    print(f"interrupted: {done} of {known} trials are over; go on with:")
    print(f"  {command_name()} resume {shown_path(store.folder)}")
    return INTERRUPTED


def _say_summary(store: RunStore, display: SweepDisplay, registration: Registration | None) -> None:
    winner = store.read("winner")
    assert winner is not None
    display.say("")
    display.say(results_table(store.trials, store.results, store.sweep.config.search))
    params = next(trial.params for trial in store.trials if trial.number == winner["trial"])
    display.say(f"winner: {trial_name(winner['trial'], params)}")
    display.say(f"why: {winner['reason']}")
    folder = shown_path(store.folder)
    command = command_name()
    option = _store_option(store.sweep.config)
    if registration is None:
        result = next(r for r in store.results if r.number == winner["trial"])
        model = f"{folder}/{result.adapter_dir}"
    else:
        alias = "champion" if registration.champion else "candidate"
        model = f"models:/{registration.model_name}@{alias}"
        display.say(f"registered: {model} (version {registration.version}): {registration.reason}")
    display.say("next:")
    display.say(f"  {command} ui{option}")
    display.say(f"  {command} generate --model {model} --prompt '...'{option}")
    display.say(f"  {command} report {folder}")


def _store_option(config: SweepConfig) -> str:
    """What `ui` and `generate` need to find the store from here."""
    uri = resolve_tracking_uri(config)
    if uri == (os.environ.get("MLFLOW_TRACKING_URI") or default_store(Path("runs"))):
        return ""
    if uri == default_store(Path(config.runs_dir)):
        return f" --runs-dir {shown_path(Path(config.runs_dir))}"
    return f" --tracking-uri {without_password(uri)}"
