"""The report shows the figures of the right runs, the paper's beside them, on a page that needs nothing else."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
from conftest import refused

import distill
from config import UserError
from measure import calibration, exposure, report
from measure.report import curve, differing, find, smooth, values_of
from safe.runs import checksum

SETTINGS = ("no_repeat_ngram", "limit", "split", "weights")


def evaluation(folder, model, data="tiny", rouge=(1.0, 3.0), parameters=5, lengths=None, **scores):
    """An evaluation as the first version wrote it, or as it is now if there are `lengths` of references."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"model": model} | {name: scores.pop(name) for name in SETTINGS if name in scores}
    content = {"command": f"python eval.py --model={model}", "given": given, "data": data, "prompts": 3,
               "seeds": [10, 20], "parameters": parameters, "seconds": 60.0, "peak_gib": 1.5,
               "scores": {"rouge_l": list(rouge)} | scores, "rouge_l_interval": [1, 2],
               "rouge_l_by_length": {"[0,5]": {"prompts": 1, "mean": rouge[0]}, "[11,inf)": {"prompts": 2, "mean": 2}}}
    rows = [{"seed": seed, "prompt": n, "instruction": f"Say {n}", "input": "", "references": ["<b>this</b>"],
             "answer": f"{model} says {n} by {seed}", "scores": {"rouge_l": 1.0, "tokens": 4}}
            for seed in (10, 20) for n in range(3)]
    if lengths:
        del content["rouge_l_interval"], content["rouge_l_by_length"]
        for n, (row, length) in enumerate(zip(rows, lengths)):
            row |= {"reference_tokens": length, "scores": {"rouge_l": float(n)}}
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def training(folder, out, **flags):
    """A run of phase 2 with its evaluation."""
    (folder / "minillm").mkdir(parents=True)
    settings = {"command": "python distill.py", "out": out, "seed": 1, "teacher": "p", "data": "tiny", "mix_alpha": 0.2,
                "objective": "eq3", "source": "sampled"} | flags
    if settings["objective"] is None:  # of an earlier version
        del settings["objective"]
    (folder / "minillm" / "run.json").write_text(json.dumps(settings))
    lines = [{"step": 0, "valid": {"valid": 10.0}}] + [{"step": n, "reverse_kl": 5.0 / n} for n in range(1, 9)]
    (folder / "minillm" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def of_kind(kind, found):
    return [item for item in found if item.kind == kind]


def ablation(found):
    """The evaluated runs of MiniLLM: what each table of an ablation is given, and the table of flags."""
    runs = of_kind("training", found)
    results = report.tested(runs, of_kind("evaluation", found))
    return runs, results, report.ablation_table(runs, results)


def results_on(found):
    return [report.result_table(data, items) for data, items in report.by_data(of_kind("evaluation", found)).items()]


def run_of(tmp_path, seed, name, valid, **flags):
    out = f"out/seed-{seed}/{name}"
    training(tmp_path / f"seed-{seed}" / name, out, seed=seed, **flags)
    evaluation(tmp_path / f"seed-{seed}" / name / "test" / "minillm", out + "/minillm", valid=[valid])


def test_runs_are_grouped_over_seeds_and_told_by_what_differs(tmp_path):
    for seed, valid in ((1, 90.0), (2, 70.0)):
        run_of(tmp_path, seed, "full", valid)
        run_of(tmp_path, seed, "student", valid - 50, mix_alpha=0.0)
    found = find([str(tmp_path)])
    assert {item.name for item in found} == {"full/minillm", "student/minillm"}
    runs, _, table = ablation(found)
    assert differing(runs) == ["mix_alpha"]
    assert table.header[:4] == ["model", "runs", "--mix_alpha", "valid"]
    assert [row[:4] for row in table.rows] == [["full/minillm", "2", "0.2", "80.00 ± 14.14"],
                                               ["student/minillm", "2", "0.0", "30.00 ± 14.14"]]
    figure = report.sweep_figure("mix_alpha", runs, of_kind("evaluation", found))
    assert figure.file == "alpha" and "Figure 16" in figure.about and figure.ticks == ["0.0", "0.2"]
    assert report.ablation_table(runs[:1], {}).rows == []


def test_a_loss_that_was_not_computed_is_not_drawn_as_none(tmp_path):
    """Without plain text a run logs a loss_pt of 0."""
    for name, pt_coef in (("with", 0.2), ("without", 0.0)):
        training(tmp_path / name, f"out/{name}", pt_coef=pt_coef)
        (tmp_path / name / "minillm" / "log.jsonl").write_text('{"step": 1, "reverse_kl": 2.0, "loss_pt": 0.0}\n')
    figure = report.training_figure(find([str(tmp_path)]), 32)
    assert [*figure.panels["loss_pt"]] == ["with/minillm"] and len(figure.panels["reverse_kl"]) == 2


def test_two_evaluations_of_one_model_are_one_row(tmp_path):
    """The second evaluation of a set adds what the first lacks. Evaluations of other sets are not mixed in."""
    run_of(tmp_path, 1, "start", 90.0)
    run_of(tmp_path, 1, "other", 80.0, gamma=0.5)
    for path, weights in (("seed-1/start/test/minillm", [7, 8]), ("text", [7, None])):  # with a teacher, and without
        evaluation(tmp_path / path, "out/seed-1/start/minillm", weights=weights, **(
            {"valid": [90.0]} if "seed" in path else {"text_loss": [1.25], "valid": [0.0]}))
    evaluation(tmp_path / "vicuna", "out/seed-1/start/minillm", "vicuna", valid=[0.0])
    found = find([str(tmp_path)])
    assert len(of_kind("evaluation", found)) == 3
    *_, table = ablation(found)
    rows = {row[0]: dict(zip(table.header, row)) for row in table.rows}
    assert rows["start/minillm"]["text_loss"] == "1.25" and rows["other/minillm"]["text_loss"] == ""
    assert rows["start/minillm"]["valid"] == "90.00" and rows["start/minillm"]["runs"] == "1"


def test_an_ablation_goes_by_the_settings_of_the_runs_own_test(tmp_path):
    """A second evaluation of one run, with other settings and under another name, does not stand in for it."""
    for seed, valid in ((1, 90.0), (2, 70.0)):
        run_of(tmp_path, seed, "start", valid)
        run_of(tmp_path, seed, "other", valid, gamma=0.5)
    evaluation(tmp_path / "seed-1" / "z", "out/seed-1/start/minillm", valid=[0.0], limit=3)
    *_, table = ablation(find([str(tmp_path)]))
    assert [row[:4] for row in table.rows] == [["other/minillm", "2", "0.5", "80.00 ± 14.14"],
                                               ["start/minillm", "2", "None", "80.00 ± 14.14"]]


def test_spread_is_over_runs_or_over_the_seeds_of_a_single_one(tmp_path):
    evaluation(tmp_path / "a", "seed-1/m", rouge=(1.0, 3.0))
    one = find([str(tmp_path)])
    assert values_of(one, "rouge_l") == [1.0, 3.0] and report.shown([1.0, 3.0], 1) == "2.00 ± 1.41"
    evaluation(tmp_path / "b", "seed-2/m", rouge=(5.0, 7.0))
    two = find([str(tmp_path)])
    assert values_of(two, "rouge_l") == [2.0, 6.0] and values_of(two, "valid") == []
    assert report.shown([2.0], 2, 1) == "2.0 (of 1)" and report.shown([], 2) == ""


def test_the_papers_figure_stands_beside_the_same_model_and_set(tmp_path):
    evaluation(tmp_path / "a", "MiniLLM/SFT-gpt2-120M", "dolly", (23.5, 24.1), 124_439_808)
    evaluation(tmp_path / "b", "out/gpt2-xl-to-gpt2/minillm", "dolly", (20.0, 20.0), 124_439_808)
    evaluation(tmp_path / "c", "out/other/minillm", "dolly", (20.0, 20.0), 1234)
    evaluation(tmp_path / "d", "MiniLLM/teacher-gpt2-1.5B", "sinst", (27.6, 27.6), 1_557_611_200)
    report.main(report.Config((str(tmp_path),), out=str(tmp_path / "report")))  # without any training
    dolly, sinst = results_on(find([str(tmp_path)]))
    column = dolly.header.index("paper's rouge_l")
    beside = {row[0]: row[column : column + 2] for row in dolly.rows}
    assert beside == {"MiniLLM/SFT-gpt2-120M": ["23.3", "+0.5"], "out/gpt2-xl-to-gpt2/minillm": ["24.6", "-4.6"],
                      "out/other/minillm": ["", ""]}
    assert sinst.rows[0][column : column + 2] == ["27.6", "+0.0"]


def square(tmp_path) -> dict[tuple, str]:
    runs, results, _ = ablation(find([str(tmp_path)]))
    table = report.square_table(runs, results, "valid")
    return {(row[0], name): cell for row in table.rows for name, cell in zip(table.header[1:], row[1:])}


def test_the_sixteen_pairs_are_a_square(tmp_path):
    run_of(tmp_path, 1, "start", 99.0)
    for n, (objective, mix_alpha) in enumerate((o, a) for o in ("single", "js") for a in (0.2, 0.0)):
        run_of(tmp_path, 1, f"{objective}-{mix_alpha}", 10.0 * n, objective=objective, mix_alpha=mix_alpha)
    assert square(tmp_path) == {("reverse", "mixed"): "0.00", ("reverse", "student"): "10.00",
                                ("js", "mixed"): "20.00", ("js", "student"): "30.00"}
    run_of(tmp_path, 1, "gold", 40.0, objective="skew", source="gold")
    assert square(tmp_path)["skew", "gold"] == "40.00" and square(tmp_path)["skew", "mixed"] == ""


def test_flags_of_earlier_versions_are_understood(tmp_path):
    """Runs of the first version had --divergence, --source=mixed and --long_term, and flags that changed no result."""
    for n, (divergence, source) in enumerate((d, s) for d in ("reverse", "js") for s in ("mixed", "student")):
        run_of(tmp_path, 1, f"{divergence}-{source}", 10.0 * n, divergence=divergence, source=source, long_term=False,
               objective=None, vocab_chunk=n, log_every=n, capture=bool(n))
    run_of(tmp_path, 1, "whole", 50.0, divergence="reverse", source="mixed", long_term=True, objective=None)
    assert square(tmp_path) == {("reverse", "mixed"): "0.00", ("reverse", "student"): "10.00",
                                ("js", "mixed"): "20.00", ("js", "student"): "30.00"}
    *_, table = ablation(find([str(tmp_path)]))
    flags = [name for name in table.header if name.startswith("--")]
    assert set(flags) == {"--divergence", "--source", "--long_term"}


def test_curves(tmp_path):
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]
    training(tmp_path, "out/x")
    steps, values = curve(tmp_path / "minillm" / "log.jsonl", "reverse_kl")
    assert steps == list(range(1, 9)) and values[4] == 1.0
    assert curve(tmp_path / "minillm" / "log.jsonl", "valid") == ([0], [10.0])
    assert curve(tmp_path / "minillm" / "log.jsonl", "rouge_l") == ([], [])
    with open(tmp_path / "minillm" / "log.jsonl", "a") as file:
        file.write('{"step": 9, "rever')  # as a run that goes on, or was killed, leaves it
    assert curve(tmp_path / "minillm" / "log.jsonl", "reverse_kl")[0] == list(range(1, 9))


