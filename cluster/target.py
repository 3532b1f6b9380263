"""Where sweeps are sent to: the seam through which jobs are followed, cancelled and resumed.

Two implementations: KubernetesTarget (RayJobs of KubeRay) and RayTarget (a Ray cluster's job API).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.submission import Action, JobView, Story, Submission
from orchestrator.config import SweepConfig


@dataclass(frozen=True)
class Plan:
    """A sweep as this target is sent it; `request` is exactly what goes over the wire."""

    submission: Submission
    request: dict[str, Any]
    shape: str = ""
    """What it takes of the cluster, in words."""


Planner = Callable[[SweepConfig, str | None], Plan]
"""From a configuration and the job's name, if it is not the sweep's. Raises ConfigError for what
would be refused, or be accepted and hang. Asks no cluster."""


class Target(Protocol):
    """Every method raises NeverStarted for a refusal, ContactLost where nothing answers."""

    place: str
    """Options with which a command reaches it: ` --target http://head:8265`. Empty: none needed."""

    def try_out(self, plan: Plan) -> None:
        """Ask the cluster whether it would take it; nothing is made."""

    def find(self, name: str) -> JobView | None: ...

    def list(self) -> list[JobView]:
        """The sweeps that were submitted, the newest first."""

    def send(self, plan: Plan, action: Action) -> None: ...

    def story(self, name: str) -> Story | None:
        """None: there is no such job any more."""

    def log(self, name: str) -> str | None:
        """What the driver has printed so far; None while it cannot be read."""

    def worker_log(self, name: str, pack: int, world_rank: int) -> str:
        """What a worker of a pack has printed. Raises ConfigError if there is none such."""

    def cancel(self, name: str) -> None:
        """Ask the driver to save and stop, or take out a job that has not started."""

    def pause(self, name: str) -> None:
        """Stop it and give back what it holds, so that `resume` goes on."""

    def resume(self, name: str) -> None:
        """Go on with a job that is suspended, failed or cancelled, from its run folder."""
