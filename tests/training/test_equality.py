"""The promise of a pack, over random members: a trial in it is the same trial alone.

In float64 nothing but the order of additions differs, so the bound is near rounding; a mistake in
which slot a number belongs to would be larger by many orders.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.config import TrialConfig
from orchestrator.records import TrialStopped
from tests.training.conftest import MakeSpec, trial_config
from tests.training.test_pack import Adapter, train

# Of an adapter value after the last step; the values are of size 0.1.
LARGEST_DIFFERENCE = {"float64": 1e-9, "float32": 2e-4}
TARGETS: list[str | tuple[str, ...]] = [
    "all-linear",
    ("q_proj", "v_proj"),
    ("gate_proj", "up_proj", "down_proj"),
    ("o_proj",),
]

trials = st.builds(
    lambda rank, rate, seed, targets, steps, batch, alpha, clip, dropout, kind: trial_config(
        steps=steps,
        batch_size=batch,
        seed=seed,
        adapter__rank=rank,
        adapter__alpha=alpha,
        adapter__dropout=dropout,
        adapter__target_modules=targets,
        optimizer__learning_rate=rate,
        optimizer__max_grad_norm=clip,
        schedule__kind=kind,
    ),
    rank=st.integers(1, 8),
    rate=st.floats(1e-4, 1e-2),
    seed=st.integers(0, 1000),
    targets=st.sampled_from(TARGETS),
    steps=st.integers(2, 4),
    batch=st.sampled_from([1, 2, 3]),
    alpha=st.sampled_from([4, 16, 10]),
    clip=st.sampled_from([None, 1.0, 0.05]),
    dropout=st.sampled_from([0.0, 0.2]),
    kind=st.sampled_from(["constant", "linear", "cosine"]),
)
diverging = trial_config(
    steps=4, batch_size=1, optimizer__learning_rate=1e300, optimizer__max_grad_norm=None
)


def largest_difference(one: Adapter, other: Adapter) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(members=st.lists(trials, min_size=2, max_size=5), num_slots=st.integers(2, 4))
def test_a_trial_in_a_pack_is_the_trial_alone_whoever_its_neighbours_are(
    make_spec: MakeSpec, dtype: str, members: list[TrialConfig], num_slots: int
) -> None:
    """More members than slots: the later ones take slots that others left. Alone each trains its
    whole batch at once, in the pack block by block."""
    quant = {**make_spec().quant, "compute_dtype": dtype}
    spec = make_spec(quant=quant, num_slots=num_slots, micro_batch_size=1)
    with TemporaryDirectory() as folder:
        packed, _ = train(spec, members, Path(folder) / "pack")
        for number, member in enumerate(members):
            single = replace(spec, num_slots=1, micro_batch_size=member.batch_size)
            alone, _ = train(single, [member], Path(folder) / f"alone{number}")
            difference = largest_difference(packed[number], alone[0])
            assert difference < LARGEST_DIFFERENCE[dtype], (number, difference)


@settings(max_examples=5, suppress_health_check=list(HealthCheck))
@given(members=st.lists(trials, min_size=2, max_size=3), place=st.integers(0, 2))
def test_a_neighbour_that_becomes_nan_changes_no_number(
    make_spec: MakeSpec, members: list[TrialConfig], place: int
) -> None:
    """And whoever takes the slot that it leaves finds nothing of it."""
    quant = {**make_spec().quant, "compute_dtype": "float64"}
    spec = make_spec(quant=quant, num_slots=2, micro_batch_size=1)
    place = min(place, len(members))
    crowd = [*members[:place], diverging, *members[place:]]
    with TemporaryDirectory() as folder:
        packed, events = train(spec, crowd, Path(folder) / "pack")
        stopped = [event.trial for event in events if isinstance(event, TrialStopped)]
        assert stopped == [place]
        quiet, _ = train(spec, members, Path(folder) / "quiet")
        for number in range(len(members)):
            seat = number + (number >= place)
            assert largest_difference(packed[seat], quiet[number]) < LARGEST_DIFFERENCE["float64"]
