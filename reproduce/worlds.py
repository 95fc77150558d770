"""The two worlds in which each table and figure is made again, and how a script's commands are run.

Every script beside this file lists the project's own commands for one table or figure, prints each before it runs, and
ends with report.py. What is finished is kept: a script that was stopped goes on when it is started again, and what
scripts have in common is made once.

tiny:     the built-in world, on a CPU: a student of 3,756 parameters, and two larger ones where sizes are compared
paper:    GPT-2 on Dolly, on a GPU; phase 2 starts from the released teacher and the released result of phase 1

Run:      python reproduce/table4.py                         all seeds of the tiny world
          python reproduce/table4.py --world=paper --dry_run         print the commands, run none
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project's files have no package

import config  # noqa: E402
from config import Stopped, UserError, check, flag  # noqa: E402

Command = list[str]
RUNNING: set[subprocess.Popen] = set()  # what the seeds have started, and wait for


@dataclass(frozen=True)
class Config:
    world: Literal["tiny", "paper"] = flag("tiny", "built-in, on a CPU; or the paper's, on a GPU")
    seeds: int | None = flag(None, "runs, each with a seed of its own, 1, 2 ...; default 5 in the tiny world, else 1")
    jobs: int = flag(1, "seeds worked on at a time; a CPU of few cores does best with one thread and a job for each")
    limit: int | None = flag(None, "prompts of each evaluation that the script itself asks for: to try it")
    dry_run: bool = flag(False, "print the commands, run none")

    def __post_init__(self):
        check(self, seeds=(1, 100), jobs=(1, 100), limit=(1, 10**9))


@dataclass(frozen=True)
class World:
    """The commands of one seed. They run in the project's root, to which their folders are relative."""
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
        return ["distill.py", "--resume", f"--seed={self.seed}", f"--out={self.folder(variant)}", *flags]

    def start(self) -> Command:
        """MiniLLM as the paper has it; in the tiny world together with the teacher, phase 1 and the baselines."""
        if self.tiny:
            return self.distill("start")
        return self.distill("start", f"--teacher={self.teacher}", f"--student={self.init}")

    def variant(self, name: str, *flags: str) -> Command:
        """The same as start, but for these flags."""
        given = {f.split("=")[0] for f in flags}
        same = [f"--teacher={self.teacher}", f"--student={self.init}", "--baselines="]
        same += ["--preset=tiny"] if self.tiny else []
        return self.distill(name, *(f for f in same if f.split("=")[0] not in given), *flags)


def run(commands: Callable[[World], Iterator[Command]], report: str) -> None:
    """Runs the commands of each seed, then report.py on the folders that they name as --out."""
    config.run(lambda cfg: go(cfg, commands, report), Config)


def go(cfg: Config, commands: Callable[[World], Iterator[Command]], report: str) -> None:
    work, everything = [], []  # what is the same for all seeds is done once, by the first
    for seed in range(1, 1 + (cfg.seeds or (5 if cfg.world == "tiny" else 1))):
        work.append([command for command in commands(World(cfg.world, seed)) if command not in everything])
        everything += work[-1]
    if not everything:
        raise UserError(f"--world={cfg.world} has nothing of this: give --world=paper")
    made = [f.removeprefix("--out=") for command in everything for f in command if f.startswith("--out=")]
    for command in everything:
        if cfg.limit and command[0] != "distill.py":
            command.append(f"--limit={cfg.limit}")
    failed = threading.Event()

    def do(seed: list[Command]) -> None:
        for command in seed:
            if failed.is_set():  # a seed that fails stops the others after their present command
                return
            try:
                call(command, cfg.dry_run)
            except UserError:
                failed.set()
                raise

    with ThreadPoolExecutor(cfg.jobs) as pool:
        try:
            list(pool.map(do, work))
        except BaseException as stop:
            failed.set()
            for process in list(RUNNING) if isinstance(stop, Stopped) else ():
                process.terminate()  # it saves and ends; a terminal's Ctrl-C it has heard itself
            raise
    call(["report.py", *dict.fromkeys(made), f"--out=out/reproduce/{cfg.world}/{report}"], cfg.dry_run)


def call(command: Command, dry_run: bool) -> None:
    print(f"$ python {shlex.join(command)}", flush=True)
    if dry_run:
        return
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    RUNNING.add(process)
    code = process.wait()
    RUNNING.discard(process)
    if code:
        raise UserError(f"stopped: `python {shlex.join(command)}` ended with exit code {code}; what it said is above")
