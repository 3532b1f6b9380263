"""What every executor must do; a new one adds a fixture."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from orchestrator.records import (
    Assign,
    BaseModel,
    Directive,
    Event,
    GroupPlace,
    Leave,
    PackLeft,
    PackLost,
    PackPlaced,
    PackQueued,
    PackReady,
    PackSpec,
    Progress,
    Prune,
    SlotTask,
    TrialDone,
)
from orchestrator.sweep.executor import Executor, InProcessExecutor, WorkerFactory
from orchestrator.sweep.simulated import SimulatedWorker
from tests.sweeps import sweep_config

MakeExecutor = Callable[[Mapping[int, str]], Executor]
ANSWER_TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    from cluster.ray_runtime import ray_cluster

    with ray_cluster(None):
        yield


@pytest.fixture(params=["in_process", "ray"])
def make_executor(request: pytest.FixtureRequest) -> Iterator[MakeExecutor]:
    made: list[Executor] = []

    def make(faults: Mapping[int, str]) -> Executor:
        factory = partial(SimulatedWorker, faults=faults)
        if request.param == "in_process":
            made.append(InProcessExecutor(factory))
        else:
            request.getfixturevalue("local_ray")
            from cluster.ray_executor import RayExecutor

            made.append(RayExecutor(factory))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def spec(number: int = 0, world_size: int = 1) -> PackSpec:
    trial = sweep_config().trial
    return PackSpec(
        pack=number,
        base_model=BaseModel("somewhere/base", None, "/nowhere", "digest"),
        data_place="shards",
        template="plain",
        quant=trial.quant.model_dump(),
        target_modules="all-linear",
        num_slots=2,
        max_rank=16,
        micro_batch_size=1,
        gradient_checkpointing=False,
        strategy=trial.strategy.model_dump(),
        device="cpu",
        cpus=1,
        evaluation=sweep_config().evaluation,
        checkpoint_every_steps=2,
        world_size=world_size,
    )


def task(trial: int, folder: object) -> Assign:
    return Assign(SlotTask(trial, 1, sweep_config().trial, str(folder)))


def next_answer(executor: Executor) -> tuple[int, list[Event]]:
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        if answers := executor.poll(0.5):
            assert len(answers) == 1
            return answers[0]
    raise AssertionError("no answer")


def test_a_pack_says_first_that_it_is_ready(make_executor: MakeExecutor) -> None:
    executor = make_executor({})
    executor.start_pack(spec(7))
    pack, events = next_answer(executor)
    assert pack == 7
    assert [type(event) for event in events] == [PackReady]


def test_a_pack_answers_each_advance_once(make_executor: MakeExecutor, tmp_path: object) -> None:
    executor = make_executor({})
    executor.start_pack(spec())
    next_answer(executor)
    assert executor.poll(0.1) == []
    executor.advance(0, [task(0, tmp_path)])
    _, events = next_answer(executor)
    assert [event.step for event in events if isinstance(event, Progress)] == [1]
    assert executor.poll(0.1) == []


def test_trials_in_two_slots_are_both_trained_to_the_end(
    make_executor: MakeExecutor, tmp_path: object
) -> None:
    executor = make_executor({})
    executor.start_pack(spec())
    next_answer(executor)
    executor.advance(0, [task(0, f"{tmp_path}/0"), task(1, f"{tmp_path}/1")])
    done: set[int] = set()
    while len(done) < 2:
        _, events = next_answer(executor)
        done |= {event.trial for event in events if isinstance(event, TrialDone)}
        if len(done) < 2:
            executor.advance(0, [])
    assert done == {0, 1}


def test_a_pruned_trials_slot_is_free_for_the_next_in_the_same_call(
    make_executor: MakeExecutor, tmp_path: object
) -> None:
    executor = make_executor({})
    executor.start_pack(spec())
    next_answer(executor)
    executor.advance(0, [task(0, f"{tmp_path}/0"), task(1, f"{tmp_path}/1")])
    next_answer(executor)
    executor.advance(0, [Prune(0), task(2, f"{tmp_path}/2")])
    _, events = next_answer(executor)
    trained = {event.trial: event.step for event in events if isinstance(event, Progress)}
    assert trained == {1: 2, 2: 1}


def test_a_pack_that_is_told_to_leave_says_so(make_executor: MakeExecutor) -> None:
    executor = make_executor({})
    executor.start_pack(spec())
    next_answer(executor)
    executor.advance(0, [Leave(save=False)])
    assert next_answer(executor) == (0, [PackLeft(0)])


def test_what_a_worker_raises_comes_back_as_a_lost_pack(
    make_executor: MakeExecutor, tmp_path: object
) -> None:
    executor = make_executor({0: "raise"})
    executor.start_pack(spec())
    next_answer(executor)
    executor.advance(0, [task(0, tmp_path)])
    next_answer(executor)
    executor.advance(0, [])
    _, events = next_answer(executor)
    (lost,) = [event for event in events if isinstance(event, PackLost)]
    assert lost.reason == "raised"
    assert "a simulated error" in lost.message


@pytest.mark.parametrize("trial", [-1, 0])
def test_data_that_cannot_be_read_is_the_reason_of_a_lost_pack(
    make_executor: MakeExecutor, tmp_path: object, trial: int
) -> None:
    """While its worker loads, or trains."""
    executor = make_executor({trial: "bad_shard"})
    executor.start_pack(spec())
    _, events = next_answer(executor)
    if trial == 0:
        executor.advance(0, [task(0, tmp_path)])
        next_answer(executor)
        executor.advance(0, [])
        _, events = next_answer(executor)
    (lost,) = [event for event in events if isinstance(event, PackLost)]
    assert lost.reason == "data_error"
    assert "the shard is missing or damaged" in lost.message


def test_an_error_while_loading_comes_back_as_a_lost_pack(make_executor: MakeExecutor) -> None:
    executor = make_executor({-1: "disk_full"})
    executor.start_pack(spec())
    _, (lost,) = next_answer(executor)
    assert isinstance(lost, PackLost)
    assert lost.reason == "disk_full"


def test_a_stopped_pack_answers_no_more_and_its_number_can_be_used_again(
    make_executor: MakeExecutor,
) -> None:
    executor = make_executor({})
    executor.start_pack(spec())
    executor.stop_pack(0)
    executor.stop_pack(0)
    assert executor.poll(0.1) == []
    executor.start_pack(spec())
    _, events = next_answer(executor)
    assert isinstance(events[0], PackReady)


def test_closing_twice_is_safe(make_executor: MakeExecutor) -> None:
    executor = make_executor({})
    executor.start_pack(spec())
    executor.close()
    executor.close()


@pytest.fixture
def make_ray_executor(local_ray: None) -> Iterator[Callable[[WorkerFactory], Executor]]:
    from cluster.ray_executor import RayExecutor

    made: list[Executor] = []

    def make(factory: WorkerFactory) -> Executor:
        made.append(RayExecutor(factory))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_worker_process_is_reported_as_lost_and_the_pack_can_start_again(
    make_ray_executor: Callable[[WorkerFactory], Executor], tmp_path: object, world_size: int
) -> None:
    executor = make_ray_executor(partial(SimulatedWorker, faults={0: "die"}))
    executor.start_pack(spec(0, world_size))
    next_answer(executor)
    executor.advance(0, [task(0, tmp_path)])
    next_answer(executor)
    executor.advance(0, [])
    _, (lost,) = next_answer(executor)  # at once, though a partner waits without end
    assert isinstance(lost, PackLost)
    assert lost.reason == "worker_lost"
    assert executor.poll(0.1) == []
    executor.stop_pack(0)
    assert executor.poll(0.1) == []
    executor.start_pack(spec(0, world_size))
    _, (ready,) = next_answer(executor)
    assert isinstance(ready, PackReady)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_pack_that_hangs_says_nothing_and_gives_its_place_back_when_it_is_stopped(
    make_ray_executor: Callable[[WorkerFactory], Executor], tmp_path: object, world_size: int
) -> None:
    import ray

    executor = make_ray_executor(partial(SimulatedWorker, faults={0: "hang"}))
    cores = int(ray.cluster_resources()["CPU"]) // world_size
    needs_all = replace(spec(0, world_size), cpus=cores)
    executor.start_pack(needs_all)
    next_answer(executor)
    executor.advance(0, [task(0, tmp_path)])
    next_answer(executor)
    executor.advance(0, [])
    assert executor.poll(1.0) == []
    executor.stop_pack(0)
    assert executor.poll(0.1) == []
    executor.start_pack(needs_all)
    _, (ready,) = next_answer(executor)
    assert isinstance(ready, PackReady)


class SlowLoader(SimulatedWorker):
    def load(self) -> PackReady:
        time.sleep(2.0)
        return super().load()


def test_a_pack_that_waits_for_room_says_so_once_and_again_when_it_has_it(
    local_ray: None,
) -> None:
    import ray

    from cluster.ray_executor import RayExecutor

    cores = int(ray.cluster_resources()["CPU"])
    needs_all = replace(spec(), cpus=cores)
    holder = RayExecutor(SimulatedWorker, queued_after_s=ANSWER_TIMEOUT_S)
    executor = RayExecutor(SlowLoader, queued_after_s=0.2)
    with closing(holder), closing(executor):
        holder.start_pack(needs_all)
        assert isinstance(next_answer(holder)[1][0], PackReady)
        executor.start_pack(needs_all)
        assert isinstance(next_answer(executor)[1][0], PackQueued)
        assert executor.poll(1.0) == []
        holder.stop_pack(0)
        assert next_answer(executor) == (0, [PackPlaced(0)])
        assert isinstance(next_answer(executor)[1][0], PackReady)


def note_process(path: Path) -> None:
    path.write_text(str(os.getpid()))


class NotingWorker(SimulatedWorker):
    """Its base's bytes are the number of its process."""

    def load(self) -> PackReady:
        return replace(super().load(), base_bytes=os.getpid())


