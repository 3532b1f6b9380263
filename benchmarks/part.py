"""One measurement in a process of its own, which `benchmarks.packs` starts and, if need be, ends.

Writes the measurement to --out as JSON. With --gate, it says that it is warm by making the file
OUT.warm, and measures once the gate's file is there: so several processes measure at once.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.flops import matmul_tflops
from benchmarks.recording import environment


def main() -> None:
    options = _options()

    def ready() -> None:
        if options.gate:
            Path(f"{options.out}.warm").touch()
            while not options.gate.exists():
                time.sleep(0.01)

    if options.kind == "matmul":
        content: dict[str, Any] = {"tflops": round(matmul_tflops(), 4)}
    elif options.kind == "stock":
        from benchmarks import stock

        content = asdict(
            stock.measure(
                options.model,
                options.bits,
                options.tokens,
                options.optimizer,
                options.steps,
                ready,
                not options.no_checkpointing,
            )
        )
    elif options.kind == "frozen":
        from benchmarks import frozen

        tokens = options.slots * options.tokens
        content = asdict(frozen.measure(options.shape, tokens, options.steps, ready))
    else:
        from benchmarks import own

        pack = own.Pack(
            options.model,
            options.shards,
            options.bits,
            options.slots,
            options.program,
            options.optimizer,
            not options.dequantise_each_use,
            options.recomputation,
            options.kept_layers,
        )
        content = asdict(own.measure(pack, options.slots, options.steps, ready))
    options.out.write_text(json.dumps(content | {"environment": environment()}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["matmul", "stock", "pack", "frozen"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gate", type=Path)
    parser.add_argument("--shape", help="of frozen products")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shards", type=Path, help="folder of the manifests")
    parser.add_argument("--bits", type=int)
    parser.add_argument("--tokens", type=int, help="in a block of the stock recipe")
    parser.add_argument("--no-checkpointing", action="store_true", help="of the stock recipe")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--program", default="eager")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--dequantise-each-use", action="store_true")
    parser.add_argument("--recomputation", action="store_true")
    parser.add_argument("--kept-layers", type=int, default=0)
    parser.add_argument("--steps", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
