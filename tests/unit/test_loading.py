from pathlib import Path

import pytest

from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.loading import (
    load_config,
    override_config,
    parse_config,
    trial_fields,
    trial_with,
)

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
        "    bit_width: 5\n"
        "  optimizer: {learning_rate: -1}\n"
        "search: {sampler: bayes}\n"
    )
    assert mistakes(text) == [
        "sweep.yaml:5: trial.adapter.rank: Input should be greater than or equal to 1 (got 0)",
        "sweep.yaml:5: trial.adapter.rnk: unknown field; did you mean 'rank'?",
        "sweep.yaml:7: trial.quant.bit_width: Input should be 2, 3, 4, 8, 16 or 'auto' (got 5)",
        "sweep.yaml:8: trial.optimizer.learning_rate: Input should be greater than 0 (got -1)",
        "sweep.yaml:9: search.sampler: Input should be 'grid', 'random', 'tpe', 'gp' or 'nsga2' "
        "(got 'bayes')",
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
    assert "trial.quant.double_quant: Input should be true or false (got" in line


@pytest.mark.parametrize("value", ["every", "1", "yes"])
def test_recomputation_that_is_not_offered_is_refused_with_the_values_that_there_are(
    value: str,
) -> None:
    (line,) = mistakes(GOOD + f"trial: {{gradient_checkpointing: {value}}}\n")
    wanted = "Input should be true, false or null or 'selective' (got"
    assert f"trial.gradient_checkpointing: {wanted}" in line
    (line,) = mistakes(GOOD + f"search: {{space: {{gradient_checkpointing: [true, {value}]}}}}\n")
    assert wanted in line


def test_a_sexagesimal_looking_name_stays_a_string() -> None:
    assert parse_config(GOOD.replace("rows.jsonl", "1:30"), "f").data.train == "1:30"


def test_true_is_no_whole_number() -> None:
    (line,) = mistakes(GOOD + "trial: {steps: true}\n")
    assert "trial.steps: Input should be a valid integer (got True)" in line


def test_broken_yaml_is_reported_with_its_line() -> None:
    (line,) = mistakes("name: test\ndata: [1, 2\n")
    assert line.startswith("sweep.yaml:3: not valid YAML")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: {{ name }}", "sweep.yaml:1: the name of a field must be a word"),
        ("name: a\x01b", "sweep.yaml: not valid YAML: unacceptable character"),
        ("name: &own [*own]", "sweep.yaml: a value must not hold itself"),
    ],
)
def test_what_only_looks_like_a_mapping_of_fields_is_one_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(text, "sweep.yaml")
    assert str(raised.value).startswith(said)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: .* cannot be read: No such file"):
        load_config(tmp_path / "missing.yaml")


def test_a_bad_value_in_the_search_space_is_found_at_once() -> None:
    text = GOOD + "search:\n  space:\n    adapter.rank: [4, 0]\n    quant.bit_widht: [4]\n"
    assert mistakes(text) == [
        "sweep.yaml:6: search.space.adapter.rank.1: adapter.rank: "
        "Input should be greater than or equal to 1 (got 0)",
        "sweep.yaml:7: search.space.quant.bit_widht: quant.bit_widht is no field of a trial; "
        "did you mean 'quant.bit_width'?",
    ]


def test_a_mistake_elsewhere_does_not_hide_an_unknown_field_in_the_search_space() -> None:
    text = GOOD.replace("name", "nam") + "search:\n  space:\n    adapter.rnk: [4, 8]\n"
    assert mistakes(text) == [
        "sweep.yaml:1: name: required field is missing",
        "sweep.yaml:1: nam: unknown field; did you mean 'name'?",
        "sweep.yaml:6: search.space.adapter.rnk: adapter.rnk is no field of a trial; "
        "did you mean 'adapter.rank'?",
    ]


def test_an_unknown_field_in_the_search_space_is_named_alone_whatever_its_values() -> None:
    for values in ("{rank: [4]}", "4", "{low: 1, high: 2}"):
        (line,) = mistakes(GOOD + RANDOM.format(field="adaptr", range=values))
        assert line.startswith("sweep.yaml:4: search.space.adaptr: adaptr is no field of a trial")


