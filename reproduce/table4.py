"""Table 4: MiniLLM without length normalisation, without the mixture, without the single step.

The paper:      Rouge-L on validation and DollyEval is 27.4 and 24.6 with all three strategies; 17.4
                and 14.7 without length normalisation; 22.3 and 20.4 without the mixture; 27.0 and
                23.7 without the single step.
The tiny world: the same flags, in minutes a seed.
--world=paper:  four runs of phase 2 of the 120M student. Not run yet.
Run:            python -m reproduce.table4
"""

from reproduce.worlds import World, run


def commands(world: World):
    yield world.start()
    yield world.variant("no-length-norm", "--length_norm=False")
    yield world.variant("no-mixture", "--mix_alpha=0")
    yield world.variant("no-single-step", "--objective=eq2")


if __name__ == "__main__":
    run(commands, "table4")
