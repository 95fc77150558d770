"""The settings of the first run: which learning rate is best for each method.

The search is the same for the baselines and for MiniLLM: four learning rates on the seeds 101, 102
and 103, which no table uses.

The tiny world: sixteen runs a seed, in five minutes; each run's last validation tells.
--world=paper:  there is nothing; Appendix B.1 has the paper's grids.
Run:            python -m reproduce.search --seeds=3
"""

from reproduce.worlds import World, run

RATES = ("2e-3", "4e-3", "8e-3", "1.6e-2")


def commands(world: World):
    if not world.tiny:
        return
    world = World(world.name, 100 + world.seed)
    yield world.start()
    yield world.answers()
    for lr in RATES:
        for method in ("sft", "kd", "seqkd"):
            yield world.baseline(f"{method}-{lr}", method, f"--lr={lr}", "--updates=640")
        yield world.variant(f"minillm-{lr}", f"--lr={lr}")


if __name__ == "__main__":
    run(commands, "search")
