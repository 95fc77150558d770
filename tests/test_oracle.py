"""By enumeration of every answer: which equations have the gradient of KL[q || p], and how far the others are."""

import re
from pathlib import Path

import pytest
import torch

from exercises import oracle
from exercises.oracle import ESTIMATORS, MASK, RESPONSE, answer_gradients, compare, exact_gradient


def test_all_answers_are_there_once():
    assert len({tuple(r[m].tolist()) for r, m in zip(RESPONSE, MASK)}) == len(RESPONSE) == 1 + 2 + 4 * 3
    student, teacher = torch.randn(2, 7, 3, dtype=torch.float64)
    probability, _ = answer_gradients(student.requires_grad_(), teacher)
    assert probability.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", [
    "Eq. (2)", "Eq. (2) without its -1", "Eq. (3)", "Eq. (4), alpha 0.2, exact weights"])
def test_what_is_exact_is_exact(name):
    cosine, error, _ = compare(ESTIMATORS[name], toys=20, seed=1)
    assert error < 1e-10 and cosine == pytest.approx(1)


@pytest.mark.parametrize("mix_alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("objective", ["eq2", "eq3"])
def test_exact_weights_are_exact_for_any_mixture(objective, mix_alpha):
    """alpha = 1 samples from the teacher alone."""
    assert compare(dict(mix_alpha=mix_alpha, weight="exact", objective=objective), toys=5, seed=2)[1] < 1e-10


@pytest.mark.parametrize("name", [
    "L_Single alone (GKD with reverse KL)", "L_Single, and R_t for R_{t+1}", "Eqs. (4, 5) as printed: product",
    "Eqs. (4, 5) with w_t per token", "Eq. (4), no weights", "Eq. (6), length normalisation",
    "--recipe=paper: Eq. (7), clipped", "--recipe=official"])
def test_what_is_biased_is_not_called_exact(name):
    assert compare(ESTIMATORS[name], toys=20, seed=1)[1] > 0.02


def test_the_product_weight_is_exact_for_the_single_step_alone():
    """Eq. (5) as printed errs on the long term only: its R_{t+1} is made of tokens drawn from p~ as well."""
    torch.manual_seed(0)
    student, teacher = torch.randn(7, 3, requires_grad=True, dtype=torch.float64), torch.randn(7, 3).double()

    def expected(**settings):
        probability, each = answer_gradients(student, teacher, objective="single", **settings)
        return probability @ each

    on_policy = expected()
    for weight in ("product", "exact"):
        torch.testing.assert_close(expected(mix_alpha=0.2, weight=weight), on_policy, atol=1e-12, rtol=0)
    assert (expected(mix_alpha=0.2, weight="per_token") - on_policy).norm() > 1e-3


def test_the_per_token_weight_on_the_single_step_changes_no_expectation():
    """Its conditional mean is 1, so that it only adds noise: why the released code could drop it."""
    with_it = compare(ESTIMATORS["Eqs. (4, 5) with w_t per token"], 20, 1)
    without = compare(ESTIMATORS["  the same, not on L_Single"], 20, 1)
    assert with_it[:2] == pytest.approx(without[:2], abs=1e-12) and with_it[2] > without[2]


def test_an_on_policy_step_needs_no_weights():
    student, teacher = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    exact = exact_gradient(student, teacher).flatten()
    for weight in ("none", "per_token", "product", "exact"):
        probability, each = answer_gradients(student, teacher, weight=weight)
        torch.testing.assert_close(probability @ each, exact, atol=1e-12, rtol=0)


def test_the_released_codes_doubling_is_removed_by_its_whitening():
    """It doubles r_t and clips at 100; --recipe=official clips at 50, and whitens as it does."""
    released = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 40
    mask = torch.ones(5, 7).bool()
    theirs, ours = (2 * released).clamp(-100, 100), released.clamp(-50, 50)
    assert (ours.abs() == 50).any()
    torch.testing.assert_close(oracle.whitened(theirs, mask, "all"), oracle.whitened(ours, mask, "all"))


def test_the_command_prints_the_table(capsys):
    oracle.main(oracle.Config(toys=2))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ESTIMATORS) and "cosine" in printed


def test_the_figures_of_the_annotated_page():
    """Each bias that docs/annotated.md gives in brackets is what the command prints, and none is left out."""
    page = (Path(oracle.__file__).parent.parent / "docs" / "annotated.md").read_text(encoding="utf-8")
    names = ["L_Single alone (GKD with reverse KL)", "L_Single, and R_t for R_{t+1}", "Eqs. (4, 5) as printed: product",
             "Eqs. (4, 5) with w_t per token", "Eq. (6), length normalisation", "--recipe=paper: Eq. (7), clipped"]
    given = set(re.findall(r"\[(0\.\d\d)\]", page))
    assert given == {f"{compare(ESTIMATORS[name], toys=100, seed=0)[1]:.2f}" for name in names}
