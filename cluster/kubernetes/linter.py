"""Refuse a RayJob that the API server would accept and KubeRay would fail, or leave waiting.

In: a RayJob as plain dictionaries. Out: problems, each with its rule, value and remedy. Pure. What
each mistake does on a cluster is written beside its rule: `fails` is the operator's
ValidationFailed; `hangs` is a RayJob that stays Initializing or Running. The operator's rules are
those of KubeRay v1.7.0, what hangs was seen with it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from cluster.kubernetes.lint_pods import POD_RULES
from cluster.kubernetes.lint_rules import CLUSTER_RULES, JOB_RULES
from cluster.kubernetes.quantities import Object
from orchestrator.errors import ConfigError


@dataclass(frozen=True)
class Problem:
    rule: str
    path: str
    text: str
    """The rule, the value and the remedy."""

    def __str__(self) -> str:
        return f"{self.path}: {self.text} [{self.rule}]"


def lint(job: Object) -> list[Problem]:
    return list(_problems(job))


def check(job: Object) -> None:
    """Raises ConfigError with one line for each problem."""
    if problems := lint(job):
        raise ConfigError("\n".join(map(str, problems)))


def rule_names() -> list[str]:
    return [rule.__name__ for rule in (*JOB_RULES, *CLUSTER_RULES, *POD_RULES)]


def _problems(job: Object) -> Iterator[Problem]:
    for job_rule in JOB_RULES:
        for path, text in job_rule(job):
            yield Problem(job_rule.__name__, path, text)
    cluster = job.get("spec", {}).get("rayClusterSpec")
    if cluster is None:
        return
    base = "spec.rayClusterSpec"
    for cluster_rule in CLUSTER_RULES:
        for path, text in cluster_rule(cluster):
            yield Problem(cluster_rule.__name__, f"{base}.{path}", text)
    groups = [("headGroupSpec", cluster.get("headGroupSpec", {}))]
    groups += [
        (f"workerGroupSpecs[{index}]", group)
        for index, group in enumerate(cluster.get("workerGroupSpecs", []))
    ]
    for name, group in groups:
        pod = group.get("template", {}).get("spec", {})
        for pod_rule in POD_RULES:
            for path, text in pod_rule(pod):
                yield Problem(pod_rule.__name__, f"{base}.{name}.template.spec.{path}", text)