def test_lines_can_be_told_apart_in_grey():
    assert len({line for _, line in report.STYLES[:4]}) == 4 and len(set(report.STYLES)) == len(report.STYLES)


def test_the_page_stands_by_itself_and_runs_nothing(tmp_path):
    """The page has no address and no script, escapes text of models and files, and tells each picture's command."""
    run_of(tmp_path, 1, "start", 50.0)
    evaluation(tmp_path / "sft", "out/<script>alert(1)</script>/sft", rouge=(2.0, 2.0))
    report.main(report.Config((str(tmp_path),), out=str(tmp_path / "report"), prompts=2))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert "&lt;b&gt;this&lt;/b&gt;" in page and "&lt;script&gt;" in page
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert pictures and all(picture.startswith(b"\x89PNG") for picture in pictures)
    written = {path.read_bytes() for path in (tmp_path / "report").glob("*.png")}
    assert written == set(pictures) and page.count("<code>python distill.py</code>") >= 1
    assert "says 1 by 10" in page and "says 2 by 10" not in page and "by 20" not in page  # two prompts, the first seed
    table = (tmp_path / "report" / "report.md").read_text()
    assert "| model | runs | valid | rouge_l |" in table


def test_the_first_prompts_are_shown_though_they_come_again(tmp_path):
    """The built-in world asks the same question twice, with another reference, and so with another answer."""
    evaluation(tmp_path, "out/m")
    samples = tmp_path / "samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    again = rows[0] | {"prompt": 3, "answer": "said later"}
    samples.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], again, *rows[3:5]]))
    page = report.answers_page("tiny", find([str(tmp_path)]), 1)
    assert "says 0 by 10" in page and "says 1" not in page and "said later" not in page


