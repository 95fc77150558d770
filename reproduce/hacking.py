"""What may go wrong: a student without the paper's three strategies, and one whose last token is paid nothing.

The paper:      Section 2.2 and its Table 8 of failures ("We to know"): short or repeated phrases that the teacher finds
                likely.
The tiny world: read the answers in the report, beside those of the full method. `hacked` has none of the three; its
                noise leads it astray. `unpaid` lacks the single step, which pays r_t, and its return R_{t+1} begins
                after r_t: to end at once is paid nothing, which is more than most answers are paid.
--world=paper:  three runs of phase 2. Not run yet.
Run:            python reproduce/hacking.py
"""

from worlds import World, run


def commands(world: World):
    yield world.start()
    yield world.variant("hacked", "--length_norm=False", "--mix_alpha=0", "--single_step=False")
    yield world.variant("unpaid", "--single_step=False", "--return_from=next")


if __name__ == "__main__":
    run(commands, "hacking")
