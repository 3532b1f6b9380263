"""Run folders for tests, made through RunStore as a sweep would make them."""

import math
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestrator.config import SweepConfig
from orchestrator.data.manifest import (
    ROLES,
    Manifest,
    Recipe,
    Repeats,
    Role,
    ShardRecord,
)
from orchestrator.data.prepare import PreparedData
from orchestrator.files import file_digest, write_json
from orchestrator.loading import trial_with
from orchestrator.records import (
    BaseModel,
    Decision,
    Evaluated,
    PackEvent,
    Progress,
    TrialResult,
    TrialSpec,
)
from orchestrator.sweep.run_store import RunStore, SweepRecord
from orchestrator.sweep.selection import select_winner

BEGAN = 1_790_000_000.0
STEPS = 40
EVERY = 2
BASELINE = 3.1
GRID: tuple[dict[str, Any], ...] = (
    {"quant.bit_width": 4, "adapter.rank": 4},
    {"quant.bit_width": 4, "adapter.rank": 16},
    {"quant.bit_width": 16, "adapter.rank": 4},
    {"quant.bit_width": 16, "adapter.rank": 16},
)
BASE = BaseModel("org/tiny-llama", None, "/models/tiny-llama", "b" * 64)


def make_config(**changes: Any) -> SweepConfig:
    content: dict[str, Any] = {
        "name": "demo",
        "base_model": {"source": BASE.source},
        "data": {"train": "stdlib-docs"},
        "trial": {"steps": STEPS},
        "search": {"space": {"quant.bit_width": [4, 16], "adapter.rank": [4, 16]}},
    }
    return SweepConfig.model_validate(content | changes)


def make_run(
    folder: Path,
    *,
    run_id: str = "demo-1",
    config: SweepConfig | None = None,
    params: tuple[dict[str, Any], ...] = GRID,
    failed: tuple[int, ...] = (),
    unfinished: tuple[int, ...] = (),
    base: BaseModel = BASE,
    gain: float = 1.0,
    winner: bool = True,
) -> RunStore:
    """A sweep over `params`; each trial not in `failed` or `unfinished` has a result."""
    config = config or make_config()
    versions = {"orchestrator": "0.1.0", "torch": "2.13.0"}
    store = RunStore.create(
        folder, SweepRecord(run_id, BEGAN, config, "cpu", "bfloat16", "ray", versions)
    )
    store.write("base_model", asdict(base))
    store.write("data", PreparedData("shards", *map(_manifest, ROLES)).to_json())
    store.write("environment", {"git_commit": "c" * 40})
    store.write("plan", {"packs": [{"title": "4-bit nf4", "slots": 2}]})
    for number, fields in enumerate(params):
        trial = TrialSpec(number, fields, trial_with(config.trial, fields))
        store.add_trial(trial)
        store.add_decision(
            Decision(BEGAN + number, "assign", f"trial {number}", "a slot of pack 0 is free")
        )
        add_place(store, trial, number not in unfinished)
        add_curve(store, trial, STEPS if number not in unfinished else STEPS // 2, gain)
        if number not in unfinished:
            add_result(store, trial, failed=number in failed, gain=gain, base=base)
    if winner and (best := select_winner(store.trials, store.results)):
        store.write("winner", best.to_json())
        store.add_decision(
            Decision(BEGAN + 900, "select_winner", f"trial {best.trial}", best.reason)
        )
    return store


def add_place(store: RunStore, trial: TrialSpec, over: bool) -> None:
    """Two packs side by side, of two slots each, on two nodes."""
    pack, slot = divmod(trial.number, 2)
    bits = trial.config.quant.bit_width
    if slot == 0:
        plan = PackEvent(
            BEGAN + 2, "start", pack, f"{bits}-bit", 2, 1, expected_bytes=(bits * 64) << 20
        )
        store.add_pack_event(plan)
        store.add_pack_event(PackEvent(BEGAN + 8, "ready", pack))
    began, node = BEGAN + 10 + trial.number, "ab"[pack % 2]
    opened = PackEvent(
        began, "opened", pack, trial=trial.number, attempt=1, slot=slot, node=f"node-{node}"
    )
    store.add_pack_event(opened)
    if over:
        end = BEGAN + 100 + trial.number
        peak_bytes = (bits * 60 + trial.config.adapter.rank * 4) << 20
        closed = PackEvent(
            end, "closed", pack, trial=trial.number, attempt=1, peak_bytes=peak_bytes
        )
        store.add_pack_event(closed)


def _manifest(role: Role) -> Manifest:
    recipe = Recipe({}, "t" * 64, (("f" * 64,),), ())
    counts = {name: 128 for name in ("num_documents", "rows")}
    counts |= {name: 0 for name in ("truncated", "split", "dropped", "without_loss", "bad_rows")}
    shard = ShardRecord(
        file="a", max_documents=20, num_bytes=1, digest="d",
        num_blocks=9, num_tokens=9_000, num_loss_tokens=700, **counts,
    )  # fmt: skip
    return Manifest(Path("shards"), role, 1024, recipe, (shard,), Repeats(0, 0))


def add_curve(store: RunStore, trial: TrialSpec, steps: int, gain: float = 1.0) -> None:
    for step in range(EVERY, steps + 1, EVERY):
        at = BEGAN + 10 + trial.number + step
        loss = eval_loss(trial, step, gain)
        wave = 0.15 * math.sin(step * (1.7 + trial.number))
        tokens = step * 1000
        store.add_point(Progress(trial.number, 1, at, step, tokens, loss + wave, 2e-4, 0.8, 1234.5))
        if step % (5 * EVERY) == 0:
            store.add_point(Evaluated(trial.number, 1, at + 0.5, step, tokens, loss))


def eval_loss(trial: TrialSpec, step: int, gain: float) -> float:
    """Falls with steps; more rank and more bits are a little better."""
    skill = 0.5 + 0.06 * math.log2(trial.config.adapter.rank)
    skill += 0.004 * trial.config.quant.bit_width
    return BASELINE - gain * skill * (1 - math.exp(-step / 15))


def add_result(
    store: RunStore, trial: TrialSpec, *, failed: bool, gain: float = 1.0, base: BaseModel = BASE
) -> None:
    end = BEGAN + 100 + trial.number
    if failed:
        reason = "the loss of step 41 is nan"
        store.finish_trial(
            TrialResult(trial.number, "failed", 1, end, "loss_not_finite", reason, steps=STEPS)
        )
        return
    rank, bits = trial.config.adapter.rank, trial.config.quant.bit_width
    result = TrialResult(
        trial.number,
        "finished",
        1,
        end,
        eval_loss=eval_loss(trial, STEPS, gain),
        baseline_eval_loss=BASELINE,
        train_loss=2.2,
        steps=STEPS,
        tokens=STEPS * 1000,
        tokens_per_s=1234.5,
        train_s=61.5,
        peak_memory_bytes=(bits * 60 + rank * 4) << 20,
        model_memory_bytes=(bits * 30 + rank * 3) << 20,
        num_adapter_params=rank * 100_000,
        adapter_bytes=rank * 400_000,
    )
    store.finish_trial(add_adapter(store, trial, result, base))


def add_adapter(
    store: RunStore, trial: TrialSpec, result: TrialResult, base: BaseModel
) -> TrialResult:
    """The smallest folder that passes for an adapter; no base model fits it."""
    folder = store.trial_dir(trial.number) / "attempts" / "1" / "adapter"
    folder.mkdir(parents=True)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(f"weights of {store.sweep.run_id} {trial.number}".encode())
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 4})
    write_adapter_record(folder, trial, base)
    assert result.eval_loss is not None
    write_evaluation(folder.parent, trial.number, result.eval_loss)
    return replace(
        result,
        adapter_dir=str(folder.relative_to(store.folder)),
        adapter_digest=file_digest(weights),
    )