def test_a_run_and_its_exposure_bias(distill_config, few_rows, tmp_path, capsys):
    """The real commands make them, with a few updates."""
    cfg = distill_config()
    distill.main(cfg)
    settings = dict(limit=3, samples=2, max_response_tokens=6, device="cpu", dtype="float32", teacher=cfg.teacher)
    exposure.main(exposure.Config(f"{cfg.out}/minillm", out=f"{cfg.out}/exposure", **settings))
    report.main(report.Config((cfg.out,), out=str(tmp_path / "report")))
    assert "5 tables, 3 figures" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"report.html", "report.md", "training.png",
                                                                      "exposure.png", "first-run.png"}


def test_right_answers_are_drawn_against_what_is_still_told(tmp_path):
    """A point for each run of a method; the page begins with the picture. Without coverage there is none."""
    for seed, shift in (("seed-1", 0.0), ("seed-2", 2.0)):
        for method, valid, covered in (("teacher", 89.0, 99.0), ("sft", 30.0, 92.0), ("minillm", 70.0, 80.0)):
            evaluation(tmp_path / seed / method, f"out/{seed}/{method}", valid=[valid - 1 + shift, valid + 1 + shift],
                       covered=[covered + shift])
    report.main(report.Config((str(tmp_path),), out=str(tmp_path / "report")))
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.split("<h2>")[1].startswith("Right answers against coverage")
    items = of_kind("evaluation", find([str(tmp_path)]))
    figure = report.trade_figure(items, {"sft": ([92.0, 94.0], [30.0, 32.0])})
    assert figure.png.startswith(b"\x89PNG") and figure.labels == ["sft"]
    shutil.rmtree(tmp_path / "report")
    for path in tmp_path.rglob("results.json"):
        path.write_text(path.read_text().replace('"covered"', '"other"'))
    report.main(report.Config((str(tmp_path),), out=str(tmp_path / "report")))
    assert not (tmp_path / "report" / "first-run.png").exists()


