"""Figure 6: exposure bias, the excess error that accumulates because a model continues its own words.

The paper:      (120M, 1.5B teacher, Dolly) it grows with the length for the baselines; for MiniLLM it stays flat after
                about 150 tokens.
The tiny world: the models of Table 1; seconds each.
--world=paper:  the released students. Not run yet.
Run:            python reproduce/fig6.py
"""

from worlds import World, run


def commands(world: World):
    if world.tiny:
        yield world.start()
    for method in ("SFT", "KD", "SeqKD", "MiniLLM"):
        model = f"{world.folder('start')}/{method.lower()}" if world.tiny else f"MiniLLM/{method}-gpt2-120M"
        out = world.folder("exposure") if world.tiny else world.shared("exposure")
        yield ["exposure.py", f"--model={model}", f"--teacher={world.teacher}", f"--out={out}/{method.lower()}"]


if __name__ == "__main__":
    run(commands, "fig6")
