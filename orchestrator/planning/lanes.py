"""How many lanes a constant program should have while fewer slots are occupied than it has lanes.

A compiled program costs the same whether a lane is idle or not. Fewer lanes cost another program:
compiling its blocks and recording it. Pure.
"""

# One H200: 6 s for the 0.5B shape and 10 s for the 8B shape, with Triton's kernels to compile.
BUILD_S = 10.0
# The last trials of a sweep may end sooner than planned; what is saved must be worth it.
WORTH = 2.0


def fewest_lanes(occupied: int, most: int) -> int:
    """That hold so many occupied slots: a power of two, or all."""
    return min(most, 1 << (occupied - 1).bit_length())


def lanes_for(
    occupied: int, present: int, most: int, rounds_left: int, round_s: float
) -> tuple[int, str]:
    """The number of lanes, and why; `present` ones stay where a change does not pay.

    `rounds_left` is the longest member's; `round_s` the seconds of one with the present lanes.
    """
    fitting = fewest_lanes(occupied, most)
    if occupied > present:
        return fitting, f"{occupied} slots are occupied, there are {present} lanes"
    if fitting >= present:
        return present, ""
    saved = rounds_left * round_s * (1 - fitting / present)
    if saved < WORTH * BUILD_S:
        return present, ""
    return fitting, (
        f"{occupied} of {present} lanes are in use: {fitting} save about {saved:.0f} s of "
        f"{rounds_left} rounds, and take about {BUILD_S:.0f} s to build"
    )
