"""Table 1, the GPT-2 rows: SFT, KD, SeqKD and MiniLLM, for three sizes of student.

The paper:      MiniLLM leads in Rouge-L, except with 340M on Dolly; with 120M it has 24.6 there,
                and SFT has 23.3.
The tiny world: one set, whose measures are valid % and reverse KL; students of 1 layer, 8, 10 and
                16 wide, of which the smaller do not hold all facts of that world. 15 minutes.
--world=paper:  everything is trained anew, the teacher first; then five sets and five seeds for
                each of 13 models, on one GPU of 80 GB. The hours on yours are told by
                `python distill.py --teacher=gpt2-xl --plan=only`. Not run yet.
Run:            python -m reproduce.table1
"""

from reproduce.worlds import World, run


def commands(world: World):
    if world.tiny:
        yield world.start()
        for size in ("1x2x8", "1x2x16"):
            yield world.distill(
                size, "--preset=tiny", f"--teacher={world.teacher}", f"--student={size}")
        return
    teacher = "gpt2-xl"
    for size in ("gpt2", "gpt2-medium", "gpt2-large"):
        yield world.distill(
            size, f"--teacher={teacher}", f"--student={size}", "--baselines=sft,kd,seqkd")
        if teacher == "gpt2-xl":  # it was fine-tuned with the first student, and teaches the others
            teacher = world.folder(size) + "/teacher"
            yield ["eval.py", f"--model={teacher}", "--data=all",
                   f"--out={world.folder('eval')}/teacher"]
        for method in ("sft", "kd", "seqkd", "minillm"):
            yield ["eval.py", f"--model={world.folder(size)}/{method}", "--data=all",
                   f"--out={world.folder('eval')}/{size}/{method}"]


if __name__ == "__main__":
    run(commands, "table1")
