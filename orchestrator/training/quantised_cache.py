"""Layers in codes on local disk, so that a base is quantised once on a machine, not for each pack.

In: a base, a QuantConfig and each layer's bits; then layers, as they are quantised. Out: the same
Codes, bit for bit, the next time. An entry is a folder under `quantised` in the cache: one file of
safetensors for each layer, whole or absent, and at last an index with their digests, without which
nothing is read. A file's digest is checked before its codes are used.

Two processes may write one entry at once, as on machines that share a cache: the content is the
same. Nothing here can fail a load: what cannot be read is quantised anew, and what cannot be
written is not kept.
"""

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from orchestrator.config import QuantConfig
from orchestrator.digests import known_file_digest
from orchestrator.files import cache_dir, read_json, record_digest, write_bytes, write_json
from orchestrator.planning.bits import HQQ_BITS
from orchestrator.records import BaseModel
from orchestrator.training.codes import Codes, shared_constants
from orchestrator.training.model_source import folder_digest

FORMAT_VERSION = 1  # raise it when the same key would give other codes
FOLDER = "quantised"
INDEX = "index.json"
MADE_WITH = ("quant_type", "double_quant", "block_size", "compute_dtype")
# One without an index is being written, or its writer was killed; the largest take minutes.
STALE_AFTER_S = 3600
HEADER_BYTES = 1024  # of a layer's file, and its part of the index, at most


