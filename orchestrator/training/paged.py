"""Whether a GPU has room for paged optimizer states, before they are made there.

bitsandbytes' paged states are CUDA's managed memory, which torch's cap (memory.py) does not count:
the driver gives any amount, and moves pages to and from the host whenever a step touches more than
the GPU can hold. That is slow at best, and may stop the GPU for good.
"""

import torch
from torch import Tensor

from orchestrator.errors import TrialFailed
from orchestrator.planning.memory import GIB

# The rest is for what CUDA itself takes as it loads kernels, and for pages that are on their way.
SHARE_OF_FREE = 0.95
# bitsandbytes pages no smaller ones (0.50, optim/optimizer.py, get_state_buffer).
MIN_PAGED_VALUES = 100_000


def paged_state_bytes(num_values: int, state_bits: int) -> int:
    """Of both moments of a row, as far as they are paged."""
    return 2 * num_values * state_bits // 8 if num_values >= MIN_PAGED_VALUES else 0


def refusal(wanted_bytes: int, free_bytes: int, share: float = SHARE_OF_FREE) -> str:
    """Why states of so many bytes are not made, and what to lower; empty where they may be."""
    if wanted_bytes <= share * free_bytes:
        return ""
    return (
        f"paged optimizer states take {wanted_bytes / GIB:.2f} GiB, but the GPU has "
        f"{free_bytes / GIB:.2f} GiB free, of which they may take {share:.0%}: lower adapter.rank, "
        "resources.slots_per_pack or trial.micro_batch_size, or set optimizer.name: "
        "paged_adamw_8bit, in a new sweep"
    )


def check_room(row: Tensor, state_bits: int) -> None:
    """For the states of a row that is on a GPU; memory that torch holds is not free, for the next
    pass needs it again.

    Raises:
        TrialFailed: out_of_memory.
    """
    wanted = paged_state_bytes(row.numel(), state_bits) if row.is_cuda else 0
    if not wanted:
        return
    free, _ = torch.cuda.mem_get_info(row.device)
    if why := refusal(wanted, free):
        raise TrialFailed("out_of_memory", why)
