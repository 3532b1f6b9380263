"""Which families of base models can be trained, decided by a probe when they are loaded."""

import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import QuantConfig, StrategyConfig
from orchestrator.errors import BaseModelError
from orchestrator.records import BaseModel, TrialDone
from orchestrator.training.attention import why_not_by_document
from orchestrator.training.base_model import LoadedBase, load_base_model
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_codes import assert_loaded_as_trained
from tests.training.test_pack import PackWorker, assert_equal, train

SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "biogpt": {},
    "cohere": {"logit_scale": 0.0625},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
    },
    "gemma2": {"sliding_window": 8},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 128},
    "llama": {},
    "mamba": {},
    "minimax": {"num_local_experts": 2},
    "mixtral": {"num_local_experts": 4, "router_jitter_noise": 0.1, "attention_dropout": 0.1},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi": {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attention_dropout": 0.1},
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


def make_family(name: str, folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES | FAMILIES[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def load(folder: Path, bit_width: int = 16, dtype: str = "float32") -> LoadedBase:
    quant = QuantConfig.model_validate({"bit_width": bit_width, "compute_dtype": dtype})
    return load_base_model(BaseModel("x", None, str(folder), "d"), quant, "cpu", StrategyConfig())


@pytest.mark.parametrize(
    ("name", "bit_width", "dtype"),
    [
        *(
            (name, 16, "float32")
            for name in ("biogpt", "gpt_oss", "jamba", "lfm2", "mamba", "minimax", "qwen3_next")
        ),
        ("falcon_h1", 16, "float32"),
        *(("opt", bits, dtype) for bits in (4, 8, 16) for dtype in ("bfloat16", "float32")),
    ],
)
def test_a_family_that_lets_documents_of_a_block_touch_is_refused(
    tmp_path: Path, name: str, bit_width: int, dtype: str
) -> None:
    folder = make_family(name, tmp_path)
    with pytest.raises(BaseModelError, match=f"'{name}'.*kept apart.*another base model"):
        load(folder, bit_width, dtype)


@pytest.mark.parametrize("bit_width", [4, 16])
def test_a_family_that_draws_at_random_in_training_is_refused(
    tmp_path: Path, bit_width: int
) -> None:
    folder, before = make_family("phimoe", tmp_path), torch.get_rng_state()
    with pytest.raises(BaseModelError, match="'phimoe': in training it draws something at random"):
        load(folder, bit_width)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_family_that_wants_weights_where_codes_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="transformers cannot load it"):
        load(make_family("mamba", tmp_path), 4, "bfloat16")


def test_a_base_of_gpt_2s_kind_is_refused_by_the_rule_where_its_layers_would_be_codes(
    tmp_path: Path,
) -> None:
    with pytest.raises(BaseModelError, match="but got quant.bit_width=4.*or choose another base"):
        load(make_family("gpt2", tmp_path), 4)


@pytest.mark.parametrize(
    ("bit_width", "strategy"),
    [(8, {}), (8, {"kind": "zero", "stage": 2}), (4, {"kind": "zero", "stage": 3})],
)
def test_a_base_of_gpt_2s_kind_trains_in_layers_of_bitsandbytes(
    make_spec: MakeSpec, tmp_path: Path, bit_width: int, strategy: dict[str, Any]
) -> None:
    base = BaseModel("gpt2", None, str(make_family("gpt2", tmp_path / "base")), "digest")
    whole = StrategyConfig.model_validate(strategy).model_dump()
    spec = make_spec(bit_width, base_model=base, num_slots=1, strategy=whole)
    _, events = train(spec, [trial_config()], tmp_path / "trials")
    (done,) = [event for event in events if isinstance(event, TrialDone)]
    assert done.eval_loss < done.baseline_eval_loss


@pytest.mark.parametrize("bit_width", [4, 8, 16])
@pytest.mark.parametrize("name", ["cohere", "gemma2", "gpt_neox", "llama", "mixtral", "phi"])
def test_a_family_that_keeps_documents_apart_loads_in_train_mode(
    tmp_path: Path, name: str, bit_width: int
) -> None:
    base = load(make_family(name, tmp_path), bit_width, "bfloat16")
    assert all(module.training for module in base.model.modules())


def make_gemma3(folder: Path) -> Path:
    """Of text and images; plain transformers loads it as a causal language model, too."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config=SIZES, vision_config={**vision, "num_attention_heads": 2, "image_size": 28}
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bit_width", [4, 16])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_of_a_base_of_text_and_images_the_text_part_is_trained_and_peft_finds_it(
    make_spec: MakeSpec, tmp_path: Path, bit_width: int, targets: Any
) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    folder = make_gemma3(tmp_path / "base")
    base = BaseModel("x", None, str(folder), "d")
    spec = make_spec(bit_width, base_model=base, target_modules=targets)
    trials = [trial_config(seed=seed, adapter__target_modules=targets) for seed in (1, 2)]
    adapters, events = train(spec, trials, tmp_path / "trials")
    for done in (event for event in events if isinstance(event, TrialDone)):
        assert done.eval_loss < done.baseline_eval_loss
        model = AutoModelForCausalLM.from_pretrained(folder)
        found = get_peft_model_state_dict(PeftModel.from_pretrained(model, done.adapter_dir))
        assert found.keys() == adapters[done.trial].keys()
        assert all(torch.equal(found[name], adapters[done.trial][name]) for name in found)


def test_a_map_of_bits_of_the_text_part_is_loaded_as_it_was_trained(tmp_path: Path) -> None:
    folder = make_gemma3(tmp_path)
    quant = QuantConfig.model_validate(
        {
            "bit_width": "auto",
            "average_bits": 6,
            "bit_width_pattern": {"[a-z]+_proj": 4, "language_model.*.down_proj": 8},
            "compute_dtype": "float32",
        }
    )
    assert_loaded_as_trained(folder, quant)


def test_experts_that_stay_at_16_bits_are_told_of(tmp_path: Path) -> None:
    note = load(make_family("mixtral", tmp_path / "mixtral"), 4).note
    assert re.fullmatch(
        r"\d\d% of its base's weights, the experts, stay at 16 bits and take no adapter", note
    )
    assert load(make_family("llama", tmp_path / "llama"), 4).note == ""
    assert load(make_gemma3(tmp_path / "gemma3"), 4).note == ""


def test_layers_that_peft_would_look_for_among_the_experts_are_refused(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    """Those of a dense first block, or shared by all tokens."""
    folder = make_family("glm4_moe", tmp_path)
    worker = PackWorker(make_spec(base_model=BaseModel("x", None, str(folder), "d")))
    words = r"down_proj, gate_proj, up_proj of a glm4_moe base .*\[k_proj, o_proj, q_proj, v_proj"
    with pytest.raises(BaseModelError, match=words):
        worker.load()


def test_a_class_without_sdpa_computes_with_its_eager_attention(tmp_path: Path) -> None:
    base = load(make_family("gemma2", tmp_path))
    assert base.model.config._attn_implementation == "eager"  # type: ignore[union-attr]


def test_the_probe_gives_llm_int8_its_outlier_threshold_back(tmp_path: Path) -> None:
    base = load(make_family("llama", tmp_path), 8)
    states = [module.state for module in base.model.modules() if hasattr(module, "state")]
    assert {state.threshold for state in states} == {6.0}  # type: ignore[union-attr]


def test_llm_int8_keeps_no_input_of_frozen_weights(tmp_path: Path) -> None:
    layer = load(make_family("llama", tmp_path), 8).model.get_submodule(
        "model.layers.0.mlp.up_proj"
    )
    x = torch.randn(3, 64, requires_grad=True)
    hidden = 2 * x
    there = weakref.ref(hidden)
    output = layer(hidden)
    del hidden
    assert there() is None
    output.sum().backward()
    assert x.grad is not None


def test_a_family_whose_head_does_more_than_is_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_family("cohere", tmp_path)
    monkeypatch.setattr(
        LoadedBase, "head", lambda self, hidden: self.model.get_output_embeddings()(hidden)
    )
    with pytest.raises(BaseModelError, match="'cohere': its output head.*another base model"):
        load(folder)


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "phi"])
def test_a_base_with_dropout_of_its_own_computes_the_same_twice_in_train_mode(
    tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_family(name, tmp_path)
    words = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.equal(plain(words).logits, plain(words).logits)
    base = load(folder)
    first, second = (base.hidden(words, words) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(base.head(first), plain.eval()(words).logits)


def test_a_trial_in_a_pack_on_a_base_with_dropout_is_the_trial_alone(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    base = BaseModel("phi", None, str(make_family("phi", tmp_path / "base")), "digest")
    trials = [trial_config(seed=1, steps=3), trial_config(seed=2, steps=3)]
    together, _ = train(make_spec(base_model=base), trials, tmp_path / "pack")
    alone, _ = train(make_spec(base_model=base, num_slots=1), trials[:1], tmp_path / "alone")
    assert_equal(together[0], alone[0])


def test_a_family_that_cannot_be_trained_is_refused_in_parts_too(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    base = BaseModel("opt", None, str(make_family("opt", tmp_path)), "digest")
    strategy = {
        "kind": "zero",
        "stage": 3,
        "offload_optimizer": "cpu",
        "offload_params": "cpu",
    }
    worker = PackWorker(make_spec(base_model=base, num_slots=1, strategy=strategy))
    with pytest.raises(BaseModelError, match="'opt'"):
        worker.load()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {}, ""),
        ("qwen2", {}, ""),  # has a window in its configuration that it does not use
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "sliding_window"),
        ("mistral", {"sliding_window": None}, ""),
        ("mistral", {"sliding_window": 32}, "sliding_window"),
        ("gemma2", {}, "sliding_window"),
        ("gemma2", {"sliding_window": None}, "attn_logit_softcapping"),
        ("gpt_oss", {"num_local_experts": 4}, "sliding_window"),
        ("llama", {"head_dim": 12}, "12 wide"),
    ],
)
def test_attention_by_document_is_for_families_of_plain_causal_attention(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | changes))
    found = why_not_by_document(model, torch.device("cuda"), torch.bfloat16)
    assert reason in found
    assert bool(found) == bool(reason)


def test_a_model_of_text_and_images_is_judged_by_its_text_part() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config=SIZES, vision_config={**vision, "num_attention_heads": 2, "image_size": 28}
    )
    model = Gemma3ForConditionalGeneration(config)
    found = why_not_by_document(model, torch.device("cuda"), torch.bfloat16)
    assert "sliding_window" in found
