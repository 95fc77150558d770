"""Which divergence, and whose answers: L_Single alone, for sixteen pairs.

The paper's reviewers asked for it. Some pairs have names in the literature: on-policy forward KL is
forward on student; GKD is js on student (its lambda = 1); word-level KD is forward on gold, the
references; MiniLLM without its long term is reverse on mixed. No pair has the long term. Answers of
the mixture have the weights w_t of Eq. (5), which are 1.25 at most. The others are taken as they
are: on the teacher's answers w_t = q / p would have no bound.

The tiny world: 16 runs a seed, an hour on two cores.
--world=paper:  seventeen runs of phase 2, one of them with the long term to compare with. Not run
                yet.
Run:            python -m reproduce.grid
"""

from reproduce.worlds import World, run

OBJECTIVES = {"reverse": "single", "forward": "forward", "js": "js", "skew": "skew"}
SOURCES = {"mixed": ["--mix_alpha=0.2"], "student": ["--mix_alpha=0"],
           "teacher": ["--mix_alpha=1", "--weight=none"], "gold": ["--source=gold"]}


def commands(world: World):
    yield world.start()
    for divergence, objective in OBJECTIVES.items():
        for source, flags in SOURCES.items():
            yield world.variant(f"{divergence}-{source}", f"--objective={objective}", *flags)


if __name__ == "__main__":
    run(commands, "grid")
