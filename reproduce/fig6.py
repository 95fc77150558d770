"""Figure 6: exposure bias, the excess error that accumulates as a model goes on from its own text.

The paper:      (120M, 1.5B teacher, Dolly) for the baselines it grows with the length; for MiniLLM
                it stays flat after about 150 tokens.
The tiny world: the models of Table 1, in seconds each.
--world=paper:  the released students. Not run yet.
Run:            python -m reproduce.fig6
"""

from reproduce.worlds import World, run


def commands(world: World):
    if world.tiny:
        yield world.start()
    for method in ("SFT", "KD", "SeqKD", "MiniLLM"):
        if world.tiny:
            model = f"{world.folder('start')}/{method.lower()}"
            out = world.folder("exposure")
        else:
            model = f"MiniLLM/{method}-gpt2-120M"
            out = world.shared("exposure")
        yield ["-m", "measure.exposure", f"--model={model}", f"--teacher={world.teacher}",
               f"--out={out}/{method.lower()}"]


if __name__ == "__main__":
    run(commands, "fig6")
