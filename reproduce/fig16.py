"""Figure 16: alpha of the mixture, Eq. (4), from the student's own answers (0) to the teacher's alone (1).

The paper:      0.2 does well for all sizes, and matters less to larger models; the numbers are in a plot only.
The tiny world: seven values, with the smallest student; minutes for each.
--world=paper:  one run of phase 2 for each value. Not run yet.
Run:            python reproduce/fig16.py
"""

from worlds import World, run


def commands(world: World):
    yield world.start()
    for mix_alpha in ("0", "0.1", "0.4", "0.6", "0.8", "1"):
        yield world.variant(f"alpha-{mix_alpha}", f"--mix_alpha={mix_alpha}")


if __name__ == "__main__":
    run(commands, "fig16")
