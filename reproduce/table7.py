"""Table 7 (appendix): what the language-model loss on plain text, L_PT, is good for.

The paper:      without L_PT the average accuracy on SST-2 and BoolQ falls from 70.2 to 65.7
                (OPT-1.3B), and instruction Rouge-L rises from 52.8 to 53.2.
The tiny world: `text_loss`, in nats a token of plain text, stands for accuracy; it takes minutes.
                The student has seen no plain text before phase 2, so L_PT teaches it and has
                nothing to keep. Phase 1 is measured too.
--world=paper:  GPT-2 120M, its accuracy by measure.calibration. The hub lacks two files in this
                form, so put them into the project's root: boolq_dev.jsonl (SuperGLUE's or Google's)
                and dev.tsv (GLUE's SST-2). Not run yet.
Run:            python -m reproduce.table7
"""

from reproduce.worlds import World, run


def commands(world: World):
    yield world.start()
    yield world.variant("no-plain-text", "--pt_coef=0")
    for name, model in (
        ("init", world.init),
        ("start", f"{world.folder('start')}/minillm"),
        ("no-plain-text", f"{world.folder('no-plain-text')}/minillm"),
    ):
        out = world.folder(f"text-{name}")
        if world.tiny:
            yield ["eval.py", f"--model={model}", "--corpus=tiny-text", "--max_prompt_tokens=16",
                   "--max_response_tokens=28", f"--out={out}"]
        else:
            yield ["-m", "measure.calibration", f"--model={model}",
                   "--data=boolq_dev.jsonl,dev.tsv", f"--out={out}"]


if __name__ == "__main__":
    run(commands, "table7")
