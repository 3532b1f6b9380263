"""A shard's file: blocks as safetensors, written whole and read by mapping it into memory.

In: Blocks or a path. Out: a file of the same bytes for the same blocks, or Blocks whose arrays are
views of the file. safetensors' own reader would copy them.
"""

import json
import mmap
from dataclasses import fields
from pathlib import Path

import numpy as np

from orchestrator.data.packing import Blocks

NAMES = tuple(field.name for field in fields(Blocks))
# https://huggingface.co/docs/safetensors: the header's length in 8 bytes, the header as JSON with
# each array's type, shape and place after it, the arrays in row-major order, all little-endian.
LENGTH_BYTES = 8
TYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "I32": "<i4"}


def write_blocks(path: Path, blocks: Blocks) -> None:
    """About 2.2 bytes a token where the vocabulary has at most 65,536 words, else 4.2."""
    from safetensors.numpy import save_file

    save_file({name: getattr(blocks, name) for name in NAMES}, path)


def map_blocks(path: Path) -> Blocks:
    """Read-only, and valid for as long as anyone holds one of the arrays.

    The file must be as `write_blocks` left it: a reader checks its digest first.
    """
    # Closing the file leaves the mapping, which has a descriptor of its own.
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = LENGTH_BYTES + int.from_bytes(mapped[:LENGTH_BYTES], "little")
    header = json.loads(mapped[LENGTH_BYTES:start])
    arrays = {}
    for name in NAMES:
        entry = header[name]
        offset = start + entry["data_offsets"][0]
        arrays[name] = np.ndarray(entry["shape"], TYPES[entry["dtype"]], mapped, offset)
    return Blocks(**arrays)
