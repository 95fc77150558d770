"""Is the small student short of memory, or of training? SFT for longer, and after MiniLLM.

The paper:      Section 2.1 argues that a student lacks the capacity to cover all that its teacher
                may say. It does not test this.
The tiny world: SFT of the student, from phase 1 on, with 1, 2, 4 and 8 times the updates of the
                first run, and three learning rates each; SFT of MiniLLM's student, with the updates
                of the first run; the teacher itself with 1, 2, 4 times its updates. If memory is
                what is short, the first levels off below MiniLLM and the second falls back.
--world=paper:  there is nothing.
Run:            python -m reproduce.capacity
"""

from reproduce.worlds import World, run


def commands(world: World):
    if not world.tiny:
        return
    yield world.start()
    for times in (1, 2, 4, 8):
        for lr in ("4e-3", "8e-3", "1.6e-2"):
            yield world.baseline(f"sft-{times}x-{lr}", "sft", f"--lr={lr}",
                                 f"--updates={640 * times}")
    yield world.baseline("sft-after-minillm", "sft", f"--model={world.folder('start')}/minillm",
                         "--lr=6e-3", "--updates=640")
    for times in (2, 4):
        yield world.baseline(f"teacher-{times}x", "sft", "--model=2x4x96", "--lr=6e-3",
                             f"--updates={800 * times}")


if __name__ == "__main__":
    run(commands, "capacity")
