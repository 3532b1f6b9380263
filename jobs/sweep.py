"""`orchestrator sweep`, `resume` and `train`: compose the flow from its real parts and run it.

In: paths and options. Out: an exit code. What is wrong with the input is found before anything is
written or started; then comes the run folder, then the cluster, then the work.
"""

import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jobs.display import SweepDisplay, command_name, results_table, shown_path
from jobs.interrupts import Interrupts
from orchestrator import __version__
from orchestrator.config import SweepConfig
from orchestrator.data.prepare import RunTasks, run_in_process
from orchestrator.data.sources import estimate_slices
from orchestrator.errors import ConfigError, OrchestratorError, TrackingError
from orchestrator.loading import load_config
from orchestrator.search.space import ask
from orchestrator.sweep.controller import Controller
from orchestrator.sweep.executor import Executor, InProcessExecutor
from orchestrator.sweep.flow import Services, auto_compute_dtype, run_sweep
from orchestrator.sweep.run_store import RunStore, SweepRecord, new_run_id
from orchestrator.tracking.follower import TrackingFollower
from orchestrator.tracking.mlflow_view import MlflowView
from orchestrator.tracking.registry import Registration, Registry
from orchestrator.tracking.report import write_report
from orchestrator.tracking.stores import check_reachable, resolve_tracking_uri
from orchestrator.training.model_source import find_source

RECORDED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "ray", "mlflow", "optuna")
INTERRUPTED = 130


@dataclass(frozen=True)
class Backend:
    """What runs the packs and the sharding tasks."""

    executor: Executor
    run_tasks: RunTasks
    num_workers: int
    device: str


def start_sweep(
    path: Path, overrides: list[str], run_dir: Path | None, ray_address: str | None
) -> int:
    config = load_config(path, overrides)
    check_inputs(config)
    folder, run_id = _run_folder(config, run_dir)
    with _ray_backend(config, ray_address) as backend:
        store = _create(config, folder, run_id, backend.device)
        return _run(store, backend, config.registry.register_winner)


def resume_sweep(run_dir: Path, ray_address: str | None) -> int:
    store = RunStore.open(run_dir)
    config = store.sweep.config
    registration = store.read("registration")
    if store.read("winner") and (registration or not config.registry.register_winner):
        print(f"{run_dir} is complete: nothing is left to do")
        return 0
    check_reachable(resolve_tracking_uri(config))
    with _ray_backend(config, ray_address) as backend:
        return _run(store, backend, config.registry.register_winner)


def train_one(path: Path, overrides: list[str], run_dir: Path | None, register: bool) -> int:
    written = load_config(path, overrides)
    config = SweepConfig.model_validate(written.model_dump() | {"search": {}})
    check_inputs(config)
    folder, run_id = _run_folder(config, run_dir)
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    backend = Backend(InProcessExecutor(), run_in_process, 1, _device(config, found))
    store = _create(config, folder, run_id, backend.device)
    return _run(store, backend, register)


def check_inputs(config: SweepConfig) -> None:
    """Find what is wrong before anything is written, started or downloaded."""
    device = "cuda" if config.resources.device == "cuda" else "cpu"
    ask(config, device, [], [])
    find_source(config.base_model)
    for source in (config.data.train, config.data.held_out):
        if source is not None:
            estimate_slices(source, config.data.rows_per_slice)
    check_reachable(resolve_tracking_uri(config))


@contextmanager
def _ray_backend(config: SweepConfig, address: str | None) -> Iterator[Backend]:
    print("starting Ray" if not address else f"attaching to Ray at {address}")
    from cluster.ray_executor import RayExecutor
    from cluster.ray_runtime import ray_cluster
    from cluster.sharding import RayTasks

    with ray_cluster(address) as resources:
        device = _device(config, resources.device)
        per_worker = config.resources.cpus_per_worker
        slots = resources.num_gpus if device == "cuda" else resources.num_cpus // per_worker
        num_workers = config.resources.num_workers or max(1, slots)
        if num_workers * per_worker > resources.num_cpus or slots < 1:
            raise ConfigError(
                f"resources: {num_workers} workers of {per_worker} CPU cores do not fit the "
                f"cluster's {resources.num_cpus} cores: lower num_workers or cpus_per_worker"
            )
        yield Backend(RayExecutor(), RayTasks(resources.num_cpus), num_workers, device)


def _device(config: SweepConfig, found: str) -> str:
    wanted = config.resources.device
    if wanted == "cuda" and found != "cuda":
        raise ConfigError("resources.device: cuda, but there is no GPU: set auto or cpu")
    return found if wanted == "auto" else wanted


def _run_folder(config: SweepConfig, run_dir: Path | None) -> tuple[Path, str]:
    run_id = new_run_id(config.name, time.time())
    if run_dir is None:
        return Path(config.runs_dir) / run_id, run_id
    RunStore(run_dir).check_free(config)
    return run_dir, run_dir.absolute().name


def _create(config: SweepConfig, folder: Path, run_id: str, device: str) -> RunStore:
    dtype = config.trial.quant.compute_dtype
    record = SweepRecord(
        run_id,
        time.time(),
        config,
        device,
        auto_compute_dtype(device) if dtype == "auto" else dtype,
        {"orchestrator": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in RECORDED_PACKAGES},
    )
    store = RunStore.create(folder, record)
    print(f"run folder: {folder}")
    return store


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _run(store: RunStore, backend: Backend, register: bool) -> int:
    view = MlflowView(store, resolve_tracking_uri(store.sweep.config))
    follower = TrackingFollower(view)
    display = SweepDisplay(store)
    interrupts = Interrupts(display.say)
    with store.locked(), interrupts.caught(), ThreadPoolExecutor(1) as background:
        # A new SQLite store takes some seconds to set up; loading the base model does, too.
        connecting = background.submit(view.connect)

        def before_training(controller: Controller) -> None:
            connecting.result()
            follower.start()
            interrupts.reach(controller)

        services = Services(
            backend.executor, backend.run_tasks, backend.num_workers, display, before_training
        )
        try:
            with display.shown():
                outcome = run_sweep(store, services)
        except KeyboardInterrupt:
            _close_tracking(follower, view, "KILLED")
            return _say_interrupted(store)
        except OrchestratorError:
            _close_tracking(follower, view, "FAILED")
            raise
        if not outcome.finished:
            _close_tracking(follower, view, "KILLED")
            return _say_interrupted(store)
        follower.stop()
        registration = None
        if register:
            display.say("registering the winner")
            registration = Registry(view.uri).register_winner(store, view)
        write_report(store)
        view.finish("FINISHED")
    _say_summary(store, display, registration)
    return 0


def _close_tracking(follower: TrackingFollower, view: MlflowView, status: str) -> None:
    """At the end of a run that failed: tracking must not hide why."""
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
    display.say(results_table(store.trials, store.results))
    display.say(f"winner: {winner['reason']}")
    folder = shown_path(store.folder)
    command = command_name()
    runs_dir = Path(store.sweep.config.runs_dir)
    option = "" if runs_dir == Path("runs") else f" --runs-dir {runs_dir}"
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
