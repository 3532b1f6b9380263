"""A pack whose workers are on several Ray nodes trains the adapter that one worker trains."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from cluster.ray_executor import RayExecutor
from cluster.ray_runtime import ray_cluster
from orchestrator.records import Event, TrialDone
from tests.nodes import local_cluster
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import assert_equal, task, train

pytestmark = pytest.mark.slow

TIMEOUT_S = 300.0
SIZES = (2, 1)
"""CPU cores of the nodes: none has room for all workers of the pack."""


@pytest.mark.parametrize("strategy", [{}, {"kind": "zero", "stage": 3}], ids=["replicated", "zero"])
def test_workers_on_two_nodes_train_as_one_worker_does(
    make_spec: MakeSpec, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    trial = trial_config(batch_size=6)
    alone, _ = train(make_spec(num_slots=1), [trial], tmp_path / "alone")
    spec = make_spec(
        num_slots=1,
        micro_batch_size=1,
        world_size=sum(SIZES),
        **({"strategy": strategy} if strategy else {}),
    )
    with local_cluster(*SIZES) as cluster, ray_cluster(cluster.address):
        executor = RayExecutor()
        executor.start_pack(spec)
        directives: list[Any] = [task(0, trial, tmp_path / "across")]
        done: list[TrialDone] = []
        while not done:
            events = answer(executor)
            done = [event for event in events if isinstance(event, TrialDone)]
            executor.advance(0, directives)
            directives = []
        executor.close()
    adapter = load_file(Path(done[0].adapter_dir) / "adapter_model.safetensors")
    assert_equal(adapter, alone[0], tolerance=1e-4)


def answer(executor: RayExecutor) -> list[Event]:
    answers = executor.poll(TIMEOUT_S)
    assert answers, "the pack does not answer in time"
    return [event for _, events in answers for event in events]