class QuantisedCache:
    """The entry of one base at its bits; `max_bytes` are for all entries together."""

    def __init__(
        self,
        base: BaseModel,
        folder: str,
        quant: QuantConfig,
        device: torch.device,
        max_bytes: int,
    ) -> None:
        self._base = base
        self._source = Path(folder)
        self._quant = quant
        self._device = device
        self._max_bytes = max_bytes
        self._layers: dict[str, Any] | None = None
        """Index of what is written so far; None where nothing is to be written."""
        self._damage = ""
        self.note = ""
        """What came of it, in words."""

    def read(self, widths: Mapping[str, int]) -> dict[str, Codes] | None:
        """All layers that have less than 16 bits; None if they are not here, or damaged."""
        if not self._source_is_as_recorded():
            self.note = f"not used: {self._source} is not the base that was recorded"
            return None
        entry = self._open(widths)
        if not (entry / INDEX).exists():
            return None
        try:
            index = read_json(entry / INDEX)
            layers = index["layers"]
            if index["digest"] != record_digest(layers) or layers.keys() != self._names:
                raise ValueError("the index is damaged")
            with torch.device("cpu"):  # transformers asks while its default is the meta device
                found = {name: self._read(entry, layer) for name, layer in layers.items()}
            os.utime(entry / INDEX)  # the entries that were used last are kept
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            self._damage = f"{entry}: {error}"
            return None
        self.note = f"read from {entry}"
        return found

    def begin(self, widths: Mapping[str, int], num_bytes: int) -> None:
        """Expect these layers' codes, which take so many bytes, if they are not here and there is
        room for them."""
        if not self._source_is_as_recorded():
            return
        entry = self._open(widths)
        if (entry / INDEX).exists() and not self._damage:
            self.note = "not used: each layer's weight is wanted"
            return
        needed = num_bytes + HEADER_BYTES * len(self._names)
        if needed > self._max_bytes:
            self.note = f"not kept: {needed} bytes, of {self._max_bytes} that it may take"
            return
        try:
            (entry / INDEX).unlink(missing_ok=True)
            _make_room(entry, self._max_bytes - needed)
        except OSError as error:
            self.note = f"not kept: {error}"
            return
        self._layers = {}

    def write(self, name: str, codes: Codes) -> None:
        if self._layers is None:
            return
        shared = shared_constants(codes.kind, len(codes.blocksizes) > 1, codes.codes.device)
        tensors = {"codes": codes.codes} | {
            f"constants_{place}": tensor
            for place, tensor in enumerate(codes.constants)
            if place not in shared
        }
        from safetensors.torch import save

        content = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        file = f"{len(self._layers):05d}.safetensors"
        try:
            write_bytes(self._entry / file, content)
        except OSError as error:
            self.abandon(str(error))
            return
        self._layers[name] = {
            "file": file,
            "digest": hashlib.sha256(content).hexdigest(),
            "num_constants": len(codes.constants),
            "blocksizes": codes.blocksizes,
            "kind": codes.kind,
            "dtype": str(codes.dtype).removeprefix("torch."),
            "shape": codes.shape,
        }

    def abandon(self, reason: str) -> None:
        """Keep nothing of what is being written."""
        if self._layers is not None:
            self._layers = None
            self.note = f"not kept: {reason}"
            if not (self._entry / INDEX).exists():  # of another process that was first
                shutil.rmtree(self._entry, ignore_errors=True)

    def finish(self) -> None:
        """All layers are written: from now on the entry counts."""
        if self._layers is None:
            return
        if self._layers.keys() != self._names:
            self.abandon("a layer was not quantised")
            return
        try:
            index = {"layers": self._layers, "digest": record_digest(self._layers)}
            write_json(self._entry / INDEX, index | {"made_of": self._key})
        except OSError as error:
            self.abandon(str(error))
            return
        self._layers = None
        self.note = f"kept in {self._entry}"
        if self._damage:
            self.note += f", made anew: {self._damage}"

    def _open(self, widths: Mapping[str, int]) -> Path:
        layers = {name: bits for name, bits in widths.items() if bits != 16}
        libraries = ["torch", "transformers", "bitsandbytes"]
        libraries += ["hqq"] if set(layers.values()) & set(HQQ_BITS) else []
        self._names = layers.keys()
        self._key = {
            "format": FORMAT_VERSION,
            "base": self._base.digest,
            "layers": layers,
            "hardware": _hardware(self._device),
            "versions": {name: version(name) for name in libraries},
            **{name: getattr(self._quant, name) for name in MADE_WITH},
        }
        self._entry = cache_dir() / FOLDER / record_digest(self._key)[:32]
        return self._entry

    def _read(self, entry: Path, layer: dict[str, Any]) -> Codes:
        from safetensors.torch import load_file

        path = entry / layer["file"]
        if known_file_digest(path) != layer["digest"]:
            raise ValueError(f"{path} is damaged")
        # On a CPU the file's pages themselves otherwise, which could change under a base in use.
        tensors = {
            name: tensor.clone() if self._device.type == "cpu" else tensor
            for name, tensor in load_file(path, device=str(self._device)).items()
        }
        kind, blocksizes = layer["kind"], layer["blocksizes"]
        shared = shared_constants(kind, len(blocksizes) > 1, self._device)
        constants: list[Tensor] = [
            shared[place] if place in shared else tensors[f"constants_{place}"]
            for place in range(layer["num_constants"])
        ]
        dtype = getattr(torch, layer["dtype"])
        return Codes(tensors["codes"], constants, blocksizes, kind, dtype, layer["shape"])

    def _source_is_as_recorded(self) -> bool:
        """The digest in the key was taken when the sweep began, perhaps on another machine."""
        digest = self._base.digest
        if digest.startswith("commit:"):  # the hub's client has verified what is in its snapshots
            return self._source.name == digest.removeprefix("commit:")
        return folder_digest(self._source) == digest


def _hardware(device: torch.device) -> str:
    """What the last bits of constants may depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _make_room(entry: Path, left_bytes: int) -> None:
    """Remove other entries, those used longest ago first, until they take no more than this, and
    what a kill left in this one."""
    for path in entry.glob(".*.tmp"):
        if time.time() - path.stat().st_mtime > STALE_AFTER_S:
            path.unlink()
    entries = [folder for folder in entry.parent.glob("*") if folder != entry]
    used = {folder: _used(folder) for folder in entries}
    sizes = {folder: sum(p.stat().st_size for p in folder.iterdir()) for folder in entries}
    for folder in sorted(entries, key=lambda folder: used[folder]):
        unfinished = not (folder / INDEX).exists()
        if unfinished and time.time() - used[folder] < STALE_AFTER_S:
            continue  # another machine may be writing it
        if unfinished or sum(sizes.values()) > left_bytes:
            shutil.rmtree(folder)
            del sizes[folder]


def _used(folder: Path) -> float:
    index = folder / INDEX
    return (index if index.exists() else folder).stat().st_mtime
