"""Exposure bias is compared with full enumeration, where R(l), eps(l) and ExAccErr(l) are exact."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import another_vocabulary, change_weights, random_gpt, refused

from measure import exposure
from measure.exposure import errors, excess
from sample import decoder


def test_by_hand():
    """The errors are 1, 3 along q's answers and 1, 1 along p's, so R = 1, 4, l eps = 1, 2 and the excess 0%, 100%."""
    totals = np.array([[[2.0, 6.0]], [[2, 2]], [[4, 1]], [[4, 1]]])
    R, eps, ex_acc_err = excess(totals)
    assert R.tolist() == [1, 4] and eps.tolist() == [1, 1] and ex_acc_err.tolist() == [0, 100]


def test_answers_that_have_ended_are_not_counted():
    """One of q's two answers ends after its first token, so the mean of the second position is over the other alone."""
    totals = np.array([[[2.0, 3.0]], [[2, 1]], [[2, 2]], [[2, 2]]])
    assert excess(totals)[0].tolist() == [1, 4]
    for times, positions in ((1000, 1), (100, 2)):  # 2 answers of 2,000 are too few for a position, 2 of 200 are not
        assert len(excess(np.concatenate([totals[:, :, :1] * times, totals], 2))[0]) == positions


def exact(student, teacher, prompt, speaker, T, vocab):
    """The mean error at each position, over every prefix that has not ended, weighted by its probability."""
    means = []
    for t in range(T):
        prefixes = list(itertools.product(range(vocab - 1), repeat=t))
        tokens = torch.tensor([prompt + list(prefix) for prefix in prefixes])
        with torch.no_grad():
            logps = {gpt: gpt.logits(gpt(tokens)).log_softmax(-1).double() for gpt in (student, teacher)}
        weight = torch.ones(len(prefixes), dtype=torch.float64)
        for at in range(t):
            step = logps[speaker][torch.arange(len(prefixes)), len(prompt) - 1 + at]
            weight *= step.gather(1, tokens[:, len(prompt) + at, None]).squeeze(1).exp()
        p, q = logps[teacher][:, -1], logps[student][:, -1]
        means.append(((p.exp() * (p - q)).sum(-1) @ weight / weight.sum()).item())
    return np.array(means)


def test_sampling_gives_what_enumeration_does(m):
    student, teacher = random_gpt(3, vocab_size=4, eos_token_id=3), random_gpt(4, vocab_size=4, eos_token_id=3)
    prompt, n, T = [1, 2], 10_000, 3
    along_q, along_p = (exact(student, teacher, prompt, gpt, T, 4) for gpt in (student, teacher))
    assert abs(along_q - along_p)[1:].min() > 0.01  # else the test could not tell them apart
    totals = errors(student, teacher, [prompt] * n, 1, T, dataclasses.replace(m, sample_batch=n, logits=n * T * 4))
    R, eps, ex_acc_err = excess(totals)
    spread = [np.array([totals[at][totals[at + 1][:, t] > 0, t].std() for t in range(T)]) for at in (0, 2)]
    tolerance = [4 * s.cumsum() / n**0.5 + 1e-6 for s in spread]
    assert (abs(R - along_q.cumsum()) < tolerance[0]).all()
    assert (abs(eps * np.arange(1, T + 1) - along_p.cumsum()) < tolerance[1]).all()
    want = 100 * (along_q.cumsum() / along_p.cumsum() - 1)
    assert ex_acc_err == pytest.approx(want, abs=3) and ex_acc_err[0] == pytest.approx(0, abs=1e-3)


def test_neither_batches_nor_the_decoder_change_anything(m):
    student, teacher = random_gpt(1), random_gpt(2)
    prompts = [[1, 2], [3], [4, 5, 6]]
    totals = errors(student, teacher, prompts, 2, 6, m)
    assert totals.shape == (4, 3, 6) and (totals[1, :, 0] == 2).all() and (totals[3, :, 0] == 2).all()
    few = dataclasses.replace(m, sample_batch=2, logits=6 * 11)
    np.testing.assert_allclose(errors(student, teacher, prompts, 2, 6, few), totals, atol=1e-5)
    draw, ready = decoder("fast")
    models = [ready(model, m.dtype) for model in (student, teacher)]
    np.testing.assert_allclose(errors(*models, prompts, 2, 6, m, draw=draw), totals, atol=1e-4)


def test_several_processes_answer_each_prompt_once(m):
    """The parts of two processes add up to what one process finds."""
    student, teacher = random_gpt(1), random_gpt(2)
    prompts = [[1, 2], [3], [4, 5, 6]]
    parts = []
    for rank in range(2):
        alone = dataclasses.replace(m, rank=rank, world=2)
        object.__setattr__(alone, "sum", lambda *tensors: None)
        parts.append(errors(student, teacher, prompts, 2, 6, alone))
    np.testing.assert_allclose(sum(parts), errors(student, teacher, prompts, 2, 6, m), atol=1e-5)


def test_the_command(tiny_models, tmp_path, capsys):
    model = str(shutil.copytree(tiny_models["student"], tmp_path / "q"))
    settings = dict(model=model, teacher=tiny_models["teacher"], limit=4, samples=2, device="cpu",
                    max_response_tokens=6, dtype="float32", out=str(tmp_path))
    results = exposure.main(exposure.Config(**settings))
    printed = capsys.readouterr().out
    assert "4 prompts, 2 answers each" in printed and "ExAccErr" in printed
    assert json.loads((tmp_path / "exposure.json").read_text()) == results
    assert all(low <= value <= high for low, value, high in zip(*(results[k] for k in ("low", "ex_acc_err", "high"))))
    assert exposure.main(exposure.Config(**settings)) == results and "kept" in capsys.readouterr().out
    change_weights(settings["model"])
    refused(lambda: exposure.main(exposure.Config(**settings)), "exposure.json holds results of other settings")
    again = exposure.main(exposure.Config(**settings | dict(out=None)))
    assert again["R"] != results["R"]
    itself = exposure.main(exposure.Config(**settings | dict(teacher=model, out=None)))
    assert itself["ex_acc_err"] == [None] * 6 and itself["R"] == [0.0] * 6  # without an error there is no excess


def test_commands_that_cannot_work(tiny_models, tmp_path):
    another_vocabulary(tmp_path / "other")
    settings = dict(model=tiny_models["student"], device="cpu")
    refused(lambda: exposure.main(exposure.Config(**settings, teacher=str(tmp_path / "other"))), "other 78")
    refused(lambda: exposure.main(exposure.Config(**settings, teacher="out/no/where")), "out/no/where")
    refused(lambda: exposure.Config(samples=0), "--samples=0 is out of range")
