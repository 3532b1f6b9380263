"""A stage on which a sweep is submitted to the stand-in of Kubernetes and things happen to it.

Time is the stage's own: each time the follower sleeps, the next scene is played.
"""

import base64
import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster.kubernetes.options import KubernetesOptions
from cluster.kubernetes.stand_in import TOKEN, StandIn
from cluster.kubernetes.target import KubernetesTarget, plan_rayjob
from cluster.ray_stand_in import RayStandIn
from jobs.submit import Sending, submit_sweep
from jobs.terminal import Terminal
from tests.manifests import definitions, hub_sweep

NAME = "test"
CLUSTER = "test-abcde"
RAY_TOKEN = "ray-token-value"
MAX_SLEEPS = 300

Scene = Callable[["Stage"], None]


@dataclass
class Stage:
    folder: Path
    options: KubernetesOptions = field(default_factory=lambda: KubernetesOptions(gpus=2))
    token: str = TOKEN
    answers: list[str] = field(default_factory=list)
    """What the person answers when asked."""
    said: list[str] = field(default_factory=list)
    screen: Console | None = None
    """Where the live table is shown, if anywhere."""
    now: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.cluster = StandIn(definitions())
        self.ray = RayStandIn(token=RAY_TOKEN)
        self.started = self.now
        self._scenes: Iterator[Scene] = iter(())
        self._sleeps = 0
        token = base64.b64encode(RAY_TOKEN.encode()).decode()
        self.put("v1", "Secret", "ray-token", data={"auth_token": token})
        self.put("v1", "PersistentVolumeClaim", "orchestrator-storage")

    @property
    def target(self) -> KubernetesTarget:
        return KubernetesTarget(self.cluster.api(token=self.token), self._sleep, lambda: self.now)

    @property
    def person(self) -> Terminal:
        ask = (lambda _: self.answers.pop(0)) if self.answers else None
        return Terminal(self.said.append, ask, self._sleep, lambda: self.now, self.screen)

    @property
    def output(self) -> str:
        return "\n".join(self.said)

    @property
    def waited_s(self) -> float:
        return self.now - self.started

    def submit(self, *scenes: Scene, sending: Sending | None = None, **changes: Any) -> int:
        path = self.folder / "sweep.yaml"
        config = hub_sweep(**changes)
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.play(*scenes)

        def plan(config: Any, name: str | None) -> Any:
            return plan_rayjob(self.options, config, name)

        sending = sending or Sending()
        return submit_sweep(path, [], plan, lambda: self.target, sending, self.person)

    def play(self, *scenes: Scene) -> None:
        self._scenes = iter(scenes)

    def put(self, version: str, kind: str, name: str, **content: Any) -> None:
        labels = content.pop("labels", {})
        metadata = {"name": name, "labels": labels, "creationTimestamp": self.stamp()}
        self.cluster.put({"apiVersion": version, "kind": kind, "metadata": metadata, **content})

    def stamp(self) -> str:
        moment = datetime.datetime.fromtimestamp(self.now, datetime.UTC)
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ")

    def status(self, deployment: str, ray: str = "", **more: Any) -> None:
        status = {"jobDeploymentStatus": deployment, "jobStatus": ray, **more}
        self.cluster.set_status("RayJob", NAME, status)

    def pod(self, name: str, waiting: tuple[str, str] | None = None, **status: Any) -> None:
        """A pod of the cluster; ready unless it waits."""
        self.put("ray.io/v1", "RayCluster", CLUSTER)
        state = (
            {"waiting": dict(zip(("reason", "message"), waiting, strict=True))} if waiting else {}
        )
        container = {"name": "ray", "image": "trainer:1", "state": state}
        ready = {"type": "Ready", "status": "False" if waiting else "True"}
        kind = "head" if "head" in name else "worker"
        labels = {"ray.io/cluster": CLUSTER, "ray.io/node-type": kind}
        given = {"containerStatuses": [container], "conditions": [ready], **status}
        self.put("v1", "Pod", name, labels=labels, status=given)

    def _sleep(self, seconds: float) -> None:
        self._sleeps += 1
        assert self._sleeps < MAX_SLEEPS, f"it hangs; said so far:\n{self.output}"
        self.now += seconds
        if scene := next(self._scenes, None):
            scene(self)


def wait(stage: Stage) -> None:
    """Nothing happens."""


def starting(stage: Stage) -> None:
    stage.status("Initializing", rayClusterName=CLUSTER, jobId="job-1")
    stage.pod("test-head", ("ContainerCreating", ""))


def running(stage: Stage) -> None:
    stage.pod("test-head")
    stage.status("Running", "RUNNING", rayClusterName=CLUSTER, jobId="job-1")
    stage.cluster.services[f"{NAME}-head-svc"] = stage.ray.handle
    stage.ray.start("job-1")


def prints(text: str) -> Scene:
    return lambda stage: stage.ray.print("job-1", text)


def succeeded(stage: Stage) -> None:
    stage.ray.end("job-1", "SUCCEEDED", 0)
    stage.status("Complete", "SUCCEEDED")


def failed(message: str, reason: str = "AppFailed") -> Scene:
    return lambda stage: stage.status("Failed", "FAILED", reason=reason, message=message)
