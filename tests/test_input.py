"""Bad input: files of instructions broken in several hundred ways, and every flag of every command given wrongly."""

import dataclasses
import importlib
import json
import math
import os
import random
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from conftest import CPU, random_gpt, refused
from safetensors.torch import load_file, save_file

import data
import distill
import eval as evaluation
import sample as sampling
import teacher as supervised
from config import UserError, parse
from measure.report import find
from model import load, save
from safe import runs, texts
from safe.files import check_place

GOOD = {"instruction": "Say hi", "input": "to Anna", "output": "hi Anna"}
COMMANDS = ["data", "sample", "eval", "teacher", "distill", "measure.exposure", "measure.calibration", "measure.judge",
            "measure.report", "tools.plan", "tools.bench", "exercises.oracle"]


def malformed() -> list[bytes]:
    """Lines of an instruction file, most of them wrong."""
    chance, good = random.Random(0), json.dumps(GOOD).encode()
    lines = [good[:n] for n in range(1, len(good))]  # cut off anywhere
    lines += [good[:n] + bytes([chance.randrange(256)]) + good[n + 1 :] for n in range(len(good))]  # a byte changed
    for _ in range(100):  # a few bytes left out
        at, count = chance.randrange(len(good)), chance.randrange(1, 9)
        lines.append(good[:at] + good[at + count :])
    values = [None, 0, 1.5, True, [], {}, [None], [[]], {"a": 1}, "", " \t", "\n", "\u2028", "\x00", "a" * 10**6,
              "\ud800", "<|endoftext|>", "\ufeff", ["a", 1], ["", "a"], ["a"] * 1000, 1e400, -0.0]
    lines += [json.dumps(GOOD | {key: value}).encode() for key in GOOD for value in values]
    lines += [json.dumps({k: v for k, v in GOOD.items() if k != key}).encode() for key in GOOD]
    lines += [json.dumps(value).encode() for value in values]
    lines += [b"\xff\xfe" + good, b"\xef\xbb\xbf" + good, good + b"\r", good + good, b"[" * 100_000, b'{"a":' * 50_000,
              b"instruction,input,output", b"'" + good + b"'", good.replace(b'"', b"'"), b"NaN", b"1" * 5000,
              '{"instruction": "é"'.encode("latin-1"), good.decode().encode("utf-16"), b"\x1f\x8b" + good]
    return lines


def test_every_bad_row_is_named_with_its_line(tmp_path):
    """Behind a good row; what is accepted is text, and holds no half of a surrogate pair."""
    lines, refused, path = malformed(), 0, tmp_path / "mine.jsonl"
    assert len(lines) > 300
    for line in lines:
        path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
        try:
            rows = data.load_rows(str(path), "test")
        except UserError as error:
            assert str(error).startswith(f"{path}:2: ") and "\n" not in str(error) and len(str(error)) < 400, line[:80]
            refused += 1
        else:
            for row in rows:
                assert row.instruction.strip() and all(output.strip() for output in row.outputs) and row.outputs
                (row.instruction + row.input + "".join(row.outputs)).encode("utf-8")
    assert refused > 200


@pytest.mark.parametrize("field", ["instruction", "input", "output"])
def test_text_never_becomes_a_special_token(field, gpt2, tmp_path):
    path = tmp_path / "mine.jsonl"
    text = "<|endoftext|> of <|endoftext|><|endoftext|>"
    path.write_text(json.dumps(GOOD | {field: text}) + "\n")
    (example,) = data.load_examples(str(path), "test", gpt2, 256, 512, lambda *words: None)
    assert (example.prompt + example.response).count(gpt2.eot_token) == 1 == example.response.count(gpt2.eot_token)
    assert text in gpt2.decode(example.prompt + example.response)


