"""Figure 7: Rouge-L over that of SFT, by the length of the reference: to 5 tokens, to 10, and more.

The paper:      (S-NI) no method gains on references of 5 tokens or less. MiniLLM gains on longer
                ones.
The tiny world: there is no figure. All references have 13 words or more, which is one group, and
                Rouge-L is chance there.
--world=paper:  the released students on DollyEval, which has references of all lengths. The hub has
                the paper's S-NI as files by length, and data.py reads the longest of them. Not run
                yet.
Run:            python -m reproduce.fig7 --world=paper
"""

from reproduce.worlds import World, run


def commands(world: World):
    if world.tiny:
        return
    for method in ("SFT", "KD", "SeqKD", "MiniLLM"):
        name = f"{method}-gpt2-120M"
        yield ["eval.py", f"--model=MiniLLM/{name}", "--data=dolly",
               f"--out={world.shared('eval')}/{name}/dolly"]


if __name__ == "__main__":
    run(commands, "fig7")
