"""The released checkpoints on the five sets, beside Table 1: no training, only the hub and a GPU.

Thirteen models, five sets and five seeds, with --no_repeat_ngram=6. The released code's tests have
this rule, and the paper does not mention it: without it Rouge-L was reported to differ by more than
a point. The report has minutes and memory. Not run yet on the true weights, only on stand-ins in
the same file formats.

Run:            python -m reproduce.released --world=paper
                python -m reproduce.released --world=paper --limit=20             a try, in minutes
"""

from reproduce.worlds import World, run

STUDENTS = [f"{method}-gpt2-{size}" for size in ("120M", "340M", "760M")
            for method in ("SFT", "KD", "SeqKD", "MiniLLM")]


def commands(world: World):
    if world.tiny:
        return
    for model in ("teacher-gpt2-1.5B", *STUDENTS):
        yield ["eval.py", f"--model=MiniLLM/{model}", "--data=all", "--no_repeat_ngram=6",
               f"--out={world.shared('released')}/{model}"]


if __name__ == "__main__":
    run(commands, "released")
