"""The index of packs gives decisions what going over all packs would."""

import random
from dataclasses import replace

import pytest

from orchestrator.planning.waiting import pack_key
from orchestrator.records import Arithmetic, TrialSpec
from orchestrator.sweep.pack_views import Packs, PackView
from orchestrator.sweep.policy import RUNG_WITHIN_S, SETTLED_AFTER_S, SweepView, decide
from tests.sweeps import premises, sweep_config

TRIALS = [
    TrialSpec(n, {}, sweep_config(trial__quant__bit_width=(4, 16)[n % 2]).trial) for n in range(12)
]


def drawn_view(number: int, drawn: random.Random) -> PackView:
    ready = drawn.random() < 0.6
    idle = ready and drawn.random() < 0.4
    return PackView(
        number,
        pack_key(TRIALS[number % 2].config),
        4,
        drawn.randint(0, 4),
        ready,
        idle,
        Arithmetic(drawn.choice((1, 2)), 1, False),
        at_rung=idle and drawn.random() < 0.5,
        leaving=ready and not idle and drawn.random() < 0.2,
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_kept_index_decides_as_the_packs_themselves(seed: int) -> None:
    drawn = random.Random(seed)
    given = premises(sweep_config())
    kept = Packs()
    running: dict[int, PackView] = {}
    for step in range(30):
        running[step] = drawn_view(step, drawn)
        for number in drawn.sample(sorted(running), drawn.randint(0, len(running))):
            kind = running[number].arithmetic
            running[number] = replace(drawn_view(number, drawn), arithmetic=kind)
        for number in drawn.sample(sorted(running), drawn.randint(0, len(running) // 3)):
            del running[number]
        kept.keep_to(running)
        waiting = drawn.sample(TRIALS, drawn.randint(0, 12))
        views = tuple(running.values())
        limits = {"": drawn.randint(0, 12)} if drawn.random() < 0.5 else {}
        over_s = drawn.choice((0.0, SETTLED_AFTER_S, RUNG_WITHIN_S))
        num_workers = drawn.randint(1, 12)
        expected = SweepView(waiting, views, num_workers, given, limits=limits, over_s=over_s)
        assert decide(replace(expected, packs=kept)) == decide(expected)
        assert list(kept) == list(views)
        assert kept.workers[""] == sum(view.arithmetic.world_size for view in views)
        assert [view.number for view in kept.idle] == [v.number for v in views if v.idle]
        fills = [view for view in views if not view.idle and not view.leaving]
        assert sum(alike.free for alike in kept.open) == sum(view.free for view in fills)
        assert sum(alike.loading for alike in kept.open) == sum(
            not view.ready and view.free > 0 for view in fills
        )