def wrong_values(kind, high: float) -> list[str]:
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return ["nonsense", "", typing.get_args(kind)[0].upper() + "x"]
    too_much = ["99999999999999999999"] if high < math.inf else []
    return {bool: ["maybe", "1", ""], int: ["x", "1.5", "", "-1", "nan", *too_much],
            float: ["x", "", "-1", "nan", "--", *too_much]}.get(kind, [])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_given_wrongly_ends_in_one_line(name, capsys):
    """Of the wrong type, out of range, misspelt: exit code 2, and a line that names the flag."""
    module = importlib.import_module(name)
    hints, tried = typing.get_type_hints(module.Config), 0
    needed = {"sample": ["--prompt=x"], "measure.calibration": ["--data=x"], "measure.report": ["out"],
              "measure.judge": ["--answers=x", "--judge=y"]}.get(name, [])
    for field in dataclasses.fields(module.Config):
        if hints[field.name] == tuple[str, ...]:
            continue
        values = wrong_values(hints[field.name], field.metadata["high"])
        wrong = [f"--{field.name}={value}" for value in values]
        for given in (*wrong, f"--{field.name}x=1", f"--{field.name[:-1]}_=1", f"-{field.name}=1"):
            with pytest.raises(SystemExit) as ended:
                parse(module.Config, [*needed, given], getattr(module, "presets", None))
            told = capsys.readouterr().err
            assert ended.value.code == 2 and told.count("\n") == 1 and given.split("=")[0].strip("-") in told, given
            tried += 1
    assert tried >= 3 * len(dataclasses.fields(module.Config)) - 3


@pytest.mark.parametrize("name", COMMANDS)
def test_an_empty_value_or_one_that_is_no_text_is_a_mistake(name, capsys):
    """--out=$UNSET would be the present folder, and --corpus= every text in it."""
    module, tried = importlib.import_module(name), 0
    hints = typing.get_type_hints(module.Config)
    for field in dataclasses.fields(module.Config):
        if hints[field.name] in (str, str | None) and not field.metadata["may_be_empty"]:
            for value, words in (("", "is empty"), ("a\udcff", "is not UTF-8 text")):
                with pytest.raises(SystemExit) as ended:
                    parse(module.Config, [f"--{field.name}={value}"], getattr(module, "presets", None))
                told = capsys.readouterr().err
                assert ended.value.code == 2 and told.count("\n") == 1 and words in told and field.name in told
                tried += 1
    assert tried or name in ("exercises.oracle", "measure.report", "tools.plan")


def test_a_place_that_cannot_be_written_to_is_told_before_there_is_work(tmp_path):
    (tmp_path / "file").write_text("")
    place = lambda path: types.SimpleNamespace(out=path if path is None else str(tmp_path / path))
    for path in (None, "new", "new/deeper", "."):
        check_place(place(path), "out")
    for path in (None, "file", "new/file"):
        check_place(place(path), file="out")
    for path in ("file", "file/deeper", "file/deeper/still"):
        refused(lambda path=path: check_place(place(path), "out"), f"--out={tmp_path / path}: ", "is a file")
    refused(lambda: check_place(place("."), file="out"), "is a folder: give the name of a file")
    refused(lambda: check_place(place("file/x"), file="out"), "file is a file")
    for Config in (evaluation.Config, supervised.Config, distill.Config):
        refused(lambda Config=Config: Config(out=str(tmp_path / "file")), "is a file, and no folder")


def test_what_is_read_is_not_written_over(tiny_models, tmp_path, distill_config):
    (tmp_path / "mine.jsonl").write_text(json.dumps(GOOD) + "\n")
    mine = f"{tmp_path}/mine.jsonl"
    refused(lambda: sampling.Config(data=mine, out=mine), f"--out={mine} would be written over")
    (tmp_path / "results.json").write_text('{"given": {}}')  # of eval.py, say
    refused(lambda: distill.main(distill_config(out=str(tmp_path))), "holds results of something else")
    (tmp_path / "results.json").write_text("[]")  # of distill.py
    refused(lambda: distill.main(distill_config(student=f"{tmp_path}/../{tmp_path.name}/minillm", out=str(tmp_path))),
            "minillm would overwrite --teacher or --student")
    cfg = evaluation.Config(model=tiny_models["student"], out=str(tmp_path), device="cpu")
    refused(lambda: evaluation.main(cfg), "results.json holds results of other settings")


