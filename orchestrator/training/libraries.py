"""The libraries that a worker loads its base and saves adapters with, imported at once.

Left to their users, each machine's workers would import them one after another, for a base is
loaded under a lock (base_model.py).
"""

from orchestrator.garbage import without_collections
from orchestrator.training.quiet import quiet_libraries


def import_libraries() -> None:
    with quiet_libraries(), without_collections():
        import peft  # noqa: F401
        import transformers.modeling_utils  # noqa: F401
