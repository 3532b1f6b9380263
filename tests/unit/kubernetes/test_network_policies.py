import pytest

from tests.unit.kubernetes.networks import Pod, may_connect
from tests.unit.kubernetes.overlays import OVERLAYS, RAY_LABELS, of_kind, rendered

HEAD, WORKER = Pod(RAY_LABELS["head"]), Pod(RAY_LABELS["worker"])
MLFLOW = Pod({"app.kubernetes.io/name": "mlflow"})
POSTGRES = Pod({"app.kubernetes.io/name": "postgres"})
S3 = Pod({"app.kubernetes.io/name": "s3"})
STRANGER = Pod({"app": "shell"})
ELSEWHERE = Pod({"app": "shell"}, "default")
IMPOSTOR = Pod({"app.kubernetes.io/component": "kuberay-operator"}, "default")
OPERATOR = Pod({"app.kubernetes.io/component": "kuberay-operator"}, "kuberay-system")
PROMETHEUS = Pod({"app.kubernetes.io/name": "prometheus"}, "monitoring")
USER_JOB = Pod({"app.kubernetes.io/name": "mlflow-user"})

NEEDED = {
    "Ray's own ports": (WORKER, HEAD, 6379),
    "workers of a pack, on a port of the system's choice": (WORKER, WORKER, 43_211),
    "the operator submits the job": (OPERATOR, HEAD, 8265),
    "the driver logs to MLflow": (HEAD, MLFLOW, 5000),
    "MLflow's tables": (MLFLOW, POSTGRES, 5432),
    "the sweeps' user is made": (USER_JOB, MLFLOW, 5000),
}
FORBIDDEN = {
    "a stranger starts programs on the dashboard": (STRANGER, HEAD, 8265),
    "a stranger from another namespace": (ELSEWHERE, HEAD, 8265),
    "a pod that is called like the operator": (IMPOSTOR, HEAD, 8265),
    "the operator needs no GCS": (OPERATOR, HEAD, 6379),
    "a stranger joins the Ray cluster": (STRANGER, HEAD, 6379),
    "a stranger meets a pack": (ELSEWHERE, WORKER, 43_211),
    "Prometheus reads metrics alone": (PROMETHEUS, HEAD, 8265),
    "sweeps do not see the database": (HEAD, POSTGRES, 5432),
    "nor does a stranger": (STRANGER, POSTGRES, 5432),
    "MLflow does not reach into a cluster": (MLFLOW, HEAD, 8265),
    "a stranger reads MLflow": (ELSEWHERE, MLFLOW, 5000),
    "sweeps do not see the store": (WORKER, S3, 8333),
    "the store's ports without a password": (MLFLOW, S3, 8888),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("what", NEEDED)
def test_what_a_sweep_needs_is_allowed(overlay: str, what: str) -> None:
    assert may_connect(rendered(overlay), *NEEDED[what])


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_nobody_needs_is_forbidden(overlay: str, what: str) -> None:
    assert not may_connect(rendered(overlay), *FORBIDDEN[what])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_metrics_and_artifacts_flow_where_the_overlay_has_them(overlay: str) -> None:
    manifests = rendered(overlay)
    monitored = bool(of_kind(manifests, "PodMonitor"))
    assert may_connect(manifests, PROMETHEUS, WORKER, 8080) == monitored
    stored_inside = any(m["metadata"]["name"] == "s3" for m in of_kind(manifests, "StatefulSet"))
    assert may_connect(manifests, MLFLOW, S3, 8333) == stored_inside


def test_without_policies_everything_would_be_allowed() -> None:
    bare = [m for m in rendered("local") if m["kind"] != "NetworkPolicy"]
    assert all(may_connect(bare, *connection) for connection in FORBIDDEN.values())
