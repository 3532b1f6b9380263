"""The libraries that a worker loads its base, trains and saves adapters with.

They are imported at once. Left to their users, each machine's workers would import them one after
another, for a base is loaded under a lock (base_model.py).
"""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata

from orchestrator.garbage import without_collections
from orchestrator.training.quiet import quiet_libraries

# Another version of one may add up in another order.
COMPUTE_WITH = ("torch", "transformers", "bitsandbytes", "deepspeed")


@cache
def library_versions() -> Mapping[str, str]:
    return installed_versions(COMPUTE_WITH)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def import_libraries() -> None:
    with quiet_libraries(), without_collections():
        import peft  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
