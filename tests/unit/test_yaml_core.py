"""What is written as YAML reads back the very same, by the rules of either version."""

from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.submission import plan_submission
from orchestrator.loading import parse_config
from orchestrator.yaml_core import CoreLoader, dump_yaml
from tests.manifests import hub_sweep

NUMBER_LIKE = r"[-+]?0?[oxb]?[0-9_]{0,8}[.:]?[0-9]{0,3}([eE][-+]?[0-9]{1,5})?"
WORDS = ("yes", "off", "True", "null", "~", "", "=", "<<", ".inf", ".NaN", "2001-01-01", "a\x85b")
texts = (
    st.text()
    | st.from_regex(NUMBER_LIKE, fullmatch=True)
    | st.sampled_from(WORDS)
    | st.text("ab :#-'\"\\\n\t\r\x85\u2028\x00\ufeff😀", max_size=200)
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
contents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(contents)
@pytest.mark.parametrize("loader", [CoreLoader, yaml.SafeLoader])
def test_what_is_written_reads_back_the_very_same(loader: Any, content: Any) -> None:
    read = yaml.load(dump_yaml({"content": content}), loader)["content"]
    assert repr(read) == repr(content)  # 1, 1.0 and True are equal


@given(texts, texts, st.floats(min_value=0, exclude_min=True, allow_infinity=False))
@example("4e12345", "0812345", 1e-5)
@example("1:30", "0x1f", 1e22)
def test_a_submitted_configuration_reaches_the_driver_as_it_was(
    revision: str, folder: str, learning_rate: float
) -> None:
    config = hub_sweep(
        base_model__revision=revision,
        runs_dir=folder,
        trial__optimizer__learning_rate=learning_rate,
    )
    entrypoint = plan_submission(config, "/shared", 60).entrypoint
    text = entrypoint.partition("<<'END_OF_SWEEP'\n")[2].removesuffix("END_OF_SWEEP\n")
    assert parse_config(text, "-") == config
