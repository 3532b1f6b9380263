"""A sweep as a RayJob: what it says, and that it is what the files in tests/golden hold."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.kubernetes.linter import lint
from cluster.kubernetes.options import KubernetesOptions
from cluster.kubernetes.rayjob import load_template, render_rayjob, to_yaml
from cluster.submission import (
    JobState,
    JobView,
    config_digest,
    decide_submission,
    driver_output,
    exit_code,
    job_name,
)
from orchestrator.errors import ConfigError
from orchestrator.loading import load_config, parse_config
from tests.manifests import hub_sweep, known, rendered

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
CASES = {
    "cpu": KubernetesOptions(namespace="sweeps", nodes=2),
    "gpu": KubernetesOptions(namespace="sweeps", gpus=8, gpu_type="h100"),
    "gpu_spot": KubernetesOptions(
        namespace="sweeps", gpus=8, gpus_per_node=4, gpu_type="a100-80gb", capacity="spot-first"
    ),
    "gpu_queue": KubernetesOptions(
        namespace="sweeps", gpus=16, gpus_per_node=8, gpu_type="h200", queue="team", priority="high"
    ),
    "keep_failed": KubernetesOptions(namespace="sweeps", gpus=1, keep_failed_s=1800),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rendered_quickstart_is_what_the_golden_file_holds(case: str) -> None:
    job = render_rayjob(load_config(ROOT / "jobs/configs/quickstart.yaml"), CASES[case]).rayjob
    path = GOLDEN / f"rayjob_{case}.yaml"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(to_yaml(job))
    assert yaml.safe_load(path.read_text()) == job, "UPDATE_GOLDEN=1 writes it anew"
    assert path.read_text() == to_yaml(job)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("rayjob_*.yaml")), ids=lambda path: path.stem)
def test_every_golden_rayjob_is_accepted(path: Path) -> None:
    job = yaml.safe_load(path.read_text())
    assert known().problems(job) == []
    assert lint(job) == []


def test_the_template_is_accepted_as_it_stands() -> None:
    assert known().problems(load_template()) == []


def test_every_pod_is_valid_for_the_core_schema() -> None:
    from kubernetes_validate import validate

    for path in GOLDEN.glob("rayjob_*.yaml"):
        spec = yaml.safe_load(path.read_text())["spec"]["rayClusterSpec"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
            validate({**pod, "spec": group["template"]["spec"]}, "1.33", strict=True)


def test_the_entrypoint_carries_the_whole_sweep() -> None:
    config = hub_sweep(trial__optimizer={"learning_rate": 1e-5})
    rayjob = render_rayjob(config, KubernetesOptions(gpus=4)).rayjob
    entrypoint = rayjob["spec"]["entrypoint"]
    command, _, rest = entrypoint.partition("\n")
    sent = parse_config(rest.removesuffix("END_OF_SWEEP\n"), "entrypoint")
    assert config_digest(sent) == config_digest(config)
    assert sent.resources.num_workers == 4
    assert sent.resources.device == "cuda"
    assert "--or-resume" in command


def test_a_name_that_looks_like_a_number_is_a_text_to_every_reader() -> None:
    job = rendered(name="4e5").rayjob
    assert "qlora-orchestrator/sweep-name: '4e5'" in to_yaml(job)


def test_a_value_never_reaches_the_shell(tmp_path: Path) -> None:
    evil = f"org/$(touch {tmp_path}/x)`touch {tmp_path}/y`'\"; touch {tmp_path}/z"
    entrypoint = rendered(data__train=evil).rayjob["spec"]["entrypoint"]
    script = f"exec cat <<{entrypoint.partition('<<')[2]}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert parse_config(done.stdout, "entrypoint").data.train == evil
    assert list(tmp_path.iterdir()) == []


def test_the_head_has_no_gpu_and_the_workers_start_at_none() -> None:
    cluster = rendered(KubernetesOptions(gpus=8)).rayjob["spec"]["rayClusterSpec"]
    assert "nvidia.com/gpu" not in str(cluster["headGroupSpec"])
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (0, 8)
    assert cluster["autoscalerOptions"]["version"] == "v2"


def test_a_job_of_a_queue_has_all_its_workers_from_the_start() -> None:
    job = rendered(KubernetesOptions(gpus=8, gpus_per_node=4, queue="team", priority="high")).rayjob
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    cluster = job["spec"]["rayClusterSpec"]
    assert not cluster["enableInTreeAutoscaling"]
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 2)
    assert "suspend" not in job["spec"]


def test_a_template_of_the_users_own_keeps_what_it_adds(tmp_path: Path) -> None:
    template = load_template()
    pod = template["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["tolerations"] = [{"key": "team", "operator": "Exists"}]
    pod["containers"].append({"name": "proxy", "image": "envoy:1.30"})
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    zone = {"key": "zone", "operator": "In", "values": ["a"]}
    pod["affinity"] = {
        "nodeAffinity": {required: {"nodeSelectorTerms": [{"matchExpressions": [zone]}]}}
    }
    path = tmp_path / "rayjob.yaml"
    path.write_text(yaml.safe_dump(template))
    options = KubernetesOptions(gpus=1, gpu_type="l4", image="trainer:1", template=path)
    (group,) = rendered(options).rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    spec = group["template"]["spec"]
    assert {"key": "team", "operator": "Exists"} in spec["tolerations"]
    assert [container["image"] for container in spec["containers"]] == ["trainer:1", "envoy:1.30"]
    (term,) = spec["affinity"]["nodeAffinity"][required]["nodeSelectorTerms"]
    first, second = term["matchExpressions"]
    assert first == zone
    assert second["values"] == ["NVIDIA-L4"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (KubernetesOptions(gpus=6, gpus_per_node=4), "--gpus must be a multiple"),
        (KubernetesOptions(gpu_type="h100"), "needs --gpus"),
        (KubernetesOptions(gpus_per_node=8), "--gpus-per-node 8 needs --gpus"),
        (KubernetesOptions(gpus=8, nodes=2), "--nodes is of sweeps without GPUs"),
        (KubernetesOptions(gpus=1, gpu_type="h10"), "--gpu-type must be one of a10,"),
        (KubernetesOptions(gpus=1, priority="high"), "needs --queue"),
        (KubernetesOptions(gpus=1, queue="q", capacity="spot-first"), "needs the autoscaler"),
        (KubernetesOptions(gpus=1, queue="q", keep_failed_s=60), "--keep-failed holds what"),
        (KubernetesOptions(gpus=1, image="trainer"), "a tag other than latest"),
        (KubernetesOptions(gpus=1, image="trainer:latest"), "a tag other than latest"),
        (KubernetesOptions(nodes=1, cpus_per_node=1), None),
        (KubernetesOptions(gpus=8, gpus_per_node=4, cpus_per_node=3), "8 workers of 1 CPU cores"),
        (KubernetesOptions(gpus=8, gpus_per_node=4, cpus_per_node=4), None),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    options: KubernetesOptions, words: str | None
) -> None:
    if words is None:
        rendered(options)
        return
    with pytest.raises(ConfigError, match=words):
        rendered(options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data__train", "./rows.jsonl"),
        ("data__train", "file:///home/me/rows.jsonl"),
        ("data__shards_dir", "shards"),
        ("base_model__source", "/home/me/base"),
    ],
)
def test_a_path_of_this_machine_is_refused(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match="which no pod has: copy it to the shared volume"):
        rendered(**{field: value})


@pytest.mark.parametrize("uri", ["sqlite:////home/me/mlflow.db", "file:///tmp/x", "mlruns"])
def test_a_tracking_store_of_this_machine_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="tracking.uri: .* is a place of this machine"):
        rendered(tracking__uri=uri)


@pytest.mark.parametrize("uri", [None, "http://mlflow:5000", "sqlite:////mnt/orchestrator/m.db"])
def test_a_tracking_store_that_pods_reach_is_not(uri: str | None) -> None:
    rendered(tracking__uri=uri)


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_workers: 3 workers"):
        rendered(KubernetesOptions(gpus=2), resources__num_workers=3)
    with pytest.raises(ConfigError, match="step_program: graph needs GPUs"):
        rendered(KubernetesOptions(), resources__step_program="graph")
    with pytest.raises(ConfigError, match="workers_per_pack=4 needs as many workers"):
        rendered(KubernetesOptions(gpus=2), resources__workers_per_pack=4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("quickstart", "quickstart"), ("a-1", "a-1"), ("x" * 47, "x" * 47)],
)
def test_a_name_that_may_stay_stays(name: str, expected: str) -> None:
    assert job_name(name) == expected


def test_names_that_look_alike_stay_apart() -> None:
    names = ["My.Sweep", "my_sweep", "My_Sweep", "x" * 48, "x" * 49, "7b", "7B", "sweep-7b"]
    made = {job_name(name) for name in names}
    assert len(made) == len(names)
    assert all(len(name) <= 47 and name[0].isalpha() for name in made)


def view(state: JobState, digest: str, **more: object) -> JobView:
    return JobView("test", "test", digest, state, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("queued", "attach"),
        ("starting", "attach"),
        ("running", "attach"),
        ("suspended", "resume"),
        ("succeeded", "nothing"),
        ("failed", "replace"),
        ("stopped", "replace"),
    ],
)
def test_what_is_done_with_a_sweep_that_was_submitted_before(state: JobState, kind: str) -> None:
    wanted = rendered().submission
    assert decide_submission(wanted, view(state, wanted.digest)).kind == kind


def test_a_name_that_is_in_use_is_refused_and_one_that_is_over_is_free() -> None:
    wanted = rendered().submission
    with pytest.raises(ConfigError, match="is taken: a sweep of that name with another config"):
        decide_submission(wanted, view("running", "other"))
    with pytest.raises(ConfigError, match="not a sweep"):
        decide_submission(wanted, view("running", ""))
    assert decide_submission(wanted, view("failed", "other")).kind == "replace"
    assert decide_submission(wanted, None).kind == "create"


def test_a_sweep_on_more_gpus_is_the_same_sweep() -> None:
    few, many = (rendered(KubernetesOptions(gpus=gpus)).submission for gpus in (1, 8))
    assert few.digest == many.digest
    assert few.run_dir == many.run_dir
    assert rendered(trial__steps=7).submission.run_dir != few.run_dir


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (view("succeeded", ""), 0),
        (view("failed", ""), 1),
        (view("failed", "", exit_code=1), 1),
        (view("failed", "", exit_code=2), 2),
        (view("stopped", ""), 3),
        (view("suspended", ""), 3),
        (view("failed", "", never_ran=True), 4),
    ],
)
def test_the_command_ends_as_the_sweep_did(found: JobView, code: int) -> None:
    assert exit_code(found) == code


def test_a_drivers_log_is_shown_without_its_entrypoint() -> None:
    entrypoint = rendered().submission.entrypoint
    first = f"2026-01-01 INFO setting up\nRunning entrypoint for job test: {entrypoint}\n"
    assert driver_output(first + "trial 0\n") == "trial 0\n"
    assert driver_output(first[: first.index("<<") + 40]) == ""
    assert driver_output("Running entrypoint for job x: true\nhello\n").endswith("hello\n")
