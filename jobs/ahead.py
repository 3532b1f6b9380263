"""What a sweep needs soon, begun before its turn: its tokenizer in a thread while Ray starts, for
this process would only wait; its workers' processes while data is prepared here.

In: a SweepConfig. Out: a task pool that is this process, for data that is not worth another one.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager

from orchestrator.config import SweepConfig
from orchestrator.data.prepare import (
    RunTasks,
    build_recipe,
    find_prepared,
    place_of,
    run_in_process,
)
from orchestrator.data.sources import is_small
from orchestrator.data.tokenizing import load_tokenizer
from orchestrator.errors import DataError
from orchestrator.files import cache_dir
from orchestrator.sweep.bits import auto_settings
from orchestrator.training.model_source import find_source


@contextmanager
def tokenizer_ahead(
    config: SweepConfig,
) -> Iterator[Callable[[], AbstractContextManager[RunTasks]]]:
    """Inside, the tokenizer is being loaded if small data is to be prepared. What is wrong with it,
    or with the data, is said by the task that finds it again."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        loading = thread.submit(_load, config)

        @contextmanager
        def task_pool() -> Iterator[RunTasks]:
            wait([loading])  # two threads must not import the same libraries at once
            yield run_in_process

        yield task_pool


def packs_come_first(config: SweepConfig) -> bool:
    """Whether nothing wants a worker's share of the node before the packs do: no sharding task, no
    measurement of layers."""
    try:
        return is_small(config.data) and not any(auto_settings(config))
    except DataError:  # a resume may not need these rows any more; else it is said in its turn
        return False


def _load(config: SweepConfig) -> None:
    folder = find_source(config.base_model)
    if folder is None or not folder.is_dir() or not is_small(config.data):
        return  # a download or a conversion is not begun here
    if find_prepared(place_of(config.data, build_recipe(config.data, folder), cache_dir())) is None:
        load_tokenizer(str(folder))
