"""Table 3: are MiniLLM's answers less diverse, since reverse KL seeks modes? Dist-4, and the loss.

The paper:      (LLaMA-7B) Dist-4 on Dolly is 99.3 for the teacher, 99.5 for SFT, 99.0 for MiniLLM;
                the loss on the references is 3.55, 3.89 and 3.95.
The tiny world: the models of Table 1, so nothing is left to run. Its report adds what the paper
                lacks, how much the answers to one prompt differ, `dist_4_prompt`, and which facts
                of the world they still tell, `covered`.
--world=paper:  the released students, in perhaps an hour of one GPU. Not run yet.
Run:            python -m reproduce.table3
"""

from reproduce.worlds import World, run


def commands(world: World):
    if world.tiny:
        yield world.start()
        return
    students = [f"{method}-gpt2-120M" for method in ("SFT", "KD", "SeqKD", "MiniLLM")]
    for name in ("teacher-gpt2-1.5B", *students):
        yield ["eval.py", f"--model=MiniLLM/{name}", "--data=dolly,self-inst",
               f"--out={world.shared('eval')}/{name}"]


if __name__ == "__main__":
    run(commands, "table3")
