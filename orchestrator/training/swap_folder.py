"""What one worker's DeepSpeed swaps through: a folder of a local disk, and memory that is locked.

The folder goes with the pack. A worker that was killed cannot remove its own: the next one does.
"""

import ctypes
import errno
import mmap
import os
import resource
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from orchestrator.config import StrategyConfig
from orchestrator.errors import StrategyError
from orchestrator.files import cache_dir

IN_USE = "in-use.lock"  # held by the worker as long as it lives


class SwapFolder:
    """Under `root`, where other workers may have theirs.

    Raises:
        StrategyError: nothing can be written there, or not past the page cache, as DeepSpeed does.
    """

    @classmethod
    def of(cls, strategy: StrategyConfig) -> "SwapFolder":
        return cls(Path(strategy.nvme_path or cache_dir() / "nvme-swap"))

    def __init__(self, root: Path) -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / "folders.lock"):  # nobody removes what is being made
                _remove_abandoned(root)
                self.path = Path(tempfile.mkdtemp(prefix="worker-", dir=root))
                self._lock = FileLock(self.path / IN_USE)
                self._lock.acquire()
            _check_direct_writes(self.path)
        except OSError as error:
            raise StrategyError(
                f"strategy.nvme_path: cannot swap into {root}: {_reason(error)}: name a folder of "
                "a local disk that the worker may write to"
            ) from error

    def named_in(self, strategy: StrategyConfig) -> StrategyConfig:
        """The strategy with this worker's own nvme_path."""
        return strategy.model_copy(update={"nvme_path": str(self.path)})

    def remove(self) -> None:
        """Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def check_locked_memory(num_bytes: int) -> None:
    """DeepSpeed's async_io locks its buffers, and goes on with no buffer where it may not.

    Raises:
        StrategyError: this process may not lock so much memory.
    """
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    with mmap.mmap(-1, num_bytes) as memory:
        place = ctypes.c_char.from_buffer(memory)
        libc = ctypes.CDLL(None, use_errno=True)
        refused = libc.mlock(ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(num_bytes))
        reason = os.strerror(ctypes.get_errno())
        del place
    if refused:
        raise StrategyError(
            f"strategy.offload_*: nvme locks {num_bytes / 2**20:.0f} MiB of memory, but this "
            f"process may not ({reason}): raise the limit (ulimit -l, or --ulimit memlock=-1 of a "
            "container), or offload to cpu"
        )


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob("worker-*"):
        lock = FileLock(folder / IN_USE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _check_direct_writes(folder: Path) -> None:
    """DeepSpeed's async_io opens with O_DIRECT (csrc/aio/common/deepspeed_aio_common.cpp), which
    tmpfs of older kernels and some network disks refuse."""
    path = folder / "probe"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    path.unlink()


def _reason(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "its file system has no direct input and output (O_DIRECT)"
    return error.strerror or str(error)
