"""Who may talk to whom under a set of network policies, between pods.

The rules of networking.k8s.io/v1: a pod that no policy selects for a direction is open in it; one
that is selected may do what any of its policies allows. Both ends must allow a connection.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.unit.kubernetes.overlays import Manifest, of_kind


@dataclass(frozen=True)
class Pod:
    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = "orchestrator"


def may_connect(manifests: list[Manifest], source: Pod, target: Pod, port: int) -> bool:
    policies = of_kind(manifests, "NetworkPolicy")
    return _allowed(policies, "egress", source, target, port) and _allowed(
        policies, "ingress", target, source, port
    )


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items()
    if any(labels.get(key) != value for key, value in wanted):
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", "the only operator that the manifests use"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def _allowed(policies: list[Manifest], direction: str, pod: Pod, peer: Pod, port: int) -> bool:
    kind = direction.capitalize()
    mine = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and kind in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    if not mine:
        return True
    peers = "from" if direction == "ingress" else "to"
    return any(
        _has_port(rule, port) and any(_is(each, pod, peer) for each in rule[peers])
        for spec in mine
        for rule in spec.get(direction, [])
    )


def _has_port(rule: dict[str, Any], port: int) -> bool:
    return "ports" not in rule or any(each["port"] == port for each in rule["ports"])


def _is(peer: dict[str, Any], pod: Pod, other: Pod) -> bool:
    if "ipBlock" in peer:
        return False  # addresses outside the cluster
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace}
        if not matches(peer["namespaceSelector"], labels):
            return False
    elif other.namespace != pod.namespace:
        return False
    return matches(peer.get("podSelector", {}), other.labels)
