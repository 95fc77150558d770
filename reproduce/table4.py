"""Table 4: MiniLLM without length normalisation, without teacher-mixed sampling, without the single-step decomposition.

The paper:      Rouge-L on validation and DollyEval: 27.4 and 24.6 with all; 17.4 and 14.7 without length normalisation;
                22.3 and 20.4 without the mixture; 27.0 and 23.7 without the single step.
The tiny world: the same flags; minutes for each seed.
--world=paper:  four runs of phase 2 of the 120M student. Not run yet.
Run:            python reproduce/table4.py
"""

from worlds import World, run


def commands(world: World):
    yield world.start()
    yield world.variant("no-length-norm", "--length_norm=False")
    yield world.variant("no-mixture", "--mix_alpha=0")
    yield world.variant("no-single-step", "--single_step=False")


if __name__ == "__main__":
    run(commands, "table4")
