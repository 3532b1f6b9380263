"""A folder to swap into is a worker's own, and goes with it however it ends."""

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import StrategyError
from orchestrator.training.swap_folder import SwapFolder

KILLED = """
import os, sys
from pathlib import Path
from orchestrator.training.swap_folder import SwapFolder
folder = SwapFolder(Path(sys.argv[1]))
(folder.path / "states.swp").write_text("many bytes")
os._exit(9)
"""


def test_workers_of_one_machine_have_folders_of_their_own_that_they_remove(tmp_path: Path) -> None:
    folders = [SwapFolder(tmp_path / "nvme") for _ in range(2)]
    assert folders[0].path != folders[1].path
    (folders[0].path / "states.swp").write_text("many bytes")
    folders[0].remove()
    assert not folders[0].path.exists()
    assert folders[1].path.exists()
    folders[1].remove()
    folders[1].remove()


def test_what_a_killed_worker_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    alive = SwapFolder(tmp_path)
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert len(list(tmp_path.glob("worker-*"))) == 2
    new = SwapFolder(tmp_path)
    assert set(tmp_path.glob("worker-*")) == {alive.path, new.path}
    alive.remove()
    new.remove()


def test_a_folder_that_cannot_be_made_is_one_error_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StrategyError, match="nvme_path: cannot swap into .*: name a folder of a"):
        SwapFolder(tmp_path / "file" / "below")


LIMITED = """
import os, resource
from orchestrator.training.swap_folder import check_locked_memory
resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**16, 2**20))
if os.getuid() == 0:  # who may lock all there is
    os.setuid(65534)
check_locked_memory(2**20)
print("a mebibyte is locked")
check_locked_memory(2**20 + 2**16)
"""


def test_memory_that_may_not_be_locked_is_one_error_with_the_remedy() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False
    )
    assert result.stdout == "a mebibyte is locked\n"
    assert "may not (Cannot allocate memory): raise the limit (ulimit -l" in result.stderr