# ---- models ---------------------------------------------------------------------------------------------------------

def changed(folder: Path, **config) -> str:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return str(folder)


@pytest.fixture
def model(tmp_path) -> Path:
    save(random_gpt(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, value", [
    ("layer_norm_epsilon", "x"), ("layer_norm_epsilon", None), ("resid_pdrop", 5), ("resid_pdrop", "x"),
    ("n_head", True), ("n_layer", 10**5), ("n_embd", 10**30), ("n_positions", 0), ("vocab_size", 11.0)])
def test_a_config_of_strange_values(name, value, model):
    refused(lambda: load(changed(model, **{name: value})), "config.json: ", name)


@pytest.mark.parametrize("content", [
    {"wte.weight": 5}, {5: torch.ones(3)}, {"wte.weight": [1.0]}, [1.0]])
def test_a_bin_that_holds_something_else_than_tensors(content, model):
    (model / "model.safetensors").unlink()
    torch.save(content, model / "pytorch_model.bin")
    refused(lambda: load(str(model)), "pytorch_model.bin holds", "state_dict()")


def test_weights_of_another_kind_or_shape(model):
    weights = load_file(model / "model.safetensors")
    for name, tensor in (("wte.weight", torch.ones(11, 8, dtype=torch.int8)), ("wte.weight", torch.tensor(1.0)),
                         ("h.0.attn.c_attn.weight", torch.ones(2, 2, 2))):
        save_file(weights | {f"transformer.{name}": tensor}, model / "model.safetensors")
        refused(lambda: load(str(model)), name, "not floating point" if tensor.dtype == torch.int8 else "size mismatch")


@pytest.mark.parametrize("table", [None, [], {"a": 1}, "x"])
def test_an_index_without_a_table_of_shards(table, model):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    refused(lambda: load(str(model)), "index.json: there is no table of shards")


@pytest.mark.parametrize("tokenizer, words", [
    ({"model": None}, "is damaged"), ({"model": []}, "is damaged"), ({}, "is damaged"),
    ({"model": {"type": "WordLevel", "vocab": ["a"]}}, "is damaged"),
    ({"model": {"type": "WordLevel", "vocab": {"a": "0"}}}, "is neither GPT-2's"),
    ({"model": {"type": "WordLevel", "vocab": {"a": [], "b": {}}}}, "is neither GPT-2's"),
    ({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 0}}}, "is neither GPT-2's"),
    ({"model": {"type": "WordLevel", "vocab": {"é": 0, "b": 1}}}, "is neither GPT-2's"),
    ({"model": {"type": "WordLevel", "vocab": {}}}, "is neither GPT-2's"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}, "is neither GPT-2's"),
    ({"model": {"type": "BPE", "vocab": {"\u0120the": 262, "\u0120and": 5}}}, "is neither GPT-2's")])
def test_a_tokenizer_that_is_none_of_ours(tokenizer, words, model):
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(lambda: data.load_tokenizer(str(model)), "tokenizer.json", words)


