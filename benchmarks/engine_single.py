"""One adapter alone through this project's engine, against PEFT + bitsandbytes as people use them.

Speed is measured by benchmarks.packs, once for each shape; the losses here, on the same blocks,
from the same first values, at the same rates:

    python -m benchmarks.packs run --rows FILE --shape 8b --tokens 1024 8192 --slots 1 \\
        --parts matmul stock stock-plain pack --single-programs graph
    python -m benchmarks.engine_single losses --rows FILE --shape 0.5b
    python -m benchmarks.engine_single record --rows FILE
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.pack_bars import best, like, with_ratios
from benchmarks.recording import (
    Bar,
    Row,
    add_record_action,
    append_row,
    environment,
    parser_of_actions,
    read_rows,
    record,
)

# (shape, tokens a step): goal against stock with gradient checkpointing.
GOALS = {("8b", 8192): 2.0, ("8b", 1024): 5.0, ("0.5b", 1024): 12.0}
BITS = 4
LEARNING_RATE = 2e-4
# Of nats: two ways of adding in bf16 differ by so much at a step (packs_equality.json: 0.010).
MAX_DIFFERENCE = 0.02


def main() -> None:
    options = _options()
    if options.action == "record":
        rows = read_rows(options.rows)
        speeds = [row for row in rows if row["who"] != "losses"]
        losses = [row for row in rows if row["who"] == "losses"]
        print(record(options.name, with_ratios(speeds) + losses, _bars(speeds, losses)))
        return
    children.end_on_sigterm()
    model = options.folder / options.shape
    children.call("benchmarks.models", options.shape, str(model))
    with tempfile.TemporaryDirectory() as folder:
        row = _losses(Path(folder), model, options.tokens, options.steps)
    append_row(options.rows[0], {"who": "losses", "shape": options.shape} | row)


def _losses(folder: Path, model: Path, tokens: int, steps: int) -> Row:
    """Each step's training loss, both ways."""
    from benchmarks import own
    from benchmarks.blocks import prepare_blocks
    from orchestrator.config import EvaluationConfig
    from orchestrator.records import Progress
    from orchestrator.training.pack import PackWorker

    shards = prepare_blocks(folder, model, tokens)
    pack = own.Pack(model, shards, BITS, 1, "graph")
    config = own.trial_config(pack, steps, 0, learning_rate=LEARNING_RATE)
    every_step = EvaluationConfig(every_steps=1)  # is when losses are told
    worker = PackWorker(replace(own.pack_spec(pack), evaluation=every_step))
    worker.load()
    worker.rows.open(0, config.adapter, config.seed)
    first = worker.rows.adapter_tensors(0, config.adapter)
    worker.rows.clear(0)
    events = own.train(worker, [config], folder)
    ours = [event.train_loss for event in events if isinstance(event, Progress)]
    theirs = _reference(model, shards, config, first)
    return {
        "bit_width": BITS,
        "tokens_per_adapter": tokens,
        "program": worker.programs.kind,
        "own": [round(loss, 4) for loss in ours],
        "reference": [round(loss, 4) for loss in theirs],
        "largest_difference": round(
            max(abs(one - other) for one, other in zip(ours, theirs, strict=True)), 4
        ),
        "environment": environment(),
    }


def _reference(
    model_folder: Path, shards: Path, config: Any, first: Mapping[str, Any]
) -> list[float]:
    """By PEFT, with gradient checkpointing and bf16 autocast, from the adapter `first`."""
    import torch

    from benchmarks.stock import OPTIMIZERS, load_for_training
    from orchestrator.data.manifest import load_manifest
    from orchestrator.data.order import step_block_indices
    from orchestrator.data.reader import BlockReader
    from orchestrator.training.optimizers import learning_rate

    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapter = config.adapter
    model = load_for_training(model_folder, BITS, adapter.rank, adapter.alpha)
    state = model.state_dict()
    for name, tensor in first.items():
        state[name.replace(".weight", ".default.weight")].copy_(tensor)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer.name](parameters, config.optimizer.learning_rate)
    reader = BlockReader(load_manifest(str(shards), "train"))
    losses = []
    for step in range(config.steps):
        indices = step_block_indices(config.seed, step, config.batch_size, reader.num_blocks)
        batch = reader.blocks(indices)
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(
                input_ids=torch.from_numpy(batch.input_ids).to(device), use_cache=False
            ).logits
        labels = torch.from_numpy(batch.labels).to(device)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(
            step, config.steps, config.optimizer.learning_rate, config.schedule
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def _bars(speeds: Sequence[Row], losses: Sequence[Row]) -> dict[str, Bar]:
    found = {}
    for (shape, tokens), goal in GOALS.items():
        own, stock = (
            best(speeds, like(shape, BITS, tokens, "adamw", who, 1)) for who in ("pack", "stock")
        )
        if own and stock:
            title = f"{shape.upper()} at {tokens:,}, against stock with checkpointing"
            found[title] = Bar(round(own / stock, 2), goal)
    for row in losses:
        title = f"{row['shape'].upper()}: largest difference of a step's loss, at most"
        found[title] = Bar(row["largest_difference"], MAX_DIFFERENCE, at_most=True)
    return found


def _options() -> argparse.Namespace:
    parser, actions = parser_of_actions(__doc__)
    losses = actions.add_parser("losses")
    losses.add_argument("--shape", default="0.5b")
    losses.add_argument("--tokens", type=int, default=1024)
    losses.add_argument("--steps", type=int, default=50)
    losses.add_argument("--folder", type=Path, default=Path("/tmp/packs"))
    losses.add_argument("--rows", type=Path, nargs=1, required=True)
    add_record_action(actions, "engine_single")
    return parser.parse_args()


if __name__ == "__main__":
    main()
