"""Which divergence, and whose answers: the single-step term alone, for all sixteen pairs. Asked for by the reviewers.

On-policy forward KL is forward on student; GKD is js on student (its lambda = 1); word-level KD is forward on gold, the
references; MiniLLM without its long term is reverse on mixed. No pair has the long term. References need no importance
weights; in all else the pairs are alike.

The tiny world: 16 runs a seed; an hour on two cores.
--world=paper:  seventeen runs of phase 2, one of them with the long term for comparison. Not run yet.
Run:            python reproduce/grid.py
"""

from worlds import World, run


def commands(world: World):
    yield world.start()
    for divergence in ("reverse", "forward", "js", "skew"):
        for source in ("mixed", "student", "teacher", "gold"):
            yield world.variant(f"{divergence}-{source}", f"--divergence={divergence}", f"--source={source}",
                                "--long_term=False")


if __name__ == "__main__":
    run(commands, "grid")
