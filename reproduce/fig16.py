"""Figure 16: alpha of the mixture, Eq. (4): 0 is the student's own answers, 1 the teacher's.

The paper:      0.2 does well for all sizes, and matters less for larger models. The numbers are in
                a plot only.
The tiny world: seven values with the smallest student, in minutes each.
--world=paper:  one run of phase 2 for each value. Not run yet.
Run:            python -m reproduce.fig16
"""

from reproduce.worlds import World, run


def commands(world: World):
    yield world.start()
    for mix_alpha in ("0", "0.1", "0.4", "0.6", "0.8", "1"):
        yield world.variant(f"alpha-{mix_alpha}", f"--mix_alpha={mix_alpha}")


if __name__ == "__main__":
    run(commands, "fig16")
