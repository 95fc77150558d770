"""Is the small student short of memory, or of training? SFT for longer, and after MiniLLM.

The paper:      Section 2.1 argues that a student lacks the capacity to cover all that its teacher
                may say. It does not test this.
The tiny world: SFT of the student, from phase 1 on, with 1, 2, 4 and 8 times the updates of the
                first run, at two learning rates; SFT of MiniLLM's student, with as many updates as
                in the first run; the teacher, with twice its updates. If memory is what is short,
                the first levels off below MiniLLM, and the second falls back. Five minutes a seed.
--world=paper:  there is nothing.
Run:            python -m reproduce.capacity
"""

from reproduce.worlds import World, run


def commands(world: World):
    if not world.tiny:
        return
    yield world.start()
    trained = []
    for times in (1, 2, 4, 8):
        for lr in ("8e-3", "1.6e-2"):
            name = f"sft-{times}x-{lr}"
            yield world.baseline(name, "sft", f"--lr={lr}", f"--updates={640 * times}")
            trained.append(name)
    yield world.baseline("sft-after-minillm", "sft", f"--model={world.folder('start')}/minillm",
                         "--lr=8e-3", "--updates=640")
    yield world.baseline("teacher-2x", "sft", "--model=1x4x64", "--lr=1e-2", "--updates=2000")
    for name in (*trained, "sft-after-minillm", "teacher-2x"):
        yield world.evaluation("capacity", name, world.folder(name))


if __name__ == "__main__":
    run(commands, "capacity")
