"""The rules: each says why and where from, and what they allow has run.

COVERED names, for every combination of bits and strategy, the test that trains it, DORA_COVERED and
LOFTQ_COVERED the same with DoRA and LoftQ; optimizers have a recorded run for every combination
with bits, stage and offload. What is neither refused nor named fails here. What is named but for a
test that needs an extra is skipped, with the extra, where that is not installed.
"""

import ast
import importlib.util
import itertools
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks import engine_zero_matrix as matrix
from benchmarks.memory_cases import base_shape
from benchmarks.models import SHAPES
from orchestrator.config import OptimizerConfig, TrialConfig
from orchestrator.errors import ConfigError
from orchestrator.planning.compatibility import CONV1D_RULES, RULES, problems
from orchestrator.planning.shape import UnknownShape, read_shape
from orchestrator.planning.sweep_rules import SWEEP_RULES, sweep_problems
from orchestrator.search.space import check_space
from tests.sweeps import sweep_config

ROOT = Path(__file__).parents[2]

QUANTS: dict[str, dict[str, Any]] = {
    "16 bits": {"bit_width": 16},
    "NF4": {"bit_width": 4},
    "NF4, single": {"bit_width": 4, "double_quant": False},
    "FP4": {"bit_width": 4, "quant_type": "fp4"},
    "NF4, blocks of 128": {"bit_width": 4, "block_size": 128},
    "LLM.int8": {"bit_width": 8},
    "blockwise int8": {"bit_width": 8, "int8_type": "blockwise"},
    "2 bits": {"bit_width": 2},
    "3 bits": {"bit_width": 3},
    "a map": {"bit_width": 4, "bit_width_pattern": {"down_proj": 8, "q_proj": 16}},
    "auto": {"bit_width": "auto", "average_bits": 5},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "replicated": {"kind": "replicated"},
    "ZeRO-1": {"kind": "zero", "stage": 1},
    "ZeRO-2": {"kind": "zero", "stage": 2},
    "ZeRO-3": {"kind": "zero", "stage": 3},
    "ZeRO-1, optimizer offloaded": {"kind": "zero", "stage": 1, "offload_optimizer": "cpu"},
    "ZeRO-2, optimizer offloaded": {"kind": "zero", "stage": 2, "offload_optimizer": "cpu"},
    "ZeRO-3, optimizer offloaded": {"kind": "zero", "stage": 3, "offload_optimizer": "cpu"},
    "ZeRO-3, parameters offloaded": {"kind": "zero", "stage": 3, "offload_params": "cpu"},
    "ZeRO-3, optimizer on NVMe": {"kind": "zero", "stage": 3, "offload_optimizer": "nvme"},
    "ZeRO-3, parameters on NVMe": {"kind": "zero", "stage": 3, "offload_params": "nvme"},
}
TRAINING = "tests/training/"
DORA = TRAINING + "test_dora.py::test_it_trains_as_plain_peft_does"
PACK = TRAINING + "test_pack.py::test_training_lowers_the_held_out_loss_at_every_bit_width"
BITS = TRAINING + "test_bits.py::test_training_lowers_the_held_out_loss_on_every_kind_of_base"
AUTO = (
    TRAINING
    + "test_sensitivity.py::test_a_trial_of_auto_bits_trains_on_a_map_that_every_record_names"
)
ZERO = TRAINING + "test_zero.py::test_trials_one_after_another_under_zero_end_as_replicated_ones_do"
ZERO_8 = TRAINING + "test_zero.py::test_an_8_bit_base_trains_under_zero_too"
ZERO_KINDS = TRAINING + "test_bits.py::test_every_kind_of_base_trains_under_zero_as_it_does_without"
LOFTQ = TRAINING + "test_adapter_fields.py::test_loftq_begins_nearer_to_the_base_in_16_bits"
LOFTQ_KINDS = TRAINING + "test_bits.py::test_loftq_begins_with_what_every_kind_of_codes_left_out"
NVME = TRAINING + "test_nvme.py::test_trials_one_after_another_on_nvme_end_as_replicated_ones_do"
NVME_KINDS = TRAINING + "test_nvme.py::test_every_kind_of_base_trains_on_nvme"

