"""Is the small student short of memory, or of training? SFT for longer, and after MiniLLM.

The paper:      Section 2.1 argues that a student lacks the capacity to cover all that its teacher
                may say. It does not test this.
The tiny world: SFT from phase 1 on, with 1, 2, 4 and 8 times the updates of the first run, at two
                learning rates; SFT of MiniLLM's student, with as many updates as in the first run;
                MiniLLM with 4 times the updates. This is done for the student of the first run, 10
                wide, and for one 8 wide that has had three times the phase 1. The teacher gets
                twice its updates. If memory is what is short, SFT levels off below MiniLLM, and
                falls back after it. Eight minutes a seed.
--world=paper:  there is nothing.
Run:            python -m reproduce.capacity       draws out/reproduce/tiny/capacity/capacity.png
"""

import numpy as np

from measure.report import Figure, over_runs
from reproduce.worlds import ROOT, World, run
from safe.files import read_json

TIMES, RATES = (1, 2, 4, 8), ("1.6e-2", "3.2e-2")
WIDTHS = {"10 wide": "", "8 wide": "narrow-"}  # what begins the names of their runs


def commands(world: World):
    if not world.tiny:
        return
    yield world.start()
    narrow = world.folder("narrow-init")
    yield world.baseline("narrow-init", "sft", "--model=1x2x8", "--lr=1.6e-2", "--updates=6000")
    yield world.variant("narrow", f"--student={narrow}")
    yield world.variant("minillm-4x", "--steps=2560")
    yield world.variant("narrow-minillm-4x", f"--student={narrow}", "--steps=2560")
    yield world.baseline("teacher-2x", "sft", "--model=1x4x64", "--lr=1e-2", "--updates=2000")
    trained = ["narrow-init", "teacher-2x"]
    for width, init, result in (("", world.init, "start"), ("narrow-", narrow, "narrow")):
        for times in TIMES:
            for lr in RATES:
                name = f"{width}sft-{times}x-{lr}"
                yield world.baseline(name, "sft", f"--model={init}", f"--lr={lr}",
                                     f"--updates={640 * times}")
                trained.append(name)
        after = f"{width}sft-after-minillm"
        yield world.baseline(after, "sft", f"--model={world.folder(result)}/minillm", "--lr=8e-3",
                             "--updates=640")
        trained.append(after)
    for name in trained:
        yield world.evaluation("capacity", name, world.folder(name))


def right(name: str) -> list[float]:
    """The right answers, in percent, of each seed's model."""
    seeds = sorted(path.parent for path in ROOT.glob("out/reproduce/tiny/seed-*/capacity"))
    files = [seed / name / "results.json" for seed in seeds]
    return [float(np.mean(read_json(file)["scores"]["valid"])) for file in files]


def draw() -> None:
    """Right answers by updates after phase 1; of SFT at the better rate for each number of them."""
    lines = {}
    for title, width in WIDTHS.items():
        by_times = []
        for times in TIMES:
            values = [right(f"capacity/{width}sft-{times}x-{lr}") for lr in RATES]
            by_times.append(max(values, key=np.mean))
        minillm = [right(f"{width.strip('-') or 'start'}/test/minillm"),
                   right(f"{width}minillm-4x/test/minillm")]
        after = [right(f"capacity/{width}sft-after-minillm")]
        for method, updates, measured in (("SFT", TIMES, by_times), ("MiniLLM", (1, 4), minillm),
                                          ("SFT after MiniLLM", (2,), after)):
            curves = [(updates, values) for values in zip(*measured)]  # of each seed
            label = f"{method}, {title}"
            lines[label] = tuple(over_runs(curves))
            print(f"{label}: {np.round(lines[label][1], 1).tolist()} % of right answers")
    figure = Figure("", "", "capacity", [], {"": lines}, "updates / 640", "right answers, %")
    (ROOT / "out/reproduce/tiny/capacity/capacity.png").write_bytes(figure.png)


if __name__ == "__main__":
    run(commands, "capacity", draw)
