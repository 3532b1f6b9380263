"""The validation of custom resources says what the API server says."""

from pathlib import Path
from typing import Any

import pytest

from cluster.kubernetes.crds import CustomResources
from cluster.kubernetes.quantities import quantity
from orchestrator.errors import ConfigError
from tests.manifests import changed, known, rendered

GROUP = "spec/rayClusterSpec/workerGroupSpecs/0"
CONTAINER = f"{GROUP}/template/spec/containers/0"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("spec/shutdownAfterJobFinish", True, "'shutdownAfterJobFinish' was unexpected"),
        ("spec/ttlSecondsAfterFinished", "ten", "is not of type 'integer'"),
        (f"{GROUP}/rayStartParams/num-cpus", 4, "is not of type 'string'"),
        (f"{CONTAINER}/resources/limits/memory", "64Gigs", "does not match"),
        (f"{CONTAINER}/env", [{"name": "A", "value": 1}], "is not of type 'string'"),
        (f"{GROUP}/template/spec/containers", ..., "'containers' is a required property"),
        (f"{GROUP}/groupName", None, "'groupName' is a required property"),
        ("spec/managedBy", "me", "the managedBy field value must be"),
        ("spec/preRunningDeadlineSeconds", 0, "less than the minimum"),
        ("spec/rayClusterSpec/authOptions/mode", "password", "is not one of"),
        ("spec/deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, "BOTH onSuccess and"),
    ],
)
def test_what_the_api_server_refuses_is_refused(path: str, value: Any, words: str) -> None:
    problems = known().problems(changed(rendered().rayjob, path, value))
    assert any(words in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{CONTAINER}/resources/limits/memory", 10**9),  # a quantity may be a number
        ("spec/suspend", None),  # a null is as if it were not there
        ("metadata/annotations/anything", "goes"),
        (f"{GROUP}/minReplicas", ...),  # required, but with a default
    ],
)
def test_what_the_api_server_accepts_is_accepted(path: str, value: Any) -> None:
    assert known().problems(changed(rendered().rayjob, path, value)) == []


def test_kueues_kinds_are_known_by_their_version() -> None:
    queue = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "LocalQueue",
        "metadata": {"name": "team"},
        "spec": {"clusterQueue": "gpus"},
    }
    assert known().problems(queue) == []
    assert known().problems({**queue, "spec": {"clusterQueue": "Not A Name!"}}) != []
    assert not known().knows({**queue, "apiVersion": "kueue.x-k8s.io/v1"})


def test_a_folder_without_definitions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CustomResourceDefinition"):
        CustomResources(tmp_path)


@pytest.mark.parametrize(
    ("text", "number"),
    [("500m", 0.5), ("2", 2), ("16Gi", 2**34), ("1k", 1000), ("1e3", 1000), (4, 4)],
)
def test_quantities_are_numbers(text: str | int, number: float) -> None:
    assert quantity(text) == number


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="16GiB is no quantity"):
        quantity("16GiB")
