"""Figure 7: Rouge-L over that of SFT, by the length of the reference: up to 5 tokens, up to 10, and more.

The paper:      (S-NI) no method gains where references have 5 tokens or less; MiniLLM does from 6 on.
The tiny world: no figure: all its references have 13 words and more, one group; Rouge-L is chance there besides.
--world=paper:  the released students on DollyEval, whose references are of all lengths; the paper's S-NI is on the hub
                in files by length, of which data.py reads the longest. Not run yet.
Run:            python reproduce/fig7.py --world=paper
"""

from worlds import World, run


def commands(world: World):
    for method in ("SFT", "KD", "SeqKD", "MiniLLM") if not world.tiny else ():
        name = f"{method}-gpt2-120M"
        yield ["eval.py", f"--model=MiniLLM/{name}", "--data=dolly", f"--out={world.shared('eval')}/{name}/dolly"]


if __name__ == "__main__":
    run(commands, "fig7")
