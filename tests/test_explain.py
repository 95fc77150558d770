"""The first update, token by token: its figures follow from one another and are those that training logs."""

import json
import math
import re
import sys

import pytest
from conftest import refused

import data
import distill
from config import make
from exercises import explain
from measure import report
from safe.texts import END


def shown(capsys, cfg) -> tuple[list[list[float]], list[float]]:
    """The figures of each token, and the sums below them."""
    capsys.readouterr()
    explain.show(explain.explain(cfg))
    found = [re.findall(r"-?\d+\.\d{4}", line) for line in capsys.readouterr().out.splitlines()]
    *rows, sums = [list(map(float, line)) for line in found if len(line) >= 7]
    return rows, sums


def test_it_shows_the_numbers_of_the_first_update(distill_config, capsys, tmp_path):
    """Each column from those before it, by the equation over it; and the KL of the first answer as the run logs it."""
    cfg = distill_config(rollouts=8, minibatch=1, inner_epochs=1, steps=1)
    rows, sums = shown(capsys, cfg)
    assert not (tmp_path / "run").exists()  # it writes nothing
    log_q, log_p, log_mixed, r, kl, R, w, single, long = map(list, zip(*rows))
    for t in range(len(rows)):
        assert r[t] == pytest.approx(log_p[t] - log_q[t], abs=2e-4)
        assert R[t] == pytest.approx(sum(r[t + 1 :]) / max(1, len(r) - t - 1), abs=2e-4)
        assert w[t] == pytest.approx(math.exp(log_q[t] - log_mixed[t]), abs=2e-4)
        assert math.exp(log_mixed[t]) == pytest.approx(0.2 * math.exp(log_p[t]) + 0.8 * math.exp(log_q[t]), abs=2e-4)
        assert single[t] == pytest.approx(w[t] * kl[t], abs=1e-3)
        assert long[t] == pytest.approx(-min(w[t] * R[t], min(max(w[t], 0.8), 1.2) * R[t]), abs=1e-3)
    assert sums[3:5] == pytest.approx([sum(r), sum(kl)], abs=1e-2) and len(sums) == 7
    distill.distil(cfg)
    logged = [json.loads(line) for line in (tmp_path / "run" / "minillm" / "log.jsonl").read_text().splitlines()]
    first = next(line for line in logged if "reverse_kl" in line)
    assert first["reverse_kl"] == pytest.approx(sums[4], abs=1e-3)
    assert first["loss_single"] * len(rows) == pytest.approx(sums[5], abs=1e-3)
    assert first["loss_long"] * len(rows) == pytest.approx(sums[6], abs=1e-3)


@pytest.mark.parametrize("settings", [
    dict(objective="eq2"), dict(objective="forward"), dict(recipe="official"), dict(source="gold"),
    dict(weight="exact"), dict(weight="long_only"), dict(weight="none"), dict(mix_alpha=0.0)], ids=str)
def test_every_objective_and_weight_has_its_table(settings, distill_config, capsys, tmp_path):
    """The losses are those of the first update of a run with the same flags."""
    cfg = distill_config(rollouts=8, minibatch=1, inner_epochs=1, steps=1, pt_coef=0.0, **settings)
    rows, sums = shown(capsys, cfg)
    distill.distil(cfg)
    logged = [json.loads(line) for line in (tmp_path / "run" / "minillm" / "log.jsonl").read_text().splitlines()]
    first = next(line for line in logged if "reverse_kl" in line)
    for name, total in (("loss_single", sums[5]), ("loss_long", sums[6])):
        assert first[name] * len(rows) == pytest.approx(total, abs=2e-3)


def test_it_says_what_its_settings_make_of_a_column():
    def said(**settings) -> dict[str, str]:
        cfg = make(distill.Config, settings, distill.presets)
        return {head: " ".join(of) for head, of in explain.columns(cfg).items()}

    assert said()["R_t+1"] == "(6) the mean of the r that follow" and said()["L_Single"] == "(7) w_t KL"
    official = said(recipe="official")
    assert official["r_t"] == "(2) log p - log q, clipped at 50" and official["L_Single"] == "(7) KL"
    assert official["R_t"] == "(6) the mean of r_t and the r that follow, discounted by 0.95, whitened"
    assert "the sum of" in said(length_norm=False)["R_t+1"] and "off" in said(objective="single")["L_Long"]
    assert "js divergence" in said(objective="js")["L_Single"] and said()["log p~"].startswith("(4) the mixture's")
    assert "off" in said(objective="eq2")["L_Single"] and said(objective="eq2", length_norm=False)["R_t"][:3] == "(2)"
    assert said(source="gold")["log p~"] == " the student's as of now: this answer is a reference"
    assert said(mix_alpha=1.0)["log p~"] == " the teacher's alone, from which the token was drawn"


def test_a_model_that_is_missing_is_told_with_the_command_that_makes_it(monkeypatch, tmp_path):
    """Phase 2 of the built-in world begins with OUT/teacher and OUT/init."""
    monkeypatch.setattr(sys, "argv", ["explain.py", f"--out={tmp_path}/tiny"])
    cfg = make(distill.Config, {"out": f"{tmp_path}/tiny"}, distill.presets)
    refused(lambda: explain.explain(cfg), f"{tmp_path}/tiny/teacher", f"`python distill.py --out={tmp_path}/tiny`")
    assert not (tmp_path / "tiny").exists()


def test_one_answer_is_drawn_for_any_prompt_and_shown_in_the_report(distill_config, tmp_path, capsys):
    """The tokens of the picture are the table's; the report of its folder holds it."""
    given = {name: value for name, value in vars(distill_config()).items() if name != "out"}
    path = tmp_path / "run" / "answer.png"
    cfg = explain.Config(**given, out=str(tmp_path / "run"), prompt="Tell about the cat", picture=str(path))
    explain.main(cfg)
    printed = capsys.readouterr().out
    assert "Tell about the cat" in printed and f"drawn to {path}" in printed
    assert path.read_bytes().startswith(b"\x89PNG")
    seen = explain.explain(cfg)
    assert seen.row == data.Row("Tell about the cat") and len(seen.tokens) == len(seen.values["r_t"])
    words = [text.get_text() for axes in explain.picture(seen, a_line=5).axes for text in axes.texts]
    for token in seen.tokens:
        assert ("(end)" if token == END else token.strip()[:11]) in words
    assert f"{seen.values['r_t'][0]:.2f}" in words
    assert "the tokens of one answer" in report.pictures([str(tmp_path / "run")]) and not report.pictures([])
    refused(lambda: explain.Config(picture="answer.gif"), "--picture=answer.gif", ".svg or .png")