def test_words_of_special_letters_are_words(model):
    words = {"(": 0, "a.b": 1, "\\": 2, "[x]": 3, "+": 4, "*": 5, "^": 6, "$": 7, "|": 8, "?": 9}
    (model / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": words}}))
    tokenizer = data.load_tokenizer(str(model))
    assert data.encode(tokenizer, ["(a.b\\[x]+*^$|?"]) == [list(range(10))]


# ---- what a run has left --------------------------------------------------------------------------------------------

def test_a_log_that_a_power_cut_has_spoilt_does_not_stop_a_run(tiny_models, few_rows, tmp_path, monkeypatch):
    settings = dict(model=tiny_models["student"], data="tiny", out=str(tmp_path / "run"), updates=4, evals=2,
                    select="loss", max_prompt_tokens=16, max_tokens=44, device="cpu", dtype="float32", resume=True)
    save_state = runs.save_state

    def save_and_stop(*given):
        save_state(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "save_state", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        supervised.main(supervised.Config(**settings))
    monkeypatch.undo()
    state, log = tmp_path / "run" / "state.pt", tmp_path / "run" / "log.jsonl"
    whole = torch.load(state, weights_only=True)
    for broken in ([1], {"model": {}}, whole | {"model": {"wte.weight": torch.ones(2)}}):
        torch.save(broken, state)
        refused(lambda: supervised.main(supervised.Config(**settings)), "state.pt is damaged")
    torch.save(whole, state)
    log.write_bytes(log.read_bytes() + b"\n\0\0\0\n\xff\n{}\n[]\n" + b'{"step": 1}')
    supervised.main(supervised.Config(**settings))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("text", ['{"given": null}', '{"given": {"model": 3}, "command": "x"}'])
def test_a_report_of_files_that_are_not_as_they_should_be(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    refused(lambda: find([str(tmp_path)]), "results.json is not as the commands write it")


# ---- where the output goes ------------------------------------------------------------------------------------------

SPEAK = """
import sys; sys.path.insert(0, {root!r}); sys.argv[0] = "speak"
from dataclasses import dataclass
import config, torch
@dataclass(frozen=True)
class Config:
    pass
def main(cfg):
    m = config.Machine(torch.device("cpu"), torch.float32)
    for n in range(20000):
        m.say("a line ±", n)
    print("done", file=sys.stderr)
config.run(main, Config)
"""


def test_a_run_goes_on_though_nobody_reads_or_the_terminal_lacks_a_letter():
    code = [sys.executable, "-c", SPEAK.format(root=str(Path(data.__file__).parent))]
    run = subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert run.stdout.readline() == "a line ? 0\n"
    run.stdout.close()
    assert run.stderr.read().endswith("done\n") and run.wait() == 0


def test_weights_that_no_run_has_made_are_not_written_over(tiny_models, few_rows, tmp_path):
    """Somebody's model, or the very teacher. And a finished run that has lost its weights is not kept as one."""
    save(random_gpt(), tmp_path / "mine")
    before = str(tmp_path / "mine")
    settings = dict(model=tiny_models["student"], data="tiny", updates=1, evals=1, max_prompt_tokens=16, max_tokens=44,
                    device="cpu", dtype="float32")
    refused(lambda: supervised.main(supervised.Config(out=before, **settings)), "a model that no run here has made")
    assert load(before).config.n_embd == 8
    out = tmp_path / "run"
    supervised.main(supervised.Config(out=str(out), **settings))
    (out / "model.safetensors").unlink()
    refused(lambda: supervised.main(supervised.Config(out=str(out), **settings)), "a finished run without its weights")
    for name in ("answers", "answers.txt", "answers.parquet"):
        refused(lambda name=name: sampling.Config(data="tiny", out=name), f"--out={name} must end in .jsonl")


def test_the_texts_of_a_model_are_no_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "b.txt").write_text("two")
    before = runs.checksum(tmp_path)
    save(random_gpt(), tmp_path / "run")
    (tmp_path / "run" / "merges.txt").write_text("a b")
    assert [file.name for file in texts.text_files(str(tmp_path))] == ["a.txt", "b.txt"]
    assert runs.checksum(tmp_path) == before


def test_two_lists_of_words_do_not_share_tokens(tmp_path):
    """The same words in another order: the file of tokens that one has made is not read by the other."""
    (tmp_path / "a.txt").write_text("one two two")
    words = ["one", " two"]
    read = [data.load_corpus(str(tmp_path / "a.txt"), texts.word_tokenizer(order), tmp_path / "corpus", CPU).tolist()
            for order in (words, words[::-1])]
    assert read == [[0, 1, 1, 2], [1, 0, 0, 2]]