def test_a_search_space_that_is_no_mapping_is_named() -> None:
    for search in ("4", "{space: [4]}"):
        (line,) = mistakes(GOOD + f"search: {search}\n")
        assert "Input should be a mapping" in line


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


def test_a_mistake_on_the_command_line_is_not_laid_to_a_line_of_the_file() -> None:
    text = GOOD + "trial:\n  steps: 32\n  batch_size: 0\nsearch: {space: {seed: [1, 2]}}\n"
    with pytest.raises(ConfigError) as found:
        parse_config(text, "f", ["trial.stps=3", "trial.steps=0"])
    of_the_file, *of_the_command = sorted(str(found.value).splitlines(), reverse=True)
    assert of_the_file.startswith("f:6: trial.batch_size: ")
    assert [line.partition(":")[0] for line in of_the_command] == [
        "--set trial.stps",
        "--set trial.steps",
    ]
    with pytest.raises(ConfigError, match=r"^--set search\.space\.seed\.1: seed: Input should"):
        parse_config(text.replace("0", "1"), "f", ["search.space.seed=[1, -1]"])


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("quant.bit_width", "trial.quant.bit_width"),
        ("quant.bit_widht", "trial.quant.bit_width"),
        ("trial.qant.bit_width", "trial.quant.bit_width"),
        ("steps", "trial.steps"),
        ("sampler", "search.sampler"),
    ],
)
def test_a_field_set_outside_its_group_is_named_with_the_whole_name(field: str, meant: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_config(GOOD, "f", [f"{field}=8"])
    assert str(found.value) == f"--set {field}: unknown field; did you mean '{meant}'?"


def test_a_group_outside_its_group_is_named_with_the_whole_name() -> None:
    assert mistakes(GOOD + "quant: {bit_width: 8}\n") == [
        "sweep.yaml:4: quant: unknown field; did you mean 'trial.quant'?"
    ]


def test_a_rule_of_a_group_is_laid_to_the_field_that_it_names() -> None:
    text = GOOD + "search: {seed: 3, space: {adapter.rank: [4]}}\n"
    for setting in ("space.adapter.rank=[]", "space={adapter.rank: []}"):
        with pytest.raises(ConfigError, match=r"^--set search: space.adapter.rank needs at least"):
            parse_config(text, "f", [f"search.{setting}"])
    with pytest.raises(ConfigError, match=r"^f:4: search: space.adapter.rank needs at least"):
        parse_config(text.replace("[4]", "[]"), "f", ["search.seed=5"])


def test_a_field_missing_from_a_group_that_only_the_command_line_gives_is_laid_to_it() -> None:
    without_base = "name: test\ndata: {train: rows.jsonl}\n"
    with pytest.raises(ConfigError, match=r"^--set base_model.source: required field is missing$"):
        parse_config(without_base, "f", ["base_model.revision=main"])


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "search.space.adapter.rank=4",
            "search.space.adapter.rank: Input should be a list such as [4] or a mapping (got 4)",
        ),
        (
            "search.space.adapter.rank={low: 2, high: 1}",
            "search.space.adapter.rank: low < high must hold, but got (low=2.0, high=1.0)",
        ),
        (
            "trial.adapter.target_modules=q_proj",
            "trial.adapter.target_modules: Input should be 'all-linear' or a list such as "
            "['q_proj'] (got 'q_proj')",
        ),
        (
            "trial.adapter.target_modules=[3]",
            "trial.adapter.target_modules.0: Input should be a valid string (got 3)",
        ),
        (
            "data.train=[rows.jsonl, {path: rows.jsonl, wieght: 2}]",
            "data.train.1.wieght: unknown field; did you mean 'weight'?",
        ),
        (
            "data.train=3",
            "data.train: Input should be a valid string or a mapping or a list (got 3)",
        ),
        ("data.train=[]", "data.train: needs a list of at least 1 (got [])"),
        ("trial.quant=4", "trial.quant: Input should be a mapping (got 4)"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_mistake_in_the_words_of_yaml(
    setting: str, said: str
) -> None:
    with pytest.raises(ConfigError) as found:
        parse_config(GOOD, "f", [setting])
    assert str(found.value) == f"--set {said}"


def test_all_mistakes_of_one_mapping_are_named() -> None:
    text = GOOD + RANDOM.format(field="adapter.rank", range="{low: x, hgh: 1}")
    assert mistakes(text) == [
        "sweep.yaml:4: search.space.adapter.rank.high: required field is missing",
        "sweep.yaml:4: search.space.adapter.rank.low: Input should be a valid number, unable to "
        "parse string as a number (got 'x')",
        "sweep.yaml:4: search.space.adapter.rank.hgh: unknown field; did you mean 'high'?",
    ]


def test_a_condition_of_one_field_can_be_set() -> None:
    space = "search.space={quant.bit_width: [4, 16], adapter.rank: [4, 8]}"
    condition = "search.conditions.adapter.rank={quant.bit_width: [4]}"
    config = parse_config(GOOD, "f", [space, condition])
    assert config.search.conditions == {"adapter.rank": {"quant.bit_width": (4,)}}
    other = "search.conditions.quant.bit_width={adapter.rank: [4]}"
    added = override_config(parse_config(GOOD, "f", [space]), [other])
    assert added.search.conditions == {"quant.bit_width": {"adapter.rank": (4,)}}
    with pytest.raises(ConfigError, match="names adapter.rnk, which is not in search.space"):
        parse_config(GOOD, "f", [space, "search.conditions.adapter.rnk={quant.bit_width: [4]}"])


AUTO_OR_4 = "search.space={quant.bit_width: [4, auto], quant.average_bits: [5, 6]}"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["trial.quant={bit_width: 4, budget_gib: 1}"],
            "--set trial.quant.budget_gib: only bit_width: auto has a budget, but got "
            "budget_gib=1, bit_width=4: set bit_width: auto, or leave budget_gib out",
        ),
        (
            ["search.space={quant.average_bits: [5, 6]}"],
            "--set search.space.quant.average_bits.0: only bit_width: auto has a budget, but got "
            "quant.bit_width=4: add auto to search.space.quant.bit_width, or leave "
            "quant.average_bits out",
        ),
        (
            ["search.space={quant.bit_width: [4, auto]}"],
            "--set search.space.quant.bit_width.1: quant: bit_width: auto needs average_bits or "
            "budget_gib, one of them, but got none",
        ),
    ],
)
def test_a_budget_goes_with_auto_bits_alone(settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as found:
        parse_config(GOOD, "f", settings)
    assert str(found.value) == said


def test_a_budget_may_come_from_the_trial_or_from_the_space() -> None:
    parse_config(GOOD, "f", [AUTO_OR_4])
    space = "search.space={quant.bit_width: [4, auto]}"
    config = parse_config(GOOD, "f", [space, "trial.quant.average_bits=5"])
    # A resume cannot change the trial, so a narrower space stays possible.
    override_config(config, ["search.space={adapter.rank: [4]}"])


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


RANDOM = "search: {{sampler: random, num_trials: 2, space: {{{field}: {range}}}}}\n"


@pytest.mark.parametrize(
    "field",
    ["quant.bit_width", "strategy.stage", "quant.double_quant", "optimizer.name",
     "adapter.target_modules"],
)  # fmt: skip
def test_a_range_of_a_field_that_takes_listed_values_is_refused(field: str) -> None:
    (line,) = mistakes(GOOD + RANDOM.format(field=field, range="{low: 4, high: 8, integer: true}"))
    assert f"a range needs a numeric field, and {field} is none: list the values instead" in line


@pytest.mark.parametrize("field", ["adapter.rank", "micro_batch_size"])
def test_a_range_of_a_whole_number_field_says_integer(field: str) -> None:
    (line,) = mistakes(GOOD + RANDOM.format(field=field, range="{low: 4, high: 8}"))
    assert f"{field} is a whole number: add integer: true to its range" in line
    parse_config(GOOD + RANDOM.format(field=field, range="{low: 4, high: 8, integer: true}"), "f")


@pytest.mark.parametrize("field", ["adapter.alpha", "optimizer.max_grad_norm"])
@pytest.mark.parametrize("extra", ["", ", integer: true"])
def test_a_range_of_a_number_field_may_be_of_whole_numbers(field: str, extra: str) -> None:
    parse_config(GOOD + RANDOM.format(field=field, range=f"{{low: 4, high: 8{extra}}}"), "f")


def test_a_range_of_an_unknown_field_names_the_nearest() -> None:
    (line,) = mistakes(GOOD + RANDOM.format(field="adapter.rnk", range="{low: 4, high: 8}"))
    assert line.endswith("adapter.rnk is no field of a trial; did you mean 'adapter.rank'?")


def test_lists_of_names_are_choices() -> None:
    space = "search: {space: {adapter.target_modules: [all-linear, [q_proj, v_proj]]}}\n"
    config = parse_config(GOOD + space, "f")
    choices = ("all-linear", ("q_proj", "v_proj"))
    assert config.search.space == {"adapter.target_modules": choices}
    assert SweepConfig.model_validate(config.model_dump(mode="json")) == config
    (line,) = mistakes(GOOD + "search: {space: {adapter.rank: [[q_proj]]}}\n")
    assert "adapter.rank: Input should be a valid integer" in line


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "field",
    ["trial.optimizer.learning_rate", "trial.adapter.alpha", "trial.optimizer.max_grad_norm",
     "trial.adapter.dropout"],
)  # fmt: skip
def test_a_number_is_finite(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: Input should be "):
        parse_config(GOOD, "f", [f"{field}={value}"])


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://u:secret@h/db",
        "postgresql+psycopg2://u:sec/ret@h/db",
        "mysql://h/db?user=u&password=secret",
        "https://u:secret@h:5000",
    ],
)
def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated(uri: str) -> None:
    (line,) = mistakes(GOOD + f"tracking: {{uri: '{uri}'}}\n")
    assert "put the password into MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_PASSWORD" in line
    assert "secret" not in line
    assert "sec/ret" not in line


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "http://h:5000/a@b",
        "sqlite:////a:b@c/mlflow.db",
        "postgresql://u@h:5432/db",
        "databricks",
    ],
)
def test_a_tracking_uri_without_a_password_is_taken(uri: str) -> None:
    assert parse_config(GOOD + f"tracking: {{uri: '{uri}'}}\n", "f").tracking.uri == uri


