"""An adapter merged into its base, as a model that plain transformers loads.

In: an adapter's folder, the base it was trained on, and how to measure a model. Out: a folder with
weights, configuration, tokenizer and export.json, whole or not at all.

A merged model that is quantised again is rounded a second time, which costs quality; how much is
measured for every export, against the adapter on its own base.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from orchestrator.errors import ConfigError, ExportRefused
from orchestrator.files import read_json, whole_folder, write_json
from orchestrator.training.merge import DTYPES_16, ExportType, merge
from orchestrator.training.parity import Measured, Parity, compare
from orchestrator.training.quiet import quiet_libraries

Form = Literal["merged", "nf4", "int8"]
"""merged: 16-bit weights. nf4, int8: these quantised again by bitsandbytes."""

REPORT = "export.json"


@dataclass(frozen=True)
class Bounds:
    """What an export may lose against the adapter on its own quantised base."""

    max_loss_increase: float = 0.02
    """Nats of held-out loss."""
    min_agreement_fraction: float = 0.9
    """Part of the labelled places where both would say the same token."""


@dataclass(frozen=True)
class Exported:
    folder: Path
    form: Form
    num_bytes: int
    parity: Parity


Measure = Callable[[nn.Module], Measured]
"""Losses and likeliest tokens of a loaded model on the held-out blocks."""


def export_adapter(
    adapter_dir: Path,
    base_folder: str,
    to: Path,
    form: Form,
    measure: Measure,
    bounds: Bounds,
    dtype: ExportType = "bfloat16",
) -> Exported:
    """Merge, write, load it back with plain transformers, measure; then keep it or not.

    Raises:
        BaseModelError: the adapter does not fit its base.
        ExportRefused: it differs from the adapter on its base by more than the bounds.
    """
    if to.exists():
        raise ExportRefused(f"{to} is there already: choose another --out")
    record = read_json(adapter_dir / "orchestrator.json")
    if record["base_model"]["trust_remote_code"]:
        raise ExportRefused(
            f"the code of {record['base_model']['source']} is its repository's own, which plain "
            "transformers does not run, so an export could not be compared: serve the adapter "
            "itself, on its base"
        )
    with whole_folder(to) as folder, quiet_libraries():
        reference = measure(load_adapted(adapter_dir, base_folder))
        merged = folder / "merged"
        merged.mkdir()
        merge(adapter_dir, base_folder, merged, dtype)
        if form != "merged":
            _requantise(merged, folder / "requantised", form, dtype)
            _remove(merged)
            merged = folder / "requantised"
        for path in list(merged.iterdir()):
            path.rename(folder / path.name)
        merged.rmdir()
        parity = compare(reference, measure(load_plain(folder)))
        if problem := why_refused(parity, bounds):
            raise ExportRefused(f"{form}: {problem}: nothing is written")
        num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        report = {
            "form": form,
            "dtype": dtype,
            "base_model": record["base_model"],
            "trained_with": record["quant"],
            "parity": asdict(parity),
            "bounds": asdict(bounds),
            "num_bytes": num_bytes,
        }
        write_json(folder / REPORT, report)
    return Exported(to, form, num_bytes, parity)


def why_refused(parity: Parity, bounds: Bounds) -> str:
    """Empty for an export that may be kept. A loss that is not a number never may."""
    if not parity.loss_increase <= bounds.max_loss_increase:
        return (
            f"its held-out loss is {parity.loss:.4f}, {parity.loss_increase:+.4f} against the "
            f"adapter on its own base ({parity.reference_loss:.4f}), more than --max-loss-increase "
            f"{bounds.max_loss_increase:g} allows"
        )
    if not parity.agreement_fraction >= bounds.min_agreement_fraction:
        return (
            f"it says the same token in {parity.agreement_fraction:.1%} of the places, less than "
            f"--min-agreement {bounds.min_agreement_fraction:g} asks for"
        )
    return ""


def load_adapted(adapter_dir: Path, base_folder: str) -> nn.Module:
    """The adapter on its quantised base, through PEFT and bitsandbytes: what is registered."""
    from orchestrator.tracking.adapter_model import load_base, with_adapter

    model = load_base(read_json(adapter_dir / "orchestrator.json"), base_folder)
    return _frozen(with_adapter(model, adapter_dir))


def load_plain(folder: Path) -> nn.Module:
    """As any user of transformers would."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": _place()}, local_files_only=True
    )
    return _frozen(model)


def _requantise(merged: Path, to: Path, form: Form, dtype: ExportType) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quant = {"bit_width": 4, "quant_type": "nf4", "double_quant": True}
    if form == "int8":
        quant = {"bit_width": 8}
    model = AutoModelForCausalLM.from_pretrained(
        merged,
        dtype=DTYPES_16[dtype],
        quantization_config=_bitsandbytes(quant, DTYPES_16[dtype]),
        device_map={"": _place()},
        local_files_only=True,
    )
    _frozen(model)
    model.save_pretrained(to)
    AutoTokenizer.from_pretrained(merged).save_pretrained(to)


def _bitsandbytes(quant: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quant["bit_width"] == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant["quant_type"],
            bnb_4bit_use_double_quant=quant["double_quant"],
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quant["bit_width"] == 8 else None


def _frozen(model: nn.Module) -> nn.Module:
    """For evaluation, with 4-bit weights kept as they are; see base_model.py."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model.eval()


def _place() -> int | str:
    return 0 if torch.cuda.is_available() else "cpu"


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def as_form(name: str) -> Form:
    """Raises ConfigError for an unknown one."""
    for known in get_args(Form):
        if known == name:
            return cast(Form, known)
    raise ConfigError(f"--form: {name} is not one of {', '.join(get_args(Form))}")


def as_type(name: str) -> ExportType:
    """Raises ConfigError for an unknown one."""
    for known in DTYPES_16:
        if known == name:
            return known
    raise ConfigError(f"--dtype: {name} is not one of {', '.join(DTYPES_16)}")
