"""The two worlds in which each table and figure is made again, and how a script's commands run.

Every script in this folder lists the project's own commands for one table or figure. Each command
is printed before it runs, and measure.report comes last. Finished work is kept: a script that was
stopped goes on when it is started again, and what several scripts need is made once.

tiny:     the built-in world, on a CPU: a student of 3,250 parameters, and two larger ones where
          sizes are compared
paper:    GPT-2 on Dolly, on a GPU; phase 2 begins with the released teacher and the released
          result of phase 1

Run:      python -m reproduce.table4                         all seeds of the tiny world
          python -m reproduce.table4 --world=paper --dry_run         print the commands, run none
"""

import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import config
from config import Stopped, UserError, check, flag

ROOT = Path(__file__).resolve().parent.parent
Command = list[str]
RUNNING: set[subprocess.Popen] = set()  # the processes that the seeds have started and wait for


@dataclass(frozen=True)
class Config:
    world: Literal["tiny", "paper"] = flag("tiny", "built-in, on a CPU; or the paper's, on a GPU")
    seeds: int | None = flag(None, "runs, with the seeds 1, 2 ...; default 5 in the tiny world, "
                                   "else 1", 1, 100)
    jobs: int = flag(1, "seeds worked on at a time; a CPU does best with one thread for each", 1,
                     100)
    limit: int | None = flag(None, "prompts of each evaluation by the script itself, to try it", 1)
    dry_run: bool = flag(False, "print the commands, run none")

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class World:
    """The commands of one seed. They run in the project's root, to which their folders are
    relative."""

    name: str
    seed: int

    @property
    def tiny(self) -> bool:
        return self.name == "tiny"

    def folder(self, variant: str) -> str:
        return f"out/reproduce/{self.name}/seed-{self.seed}/{variant}"

    def shared(self, variant: str) -> str:
        """The folder of what is the same for all seeds."""
        return f"out/reproduce/{self.name}/{variant}"

    @property
    def teacher(self) -> str:
        return self.folder("start") + "/teacher" if self.tiny else "MiniLLM/teacher-gpt2-1.5B"

    @property
    def init(self) -> str:
        """The student after phase 1."""
        return self.folder("start") + "/init" if self.tiny else "MiniLLM/init-gpt2-120M"

    def distill(self, variant: str, *flags: str) -> Command:
        same = [f"--seed={self.seed}", f"--out={self.folder(variant)}"]
        return ["distill.py", "--resume", *same, *flags]

    def start(self) -> Command:
        """MiniLLM as in the paper. In the tiny world, the teacher, phase 1 and the baselines are
        trained too."""
        if self.tiny:
            return self.distill("start")
        return self.distill("start", f"--teacher={self.teacher}", f"--student={self.init}")

    def variant(self, name: str, *flags: str) -> Command:
        """The command of start, but with these flags."""
        given = {flag.split("=")[0] for flag in flags}
        same = [f"--teacher={self.teacher}", f"--student={self.init}", "--baselines="]
        if self.tiny:
            same.append("--preset=tiny")
        same = [flag for flag in same if flag.split("=")[0] not in given]
        return self.distill(name, *same, *flags)

    def answers(self) -> Command:
        """The teacher's answers, from which SeqKD learns in the built-in world."""
        return ["sample.py", f"--model={self.teacher}", "--data=tiny", "--split=train",
                "--max_prompt_tokens=16", "--max_response_tokens=28", "--sample_batch=256",
                "--dtype=float32", f"--seed={self.seed}", f"--out={self.folder('answers.jsonl')}"]

    def baseline(self, name: str, method: str, *flags: str) -> Command:
        """A baseline of the built-in world, as start() trains it, but with these flags."""
        data = {"seqkd": [f"--data={self.folder('answers.jsonl')}", "--valid_data=tiny"],
                "kd": ["--data=tiny", f"--teacher={self.teacher}"], "sft": ["--data=tiny"]}
        same = [f"--model={self.init}", *data[method], "--max_prompt_tokens=16", "--max_tokens=44",
                "--batch_size=64", "--micro_batch=64", "--select=last", "--evals=1",
                "--dtype=float32", f"--seed={self.seed}", f"--out={self.folder(name)}"]
        given = {flag.split("=")[0] for flag in flags}
        same = [flag for flag in same if flag.split("=")[0] not in given]
        return ["teacher.py", "--resume", *same, *flags]

    def evaluation(self, script: str, name: str, model: str, *flags: str) -> Command:
        """Evaluates a model of the built-in world, as the table at a run's end does."""
        return ["eval.py", f"--model={model}", f"--teacher={self.teacher}", "--data=tiny",
                "--max_prompt_tokens=16", "--max_response_tokens=28", "--sample_batch=256",
                "--dtype=float32", f"--out={self.folder(script)}/{name}", *flags]


def run(commands: Callable[[World], Iterator[Command]], report: str,
        draw: Callable[[], None] | None = None) -> None:
    """Runs the commands of each seed, then measure.report on the folders with results that they
    name as --out, and what draws a figure of its own."""
    config.run(lambda cfg: go(cfg, commands, report, draw), Config)


def go(cfg: Config, commands: Callable[[World], Iterator[Command]], report: str,
       draw: Callable[[], None] | None = None) -> None:
    seeds = cfg.seeds or (5 if cfg.world == "tiny" else 1)
    work = []  # the commands of each seed; what is the same for all seeds is done by the first
    everything = []
    for seed in range(1, seeds + 1):
        mine = [command for command in commands(World(cfg.world, seed))
                if command not in everything]
        work.append(mine)
        everything += mine
    if not everything:
        other = {"tiny": "paper", "paper": "tiny"}[cfg.world]
        raise UserError(f"--world={cfg.world} has nothing of this: give --world={other}")
    made = [flag.removeprefix("--out=") for command in everything for flag in command
            if flag.startswith("--out=") and command[0] not in ("teacher.py", "sample.py")]
    for command in everything:
        if cfg.limit and command[0] in ("eval.py", "-m"):
            command.append(f"--limit={cfg.limit}")
    failed = threading.Event()

    def do(mine: list[Command]) -> None:
        for command in mine:
            if failed.is_set():  # another seed has failed
                return
            try:
                call(command, cfg.dry_run)
            except UserError:
                failed.set()
                raise

    with ThreadPoolExecutor(cfg.jobs) as pool:
        try:
            list(pool.map(do, work))
        except BaseException as error:
            failed.set()
            if isinstance(error, Stopped):  # processes have heard a terminal's Ctrl-C themselves
                for process in list(RUNNING):
                    process.terminate()  # it saves its state and ends
            raise
    out = f"--out=out/reproduce/{cfg.world}/{report}"
    call(["-m", "measure.report", *dict.fromkeys(made), out], cfg.dry_run)
    if draw and not cfg.dry_run:
        draw()


def call(command: Command, dry_run: bool) -> None:
    """Prints a command and runs it. Raises UserError if it fails."""
    print(f"$ python {shlex.join(command)}", flush=True)
    if dry_run:
        return
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    RUNNING.add(process)
    code = process.wait()
    RUNNING.discard(process)
    if code:
        raise UserError(f"stopped: `python {shlex.join(command)}` ended with exit code {code}; "
                        "its message is above")
