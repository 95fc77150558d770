"""What may go wrong: a student without the paper's strategies, and one whose last token earns 0.

The paper:      Section 2.2 and its Table 8 of failures ("We to know"): short or repeated phrases
                that the teacher finds likely.
The tiny world: read the answers in the report, beside those of the full method. `hacked` has none
                of the three strategies, and its noise leads it astray. `unpaid` lacks the single
                step, which pays r_t, and its return R_{t+1} begins after r_t. To end at once is
                then paid nothing, which is more than most answers are paid.
--world=paper:  three runs of phase 2. Not run yet.
Run:            python -m reproduce.hacking
"""

from reproduce.worlds import World, run


def commands(world: World):
    yield world.start()
    yield world.variant("hacked", "--length_norm=False", "--mix_alpha=0", "--objective=eq2")
    yield world.variant("unpaid", "--objective=unpaid")


if __name__ == "__main__":
    run(commands, "hacking")
