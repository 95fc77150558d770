"""Table 7 (appendix): what the language-model loss on plain text, L_PT, is good for.

The paper:      without L_PT the average accuracy on SST-2 and BoolQ falls from 70.2 to 65.7
                (OPT-1.3B), and instruction Rouge-L rises from 52.8 to 53.2.
The tiny world: `text_loss`, in nats a token of plain text, stands for accuracy. The student learns
                plain text first, as GPT-2 has, then phase 1; --pt_coef is 0, 0.2 and 1 in phase 2,
                a minute each.
--world=paper:  GPT-2 120M, its accuracy by measure.calibration. The hub lacks two files in this
                form, so put them into the project's root: boolq_dev.jsonl (SuperGLUE's or Google's)
                and dev.tsv (GLUE's SST-2). Not run yet.
Run:            python -m reproduce.table7
"""

from reproduce.worlds import World, run


def commands(world: World):
    yield world.start()
    if world.tiny:
        base, init = world.folder("text-base"), world.folder("text-init")
        yield ["teacher.py", "--resume", "--model=1x2x10", "--data=tiny-text", "--select=loss",
               "--updates=2000", "--lr=1.6e-2", "--batch_size=64", "--micro_batch=64",
               "--max_tokens=44", "--dtype=float32", f"--seed={world.seed}", f"--out={base}"]
        yield world.baseline("text-init", "sft", f"--model={base}", "--lr=1.6e-2",
                             "--updates=2000")
        models = {"text-base": base, "text-init": init}
        for pt_coef in ("0", "0.2", "1"):
            name = f"text-pt-{pt_coef}"
            yield world.variant(name, f"--student={init}", f"--pt_coef={pt_coef}")
            models[name] = f"{world.folder(name)}/minillm"
        for name, model in models.items():
            yield world.evaluation("text", name, model, "--corpus=tiny-text")
        return
    yield world.variant("no-plain-text", "--pt_coef=0")
    for name, model in (
        ("init", world.init),
        ("start", f"{world.folder('start')}/minillm"),
        ("no-plain-text", f"{world.folder('no-plain-text')}/minillm"),
    ):
        yield ["-m", "measure.calibration", f"--model={model}", "--data=boolq_dev.jsonl,dev.tsv",
               f"--out={world.folder(f'text-{name}')}"]


if __name__ == "__main__":
    run(commands, "table7")
