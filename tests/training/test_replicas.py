"""Workers that add up tensors, in processes of their own; nobody waits for a lost one for ever."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchestrator.records import ALONE, GroupPlace
from orchestrator.training.process_group import leave_group
from orchestrator.training.replicas import Alone, agree, join

TIMEOUT_S = 60.0
SHORT_TIMEOUT_S = 2.0


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def run_pair(work: Callable[[GroupPlace, Path], None], folder: Path) -> list[str]:
    """What two workers wrote, by world_rank; empty for one that wrote nothing."""
    context = multiprocessing.get_context("spawn")
    address = free_address()
    places = [GroupPlace(world_rank, 2, address) for world_rank in range(2)]
    files = [folder / str(place.world_rank) for place in places]
    workers = [
        context.Process(target=work, args=(place, file), daemon=True)
        for place, file in zip(places, files, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT_S)
        assert worker.exitcode is not None, "a worker hangs"
    return [file.read_text() if file.exists() else "" for file in files]


def values(world_rank: int) -> torch.Tensor:
    """Different ones for every worker."""
    return torch.randn(1000, generator=torch.Generator().manual_seed(world_rank))


def add_up(place: GroupPlace, file: Path) -> None:
    replicas = join(place, "cpu", TIMEOUT_S)
    first, second = values(place.world_rank), torch.full((3,), place.world_rank + 1.0)
    replicas.sum(first)
    replicas.sum(second)
    replicas.close()
    replicas.close()
    assert second.tolist() == [3.0] * 3
    file.write_text(first.numpy().tobytes().hex())


def lose_the_other(place: GroupPlace, file: Path) -> None:
    replicas = join(place, "cpu", TIMEOUT_S)
    tensor = torch.ones(3)
    replicas.sum(tensor)
    if place.world_rank == 1:
        os._exit(1)
    with pytest.raises(ConnectionError, match="worker 0 of 2 has lost a partner"):
        replicas.sum(tensor)
    file.write_text("told")
    replicas.close()


def wait_for_one_that_is_stuck(place: GroupPlace, file: Path) -> None:
    replicas = join(place, "cpu", SHORT_TIMEOUT_S)
    if place.world_rank == 1:
        time.sleep(2 * SHORT_TIMEOUT_S)
        return
    with pytest.raises(
        ConnectionError, match="world_rank 1 did not come to where world_rank 0 wai"
    ):
        replicas.sum(torch.ones(3))
    file.write_text("told")


def load_longer_than_partners_wait(place: GroupPlace, file: Path) -> None:
    replicas = join(place, "cpu", SHORT_TIMEOUT_S)
    if place.world_rank == 1:  # it waits for its turn to load
        time.sleep(2 * SHORT_TIMEOUT_S)
    replicas.loaded()
    tensor = torch.ones(3)
    replicas.sum(tensor)
    file.write_text(str(tensor.tolist()))
    replicas.close()


def lose_the_first_while_it_loads(place: GroupPlace, file: Path) -> None:
    replicas = join(place, "cpu", TIMEOUT_S)
    replicas.sum(torch.ones(3))  # both are there
    if place.world_rank == 0:
        os._exit(1)
    with pytest.raises(ConnectionError, match="worker 1 of 2 has lost a partner"):
        replicas.loaded()
    file.write_text("told")


def wait_in_a_librarys_collective(place: GroupPlace, file: Path) -> None:
    """As DeepSpeed's are; what else goes wrong there is no fault of a partner's."""
    replicas = join(place, "cpu", SHORT_TIMEOUT_S)
    with pytest.raises(RuntimeError, match="^of its own$"), replicas.waiting():
        raise RuntimeError("of its own")
    if place.world_rank == 0:
        time.sleep(2 * SHORT_TIMEOUT_S)
        return
    with pytest.raises(ConnectionError, match="world_rank 0 did not come"), replicas.waiting():
        torch.distributed.all_reduce(torch.ones(3))
    file.write_text("told")


def test_a_partner_that_is_stuck_is_named_by_a_librarys_wait_too(tmp_path: Path) -> None:
    assert run_pair(wait_in_a_librarys_collective, tmp_path) == ["", "told"]


def test_one_that_is_alone_keeps_its_values() -> None:
    replicas = join(ALONE, "cpu")
    tensor = values(0)
    replicas.sum(tensor)
    assert (replicas.world_rank, replicas.world_size) == (0, 1)
    torch.testing.assert_close(tensor, values(0), rtol=0, atol=0)
    replicas.close()
    replicas.close()


def test_two_workers_get_the_same_sum(tmp_path: Path) -> None:
    one, other = run_pair(add_up, tmp_path)
    assert one == other == (values(0) + values(1)).numpy().tobytes().hex()


def test_workers_that_load_in_turn_wait_for_each_other_beyond_a_steps_patience(
    tmp_path: Path,
) -> None:
    assert run_pair(load_longer_than_partners_wait, tmp_path) == ["[2.0, 2.0, 2.0]"] * 2


def test_a_partner_that_ends_while_it_loads_is_an_error_of_the_other(tmp_path: Path) -> None:
    assert run_pair(lose_the_first_while_it_loads, tmp_path) == ["", "told"]


def test_a_partner_that_ends_is_an_error_of_the_other(tmp_path: Path) -> None:
    assert run_pair(lose_the_other, tmp_path) == ["told", ""]


def test_a_partner_that_is_stuck_is_an_error_of_the_other(tmp_path: Path) -> None:
    assert run_pair(wait_for_one_that_is_stuck, tmp_path) == ["told", ""]


@pytest.fixture
def no_group() -> None:
    """DeepSpeed's tests leave a process group of one in their process."""
    leave_group()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("world_rank", [0, 1])
def test_a_partner_that_never_comes_is_an_error(world_rank: int) -> None:
    with pytest.raises(ConnectionError, match=f"worker {world_rank} of 2 has lost a partner"):
        join(GroupPlace(world_rank, 2, free_address()), "cpu", SHORT_TIMEOUT_S)
    assert not torch.distributed.is_initialized()


class Beside(Alone):
    """A worker beside others that ask with numbers of their own."""

    def __init__(self, *others: int) -> None:
        self.world_size = 1 + len(others)
        self._others = others

    def sum(self, tensor: Tensor) -> None:
        for number in self._others:
            tensor += torch.tensor([number, number**2], dtype=tensor.dtype)


@pytest.mark.parametrize(
    ("number", "others", "same"),
    [(7, (), True), (7, (7, 7), True), (0, (0,), True), (2, (1, 3), False), (1, (2, 3), False)],
)
def test_workers_agree_on_a_number_only_if_all_have_it(
    number: int, others: tuple[int, ...], same: bool
) -> None:
    """The one in the middle, too."""
    assert agree(Beside(*others), number, torch.device("cpu")) == same