def write_adapter_record(
    folder: Path, trial: TrialSpec, base: BaseModel, template: str = "plain"
) -> None:
    write_json(
        folder / "orchestrator.json",
        {
            "base_model": asdict(base),
            "quant": trial.config.quant.model_dump(mode="json"),
            "compute_dtype": "float32",
            "template": template,
            "train_manifest": "t" * 64,
            "held_out_manifest": "h" * 64,
            "files": {
                name: file_digest(folder / name)
                for name in ("adapter_config.json", "adapter_model.safetensors")
            },
        },
    )


def write_evaluation(
    folder: Path, seed: int, loss: float, examples: str = "e", count: int = 40
) -> None:
    """Losses of `count` examples whose mean is `loss`, each a little off it in its own way."""
    numbers = random.Random(f"{seed} {loss}")
    labels = [5 + 7 * index % 50 for index in range(count)]
    noise = [numbers.gauss(0, 0.05) for _ in labels]
    mean = sum(n * x for n, x in zip(labels, noise, strict=True)) / sum(labels)
    write_json(
        folder / "evaluation.json",
        {
            "manifest": examples * 64,
            "examples_digest": examples * 64,
            "eval_loss": loss,
            "examples": [f"{index:064x}" for index in range(count)],
            "nll": [n * (loss + x - mean) for n, x in zip(labels, noise, strict=True)],
            "labels": labels,
            "step": STEPS,
        },
    )


def write_answers(folder: Path, right: int, questions: str = "b", count: int = 40) -> None:
    """To `count` questions, the first `right` of them rightly."""
    write_json(
        folder / "answers.json",
        {
            "task_score": right / count,
            "examples": [f"{questions}{index:063x}" for index in range(count)],
            "right": [int(index < right) for index in range(count)],
        },
    )


def make_base_model(folder: Path) -> BaseModel:
    """A tiny Llama with random weights and a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from orchestrator.tracking.adapter_model import base_digest
    from tests.tiny import make_tokenizer

    make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return BaseModel(str(folder), None, str(folder), base_digest(folder))


def make_peft_adapter(folder: Path, base: BaseModel) -> None:
    """A real adapter, far enough from zero to change what is generated."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)


def generate_with_peft(
    adapter: Path, base: BaseModel, bit_width: int, template: str, prompts: list[str], count: int
) -> list[str]:
    """As a user without this project would do it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.float32, quantization_config=quant if bit_width == 4 else None
    )
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    texts = []
    for prompt in prompts:
        if template == "chat":
            prompt = f"<|user|>{prompt}<|end|><|assistant|>"
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        start = inputs["input_ids"].shape[1]
        texts.append(tokenizer.decode(output[0, start:], skip_special_tokens=True))
    return texts
