"""An adapter on disk in PEFT's own format, loadable by plain PEFT, with what it was trained on.

In: the tensors of one slot. Out: a folder with adapter_config.json, adapter_model.safetensors and
orchestrator.json (base model, quantisation, template, digests of the other files).
"""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from orchestrator.config import AdapterConfig, TrialConfig
from orchestrator.errors import BaseModelError, TrialFailed
from orchestrator.files import file_digest, read_json, whole_folder, write_file, write_json
from orchestrator.planning.ranks import alpha_of, rank_of
from orchestrator.planning.shape import Targets
from orchestrator.records import BaseModel
from orchestrator.training.quiet import quiet_libraries

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names


def save_adapter(
    folder: Path,
    tensors: dict[str, Tensor],
    trial: TrialConfig,
    base: BaseModel,
    facts: dict[str, Any],
    names_elsewhere: AbstractSet[str] = frozenset(),
) -> str:
    """Write the folder whole or not at all; returns the digest of its weights.

    `facts` go to orchestrator.json beside the base model's record and the quantisation. A layer is
    named as a whole if its last name is one of `names_elsewhere`.

    Raises:
        TrialFailed: the adapter is as it began.
    """
    adapter, optimizer = trial.adapter, trial.optimizer
    if not any("lora_B" in name and bool(tensor.any()) for name, tensor in tensors.items()):
        # Its steps are too small for fp32, or it is an error upstream: DeepSpeed 7900, peft 2892.
        raise TrialFailed(
            "not_trained",
            f"every lora_B is zero after {trial.steps} steps, so the adapter changes nothing (got "
            f"learning_rate={optimizer.learning_rate}, max_grad_norm={optimizer.max_grad_norm}, "
            f"alpha={adapter.alpha}): raise optimizer.learning_rate, optimizer.max_grad_norm or "
            "adapter.alpha",
        )
    layers = {name.split(".lora_")[0].removeprefix(PREFIX) for name in tensors}
    modules = sorted({_target(name, adapter.target_modules, names_elsewhere) for name in layers})
    ranks = {name: rank_of(adapter, name) for name in sorted(layers)}
    alphas = {name: alpha_of(adapter, name) for name in sorted(layers)}
    with quiet_libraries():
        from peft import LoraConfig
        from safetensors.torch import save_file

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.use_dora,
        # By whole names: PEFT takes the first key that matches, we the longest.
        rank_pattern={name: rank for name, rank in ranks.items() if rank != adapter.rank},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != adapter.alpha},
        target_modules=modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.folder,
        inference_mode=True,
    )
    with whole_folder(folder) as temporary:
        write_file(
            temporary / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"})
        )
        config.save_pretrained(str(temporary))
        digests = {name: file_digest(temporary / name) for name in (CONFIG, WEIGHTS)}
        write_json(
            temporary / "orchestrator.json",
            {
                "base_model": {
                    "source": base.source,
                    "revision": base.revision,
                    "folder": base.folder,
                    "digest": base.digest,
                    "trust_remote_code": base.trust_remote_code,
                },
                "files": digests,
                "quant": trial.quant.model_dump(mode="json"),
                **facts,
            },
        )
    return file_digest(folder / WEIGHTS)


def _target(layer: str, targets: Targets, names_elsewhere: AbstractSet[str]) -> str:
    """What PEFT is to find the layer by: its last name, where all layers of that name were trained,
    or else the whole."""
    last = layer.rpartition(".")[2]
    all_of_that_name = targets == "all-linear" or last in targets
    return last if all_of_that_name and last not in names_elsewhere else layer


def check_peft_keeps(model: nn.Module, layers: Iterable[str]) -> None:
    """Raises BaseModelError where PEFT would look for these layers' adapters elsewhere. It takes
    the names of dense layers in a mixture of experts for those of the experts, whose weights were
    single layers in earlier versions of transformers (peft 0.21, `_convert_peft_config_moe`)."""
    if not any(".experts." in name for name, _ in model.named_parameters()):
        return
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = {name.rpartition(".")[2] for name in layers}
    moved = set()
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=model, conversions=None)
        except ValueError:  # one of several that are one weight now
            moved.add(name)
        if name not in (config.target_modules or ()):
            moved.add(name)
    if moved:
        kind = getattr(model.config, "model_type", "this")
        raise BaseModelError(
            f"PEFT takes adapters on {', '.join(sorted(moved))} of a {kind} base for its experts', "
            "so that what is trained would not be what is loaded: set adapter.target_modules to "
            f"[{', '.join(sorted(names - moved))}]"
        )


def saved_config(folder: Path) -> AdapterConfig:
    """What a saved adapter's shapes and scaling follow from."""
    content = read_json(folder / CONFIG)
    return AdapterConfig.model_validate(
        {
            "rank": content["r"],
            "alpha": content["lora_alpha"],
            "rslora": content["use_rslora"],
            "use_dora": content.get("use_dora", False),
            "target_modules": tuple(content["target_modules"]),
            "rank_pattern": content.get("rank_pattern") or {},
            "alpha_pattern": content.get("alpha_pattern") or {},
        }
    )