def test_folders_that_hold_nothing(tmp_path):
    refused(lambda: report.Config(), "give the folders")
    refused(lambda: find([str(tmp_path / "none")]), "none is not a folder")
    refused(lambda: find([str(tmp_path)]), "no results in it")
    (tmp_path / "results.json").write_text("{")
    refused(lambda: find([str(tmp_path)]), "results.json is not JSON")


def whole_calibration() -> dict:
    task = {"accuracy": 60.0, "majority": 50.0, "ece": 0.1, "bins": [{"low": 0.5, "count": 2, "confidence": 0.6,
                                                                     "accuracy": 0.5}]}
    return {"command": "x", "given": {"model": "out/m"}, "tasks": {"boolq": task}}


def whole_exposure() -> dict:
    given, curve = {"model": "out/m"}, [0.0, 1.0]
    return {"command": "x", "given": given, "data": "dolly", "ex_acc_err": curve, "low": curve, "high": curve}


def judged(**verdict) -> dict:
    given = {"answers": "out/a/dolly", "against": None, "judge": "gpt-4"}
    return {"command": "x", "given": given, "judged": 5, "unscored": 1} | verdict


@pytest.mark.parametrize("name, content, least", [
    ("results.json", None, 6), ("run.json", None, 4), ("calibration.json", whole_calibration(), 6),
    ("exposure.json", whole_exposure(), 5),
    ("judge.json", judged(kind="reference", score=44.7, interval=[40.0, 50.0]), 6),
    ("judge-b.json", judged(kind="pairwise", win={"percent": 60.0}, tie={"percent": 1.0}, loss={"percent": 3.0}), 7)])
def test_a_result_that_lacks_a_part_is_named(tmp_path, name, content, least):
    """Whatever is taken away, a flag or a part of a task too, there is a report or a mistake in one line."""
    if name == "results.json":
        evaluation(tmp_path, "out/m", "dolly")
    elif name == "run.json":
        training(tmp_path, "out/x")
    else:
        (tmp_path / name).write_text(json.dumps(content))
    (path,) = tmp_path.rglob(name)
    whole, told = json.loads(path.read_text()), 0
    make = lambda: report.main(report.Config((str(tmp_path),), out=str(tmp_path / "report")))
    make()
    task = whole.get("tasks", {}).get("boolq", {})
    without = lambda part: [{key: value for key, value in part.items() if key != gone} for gone in part]
    less = without(whole) + [whole | {"given": given} for given in without(whole.get("given", {}))]
    for content in less + [whole | {"tasks": {"boolq": part}} for part in without(task)]:
        path.write_text(json.dumps(content))
        try:
            make()
        except UserError as error:
            assert "is not as the commands write it" in str(error) or "no results in it" in str(error)
            told += 1
    assert told >= least