REPLICATED = {
    "16 bits": PACK,
    "NF4": PACK,
    "NF4, single": BITS,
    "FP4": BITS,
    "NF4, blocks of 128": BITS,
    "LLM.int8": PACK,
    "blockwise int8": BITS,
    "2 bits": BITS,
    "3 bits": BITS,
    "a map": BITS,
    "auto": AUTO,
}
UNDER_ZERO = {
    "16 bits": ZERO,
    "NF4": ZERO,
    "NF4, single": ZERO_KINDS,
    "FP4": ZERO_KINDS,
    "LLM.int8": ZERO_8,
}
UNDER_NVME = {
    "16 bits": NVME,
    "NF4": NVME,
    "NF4, single": NVME_KINDS,
    "FP4": NVME_KINDS,
    "LLM.int8": NVME_KINDS,
}
COVERED = {(quant, "replicated"): test for quant, test in REPLICATED.items()} | {
    (quant, strategy): test
    for tests, on_nvme in ((UNDER_ZERO, False), (UNDER_NVME, True))
    for quant, test in tests.items()
    for strategy in STRATEGIES
    if strategy != "replicated" and strategy.endswith("NVMe") == on_nvme
}
COVERED |= {(quant, "ZeRO-3, parameters offloaded"): ZERO_KINDS for quant in ("16 bits", "NF4")}
COVERED |= {
    ("LLM.int8", strategy): ZERO_KINDS
    for strategy in STRATEGIES
    if strategy.endswith("optimizer offloaded")
}

# What auto chose is a map by the time that a pack is started: see AUTO.
DORA_COVERED = {(quant, "replicated"): DORA for quant in QUANTS if quant != "LLM.int8"}
LOFTQ_COVERED = {
    (quant, "replicated"): LOFTQ if quant == "NF4" else LOFTQ_KINDS
    for quant in QUANTS
    if quant not in ("16 bits", "LLM.int8")
}
# Whose tests are skipped where this extra is not installed.
NEEDS_EXTRA = {"2 bits": "hqq", "3 bits": "hqq"}


ADAPTERS: dict[str, tuple[dict[str, Any], dict[tuple[str, str], str]]] = {
    "plain": ({}, COVERED),
    "DoRA": ({"use_dora": True}, DORA_COVERED),
    "LoftQ": ({"init": "loftq"}, LOFTQ_COVERED),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("quant", QUANTS)
def test_every_combination_is_refused_or_has_a_test_that_trains_it(
    quant: str, strategy: str, adapter: str
) -> None:
    fields, covered = ADAPTERS[adapter]
    trial = sweep_config(
        trial__quant=QUANTS[quant],
        trial__strategy=STRATEGIES[strategy],
        trial__adapter=fields,
    ).trial
    test = covered.get((quant, strategy))
    refused = problems(trial)
    offloaded = ("ZeRO-3, parameters offloaded", "ZeRO-3, parameters on NVMe")
    if quant == "LLM.int8" and strategy in offloaded and adapter == "plain":
        assert "cannot move the weights" in refused[0]
    elif refused:
        assert test is None, refused
    else:
        assert test is not None, "allowed, but nothing shows that it works"
        file, _, name = test.partition("::")
        functions = ast.parse((ROOT / file).read_text()).body
        assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}
        extra = NEEDS_EXTRA.get(quant)
        if extra and importlib.util.find_spec(extra) is None:
            pytest.skip(f"its one test, {name}, needs the extra {extra}, which is not installed")


@pytest.mark.parametrize("record", ["engine_zero_matrix", "engine_zero_matrix_one_gpu"])
@pytest.mark.parametrize("optimizer", get_args(OptimizerConfig.model_fields["name"].annotation))
def test_every_optimizer_is_refused_or_has_trained_at_all_bits_stages_and_offloads(
    optimizer: str, record: str
) -> None:
    path = ROOT / "benchmarks" / "results" / f"{record}.json"
    ran = {
        (row["bit_width"], row["stage"], row["offload"]): row
        for row in json.loads(path.read_text())["rows"]
        if row["optimizer"] == optimizer
    }
    for cell, refused in matrix.cells(matrix.BITS, [optimizer], "nvme"):
        row = ran[cell["bit_width"], cell["stage"], cell["offload"]]
        assert row["state"] == ("refused" if refused else "trained"), (cell, refused)
        assert refused or row["largest_difference"] <= matrix.BOUND


