"""RayJobs for tests, the custom resources' definitions, and changes to manifests."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest

from cluster.kubernetes.crds import CustomResources
from cluster.kubernetes.options import KubernetesOptions
from cluster.kubernetes.rayjob import Object, Rendered, render_rayjob
from orchestrator.config import SweepConfig
from tests.sweeps import sweep_config

# Beside the repository, where they are kept for all who work on it; not part of the project.
CRDS = Path(__file__).parents[2] / "shared" / "crds"


@functools.cache
def definitions() -> CustomResources | None:
    """Read when a test first asks for them, as that takes seconds."""
    return CustomResources(CRDS) if CRDS.is_dir() else None


def known() -> CustomResources:
    """A test that asks for them is skipped where there are none."""
    found = definitions()
    if found is None:
        pytest.skip(f"the custom resources' definitions are not at {CRDS}")
    return found


def hub_sweep(**changes: Any) -> SweepConfig:
    """A sweep that names nothing of this machine."""
    given = {"data__train": "org/rows", "base_model__source": "org/base"}
    return sweep_config(**{**given, **changes})


def rendered(options: KubernetesOptions | None = None, **changes: Any) -> Rendered:
    return render_rayjob(hub_sweep(**changes), options or KubernetesOptions(gpus=2))


def changed(job: Object, path: str, value: Any) -> Object:
    """A copy with one place set, or taken out for ...

    Numbers in the path index lists, % stands for a slash.
    """
    result = copy.deepcopy(job)
    parts = [part.replace("%", "/") for part in path.split("/")]
    *parents, leaf = [int(part) if part.isdigit() else part for part in parts]
    place: Any = result
    for parent in parents:
        place = place[parent] if isinstance(parent, int) else place.setdefault(parent, {})
    if value is ...:
        place.pop(leaf)
    else:
        place[leaf] = value
    return result