def test_the_sft_of_the_same_size():
    assert report.sft_of("KD-gpt2-340M") == "sft-gpt2-340m" and report.sft_of("start/seqkd") == "start/sft"
    assert report.sft_of("start/init") == "start/sft" and report.sft_of("some/model") is None
    assert report.sft_of("teacher-gpt2-1.5B") is None


def test_several_sets_in_one_table(tmp_path):
    evaluation(tmp_path / "a" / "dolly", "MiniLLM/SFT-gpt2-120M", "dolly", (23.0, 24.0), 124_439_808)
    evaluation(tmp_path / "a" / "uinst", "MiniLLM/SFT-gpt2-120M", "uinst", (18.0, 18.0), 124_439_808)
    evaluation(tmp_path / "b" / "dolly", "MiniLLM/KD-gpt2-120M", "dolly", (20.0, 20.0), 7)
    table = report.summary_table(find([str(tmp_path)]))
    assert table.header == ["model", "dolly", "uinst"]
    assert table.rows == [["SFT-gpt2-120M", "23.50 ± 0.71 (23.3)", "18.00 ± 0.00 (18.5)"],
                          ["KD-gpt2-120M", "20.00 ± 0.00", ""]]


def test_judgements_are_read_as_they_are_written(tmp_path):
    given = {"answers": "out/a/dolly", "against": None, "judge": "gpt-4"}
    common = {"command": "python judge.py", "judged": 5, "unscored": 1}
    (tmp_path / "judge.json").write_text(json.dumps(common | {
        "given": given, "kind": "reference", "score": 44.72, "interval": [40.0, 50.0]}))
    (tmp_path / "judge-against-b.json").write_text(json.dumps(common | {
        "given": given | {"against": "out/b/dolly"}, "kind": "pairwise", "win": {"percent": 60.0},
        "tie": {"percent": 10.0}, "loss": {"percent": 30.0}}))
    table = report.judge_table(find([str(tmp_path)]))
    assert [row[3] for row in table.rows] == ["win 60.0, tie 10.0, loss 30.0 against out/b/dolly",
                                              "44.7 (40.0 to 50.0)"]
    evaluation(tmp_path, "MiniLLM/KD-gpt2-120M", "dolly", parameters=124_439_808)  # of the answers that were judged
    found = of_kind("judge", find([str(tmp_path)]))
    beside = {row[3][:4]: row[:2] + row[4:5] for row in report.judge_table(found).rows}
    part = tmp_path / "part"
    evaluation(part, "MiniLLM/KD-gpt2-120M", "dolly", parameters=124_439_808, limit=20)
    (part / "judge.json").write_text((tmp_path / "judge.json").read_text())
    judged = of_kind("judge", find([str(part)]))
    assert [report.of_paper(item, score=True) for item in judged] == [None]
    shutil.rmtree(part)
    (tmp_path / "results.json").write_text('{"best": {}}')  # of training, whose answers can be judged too
    assert len(find([str(tmp_path)])) == 2
    assert beside == {"win ": ["KD-gpt2-120M", "dolly", ""], "44.7": ["KD-gpt2-120M", "dolly", "40.3"]}


def test_marks_of_answers_that_are_gone_are_not_shown(tmp_path):
    evaluation(tmp_path, "out/m", "dolly")
    samples = tmp_path / "samples.jsonl"
    given = {"answers": str(tmp_path), "against": None, "judge": "j", "files": checksum(samples)}
    (tmp_path / "judge-j.json").write_text(json.dumps({
        "command": "python judge.py", "given": given, "kind": "reference", "score": 1.0, "interval": [1, 2],
        "judged": 1, "unscored": 0}))
    assert len(find([str(tmp_path)])) == 2
    samples.write_text(samples.read_text() + "\n")
    refused(lambda: find([str(tmp_path)]), "judge-j.json has marks of other answers", "run the judge again")


def calibrated(folder, model, probabilities, labels, task="boolq", bins=5):
    folder.mkdir(parents=True, exist_ok=True)
    r = calibration.measure(np.array(probabilities), np.array(labels), bins)
    (folder / "calibration.json").write_text(json.dumps({
        "command": "python calibration.py", "given": {"model": model, "data": f"{task}.x"}, "tasks": {task: r}}))


