"""Which trials may take a slot at all.

In: a TrialSpec, and what the planner goes by when the sweep starts. Out: a TrialResult that refuses
it, or None.
"""

import time
from collections.abc import Sequence

from orchestrator.errors import ConfigError
from orchestrator.planning.compatibility import problems
from orchestrator.planning.kinds import WorkerKind
from orchestrator.planning.options import Premises
from orchestrator.records import TrialResult, TrialSpec
from orchestrator.search_config import ConstraintsConfig
from orchestrator.sweep.expectations import refusal
from orchestrator.sweep.results import failed_result


class Admission:
    def __init__(
        self, premises: Premises, constraints: ConstraintsConfig, kinds: Sequence[WorkerKind]
    ) -> None:
        """By the estimate alone: what ran out of memory before is tried with less."""
        self._premises = premises
        self._constraints = constraints
        self._kinds = kinds

    def refused_new(self, trial: TrialSpec) -> TrialResult | None:
        return self._refused(trial, self._premises.resources.workers_per_pack)

    def refused_stored(self, trials: Sequence[TrialSpec]) -> list[TrialResult]:
        """Of those that cannot work at all. A resume may change the resources, and the cluster may
        be another one; stored trials were taken with the old ones, which may train them yet.

        Raises:
            ConfigError: trials do not suit the resources, fit no worker that there is now, or need
                more than the constraints allow with the number of workers that there is now.
        """
        workers_per_pack = self._premises.resources.workers_per_pack
        over, misfits = [], []
        for trial in trials:
            refused = self._refused(trial, None)
            if refused is None:
                found = problems(trial.config, workers_per_pack)
                misfits += [f"trial {trial.number}: {problem}" for problem in found]
            elif refused.reason == "not_valid":
                over.append(refused)
            else:
                words = refused.message
                if refused.reason == "constraint":
                    words += " on the workers that there are now: resume with as many as before"
                misfits.append(f"trial {trial.number}: {words}")
        if misfits:
            raise ConfigError("\n".join(misfits))
        return over

    def _refused(self, trial: TrialSpec, workers_per_pack: int | None) -> TrialResult | None:
        """Of a trial that breaks a rule, has no map of bits, cannot keep to the constraints or fits
        no worker."""
        found = problems(trial.config, workers_per_pack, self._premises.shape)
        if words := "; ".join(found) or trial.refused:
            return failed_result(trial.number, 0, "not_valid", words)
        return refusal(trial, self._constraints, self._premises, time.time(), self._kinds)
