"""Figure 5: one student, teachers of growing size.

The paper:      340M, 760M and 1.5B teach 120M. MiniLLM is ahead of SeqKD with each of them, and
                gains with their size.
The tiny world: teachers of 1 layer, 16, 32 and 64 wide, in minutes.
--world=paper:  the two smaller teachers are the released SFT models. Each run does phase 1 anew,
                because SeqKD begins with GPT-2 itself and not with the result of phase 1; then come
                phase 2 and SeqKD. Not run yet.
Run:            python -m reproduce.fig5
"""

from reproduce.worlds import World, run


def commands(world: World):
    if world.tiny:
        yield world.start()
        for teacher in ("1x4x16", "1x4x32"):
            yield world.variant(f"teacher-{teacher}", f"--teacher={teacher}", "--baselines=seqkd")
        return
    for size, name in (
        ("340M", "MiniLLM/SFT-gpt2-340M"),
        ("760M", "MiniLLM/SFT-gpt2-760M"),
        ("1.5B", "MiniLLM/teacher-gpt2-1.5B"),
    ):
        yield world.variant(
            f"teacher-{size}", f"--teacher={name}", "--student=gpt2", "--baselines=seqkd")


if __name__ == "__main__":
    run(commands, "fig5")
