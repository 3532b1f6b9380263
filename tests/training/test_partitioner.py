"""A base for ZeRO-3 is partitioned as it is read: no worker ever holds the whole."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.config import QuantConfig, StrategyConfig, TrialConfig
from orchestrator.records import BaseModel, GroupPlace, PackSpec
from orchestrator.tracking.adapter_model import base_digest
from orchestrator.training.base_model import load_base_model, probe
from orchestrator.training.lanes import Served
from orchestrator.training.pack import PackWorker
from orchestrator.training.replicas import join
from tests.tiny import make_base_model
from tests.training.conftest import MakeSpec
from tests.training.test_data_parallel import run_together
from tests.training.test_zero import zero_strategy

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")

HIDDEN_SIZE = 256
LARGEST_BYTES = 2 * HIDDEN_SIZE * 2 * HIDDEN_SIZE
"""Of a layer in 16 bits: 256 KiB, of 6 MiB in all."""
# Each layer of 4 bits has maps from codes to values of its own, 1.1 kB; there are 56.
SLACK_BYTES = 2**17


# Smaller ones count as held where they are pages of a file, too: asking takes milliseconds.
LEAST_ASKED_BYTES = 2**14


class HeldBytes(TorchDispatchMode):
    """The most that the results of torch's operators took at once, but for pages of files."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[StorageWeakRef, int] = {}
        self._most = 0
        """What is held, and what ceased to be since it was last looked at."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference not in self._held:
                    self._held[reference] = _held_bytes(storage)
                    self._most += self._held[reference]
        if self._most > self.peak:
            self._held = {ref: size for ref, size in self._held.items() if not ref.expired()}
            self._most = sum(self._held.values())
            self.peak = max(self.peak, self._most)
        return result


def _held_bytes(storage: UntypedStorage) -> int:
    size = storage.nbytes()
    of_a_file = size >= LEAST_ASKED_BYTES and _is_of_a_file(storage.data_ptr())
    return 0 if of_a_file else size


def _is_of_a_file(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return "/" in line
    return False


CASES = {
    "4 bits": ("stage 3", 4, "bfloat16"),
    "4 bits, offloaded": ("stage 3, all on the CPU", 4, "bfloat16"),
    "16 bits": ("stage 3", 16, "bfloat16"),
    "16 bits, as the files": ("stage 3", 16, "float32"),
}


def load_and_measure(
    place: GroupPlace, spec: PackSpec, trials: Sequence[TrialConfig], folder: Path
) -> None:
    replicas = join(place, "cpu")
    (folder / str(place.world_rank)).write_text(
        json.dumps({name: held_while_loading(spec.base_model, *CASES[name]) for name in CASES})
    )
    replicas.loaded()
    replicas.close()


def held_while_loading(
    record: BaseModel, name: str, bit_width: int, compute_dtype: str
) -> dict[str, int]:
    """Bytes."""
    quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": compute_dtype})
    strategy = StrategyConfig.model_validate(zero_strategy(name))
    with HeldBytes() as held:
        base = load_base_model(record, quant, "cpu", strategy)
    parameters: list[Any] = list(base.model.parameters())
    partitioned = sum(p.ds_numel * p.element_size() for p in parameters)
    return {
        "peak": held.peak,
        "whole": base.num_bytes,
        "partitioned": partitioned,
        "own": sum(p.ds_tensor.numel() * p.element_size() for p in parameters),
        "constants": base.num_bytes - partitioned,
    }


@pytest.fixture(scope="module")
def measured(
    make_spec: MakeSpec, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, int]]]:
    """What each of two workers held while it loaded a base of eight layers, fp32 in its file."""
    folder = tmp_path_factory.mktemp("partitioned")
    base = make_base_model(folder / "base", hidden_size=HIDDEN_SIZE, num_layers=8)
    record = BaseModel("deep", None, str(base), base_digest(base))
    run_together(load_and_measure, replace(make_spec(), base_model=record), [], folder / "pair")
    return [json.loads((folder / "pair" / str(rank)).read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["4 bits", "4 bits, offloaded", "16 bits"])
def test_a_worker_holds_its_part_of_a_base_and_one_layer_while_it_loads(
    measured: list[dict[str, dict[str, int]]], case: str
) -> None:
    for by_case in measured:
        found = by_case[case]
        assert found["own"] == pytest.approx(found["partitioned"] / 2, rel=0.01)
        most = found["own"] + found["constants"] + LARGEST_BYTES + SLACK_BYTES
        assert most < 0.8 * found["whole"]
        assert found["own"] < found["peak"] <= most


def test_of_files_in_the_bases_own_type_a_worker_copies_its_part_alone(
    measured: list[dict[str, dict[str, int]]],
) -> None:
    for by_case in measured:
        found = by_case["16 bits, as the files"]
        assert found["own"] <= found["peak"] <= found["own"] + SLACK_BYTES


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_are_tied_in_words_alone_stay_two(
    make_spec: MakeSpec, tmp_path: Path, tied: bool
) -> None:
    """transformers ties them only if the files do not hold two that differ."""
    base = make_base_model(tmp_path / "base", tied=True)
    path = base / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = head.clone() if tied else head.flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    spec = make_spec(num_slots=1, base_model=BaseModel("two", None, str(base), base_digest(base)))
    whole = PackWorker(spec)
    parts = PackWorker(replace(spec, strategy=zero_strategy("stage 3")))
    ready, expected = parts.load(), whole.load()
    assert ready.baseline_eval_loss == pytest.approx(expected.baseline_eval_loss, rel=1e-6)
    assert ready.num_base_params == expected.num_base_params
    assert ready.base_bytes == expected.base_bytes


@pytest.mark.parametrize("recomputation", [False, True])
def test_codes_that_zero_lets_go_of_are_kept_by_nobody_until_the_backward_pass(
    make_spec: MakeSpec, recomputation: bool
) -> None:
    spec = make_spec(
        num_slots=1,
        bit_width=4,
        strategy=zero_strategy("stage 3"),
        gradient_checkpointing=recomputation,
    )
    worker = PackWorker(spec)
    worker.load()
    words, _, positions = probe(worker.base)
    engine: Any = worker.engine
    engine.program.serve([Served(0, 1.0)])
    hidden = engine.forward(lambda: worker.base.hidden(words, positions))
    engine._engine.empty_partition_cache()
    kept = [
        tensor for node in nodes_before(hidden.grad_fn) for tensor in getattr(node, "tensors", ())
    ]
    codes = [tensor for tensor in kept if tensor is not None]
    assert len(codes) > 7  # of two blocks' seven layers, of the first those that see an adapter
    assert sum(tensor.untyped_storage().nbytes() for tensor in codes) == 0


def nodes_before(last: Any) -> set[Any]:
    """Of autograd's graph."""
    found: set[Any] = set()
    left = [last]
    while left:
        if (node := left.pop()) is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return found
