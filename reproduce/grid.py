"""Which divergence, and whose answers: L_Single alone, for sixteen pairs.

The paper's reviewers asked for it. Some pairs have names in the literature: on-policy forward KL is
forward on student; GKD is js on student (its lambda = 1); word-level KD is forward on gold, the
references; MiniLLM without its long term is reverse on mixed. No pair has the long term. References
need no importance weights, and the other answers have them. On the teacher's answers the weight
w_t = q / p has no bound, so that column also shows the noise of its weights.

The tiny world: 16 runs a seed, an hour on two cores.
--world=paper:  seventeen runs of phase 2, one of them with the long term to compare with. Not run
                yet.
Run:            python -m reproduce.grid
"""

from reproduce.worlds import World, run

OBJECTIVES = {"reverse": "single", "forward": "forward", "js": "js", "skew": "skew"}
SOURCES = {"mixed": "--mix_alpha=0.2", "student": "--mix_alpha=0", "teacher": "--mix_alpha=1",
           "gold": "--source=gold"}


def commands(world: World):
    yield world.start()
    for divergence, objective in OBJECTIVES.items():
        for source, flag in SOURCES.items():
            yield world.variant(f"{divergence}-{source}", f"--objective={objective}", flag)


if __name__ == "__main__":
    run(commands, "grid")
