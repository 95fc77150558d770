"""Figure 7: Rouge-L over that of SFT, by the length of the reference: up to 5 tokens, up to 10, and more.

The paper:      (S-NI) no method gains on references of 5 tokens or less; MiniLLM gains on longer ones.
The tiny world: no figure: all references have 13 words or more, which is one group, and Rouge-L is chance there.
--world=paper:  the released students on DollyEval, which has references of all lengths; the hub has the paper's S-NI as
                files by length, of which data.py reads the longest. Not run yet.
Run:            python reproduce/fig7.py --world=paper
"""

from worlds import World, run


def commands(world: World):
    for method in ("SFT", "KD", "SeqKD", "MiniLLM") if not world.tiny else ():
        name = f"{method}-gpt2-120M"
        yield ["eval.py", f"--model=MiniLLM/{name}", "--data=dolly", f"--out={world.shared('eval')}/{name}/dolly"]


if __name__ == "__main__":
    run(commands, "fig7")
