"""What the client depends on of a Kubernetes API, held by the stand-in as by a real server.

A real one, with KubeRay installed, takes part when ORCHESTRATOR_TEST_CONTEXT names a context of the
kubeconfig; a namespace is given with ORCHESTRATOR_TEST_NAMESPACE.
"""

import os
from collections.abc import Iterator

import pytest

from cluster.kubernetes.api import KubernetesApi, Refused
from cluster.kubernetes.quantities import Object
from cluster.kubernetes.stand_in import StandIn
from orchestrator.errors import ContactLost
from tests.manifests import changed, definitions, known, rendered

CONTEXT = os.environ.get("ORCHESTRATOR_TEST_CONTEXT")


@pytest.fixture(params=["stand-in", "real"])
def api(request: pytest.FixtureRequest) -> KubernetesApi:
    if request.param == "real":
        if CONTEXT is None:
            pytest.skip("ORCHESTRATOR_TEST_CONTEXT names no cluster")
        return KubernetesApi.connect(CONTEXT, os.environ.get("ORCHESTRATOR_TEST_NAMESPACE"))
    return StandIn(definitions()).api()


@pytest.fixture
def needs_definitions() -> None:
    """Without them the stand-in validates nothing."""
    known()


@pytest.fixture
def job(api: KubernetesApi) -> Iterator[Object]:
    # Suspended: nothing is started by it on a real cluster.
    rayjob = changed(rendered(name="contract").rayjob, "spec/suspend", True)
    yield rayjob
    api.delete("RayJob", "contract")


def test_what_is_created_is_there_with_a_version_of_its_own(
    api: KubernetesApi, job: Object
) -> None:
    created = api.create(job)
    assert created["metadata"]["uid"]
    found = api.get("RayJob", "contract")
    assert found is not None
    assert found["spec"]["entrypoint"] == job["spec"]["entrypoint"]
    changed_job = api.patch("RayJob", "contract", {"spec": {"backoffLimit": 1}})
    assert changed_job["metadata"]["resourceVersion"] != created["metadata"]["resourceVersion"]
    assert changed_job["spec"]["entrypoint"] == job["spec"]["entrypoint"]


def test_a_name_is_given_once(api: KubernetesApi, job: Object) -> None:
    api.create(job)
    with pytest.raises(Refused, match="already exists") as caught:
        api.create(job)
    assert (caught.value.code, caught.value.reason) == (409, "AlreadyExists")


@pytest.mark.usefixtures("needs_definitions")
def test_an_unknown_field_is_refused_not_dropped(api: KubernetesApi, job: Object) -> None:
    with pytest.raises(Refused, match="shutdownAfterJobFinish"):
        api.create(changed(job, "spec/shutdownAfterJobFinish", True))
    assert api.get("RayJob", "contract") is None


def test_a_dry_run_makes_nothing(api: KubernetesApi, job: Object) -> None:
    api.create(job, dry_run=True)
    assert api.get("RayJob", "contract") is None


def test_what_is_not_there_is_none_and_may_be_deleted(api: KubernetesApi) -> None:
    assert api.get("RayJob", "not-there") is None
    api.delete("RayJob", "not-there")


def test_a_list_is_cut_down_by_labels_and_by_fields(api: KubernetesApi, job: Object) -> None:
    api.create(job)
    names = [item["metadata"]["name"] for item in api.list("RayJob", "qlora-orchestrator/sweep")]
    assert "contract" in names
    assert api.list("RayJob", "qlora-orchestrator/sweep=another") == []
    assert api.list("Event", fields="involvedObject.name=not-there") == []


def test_a_merge_patch_takes_out_what_is_null(api: KubernetesApi, job: Object) -> None:
    api.create(job)
    patched = api.patch("RayJob", "contract", {"metadata": {"annotations": {"a": "1", "b": "2"}}})
    assert patched["metadata"]["annotations"]["a"] == "1"
    patched = api.patch("RayJob", "contract", {"metadata": {"annotations": {"a": None}}})
    assert "a" not in patched["metadata"]["annotations"]
    assert patched["metadata"]["annotations"]["b"] == "2"


def test_a_status_is_not_for_users_to_write(api: KubernetesApi, job: Object) -> None:
    status = {"jobDeploymentStatus": "Complete"}
    assert api.create({**job, "status": status}).get("status", {}) != status
    changed_job = api.patch("RayJob", "contract", {"status": status})
    assert changed_job.get("status", {}) != status


@pytest.mark.usefixtures("needs_definitions")
def test_a_patch_is_validated_as_a_whole(api: KubernetesApi, job: Object) -> None:
    api.create(job)
    with pytest.raises(Refused, match="preRunningDeadlineSeconds") as caught:
        api.patch("RayJob", "contract", {"spec": {"preRunningDeadlineSeconds": 0}})
    assert (caught.value.code, caught.value.reason) == (422, "Invalid")
    found = api.get("RayJob", "contract")
    assert found is not None
    assert found["spec"]["preRunningDeadlineSeconds"] > 0


def test_what_has_a_finalizer_is_there_until_it_is_taken_off(
    api: KubernetesApi, job: Object
) -> None:
    api.create(changed(job, "metadata/finalizers", ["example.com/last-words"]))
    api.delete("RayJob", "contract")
    found = api.get("RayJob", "contract")
    assert found is not None
    assert found["metadata"]["deletionTimestamp"]
    api.patch("RayJob", "contract", {"metadata": {"finalizers": None}})
    api.delete("RayJob", "contract")
    assert api.get("RayJob", "contract") is None


def test_a_machine_without_kubeconfig_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    with pytest.raises(ContactLost, match="set KUBECONFIG"):
        KubernetesApi.connect()
