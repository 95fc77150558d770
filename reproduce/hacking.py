"""Reward hacking: without the paper's three strategies reverse KL falls in training while answers degenerate.

The paper:      Section 2.2 and its Table 8 of failures ("We to know"): short or repeated phrases that the teacher finds
                likely.
The tiny world: read the answers in the report, beside those of the full method.
--world=paper:  two times phase 2. Not run yet.
Run:            python reproduce/hacking.py
"""

from worlds import World, run


def commands(world: World):
    yield world.start()
    yield world.variant("hacked", "--length_norm=False", "--mix_alpha=0", "--single_step=False")


if __name__ == "__main__":
    run(commands, "hacking")
