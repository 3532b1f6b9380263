"""What everything that runs sharding tasks must do, and what the Ray pool does when actors die."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from cluster.ray_runtime import ray_cluster
from cluster.sharding import RayTasks
from orchestrator.data.manifest import ROLES, manifest_name
from orchestrator.data.prepare import RunTasks, prepare, run_in_process
from orchestrator.data_config import DataConfig
from orchestrator.errors import ClusterError, DataError
from tests.nodes import LocalCluster, local_cluster
from tests.tiny import make_tokenizer, question_rows

Pool = Callable[[int], AbstractContextManager[RunTasks]]
NUM_CPUS = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A head without cores, so that every actor is on a node that a test may take away."""
    with local_cluster(NUM_CPUS) as nodes, ray_cluster(nodes.address):
        yield nodes


@pytest.fixture(params=["in_process", "ray"])
def pool(request: pytest.FixtureRequest) -> Pool:
    if request.param == "in_process":
        return lambda num_actors: nullcontext(run_in_process)
    request.getfixturevalue("cluster")
    return RayTasks


def test_results_come_in_task_order_whatever_takes_longest(pool: Pool) -> None:
    def slow_first(number: int) -> int:
        time.sleep(0.2 if number == 0 else 0)
        return number * number

    with pool(NUM_CPUS) as run:
        assert list(run(slow_first, range(6))) == [0, 1, 4, 9, 16, 25]
        assert list(run(slow_first, [])) == []
        assert list(run(str, [7])) == ["7"]


def test_the_projects_errors_arrive_as_they_are(pool: Pool) -> None:
    def refuse(number: int) -> int:
        if number == 1:
            raise DataError(f"rows.jsonl:{number}: wrong")
        return number

    with pool(NUM_CPUS) as run:
        with pytest.raises(DataError, match="^rows.jsonl:1: wrong$"):
            list(run(refuse, range(4)))
        assert list(run(refuse, [2, 3])) == [2, 3]


def test_a_task_goes_to_an_actor_only_when_that_is_idle(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    folder = str(tmp_path)

    def note(number: int) -> int:
        open(f"{folder}/{number}", "w").close()
        time.sleep(0.1)
        return len(os.listdir(folder))

    with RayTasks(2) as run:
        begun = list(run(note, range(8)))
    assert all(count <= number + 3 for number, count in enumerate(begun))


def test_the_task_of_a_killed_actor_runs_again(cluster: LocalCluster, tmp_path: Path) -> None:
    sign = str(tmp_path / "died")

    def die_once(number: int) -> int:
        if number == 2 and not os.path.exists(sign):
            open(sign, "w").close()
            os.kill(os.getpid(), 9)
        return number

    with RayTasks(2) as run:
        assert list(run(die_once, range(5))) == [0, 1, 2, 3, 4]
    assert os.path.exists(sign)


def test_actors_that_are_lost_together_while_idle_count_once(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """And what an earlier stage lost does not count against a later one."""

    def meet(folder: str) -> int:
        """None ends before all four have begun, so that each is another actor's."""
        open(f"{folder}/{os.getpid()}", "w").close()
        while len(os.listdir(folder)) < 4:
            time.sleep(0.05)
        return os.getpid()

    cluster.add(num_cpus=2)
    with RayTasks(4) as run:
        for stage in ("first", "second"):
            (tmp_path / stage).mkdir()
            actors = list(run(meet, [str(tmp_path / stage)] * 4))
            assert len(set(actors)) == 4
            for actor in actors:
                os.kill(actor, 9)
        assert list(run(abs, [-7])) == [7]
    cluster.kill(cluster.node_ids()[-1])


@pytest.mark.slow
def test_a_task_that_always_ends_its_actor_is_given_up_with_the_remedy(
    cluster: LocalCluster,
) -> None:
    def die(number: int) -> int:
        os.kill(os.getpid(), 9)
        return number

    with RayTasks(1) as run, pytest.raises(ClusterError, match="lower data.slice_bytes"):
        list(run(die, [0]))


@pytest.mark.slow
def test_a_preparation_survives_the_loss_of_a_node(cluster: LocalCluster, tmp_path: Path) -> None:
    """The same manifests, and no shard that was finished is made again. Two of four actors go for
    good, since the nodes that are left have no core for them."""
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in question_rows(2000)))
    config = DataConfig(train=str(rows), block_length=64, slice_bytes=2000)
    cluster.add(num_cpus=2)
    node = cluster.node_ids()[-1]
    finished: dict[Path, int] = {}

    def lose_the_node(line: str) -> None:
        if " of " in line and not finished:
            finished.update((path, path.stat().st_mtime_ns) for path in _shards(tmp_path / "ray"))
            cluster.kill(node)

    with RayTasks(4) as run:
        prepared = prepare(config, tokenizer, tmp_path / "ray", run, lose_the_node)
    assert len(finished) >= len(prepared.train.shards) // 10
    assert all(path.stat().st_mtime_ns == at for path, at in finished.items())
    alone = prepare(config, tokenizer, tmp_path / "alone")
    assert prepared.train.digest == alone.train.digest
    for role in ROLES:
        name = manifest_name(role)
        assert (prepared.train.folder / name).read_bytes() == (
            alone.train.folder / name
        ).read_bytes()


def _shards(cache: Path) -> list[Path]:
    """Those with a record, which is written last."""
    records = cache.rglob("train-*.json")
    return [path.with_suffix(".safetensors") for path in records]