def test_calibration_is_over_runs_and_tasks(tmp_path):
    calibrated(tmp_path / "1", "out/seed-1/m", [[0.3, 0.7], [0.9, 0.1], [0.6, 0.4], [0.8, 0.2]], [1, 0, 1, 1])
    calibrated(tmp_path / "2", "out/seed-2/m", [[0.3, 0.7], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], [1, 0, 1, 1])
    calibrated(tmp_path / "3", "out/seed-1/m", [[0.3, 0.7]], [1], "sst2")
    found = find([str(tmp_path)])
    rows = report.calibration_table(found).rows
    assert rows[0][:5] == ["m", "2", "boolq", "62.5 ± 17.7", "75.0 ± 0.0"]
    assert rows[1][:4] == ["m", "1", "sst2", "100.0"]
    figure = report.reliability_figure(found)
    assert figure.file == "reliability" and set(figure.panels) == {"boolq", "sst2"}
    confidence, accuracy = figure.panels["boolq"]["m"]
    assert confidence == pytest.approx([0.6, (0.7 * 2 + 0.8 * 2) / 4, 0.9]) and accuracy == pytest.approx([0, 0.75, 1])


def test_curves_are_means_over_the_runs_that_have_a_step(tmp_path):
    """Seed 2 stopped after two updates: the first two points are means, and the others are seed 1's."""
    for seed, values in ((1, [4.0, 2.0, 1.0, 0.5]), (2, [8.0, 4.0])):
        run_of(tmp_path, seed, "start", 50.0)
        lines = [{"step": n, "reverse_kl": x} for n, x in enumerate(values, 1)]
        (tmp_path / f"seed-{seed}" / "start" / "minillm" / "log.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines))
    figure = report.training_figure(of_kind("training", find([str(tmp_path)])), 32)
    x, y = figure.panels["reverse_kl"]["minillm"]
    assert x.tolist() == [1, 2, 3, 4] and y.tolist() == [6, 3, 1, 0.5]
    (tmp_path / "seed-1" / "start" / "minillm" / "log.jsonl").write_text("")
    (tmp_path / "seed-2" / "start" / "minillm" / "log.jsonl").write_text("")
    assert report.training_figure(of_kind("training", find([str(tmp_path)])), 32).panels == {}


def exposed(folder, model, curve, **given):
    folder.mkdir(parents=True)
    content = {"command": "python exposure.py", "given": {"model": model, "teacher": "t"} | given, "data": "tiny",
               "ex_acc_err": curve, "low": [x - 1 for x in curve], "high": [x + 2 for x in curve]}
    (folder / "exposure.json").write_text(json.dumps(content))


def test_exposure_bias_is_drawn_with_its_band(tmp_path):
    exposed(tmp_path / "1", "out/seed-1/m", [0.0, 10.0, 20.0])
    figure = report.exposure_figure(find([str(tmp_path)]))
    assert [values.tolist() for values in figure.panels[""]["m"]] == [[1, 2, 3], [0, 10, 20], [-1, 9, 19], [2, 12, 22]]
    content = json.loads((tmp_path / "1" / "exposure.json").read_text())
    (tmp_path / "1" / "exposure.json").write_text(json.dumps(content | {"low": [-1, 9, None]}))  # of few prompts
    figure = report.exposure_figure(find([str(tmp_path)]))
    assert str(figure.panels[""]["m"][2].tolist()) == "[-1.0, 9.0, nan]"
    exposed(tmp_path / "2", "out/seed-2/m", [0.0, 30.0])
    figure = report.exposure_figure(find([str(tmp_path)]))
    assert [values.tolist() for values in figure.panels[""]["m"]] == [[1, 2, 3], [0, 20, 20], [0, 10, 20], [0, 30, 20]]
    table = report.exposure_table(find([str(tmp_path)]))
    assert (table.header, table.rows) == (["model", "runs", "l = 1"], [["m", "2", "0.0 ± 0.0"]])
    exposed(tmp_path / "4", "out/seed-2/n", [1.0, 2.0, 3.0, 4.0, 7.0])
    table = report.exposure_table(find([str(tmp_path)]))
    assert table.header[2:] == ["l = 1", "l = 5"] and ["m", "2", "0.0 ± 0.0", ""] in table.rows
    exposed(tmp_path / "3", "out/seed-1/m", [0.0, 5.0], teacher="another")
    assert {item.name for item in find([str(tmp_path)])} == {"m (teacher=t)", "m (teacher=another)", "n"}


def test_bars_are_less_the_sft_of_the_same_size(tmp_path):
    for n, name in enumerate(("SFT-gpt2-120M", "KD-gpt2-120M", "MiniLLM-gpt2-340M", "teacher-gpt2-1.5B")):
        evaluation(tmp_path / name, f"MiniLLM/{name}", "dolly", (3.0 * n + 1, 1.0))
    figure = report.length_figure("dolly", find([str(tmp_path)]))
    assert {label: mean.tolist() for label, (_, mean) in figure.panels[""].items()} == {"KD-gpt2-120M": [3.0, 0.0]}
    assert figure.ticks == ["[0,5]", "[11,inf)"]


def test_lengths_of_references_are_told_by_the_answers(tmp_path):
    """Figure 7's groups are up to 5 tokens, 6 to 10, and more. Earlier versions wrote their means, not the lengths."""
    evaluation(tmp_path, "out/m", "dolly", lengths=(0, 5, 6, 10, 11, 400))
    (item,) = find([str(tmp_path)])
    assert report.by_length(item) == {"[0,5]": 0.5, "[6,10]": 2.5, "[11,inf)": 4.5}
    figure = report.length_figure("dolly", [item])
    assert figure.panels[""]["m"][1].tolist() == [0.5, 2.5, 4.5] and figure.ylabel == "Rouge-L"


def test_a_single_run_has_an_interval_over_prompts(tmp_path):
    """Three prompts with means of 1.5, 2.5 and 3.5: one draw in 27 has the least of them thrice."""
    evaluation(tmp_path / "1", "out/seed-1/m", "dolly", lengths=(5,) * 6)
    (table,) = results_on(find([str(tmp_path)]))
    assert dict(zip(table.header, table.rows[0]))["rouge_l, 95%"] == "1.50 to 3.50"
    evaluation(tmp_path / "2", "out/seed-2/m", "dolly", lengths=(5,) * 6)
    (table,) = results_on(find([str(tmp_path)]))
    assert table.header == ["model", "runs", "rouge_l", "minutes", "GiB"]


def test_a_lead_is_told_prompt_by_prompt(tmp_path):
    """m has 1.5, 2.5 and 3.5 on three prompts, over two seeds; sft is 1 behind on the first, 3 on the second, and did
    not answer the third. A third model has no answers beside it."""
    for name, values in (("m", [0, 1, 2, 3, 4, 5]), ("sft", [0, 0, None, 1, -1, None]), ("none", [])):
        evaluation(tmp_path / name, f"out/{name}", "dolly", lengths=(5,) * 6)
        path = tmp_path / name / "samples.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line | {"scores": {"rouge_l": value}} for line, value in zip(lines, values) if value is not None]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = of_kind("evaluation", find([str(tmp_path)]))
    table = report.difference_table("dolly", found, "rouge_l", "m")
    assert table.rows == [["m - sft", "+2.00", "1.00 to 3.00", "100%", "0%"]]
    table = report.difference_table("dolly", found, "rouge_l", "sft")
    assert table.rows == [["sft - m", "-2.00", "-3.00 to -1.00", "0%", "100%"]]
    assert not report.difference_table("dolly", found, "rouge_l", "absent").rows


def test_teachers_of_growing_size_with_seqkd(tmp_path):
    for n, (name, size) in enumerate((("a", 100), ("b", 30))):
        out = f"out/seed-1/{name}"
        training(tmp_path / name, out, teacher=f"{out}/teacher")
        evaluation(tmp_path / name / "test" / "minillm", f"{out}/minillm", valid=[50.0 + n])
        evaluation(tmp_path / name / "test" / "seqkd", f"{out}/seqkd", valid=[20.0 + n])
        evaluation(tmp_path / name / "test" / "teacher", f"{out}/teacher", parameters=size, valid=[90.0])
    found = find([str(tmp_path)])
    figure = report.sweep_figure("teacher", of_kind("training", found), of_kind("evaluation", found))
    values = {method: mean.tolist() for method, (_, mean, _, _) in figure.panels[""].items()}
    assert figure.file == "teachers" and values == {"minillm": [51, 50], "seqkd": [21, 20]}
    assert figure.ticks == ["30", "100"] and figure.panels[""]["seqkd"][0].tolist() == [0, 1]


def test_what_was_measured_otherwise_is_a_row_of_its_own(tmp_path):
    evaluation(tmp_path / "a", "out/m", "dolly", (10.0, 10.0), no_repeat_ngram=0)
    evaluation(tmp_path / "b", "./out/m/", "dolly", (90.0, 90.0), no_repeat_ngram=6)
    evaluation(tmp_path / "c", "out/m", "dolly", (10.0, 10.0), no_repeat_ngram=0)  # the first once more
    assert [row[:3] for row in results_on(find([str(tmp_path)]))[0].rows] == [
        ["m (no_repeat_ngram=0)", "1", "10.00 ± 0.00"], ["m (no_repeat_ngram=6)", "1", "90.00 ± 0.00"]]


def test_two_evaluations_of_different_weights_are_not_two_runs(tmp_path):
    for name, weights in (("a", [1, None]), ("b", [2, None])):
        evaluation(tmp_path / name, "out/m", "dolly", weights=weights)
    refused(lambda: find([str(tmp_path)]), "are of out/m with different weights: remove the older")


def test_each_seed_is_shown_where_several_are(tmp_path):
    for seed, valid in ((1, 90.0), (2, 70.0), (10, 50.0)):
        run_of(tmp_path, seed, "start", valid)
    run_of(tmp_path, 2, "other", 60.0, gamma=0.5)
    run_of(tmp_path, 10, "other", 40.0, gamma=0.5)
    evaluation(tmp_path / "alone", "out/alone", valid=[1.0])
    table = report.run_table("tiny", of_kind("evaluation", find([str(tmp_path)])), "valid")
    assert table.title == "Run by run on tiny: valid" and table.header == ["model", "seed 1", "seed 2", "seed 10"]
    assert table.rows == [["start/minillm", "90.00", "70.00", "50.00"], ["other/minillm", "", "60.00", "40.00"]]


def test_a_part_of_a_set_is_not_set_beside_the_papers_figure(tmp_path):
    for n, given in enumerate(({"limit": None, "split": "test"}, {"limit": 20}, {"split": "valid"})):
        evaluation(tmp_path / str(n), f"MiniLLM/SFT-gpt2-120M-{n}", "dolly", parameters=124_439_808, **given)
    found = find([str(tmp_path)])
    assert [report.of_paper(item) for item in sorted(found, key=lambda item: item.path)] == [23.3, None, None]


def test_flags_that_change_no_result_are_no_ablation(tmp_path):
    for n, mix_alpha in enumerate((0.0, 0.2, 0.4)):
        run_of(tmp_path, 1, f"alpha-{n}", 50.0 + n, mix_alpha=mix_alpha, micro_batch=n, sample_batch=n, device=str(n))
    found = find([str(tmp_path)])
    runs = of_kind("training", found)
    assert differing(runs) == ["mix_alpha"]
    figure = report.sweep_figure("mix_alpha", runs, of_kind("evaluation", found))
    assert figure.ticks == ["0.0", "0.2", "0.4"] and figure.panels[""]["minillm"][1].tolist() == [50, 51, 52]


def test_a_metric_that_few_runs_have_says_so(tmp_path):
    run_of(tmp_path, 1, "start", 90.0)
    run_of(tmp_path, 2, "start", 70.0)
    evaluation(tmp_path / "text", "out/seed-1/start/minillm", text_loss=[2.0])
    (table,) = results_on(find([str(tmp_path)]))
    row = dict(zip(table.header, table.rows[0]))
    assert row["valid"] == "80.00 ± 14.14" and row["text_loss"] == "2.00 (of 1)" and row["runs"] == "2"


def test_more_models_than_lines_are_said(tmp_path):
    for n in range(20):
        exposed(tmp_path / str(n), f"out/m{n}", [0.0, 1.0])
    figure = report.exposure_figure(find([str(tmp_path)]))
    assert "Of 20 models the first 16 are drawn" in figure.about


def test_odd_text_is_no_trouble(tmp_path):
    """Answers may hold line separators and names dollars; files may be foreign, or still being written."""
    run_of(tmp_path, 1, "a$\\x{$", 50.0)
    samples = tmp_path / "seed-1" / "a$\\x{$" / "test" / "minillm" / "samples.jsonl"
    row = json.loads(samples.read_text().splitlines()[0]) | {"answer": "one\u2028two\x85three"}
    samples.write_text(json.dumps(row, ensure_ascii=False) + "\n" + '{"seed": 1', encoding="utf-8")
    (tmp_path / "results.json").write_text('{"scores": 1}')
    (tmp_path / "judges.json").write_text("{}")
    (tmp_path / "exposure.json").write_text("[]")
    report.main(report.Config((str(tmp_path),), out=str(tmp_path / "report")))
    assert "one\u2028two\x85three" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    samples.write_text('{"seed": 1\n')
    refused(lambda: report.main(report.Config((str(tmp_path),), out=str(tmp_path / "report"))), "samples.jsonl", "JSON")