def test_every_rule_has_a_reason_and_a_source() -> None:
    rules = [*RULES, *CONV1D_RULES, *SWEEP_RULES]
    assert len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        assert len(rule.reason.split()) >= 6, rule.name
        assert rule.source, rule.name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"trial__quant": {"bit_width": 8, "bit_width_pattern": {"q_proj": 4},
                              "int8_type": "llm_int8"}},
            "llm_int8 needs all layers at 8 bits",
        ),
        (
            {"trial__quant": {"bit_width": "auto", "average_bits": 5,
                              "bit_width_pattern": {"down_proj": 3}}},
            "give those layers 4, 8 or 16 bits",
        ),
        (
            {"trial__quant": {"bit_width": 8, "int8_type": "blockwise", "block_size": 32}},
            "set quant.block_size: 64 or more",
        ),
        ({"trial__quant": {"storage_dtype": "bfloat16"}}, "set quant.storage_dtype: auto"),
        (
            {"trial__quant": {"bit_width": 16, "bit_width_pattern": {"q_proj": 4},
                              "compute_dtype": "float64"}},
            "needs quant.bit_width: 16 for all layers",
        ),
        (
            {"trial__optimizer": {"name": "deepspeed_cpu_adam"}},
            "deepspeed_cpu_adam needs strategy.offload_optimizer: cpu",
        ),
        (
            {"trial__optimizer": {"name": "deepspeed_cpu_adam"},
             "trial__strategy": {"kind": "zero", "stage": 2}},
            "strategy.offload_optimizer=none, strategy.kind=zero",
        ),
        (
            {"trial__strategy": {"kind": "zero", "stage": 2, "offload_optimizer": "nvme"}},
            "nvme needs strategy.stage: 3, but got strategy.stage=2",
        ),
        (
            {"trial__strategy": {"kind": "zero", "stage": 3, "offload_optimizer": "nvme"},
             "trial__optimizer": {"name": "adamw_8bit"}},
            "needs optimizer.name: adamw or deepspeed_cpu_adam, but got optimizer.name=adamw_8bit",
        ),
        (
            {"trial__strategy": {"kind": "zero", "stage": 3, "offload_params": "nvme"},
             "trial__quant": {"bit_width": 4, "storage_dtype": "uint8"}},
            "nvme needs quant.storage_dtype: auto, but got quant.storage_dtype=uint8",
        ),
        (
            {"trial__strategy": {"kind": "zero", "stage": 3, "nvme_path": "/scratch"}},
            "strategy.nvme_path needs strategy.offload_optimizer or offload_params: nvme",
        ),
        ({"trial__strategy": {"nvme_path": "/scratch"}}, "nvme_path need strategy.kind: zero"),
        ({"trial__adapter": {"init": "pissa"}}, "set adapter.init: loftq, which begins"),
        (
            {"trial__adapter": {"init": "loftq"},
             "trial__quant": {"bit_width": 16, "bit_width_pattern": {"q_proj": 16}}},
            "got quant.bit_width=16, quant.bit_width_pattern={'q_proj': 16}, quant.int8_type=None",
        ),
        (
            {"trial__adapter": {"use_dora": True}, "trial__quant": {"bit_width": 8}},
            "set quant.int8_type: blockwise, or adapter.use_dora: false",
        ),
        (
            {"trial__adapter": {"use_dora": True},
             "trial__strategy": {"kind": "zero", "stage": 1}},
            "set strategy.kind: replicated, or adapter.use_dora: false",
        ),
        (
            {"trial__adapter": {"init": "loftq"}, "trial__quant": {"bit_width": 16}},
            "loftq needs a base in codes",
        ),
        (
            {"trial__adapter": {"init": "loftq"}, "trial__quant": {"bit_width": 8}},
            "quant.bit_width=8, quant.int8_type=None",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_remedy(changes: dict[str, Any], words: str) -> None:
    (problem,) = problems(sweep_config(**changes).trial)
    assert words in problem


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("quant", QUANTS)
def test_what_is_named_in_place_of_pissa_is_not_refused_itself(quant: str, strategy: str) -> None:
    def trial(init: str) -> TrialConfig:
        return sweep_config(
            trial__quant=QUANTS[quant],
            trial__strategy=STRATEGIES[strategy],
            trial__adapter={"init": init},
        ).trial

    if problems(trial("default")):
        return
    (problem,) = problems(trial("pissa"))
    assert "changes the base itself, which the trials of a pack share" in problem
    assert f"quant.bit_width={trial('pissa').quant.bit_width}" in problem
    assert ("set adapter.init: loftq" in problem) == (not problems(trial("loftq")))


@pytest.mark.parametrize(
    ("pattern", "targets", "refused"),
    [
        ({".*_proj": 16}, "all-linear", True),
        ({"q_proj": 16}, ["q_proj"], True),
        ({"q_proj": 16}, ["q_proj", "v_proj"], False),
        ({}, "all-linear", False),
    ],
)
def test_loftq_is_refused_where_a_map_leaves_all_its_layers_at_16_bits(
    pattern: dict[str, int], targets: Any, refused: bool
) -> None:
    trial = sweep_config(
        trial__quant={"bit_width_pattern": pattern},
        trial__adapter={"init": "loftq", "target_modules": targets},
    ).trial
    found = problems(trial, shape=base_shape(SHAPES["0.5b"]))
    assert [refused] * refused == ["leaves all layers" in message for message in found]


FOUR_AND_MORE = [4, 8, 16]


@pytest.mark.parametrize(
    ("quant", "space", "words"),
    [
        ({"bit_width": 16, "block_size": 128}, {}, "quant.block_size=128, quant.bit_width=16"),
        ({"bit_width": 16, "int8_type": "blockwise"}, {}, "int8_type is read only by layers of 8"),
        ({"bit_width": 16, "double_quant": False}, {}, "got quant.double_quant=false"),
        ({"bit_width": 8, "block_size": 128}, {}, "of 8 with quant.int8_type: blockwise, but"),
        ({"bit_width": 8, "double_quant": False}, {}, "quant.bit_width=8, quant.int8_type=None"),
        ({"bit_width": 3, "double_quant": False}, {}, "quant out, or set what reads it"),
        ({"bit_width": 4, "int8_type": "blockwise"}, {}, "leave quant.int8_type out"),
        ({"bit_width": 4, "average_bits": 5}, {}, "read only with quant.bit_width: auto"),
        ({"bit_width": 16, "storage_dtype": "uint8"}, {}, "storage_dtype is read only by layers"),
        ({"bit_width": 16, "bit_width_pattern": {"q_proj": 16}, "block_size": 128}, {},
         "quant.bit_width_pattern={'q_proj': 16}"),
        ({"block_size": 128}, {"quant.bit_width": [8, 16]}, "quant.block_size=128"),
        ({}, {"quant.bit_width": [4, 16], "quant.block_size": [64, 128]},
         "keep it to where it is read with search.conditions"),
    ],
)  # fmt: skip
def test_a_field_that_is_set_and_that_nothing_reads_is_refused_with_the_remedy(
    quant: dict[str, Any], space: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_space(sweep_config(trial__quant=quant, search={"space": space}))


@pytest.mark.parametrize(
    ("quant", "search"),
    [
        ({"bit_width": 16, "quant_type": "nf4", "double_quant": True, "block_size": 64}, {}),
        ({"bit_width": 8, "int8_type": "blockwise", "block_size": 128, "double_quant": False}, {}),
        ({"bit_width": 3, "block_size": 128}, {}),
        ({"bit_width": 4, "bit_width_pattern": {"q_proj": 8}, "int8_type": "blockwise"}, {}),
        ({"bit_width": 16, "bit_width_pattern": {"q_proj": 4}, "double_quant": False}, {}),
        ({"quant_type": "nf4"}, {"space": {"quant.bit_width": FOUR_AND_MORE}}),
        ({"block_size": 128, "double_quant": False},
         {"space": {"quant.bit_width": FOUR_AND_MORE}}),
        ({"bit_width": 16, "block_size": 128},
         {"space": {"quant.bit_width": FOUR_AND_MORE}, "sampler": "random", "num_trials": 1}),
        ({"average_bits": 5}, {"space": {"quant.bit_width": [4, "auto", 16]}}),
        ({}, {"space": {"quant.bit_width": FOUR_AND_MORE, "quant.block_size": [64, 128],
                        "quant.quant_type": ["nf4", "fp4"]},
              "conditions": {"quant.block_size": {"quant.bit_width": [4]},
                             "quant.quant_type": {"quant.bit_width": [4]}}}),
    ],
)  # fmt: skip
def test_a_field_that_some_trial_of_the_sweep_reads_is_not_refused_nor_a_default(
    quant: dict[str, Any], search: dict[str, Any]
) -> None:
    check_space(sweep_config(trial__quant=quant, search=search))


GPT2 = UnknownShape("its config.json has no num_hidden_layers", conv1d=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("quant", QUANTS)
def test_a_base_of_gpt_2s_kind_is_for_layers_of_bitsandbytes_alone(
    quant: str, strategy: str
) -> None:
    trial = sweep_config(trial__quant=QUANTS[quant], trial__strategy=STRATEGIES[strategy]).trial
    if problems(trial):
        return
    refused = problems(trial, shape=GPT2)
    if quant == "LLM.int8" or (quant != "16 bits" and strategy != "replicated"):
        assert not refused
    else:
        assert f"but got quant.bit_width={trial.quant.bit_width}" in refused[0]
        assert "set quant.bit_width: 8 and quant.int8_type: llm_int8, or choose" in refused[0]


@pytest.mark.parametrize(("family", "conv1d"), [("gpt2", True), ("bloom", False)])
def test_a_base_of_gpt_2s_kind_is_known_by_its_config(
    tmp_path: Path, family: str, conv1d: bool
) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{family}", "n_embd": 64}}')
    shape = read_shape(tmp_path)
    assert isinstance(shape, UnknownShape)
    assert shape.conv1d == conv1d


def test_what_the_rules_refuse_together_is_found_in_a_grid() -> None:
    """One allowed combination of each pair is enough to see that no rule is too wide."""
    allowed = [
        (quant, strategy)
        for quant, strategy in itertools.product(QUANTS, STRATEGIES)
        if not problems(
            sweep_config(trial__quant=QUANTS[quant], trial__strategy=STRATEGIES[strategy]).trial
        )
    ]
    assert len(allowed) == 11 + 9 * 4 + 7


TASK: dict[str, Any] = {"evaluation__task": {}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"search__objectives": ["eval_loss", "task_score"]},
            "task_score needs evaluation.task, but got evaluation.task=null: write",
        ),
        (
            {"registry__gate": {"metric": "task_error"}},
            "task_error needs evaluation.task, but got evaluation.task=null: write",
        ),
        (
            {"evaluation__task": {"max_examples": 16}}
            | {"registry__gate": {"metric": "task_error"}},
            "needs registry.gate.min_pairs (20) questions, but got evaluation.task.max_examples=16",
        ),
        (
            TASK | {"data__format": "instruction"},
            "data.format: prompt_completion, where the completion is the answer, but got instr",
        ),
        (
            TASK | {"data__held_out": [{"path": "a.jsonl", "format": "text"}, "b.jsonl"]},
            "but got prompt_completion, text: give such ones as data.held_out",
        ),
        (TASK | {"data__overlong": "split"}, "but got data.overlong=split: set data.overlong: err"),
        (TASK | {"data__overlong": "truncate"}, "but got data.overlong=truncate"),
        (
            TASK | {"trial__strategy": {"kind": "zero", "stage": 2}},
            "needs strategy.kind: replicated, but got strategy.kind=zero: leave evaluation.task",
        ),
        (
            TASK | {"search__space": {"strategy.kind": ["replicated", "zero"]}},
            "but got strategy.kind=zero",
        ),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_with_the_remedy(
    changes: dict[str, Any], words: str
) -> None:
    config = sweep_config(**changes)
    (problem,) = sweep_problems(config)
    assert words in problem
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_space(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        TASK,
        TASK | {"search__objectives": ["task_score", "adapter_bytes"]},
        TASK
        | {"data__format": "chat", "data__held_out": {"path": "a", "format": "prompt_completion"}},
        TASK | {"resources__workers_per_pack": 2, "data__overlong": "drop"},
    ],
)
def test_a_task_that_can_be_scored_is_not_refused(changes: dict[str, Any]) -> None:
    assert sweep_problems(sweep_config(**changes)) == []