def test_a_loaded_configuration_is_overridden_and_checked_anew() -> None:
    config = parse_config(GOOD, "f")
    assert override_config(config, ["resources.num_workers=3"]).resources.num_workers == 3
    with pytest.raises(ConfigError, match=r"^--set trial.steps: Input should be"):
        override_config(config, ["trial.steps=0"])
    with pytest.raises(ConfigError, match=r"^--set search.space.seed.0: seed: Input should be"):
        override_config(config, ["search.space.seed=[-1]"])


@pytest.mark.parametrize(("written", "meant"), [("010", 10), ("08", 8), ("+007", 7)])
def test_zeros_before_a_whole_number_change_nothing(written: str, meant: int) -> None:
    assert parse_config(GOOD + f"trial: {{steps: {written}}}\n", "f").trial.steps == meant
    assert parse_config(GOOD, "f", [f"trial.steps={written}"]).trial.steps == meant


def test_a_whole_number_of_more_digits_than_can_be_read_is_a_mistake() -> None:
    (line,) = mistakes(GOOD + f"trial: {{steps: {'1' * 5000}}}\n")
    assert line.startswith("sweep.yaml:4: not valid YAML: no whole number that can be read: 111")
    with pytest.raises(ConfigError, match="the value is not valid YAML"):
        parse_config(GOOD, "f", [f"trial.steps={'1' * 5000}"])
