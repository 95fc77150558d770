"""Table 3: are MiniLLM's answers less diverse, as reverse KL seeks modes? Dist-4, and the loss on the references.

The paper:      (LLaMA-7B) Dist-4 on Dolly 99.3 for the teacher, 99.5 for SFT, 99.0 for MiniLLM; loss 3.55, 3.89, 3.95.
The tiny world: the models of Table 1, so nothing is left to run. Its report adds what the paper lacks, how much the
                answers to one prompt differ: `distinct` and `dist_4_prompt`.
--world=paper:  the released students; an hour of one GPU, at a guess. Not run yet.
Run:            python reproduce/table3.py
"""

from worlds import World, run


def commands(world: World):
    if world.tiny:
        yield world.start()
        return
    for name in ("teacher-gpt2-1.5B", "SFT-gpt2-120M", "KD-gpt2-120M", "SeqKD-gpt2-120M", "MiniLLM-gpt2-120M"):
        yield ["eval.py", f"--model=MiniLLM/{name}", "--data=dolly,self-inst", f"--out={world.shared('eval')}/{name}"]


if __name__ == "__main__":
    run(commands, "table3")
