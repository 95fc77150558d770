"""What runs on a GPU, run on a pretend one; and what that refuses, as a real one does."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
REFUSED = ["gpu + host", "host + gpu", "torch.cat([gpu, host])", "host[gpu.long()]",
           "gpu[host.long()] = host", "torch.nn.Linear(3, 3).to('cuda')(host)", "gpu.numpy()", "numpy.array(gpu)",
           "record(lambda: gpu.sum().item())", "record(lambda: gpu[gpu > 0])", "record(lambda: gpu.cpu())",
           "record(lambda: host.to('cuda'))", "record(lambda: gpu.copy_(host))", "record(lambda: gpu.tolist())",
           "record(lambda: gpu[host.long()])", "record(lambda: gpu[[0, 2]])", "record(lambda: gpu[[0, 2], ...])",
           "record(lambda: torch.tensor(1, device='cuda'))",
           "torch.empty(2**50, device='cuda')"]
SCRIPT = """
import numpy, torch
from pretend_gpu import GPU
from fast.decode import record
gpu, host, passed = torch.ones(3, device="cuda"), torch.ones(3), []
for line in {lines!r}:
    try:
        exec(line)
    except (RuntimeError, TypeError, AssertionError):
        continue
    passed.append(line)
assert not passed, passed
gpu[[0, 2]] = 2.0
assert gpu.device == GPU and gpu[host.bool()].tolist() == [2.0, 1.0, 2.0]
assert torch.equal(gpu.copy_(host).cpu(), host)
step = record(lambda: gpu.add_(gpu * 2))
for times in (1, 2):
    step()
    assert gpu.tolist() == [3.0**times] * 3
"""


def test_it_refuses_what_a_gpu_refuses(capfd):
    """In a process of its own, as importing it changes torch."""
    process = multiprocessing.get_context("fork").Process(target=exec, args=(SCRIPT.format(lines=REFUSED), {}))
    process.start()
    process.join(60)
    assert process.exitcode == 0, capfd.readouterr().err


def test_the_tests_of_a_gpu_pass():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "pretend_gpu", "tests/test_gpu.py"], env=env,
                          cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