def test_a_pack_takes_a_worker_that_was_started_before_there_was_a_pack(
    local_ray: None, tmp_path: Path
) -> None:
    from cluster.ray_executor import RayExecutor

    with closing(RayExecutor(NotingWorker)) as executor:
        executor.start_spares(1, "cpu", 1, partial(note_process, tmp_path / "process"))
        executor.start_pack(spec(0))
        executor.start_pack(spec(1))
        ready = dict(next_answer(executor) for _ in range(2))
        spare, other = (events[0] for _, events in sorted(ready.items()))
    assert isinstance(spare, PackReady)
    assert isinstance(other, PackReady)
    assert spare.base_bytes == int((tmp_path / "process").read_text())
    assert other.base_bytes != spare.base_bytes


def test_workers_that_no_pack_took_do_not_keep_their_places(
    local_ray: None, tmp_path: Path
) -> None:
    import ray

    from cluster.ray_executor import RayExecutor

    cores = int(ray.cluster_resources()["CPU"])
    with (
        closing(RayExecutor(SimulatedWorker)) as executor,
        closing(RayExecutor(SimulatedWorker)) as other,
    ):
        executor.start_spares(cores, "cpu", 1, partial(note_process, tmp_path / "process"))
        executor.start_pack(spec())
        next_answer(executor)
        other.start_pack(replace(spec(), cpus=cores - 1))
        _, (ready,) = next_answer(other)
        assert isinstance(ready, PackReady)


