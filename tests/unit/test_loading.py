from pathlib import Path

import pytest

from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.loading import load_config, parse_config, trial_fields, trial_with

GOOD = """\
name: test
base_model: {source: some/model}
data: {train: rows.jsonl}
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "sweep.yaml")
    return str(caught.value).splitlines()


def test_a_short_file_is_completed_with_defaults() -> None:
    config = parse_config(GOOD, "sweep.yaml")
    assert config.trial.adapter.rank == 16
    assert config.experiment_name == "test"
    assert config.registered_model_name == "test"


def test_every_mistake_is_reported_at_once_with_its_line() -> None:
    text = GOOD + (
        "trial:\n"
        "  adapter: {rnk: 8, rank: 0}\n"
        "  quant:\n"
        "    bit_width: 3\n"
        "  optimizer: {learning_rate: -1}\n"
        "search: {sampler: bayes}\n"
    )
    assert mistakes(text) == [
        "sweep.yaml:5: trial.adapter.rank: Input should be greater than or equal to 1 (got 0)",
        "sweep.yaml:5: trial.adapter.rnk: unknown field; did you mean 'rank'?",
        "sweep.yaml:7: trial.quant.bit_width: Input should be 4, 8 or 16 (got 3)",
        "sweep.yaml:8: trial.optimizer.learning_rate: Input should be greater than 0 (got -1)",
        "sweep.yaml:9: search.sampler: Input should be 'grid', 'random' or 'tpe' (got 'bayes')",
    ]


def test_a_missing_field_is_reported_where_it_belongs() -> None:
    assert mistakes("name: test\nbase_model: {}\ndata: {train: x}\n") == [
        "sweep.yaml:2: base_model.source: required field is missing"
    ]


def test_a_key_given_twice_is_refused() -> None:
    assert mistakes(GOOD + "name: other\n") == ["sweep.yaml:4: name: given twice (first in line 1)"]


@pytest.mark.parametrize(
    ("written", "meant"), [("2e-4", 2e-4), ("1E-3", 1e-3), (".5", 0.5), ("1", 1.0)]
)
def test_numbers_are_read_as_yaml_1_2_reads_them(written: str, meant: float) -> None:
    config = parse_config(GOOD + f"trial: {{optimizer: {{learning_rate: {written}}}}}\n", "f")
    assert config.trial.optimizer.learning_rate == meant


@pytest.mark.parametrize("word", ["yes", "off", "on", "'true'", "1"])
def test_only_true_and_false_are_booleans(word: str) -> None:
    (line,) = mistakes(GOOD + f"trial: {{quant: {{double_quant: {word}}}}}\n")
    assert "trial.quant.double_quant" in line


def test_a_sexagesimal_looking_name_stays_a_string() -> None:
    assert parse_config(GOOD.replace("rows.jsonl", "1:30"), "f").data.train == "1:30"


def test_true_is_no_whole_number() -> None:
    (line,) = mistakes(GOOD + "trial: {steps: true}\n")
    assert "trial.steps: Input should be a valid integer (got True)" in line


def test_broken_yaml_is_reported_with_its_line() -> None:
    (line,) = mistakes("name: test\ndata: [1, 2\n")
    assert line.startswith("sweep.yaml:3: not valid YAML")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot read"):
        load_config(tmp_path / "missing.yaml")


def test_a_bad_value_in_the_search_space_is_found_at_once() -> None:
    text = GOOD + "search:\n  space:\n    adapter.rank: [4, 0]\n    quant.bit_widht: [4]\n"
    assert mistakes(text) == [
        "sweep.yaml:6: search.space.adapter.rank.1: adapter.rank: "
        "Input should be greater than or equal to 1 (got 0)",
        "sweep.yaml:7: search.space.quant.bit_widht.0: quant.bit_widht is no field of a trial; "
        "did you mean 'quant.bit_width'?",
    ]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("search: {sampler: random, space: {adapter.rank: [4]}}", "random needs num_trials"),
        ("search: {space: {optimizer.learning_rate: {low: 1, high: 2}}}", "grid needs lists"),
        (
            "search: {sampler: tpe, num_trials: 3, space: {adapter.rank: {low: 8, high: 4}}}",
            r"low < high must hold, but got \(low=8.0, high=4.0\)",
        ),
        ("search: {space: {adapter.rank: []}}", "needs at least one value"),
        ("search: {space: {adapter.rank: [4, 4]}}", "lists a value twice"),
        (
            "base_model: {source: a/b, revision: main, trust_remote_code: true}",
            "needs revision to be a full 40-digit commit hash",
        ),
        ("data: {train: x, format: text, template: chat}", "template: chat needs format"),
    ],
)
def test_combinations_that_cannot_work_name_both_fields(extra: str, message: str) -> None:
    kept = [line for line in GOOD.splitlines() if line.split(":")[0] != extra.split(":")[0]]
    with pytest.raises(ConfigError, match=message):
        parse_config("\n".join([*kept, extra]), "f")


def test_a_field_is_set_from_the_command_line() -> None:
    config = parse_config(
        GOOD, "f", ["trial.optimizer.learning_rate=5e-4", "search.space.adapter.rank=[2, 4]"]
    )
    assert config.trial.optimizer.learning_rate == 5e-4
    assert config.search.space == {"adapter.rank": (2, 4)}


@pytest.mark.parametrize("override", ["trial.steps", "=3", "name.x=3"])
def test_a_malformed_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_config(GOOD, "f", [override])


def test_a_candidate_is_validated_as_a_whole_trial() -> None:
    trial = SweepConfig.model_validate(
        {"name": "t", "base_model": {"source": "x"}, "data": {"train": "x"}}
    ).trial
    assert trial_with(trial, {"adapter.rank": 3}).adapter.rank == 3
    with pytest.raises(ConfigError, match="adapter.rank"):
        trial_with(trial, {"adapter.rank": -3})
    with pytest.raises(ConfigError, match="adapter is no field"):
        trial_with(trial, {"adapter": 3})


def test_all_leaf_fields_of_a_trial_are_known() -> None:
    assert {"quant.bit_width", "adapter.rank", "steps"} <= set(trial_fields())
    assert "adapter" not in trial_fields()
