"""Figure 5: one student, teachers of growing size.

The paper:      120M taught by 340M, 760M and 1.5B: MiniLLM is ahead of SeqKD with each, and gains with their size.
The tiny world: teachers of 2 layers, 32, 48 and 96 wide; minutes.
--world=paper:  the two smaller teachers are the released SFT models. With each, phase 1 anew, as SeqKD begins with
                GPT-2 itself, not with the result of phase 1; then phase 2 and SeqKD. Not run yet.
Run:            python reproduce/fig5.py
"""

from worlds import World, run


def commands(world: World):
    if world.tiny:
        yield world.start()
        for teacher in ("2x4x32", "2x4x48"):
            yield world.variant(f"teacher-{teacher}", f"--teacher={teacher}", "--baselines=seqkd")
        return
    for size in ("340M", "760M", "1.5B"):
        teacher = f"MiniLLM/{'teacher' if size == '1.5B' else 'SFT'}-gpt2-{size}"
        yield world.variant(f"teacher-{size}", f"--teacher={teacher}", "--student=gpt2", "--baselines=seqkd")


if __name__ == "__main__":
    run(commands, "fig5")