def test_workers_without_a_pack_give_way_to_one_that_needs_another_place(
    local_ray: None, tmp_path: Path
) -> None:
    import ray

    from cluster.ray_executor import RayExecutor

    cores = int(ray.cluster_resources()["CPU"])
    with closing(RayExecutor(SimulatedWorker)) as executor:
        executor.start_spares(cores, "cpu", 1, partial(note_process, tmp_path / "process"))
        executor.start_pack(replace(spec(), cpus=cores))
        _, (ready,) = next_answer(executor)
        assert isinstance(ready, PackReady)


class SummingWorker:
    """Meets its partners; its baseline loss and base bytes say who they were."""

    def __init__(self, spec: PackSpec, place: GroupPlace) -> None:
        self._pack = spec.pack
        self._place = place

    def load(self) -> PackReady:
        import torch

        from orchestrator.training.replicas import join

        self._replicas = join(self._place, "cpu", ANSWER_TIMEOUT_S)
        present = torch.zeros(3)
        present[self._place.world_rank] = 1
        self._replicas.sum(present)
        return PackReady(self._pack, round(float(present.sum())), 0, float(present[1]), 0.0)

    def advance(self, directives: Sequence[Directive]) -> list[Event]:
        self._replicas.close()
        return [PackLeft(self._pack)]


def test_the_workers_of_a_pack_meet_and_one_of_them_speaks(
    make_ray_executor: Callable[[WorkerFactory], Executor],
) -> None:
    executor = make_ray_executor(SummingWorker)
    executor.start_pack(spec(3, world_size=2))
    pack, (ready,) = next_answer(executor)
    assert isinstance(ready, PackReady)
    assert (pack, ready.base_bytes, ready.baseline_eval_loss) == (3, 2, 1.0)
    assert executor.poll(0.1) == []
    executor.advance(3, [Leave(save=False)])
    assert next_answer(executor) == (3, [PackLeft(3)])
    assert executor.poll(0.1) == []


def test_what_one_of_several_workers_raises_comes_back_once(
    make_ray_executor: Callable[[WorkerFactory], Executor],
) -> None:
    executor = make_ray_executor(partial(SimulatedWorker, faults={-1: "disk_full"}))
    executor.start_pack(spec(0, world_size=2))
    _, (lost,) = next_answer(executor)
    assert isinstance(lost, PackLost)
    assert lost.reason == "disk_full"
    assert executor.poll(0.1) == []


def test_what_one_of_several_workers_raises_in_a_step_comes_back_though_its_partner_waits(
    make_ray_executor: Callable[[WorkerFactory], Executor], tmp_path: object
) -> None:
    executor = make_ray_executor(partial(SimulatedWorker, faults={1: "raise"}))
    executor.start_pack(spec(0, world_size=2))
    next_answer(executor)
    executor.advance(0, [task(0, f"{tmp_path}/0"), task(1, f"{tmp_path}/1")])
    next_answer(executor)
    executor.advance(0, [])
    _, (lost,) = next_answer(executor)
    assert isinstance(lost, PackLost)
    assert (lost.reason, lost.message) == ("raised", "ValueError: a simulated error")
    executor.stop_pack(0)
    executor.start_pack(spec(1, world_size=2))  # where one of the two is tried alone
    _, (ready,) = next_answer(executor)
    assert isinstance(ready, PackReady)
