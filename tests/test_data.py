"""Rows, tokens and batches: what public trainers got wrong most often: masks, end tokens, silent truncation."""

import gzip
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, refused

import data
import families
from config import UserError
from data import Pieces, Row, load_corpus, load_examples, load_rows, pad_left, pad_right, picks
from model import GPTConfig
from safe import rows as of_rows
from safe import texts
from safe.texts import END
from safe.files import write_json


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def row(instruction="Add.", output="3", **more):
    return {"instruction": instruction, "output": output} | more


def read_rows(path) -> list[Row]:
    return load_rows(str(path), "test")


SILENT = lambda *words: None


# ---- rows -----------------------------------------------------------------------------------------------------------

def test_the_template_is_the_papers_to_the_letter():
    assert Row("Add.").prompt_text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n")
    assert Row("Add {input}.", "{instruction} 1 2").prompt_text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {input}.\n\n### Input:\n"
        "{instruction} 1 2\n\n### Response:\n")


def test_rows_of_every_allowed_kind(tmp_path):
    path = tmp_path / "my.jsonl"
    rows = [row(input=None, extra=[1], ended=None), row(output=["3", "three"]),
            row("naïve 日本", "é", input="x", ended=False)]
    lines = [json.dumps(row()), "", *map(json.dumps, rows)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_rows(path) == [Row("Add.", "", ("3",)), Row("Add.", "", ("3",)), Row("Add.", "", ("3", "three")),
                               Row("naïve 日本", "x", ("é",), ended=False)]


@pytest.mark.parametrize("line, words", [
    (b'{"instruction": "a", "output": ' + b"1" * 5000 + b"}", ["not JSON that can be read"]),
    (b'{"instruction": "a", "outp', ["not JSON", "column", "cut off"]),
    (b"[1, 2]", ["object", "list"]),
    (b"3", ["object", "int"]),
    (b'{"output": "b"}', ['no "instruction"', "found: output"]),
    (b'{"instruction": "a"}', ['no "output"', "found: instruction"]),
    (b"{}", ['no "instruction"', "found: nothing"]),
    (b'{"instruction": ["a"], "output": "b"}', ['"instruction" must be a string', '["a"]']),
    (b'{"instruction": null, "output": "b"}', ['"instruction" must be a string', "null"]),
    (b'{"instruction": "a", "input": 0, "output": "b"}', ['"input" must be a string', "0"]),
    (b'{"instruction": "a", "output": {"b": 1}}', ['"output" must be a string']),
    (b'{"instruction": "a", "output": ["b", 2]}', ['"output" must be a string', "2"]),
    (b'{"instruction": "a", "output": []}', ['"output" is empty']),
    (b'{"instruction": "a", "output": ["b", ""]}', ['"output" is empty']),
    (b'{"instruction": "a", "output": " "}', ['"output" is empty']),
    (b'{"instruction": "\\n", "output": "b"}', ['"instruction" is empty']),
    (b'{"instruction": "\\ud800", "output": "b"}', ["surrogate"]),
    (b'{"instruction": "a", "output": "b", "ended": "false"}', ['"ended" must be true or false', '"false"']),
    (b'{"instruction": "a", "output": "b", "ended": 0}', ['"ended" must be true or false', "0"]),
    (b'{"instruction": "a", "output": "b", "tokens": "5"}', ['"tokens" must be a list of whole numbers']),
    (b'{"instruction": "a", "output": "b", "tokens": [5, true]}', ['"tokens" must be a list of whole numbers']),
    (b'{"instruction": "a", "output": "", "tokens": [], "ended": false}', ['"output" is empty']),
    (b'{"instruction": "a", "output": "b", "output": "c"}', ['"output" is given twice']),
    (b'{"instruction": "a", "output": "\\u200b \\ufeff"}', ['"output" is empty']),
    (b'{"prompt": "a", "completion": 3}', ['"completion" must be a string', "3"]),
    (b'{"prompt": "Below is an instruction that describes a task. ...", "completion": "b"}',
     ['"prompt" is a template that is filled in already']),
    (b'{"instruction": "\xff", "output": "b"}', ["not UTF-8", "byte 18"]),
    ("{\"instruction\": \"a\"}".encode("utf-16"), ["not UTF-8"]),
    (b"[" * 100_000, ["nested too deeply"]),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, words):
    path = tmp_path / "my.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n" + line + b"\n" + json.dumps(row()).encode())
    refused(lambda: read_rows(path), f"{path}:2: ", *words)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    refused(lambda: load_rows(str(tmp_path / "empty.jsonl"), "test"), "empty.jsonl", "no rows")
    refused(lambda: load_rows(str(tmp_path / "absent.jsonl"), "test"), "absent.jsonl", "No such file")
    refused(lambda: load_rows("doly", "test"), "doly is not an instruction set", "dolly", ".jsonl")
    refused(lambda: load_rows("vicuna", "train"), "vicuna has only a test split", "dolly")
    name = str(tmp_path / "one.jsonl")
    for rows in ([row()], [row(output=str(n)) for n in range(30)], [row("Add. "), row("add.", input="\n")]):
        write_rows(tmp_path / "one.jsonl", *rows)
        for split in ("train", "valid"):
            refused(lambda split=split: load_rows(name, split), f"{name}: rows of one prompt", "--valid_data")
        assert len(load_rows(name, "test")) == len(load_rows(name, "all")) == len(rows)


# ---- keys -----------------------------------------------------------------------------------------------------------

def misspellings(word: str) -> set[str]:
    """A letter left out, doubled or changed, another case, and white space."""
    wrong = {word.upper(), word.title(), f" {word}", f"{word}s", f"{word} "}
    for n, letter in enumerate(word):
        wrong |= {word[:n] + word[n + 1 :], word[:n] + letter + word[n:], word[:n] + "x" + word[n + 1 :]}
    return wrong - {word}


def test_a_misspelt_key_is_an_error_that_names_the_right_one(tmp_path):
    """It would be passed over: the input above all, without which a row still looks whole."""
    tried = 0
    for word, value in (("instruction", "x"), ("input", "x"), ("context", "x"), ("output", "x"), ("response", "x"),
                        ("completion", "x"), ("answer", "x"), ("ended", False), ("tokens", [1])):
        for wrong in misspellings(word):
            name = write_rows(tmp_path / "my.jsonl", row(), row() | {wrong: value})
            told = refused(lambda name=name: read_rows(name), f"{name}:2: ", f'unknown key "{wrong}": did you mean "')
            assert f'"{word}"?' in told or word in ("input", "output"), told  # "inputs" and "outputs" have both near
            tried += 1
    assert tried > 200


def test_other_spellings_are_read_and_said_aloud_once(tmp_path, capsys):
    for number, (asked, given, said) in enumerate(itertools.product(*of_rows.SPELLINGS.values())):
        rows = {asked: "Add.", given: "1 2", said: "3"}, {asked: "Add.", said: "4"}
        name = write_rows(tmp_path / f"{number}.jsonl", *rows)
        for _ in range(2):
            assert read_rows(name) == [Row("Add.", "1 2", ("3",)), Row("Add.", "", ("4",))]
        printed = capsys.readouterr().err
        for key, ours in ((asked, "instruction"), (given, "input"), (said, "output")):
            assert printed.count(f'"{key}" is read as "{ours}"') == (key != ours)
        aloud = [asked, given, said] != list(of_rows.SPELLINGS)
        assert printed.count("\n") == printed.count(f"data {name}: ") == aloud
    assert number == 23


def test_two_texts_for_one_field_are_not_silently_one(tmp_path):
    path = tmp_path / "my.jsonl"
    for more, words in (({"response": "4"}, ['"output" and "response" both hold the output', "join them"]),
                        ({"context": "a", "input": "b"}, ['"input" and "context" both hold the input']),
                        ({"prompt": "Add. 1 2"}, ['"instruction" and "prompt" both hold the instruction'])):
        write_rows(path, row() | more)
        refused(lambda: read_rows(path), f"{path}:1: ", *words)
    for more in ({"response": "3"}, {"response": ""}, {"context": None, "input": ""}, {"question": "Add."}):
        write_rows(path, row() | more)
        assert read_rows(path) == [Row("Add.", "", ("3",))]
    write_rows(path, row(input="", context="1 2"))
    assert read_rows(path) == [Row("Add.", "1 2", ("3",))]


@pytest.mark.parametrize("key, value", [
    ("system", "Be brief."), ("history", [["Hi.", "Hello."]]), ("messages", [{"role": "user", "content": "Hi."}]),
    ("explanation", "1 + 2"), ("hint", {"a": 1}), ("text", "Add. 3"), ("references", ["3"])])
def test_a_key_whose_text_would_be_lost_is_an_error(key, value, tmp_path):
    path = tmp_path / "my.jsonl"
    write_rows(path, row(), row() | {key: value})
    refused(lambda: read_rows(path), f'{path}:2: unknown key "{key}", whose text would be lost', "remove the key")
    write_rows(path, row() | {key: type(value)()})  # nothing is lost
    assert read_rows(path) == [Row("Add.", "", ("3",))]


def test_what_tells_about_a_row_is_passed_over_aloud(tmp_path, capsys, monkeypatch):
    more = {"id": 5, "Category": "sums", "task_id": "a/1", "difficulty": 0.5, "embedding": [0.1, 0.2],
            "prompt": Row("Add.").prompt_text, "text": Row("Add.").prompt_text + "3", "seed": 1}
    name = write_rows(tmp_path / "my.jsonl", *(row() | more for _ in range(3)))
    for _ in range(2):
        assert read_rows(name) == 3 * [Row("Add.", "", ("3",))]
    passed_over = ", ".join(f'"{key}"' for key in more if key != "seed")
    assert capsys.readouterr().err == f"data {name}: not read: {passed_over}\n"
    monkeypatch.setenv("RANK", "1")  # of several processes one speaks
    read_rows(write_rows(tmp_path / "other.jsonl", row() | more))
    assert capsys.readouterr().err == ""


def test_a_passage_under_a_key_that_tells_about_a_row_is_not_lost(tmp_path):
    path = tmp_path / "my.jsonl"
    for key in ("source", "topic", "line", "passage_id"):
        write_rows(path, row() | {key: "a book of sums"})
        assert read_rows(path) == [Row("Add.", "", ("3",))]
        write_rows(path, row() | {key: 21 * "one "})
        refused(lambda: read_rows(path), f'{path}:1: unknown key "{key}", whose text would be lost')


def test_the_end_token_spelt_out_in_rows_or_text_is_said_aloud(tmp_path, capsys, m):
    """It ends nothing there. On a line of its own, blanks beside it or not, it parts documents of plain text."""
    end = "<|endoftext|>"
    name = write_rows(tmp_path / "my.jsonl", row(output="3" + end), row(), row(input=end))
    read_rows(name)
    assert f"data {name}: {end} is in 2 of the rows, where it is text" in capsys.readouterr().err
    read_rows(write_rows(tmp_path / "other.jsonl", row()))
    assert capsys.readouterr().err == ""
    path = tmp_path / "text.txt"
    path.write_text(f"one\n{end} \ntwo\n\t{end}\r\nthree{end}four\n")
    assert [text for text, _ in texts.documents(path)] == ["one", "two", f"three{end}four\n"]
    assert capsys.readouterr().err.startswith(f"{path}:5: {end} is text here, as it shares its line")


def test_of_a_set_on_the_hub_the_papers_keys_are_read(tmp_path, monkeypatch, capsys):
    more = {"prompt": "a template of theirs", "constraints": "None.", "inputt": "x"}
    write_rows(tmp_path / "valid.jsonl", row() | more)
    monkeypatch.setattr(data, "require", lambda repo, file, kind: tmp_path / Path(file).name)
    assert load_rows("uinst", "test") == [Row("Add.", "", ("3",))] and capsys.readouterr().out == ""


BLANKS = [" ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u3000", "\u200b", "\ufeff", "\u2060", "\x00", "\x1c", "\x85"]


def test_an_input_of_which_nothing_can_be_seen_is_none(tmp_path):
    """An empty `### Input:` would be a prompt that the model knows from nowhere."""
    chance = random.Random(0)
    for blank in (*BLANKS, *("".join(chance.choices(BLANKS, k=5)) for _ in range(100))):
        assert Row("Add.", blank).prompt_text == Row("Add.").prompt_text  # as by sample.py --input
        name = write_rows(tmp_path / "my.jsonl", row(input=blank))
        assert read_rows(name)[0].prompt_text == Row("Add.").prompt_text
        assert "### Input:\nx" in Row("Add.", f"x{blank}").prompt_text
        for field in ("instruction", "output"):
            write_rows(tmp_path / "my.jsonl", row() | {field: blank})
            refused(lambda name=name: read_rows(name), f'{name}:1: "{field}" is empty')


# ---- kinds of files -------------------------------------------------------------------------------------------------

def in_every_form(folder, rows: list[dict]) -> list[str]:
    """Files of the same rows, of each kind that is read."""
    lines, array = "".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows, indent=1)
    contents = {"a.jsonl": lines, "b.json": array, "c.json": lines, "d.jsonl": json.dumps(rows), "E.JSONL": lines,
                "f.jsonl.gz": gzip.compress(lines.encode()), "g.json.gz": gzip.compress(array.encode()),
                "h.jsonl": gzip.compress(lines.encode()), "i.jsonl.gz": lines, "j.json": f"\ufeff\r\n {array}"}
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return [str(folder / name) for name in contents]


def test_one_file_in_every_form_has_the_same_rows(tmp_path, gpt2):
    rows = [row(f"Add {n}.", f"é\r\n{n}", input="\u2028 x") for n in range(30)]
    for name in in_every_form(tmp_path, rows):
        assert of_rows.is_file_of_rows(name) and not data.is_text(name)
        assert read_rows(name) == [Row(r["instruction"], r["input"], (r["output"],)) for r in rows], name
        assert len(load_rows(name, "valid")) == 3 and len(load_rows(name, "all")) == 30
    assert len(load_examples(name, "train", gpt2, 256, 512, SILENT)) == 27


def test_rows_in_parquet(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="an optional package")
    from pyarrow import parquet
    path = tmp_path / "k=1" / "my.parquet"
    path.parent.mkdir()
    rows = [row(input=None, ended=True, tokens=[18]), row(output="4", input="x", ended=None, tokens=None)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_rows(path) == [Row("Add.", "", ("3",), True, (18,)), Row("Add.", "x", ("4",))]
    parquet.write_table(pyarrow.Table.from_pylist([row(), row(output=None)]), path)
    refused(lambda: read_rows(path), f'{path}, row 2: "output" must be a string, not null')
    parquet.write_table(pyarrow.table({"instruction": ["a"], "output": [b"b"]}), path)
    refused(lambda: read_rows(path), f'{path}, row 1: "output" must be a string')
    path.write_bytes(b"PAR1 and no more")
    refused(lambda: read_rows(path), f"{path}: ")
    refused(lambda: read_rows(tmp_path / "absent.parquet"), "absent.parquet: ", "No such file")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(lambda: read_rows(path), f"{path} is read by pyarrow: `pip install pyarrow`")


def test_a_bad_row_of_an_array_is_named(tmp_path):
    path = tmp_path / "my.json"
    for content, words in ((json.dumps([row(), {"output": "b"}]), [f'{path}, row 2: there is no "instruction"']),
                           (json.dumps([row(), 3]), [f"{path}, row 2: one JSON object a row", "int"]),
                           (json.dumps([row()], indent=1)[:-1] + ",", [f"{path}: line 6: not JSON"]),
                           ("[\n", [f"{path}: line 2: not JSON"]), ("[]", [f"{path} holds no rows"]),
                           ('[\n{"a": "', [f"{path}: line 2: not JSON (column 7"]),
                           ("[" * 100_000, ["nested too deeply"])):
        path.write_text(content)
        refused(lambda: read_rows(path), *words)
    path.write_bytes(b'[{"instruction":\n"\xff"}]')
    refused(lambda: read_rows(path), f"{path}: line 2: not UTF-8 (byte 2 of the line)")
    path.write_text(json.dumps(row(), indent=1))
    refused(lambda: read_rows(path), f"{path}: a row is one line", f"gzip -cdf {path} | jq -c . >", "my-lines.jsonl")


def test_a_packed_file_that_is_damaged(tmp_path):
    whole, path = gzip.compress(json.dumps(row()).encode()), tmp_path / "my.jsonl.gz"
    for content in (whole[:-9], whole[:20], whole[:30] + b"\xff\xff\xff" + whole[33:], b"\x1f\x8b"):
        path.write_bytes(content)
        refused(lambda: read_rows(path), f"{path}: ")


def test_a_table_is_refused_with_the_line_that_makes_rows_of_it(tmp_path):
    for ending, comma in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"my table.{ending}"
        lines = [("instruction", "output"), ("Add.", '"3\r\n4"'), ("Naïve?", '"a, ""b"""')]
        path.write_bytes(("\ufeff" + "\r\n".join(comma.join(line) for line in lines)).encode())
        told = refused(lambda path=path: read_rows(path), f"{path} is a table", "my table-rows.jsonl")
        line = told.split("rows of it: ")[1].replace("python", sys.executable, 1)
        subprocess.run(line, shell=True, check=True)
        rows = [Row("Add.", "", ("3\r\n4",)), Row("Naïve?", "", ('a, "b"',))]
        assert read_rows(tmp_path / "my table-rows.jsonl") == rows


def test_what_is_no_file_of_rows(tmp_path):
    for name in ("doly", "my.xlsx", "my.jsonl.zip", "my", "my.csv.gz"):
        refused(lambda name=name: load_rows(name, "train"), f"{name} is not an instruction set", "dolly", ".json.gz")
    refused(lambda: load_rows(str(tmp_path), "train"), f"{tmp_path} is a folder", "one file of rows")
    assert not data.is_text("openwebtext.jsonl") and data.is_text("openwebtext:2")


# ---- splits ---------------------------------------------------------------------------------------------------------

def test_splits_of_a_file_of_ones_own(tmp_path):
    name = write_rows(tmp_path / "my.jsonl", *(row(f"{n}.") for n in range(25)))
    train, valid, test, whole = (load_rows(name, split) for split in ("train", "valid", "test", "all"))
    assert len(valid) == 3 and [r for r in test if r not in valid] == train
    assert whole == test and len(test) == 25 and load_rows("tiny", "all") == load_rows("tiny", "train")


def test_the_held_out_rows_are_a_tenth_whatever_their_order(tmp_path):
    """Of files of any size and order, with doubles: prompts are on one side, and neither side is empty."""
    chance, path = random.Random(0), tmp_path / "my.jsonl"
    for _ in range(150):
        prompts = [f"Add {n}." for n in range(chance.randrange(2, 40))]
        picked = prompts[:2] + chance.choices(prompts, k=chance.randrange(60))
        written = lambda prompt: chance.choice([prompt, prompt.upper(), f"{prompt} ", prompt.replace(" ", "\u00a0"),
                                                 prompt[:1] + "\u200b" + prompt[1:], prompt.replace("A", "\uff21")])
        rows = [row(written(prompt), str(n)) for n, prompt in enumerate(picked)]
        splits = []
        for _ in range(2):
            write_rows(path, *rows)
            splits.append([{r.outputs[0] for r in load_rows(str(path), split)} for split in ("train", "valid")])
            chance.shuffle(rows)
        (train, valid), other_order = splits
        assert [train, valid] == other_order and train and valid
        assert not train & valid and len(train | valid) == len(rows)
        assert not {picked[int(n)] for n in train} & {picked[int(n)] for n in valid}
        fewest = min(map(picked.count, set(picked)))
        assert len(valid) <= max(-(-len(rows) // 10), fewest)
        if len(set(picked)) == len(picked):
            assert len(valid) == -(-len(rows) // 10)


def test_prompts_that_validate_are_not_trained_on_from_another_file(tmp_path, capsys):
    """As when answers to all rows of a file were sampled; the built-in world trains on all of its prompts."""
    whole = write_rows(tmp_path / "mine.jsonl", *(row(f"Add {n}.") for n in range(40)))
    held_out, rows = load_rows(whole, "valid"), load_rows(whole, "test")
    examples, valid = ([data.Example(row, [1], [2]) for row in some] for some in (rows, held_out))
    kept = of_rows.apart("answers.jsonl", examples, whole, valid, print)
    assert [example.row for example in kept] == load_rows(whole, "train")
    assert capsys.readouterr().out == (f"data answers.jsonl: 4 rows are left out, as prompts of {whole} validate\n")
    assert of_rows.apart("answers.jsonl", kept, whole, valid, print) == kept
    twins = [data.Example(Row(row.instruction.upper() + "\u200b"), [1], [2]) for row in rows]
    assert len(of_rows.apart("answers.jsonl", twins, whole, valid, lambda line: None)) == 36
    assert of_rows.apart("answers.jsonl", examples, "tiny", valid, print) == examples
    refused(lambda: of_rows.apart("answers.jsonl", valid, whole, valid, print), "holds no other prompts")
    assert capsys.readouterr().out == ""


def test_every_task_of_a_sorted_file_is_held_out(tmp_path):
    tasks = ("Add", "Sort", "Name", "Tell")
    name = write_rows(tmp_path / "my.jsonl", *(row(f"{task} {n}.") for task in tasks for n in range(200)))
    held_out = [r.instruction.split()[0] for r in load_rows(name, "valid")]
    assert len(held_out) == 80 and all(8 < held_out.count(task) < 40 for task in tasks)


def test_at_most_a_thousand_rows_are_held_out(tmp_path):
    name = write_rows(tmp_path / "my.jsonl", *(row(f"{n}.") for n in range(10_500)))
    assert len(load_rows(name, "valid")) == 1000 and len(load_rows(name, "train")) == 9500


def test_dollys_split_is_the_papers(tmp_path, monkeypatch):
    """raw.jsonl: 1,000 rows to validate with and the rest to train on; valid.jsonl is DollyEval."""
    write_rows(tmp_path / "raw.jsonl", *(row(f"raw {n}") for n in range(10_200)))  # the hub's has 12,435
    write_rows(tmp_path / "valid.jsonl", *(row(f"eval {n}") for n in range(500)))
    monkeypatch.setattr(data, "require", lambda repo, file, kind: {"MiniLLM/dolly": tmp_path}[repo] / file)
    assert [r.instruction for r in load_rows("dolly", "train")] == [f"raw {n}" for n in range(1000, 10_200)]
    assert [r.instruction for r in load_rows("dolly", "valid")] == [f"raw {n}" for n in range(1000)]
    assert [r.instruction for r in load_rows("dolly", "test")] == [f"eval {n}" for n in range(500)]
    assert load_rows("dolly", "all") == load_rows("dolly", "train")


def test_of_uinst_the_first_ten_thousand_are_used(tmp_path, monkeypatch):
    write_rows(tmp_path / "valid.jsonl", *(row(f"{n}") for n in range(10_002)))
    monkeypatch.setattr(data, "require", lambda repo, file, kind: tmp_path / Path(file).name)
    assert len(load_rows("uinst", "test")) == 10_000 and len(load_rows("sinst", "test")) == 10_002


# ---- tokens ---------------------------------------------------------------------------------------------------------

def test_long_prompts_and_samples_are_dropped_and_counted_aloud(tmp_path, gpt2):
    long_prompt, long_answer = row("word " * 300), row(output="word " * 500)
    name = write_rows(tmp_path / "my.jsonl", row(), long_prompt, long_answer, row(output="word " * 300))
    said = []
    kept = load_examples(name, "test", gpt2, 256, 512, said.append)
    dropped = "dropped 1 with a prompt over 256 tokens and {} over 512 in all"
    assert said == [f"data {name} test: 3 rows; " + dropped.format(0)]
    assert [len(e.prompt) + len(e.response) for e in kept][1] == 512  # a reference is cut, not dropped
    rows = [row(f"Add {n}.") for n in range(30)]
    write_rows(tmp_path / "my.jsonl", *rows, long_prompt, long_answer)
    said.clear()
    load_examples(name, "train", gpt2, 256, 512, said.append)
    assert said == [f"data {name} train: 26 rows; " + dropped.format(1)]
    refused(lambda: load_examples(name, "train", gpt2, 5, 512, said.append), "--data=", "--max_prompt_tokens=5")


def test_the_end_token_ends_a_response_unless_it_was_cut_off(tmp_path, gpt2):
    name = write_rows(tmp_path / "my.jsonl", row(), row(ended=False))
    whole, cut = load_examples(name, "test", gpt2, 256, 512, lambda *words: None)
    assert whole.response == [18, gpt2.eot_token] and cut.response == [18]
    assert gpt2.eot_token not in whole.prompt


def test_the_tokens_of_a_sampled_answer_are_kept(tmp_path, gpt2):
    """Any tokens: text would make others of them, and U+FFFD where a character is cut."""
    chance, name = random.Random(0), str(tmp_path / "my.jsonl")
    cut, ours = gpt2.encode_ordinary("日")[:1], gpt2.encode_ordinary("an answer")
    answers = [cut, [*ours, *cut], [], [198], [220, 220], [201, 198], gpt2.encode_ordinary("\u2028\x85"), [0],
               [gpt2.eot_token - 1], *gpt2.encode_ordinary_batch([" ", "a b", "\r\n"]),
               *([chance.randrange(gpt2.eot_token) for _ in range(chance.randrange(1, 30))] for _ in range(300))]
    answers = [(tokens, ended) for tokens in answers for ended in (True, False) if tokens or ended]
    write_rows(tmp_path / "my.jsonl", *(row(output=gpt2.decode(tokens), tokens=tokens, ended=ended)
                                        for tokens, ended in answers))
    examples = load_examples(name, "test", gpt2, 256, 512, SILENT)
    assert [e.response for e in examples] == [tokens + [gpt2.eot_token] * ended for tokens, ended in answers]
    assert sum(gpt2.encode_ordinary(gpt2.decode(tokens)) != tokens for tokens, _ in answers) > 200


def test_tokens_that_do_not_read_as_the_text_are_not_used(tmp_path, gpt2):
    name, ours, end = str(tmp_path / "my.jsonl"), gpt2.encode_ordinary("an answer"), gpt2.eot_token
    for tokens in (ours[:-1], [*ours, end], [-1], [end + 1], [2**70], [], ours[::-1]):
        write_rows(tmp_path / "my.jsonl", row(output="an answer", tokens=tokens))
        (example,) = load_examples(name, "test", gpt2, 256, 512, SILENT)
        assert example.response == [*ours, end], tokens
    write_rows(tmp_path / "my.jsonl", {"instruction": "Tell about the cat", "output": "Anna", "tokens": ours})
    (example,) = load_examples(name, "test", data.world_tokenizer(), 256, 512, SILENT)
    assert data.decode(data.world_tokenizer(), example.response) == "Anna"


RUN = 10**6  # characters of white space, at which the tokenizer panics


@pytest.mark.parametrize("run", [" " * RUN, "\n" * RUN, "\u00a0 \t\n" * (RUN // 4)])
def test_a_million_blanks_are_named_by_file_and_row(run, tmp_path, gpt2):
    for name in in_every_form(tmp_path, [row(), row(output=f"a{run}b")])[:2]:
        place = f"{name}:2" if name.endswith("jsonl") else f"{name}, row 2"
        refused(lambda name=name: read_rows(name), f'{place}: in "output" there are over 500,000 characters of white')
    for field in ("instruction", "input"):
        write_rows(tmp_path / "my.jsonl", row(**{field: f"a{run}b"}))
        refused(lambda: read_rows(tmp_path / "my.jsonl"), f'my.jsonl:1: in "{field}" there are')
    refused(lambda: data.encode(gpt2, ["a", f"a{run}b"]), "in a text there are over 500,000")
    path = _write(tmp_path / "my.txt", f"one\n{END}\n{END}\ntwo\nthree{run}four\n{END}\nfive")
    refused(lambda: load_corpus(str(path), gpt2, tmp_path, CPU), f"{path}:5: there are over 500,000", "remove them")
    assert not list(tmp_path.glob("my-*"))
    path = _write(tmp_path / "end.txt", f"one\n\ntwo{run}")
    refused(lambda: load_corpus(str(path), gpt2, tmp_path, CPU), f"{path}:3: there are")


def test_a_million_blanks_in_parquet(tmp_path, gpt2, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="an optional package")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": ["one", "", f"a{' ' * RUN}b"]}), tmp_path / "0000.parquet")
    monkeypatch.setattr(data, "require", lambda *where: tmp_path / "0000.parquet")
    refused(lambda: load_corpus("openwebtext", gpt2, tmp_path, CPU), "0000.parquet, row 3: there are over 500,000")


def test_fewer_blanks_are_tokenised(gpt2):
    for blank in " \n":
        (tokens,) = data.encode(gpt2, [f"a{blank * (texts.BLANKS - 1)}b"])
        assert gpt2.decode(tokens) == f"a{blank * (texts.BLANKS - 1)}b"


def test_text_never_becomes_the_end_token(gpt2):
    tokens = data.encode(gpt2, [f"a{END}b"])[0]
    assert gpt2.eot_token not in tokens and data.decode(gpt2, tokens) == f"a{END}b"
    assert data.decode(gpt2, [64, gpt2.eot_token]) == "a"


def test_the_world_names_a_word_that_it_does_not_know():
    for text, word in (("Tell about the cow", "'cow'"), ("Tell about the cat ", "' '")):
        refused(lambda text=text: data.encode(data.world_tokenizer(), [text]), f"does not know {word}",
                "data.py --data=tiny")


@pytest.mark.parametrize("vocabulary", ["words", "gpt2"])
def test_transformers_reads_the_same_tokens(vocabulary, tmp_path, request):
    transformers = pytest.importorskip("transformers")
    tokenizer = data.world_tokenizer() if vocabulary == "words" else request.getfixturevalue("gpt2")
    data.save_tokenizer(tokenizer, tmp_path)
    shape = {"vocab_size": tokenizer.n_vocab, "eos_token_id": tokenizer.eot_token}
    write_json(tmp_path / "config.json", shape)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [r.prompt_text + r.outputs[0] for r in load_rows("tiny", "test")[:20]]
    if vocabulary == "gpt2":
        texts += ["naïve  日本\t\n\n x\r\n 's'T 12345 \u00a0", "".join(map(chr, range(32, 600)))]
    for text in texts:
        tokens = data.encode(tokenizer, [text])[0]
        assert theirs.encode(text) == tokens and theirs.decode(tokens) == text
    assert theirs.eos_token_id == tokenizer.eot_token and len(theirs) == tokenizer.n_vocab
    assert theirs.encode(END) == [tokenizer.eot_token]
    assert data.load_tokenizer(str(tmp_path)).encode_ordinary(texts[0]) == data.encode(tokenizer, texts[:1])[0]


def test_saving_a_model_needs_no_network(tmp_path, gpt2, monkeypatch):
    """GPT-2's files are read together with its tokenizer: hours later the network or the cache may be gone."""
    monkeypatch.setattr(texts, "read_file_cached", None)
    data.save_tokenizer(gpt2, tmp_path)
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\n\u0120 t\n")


def save_config(folder, vocab_size, end) -> str:
    write_json(folder / "config.json", {"vocab_size": vocab_size, "eos_token_id": end})
    return str(folder)


def test_a_model_of_another_vocabulary_is_refused(tmp_path, gpt2):
    data.save_tokenizer(data.world_tokenizer(), tmp_path)
    size = data.world_tokenizer().n_vocab
    for vocab_size, end in ((size + 47, size - 1), (size, 0), (size, None), (gpt2.n_vocab, gpt2.eot_token)):
        name = save_config(tmp_path, vocab_size, end)
        refused(lambda name=name: data.load_tokenizer(name), name, f"{vocab_size} tokens", f"number {end}")
    (tmp_path / "tokenizer.json").write_text("{")
    refused(lambda: data.load_tokenizer(name), "tokenizer.json is not a JSON object")


FRENCH = {"Ġthe": 1000, "Ġle": 262, "Ġet": 290, "ing": 278} | {f"x{n}": n for n in range(2000, 52254)}


@pytest.mark.parametrize("file, content", [
    ("vocab.json", FRENCH), ("tokenizer.json", {"model": {"type": "BPE", "vocab": FRENCH}})])
@pytest.mark.parametrize("on_the_hub", [False, True])
def test_a_gpt2_of_another_language_is_refused(file, content, on_the_hub, tmp_path, gpt2, monkeypatch):
    """It has as many tokens as GPT-2, whose text would be noise to it: in either form, in a folder and on the hub."""
    name = save_config(tmp_path, gpt2.n_vocab, gpt2.eot_token)
    assert data.load_tokenizer(name) is gpt2  # a model without a tokenizer is taken for GPT-2's
    write_json(tmp_path / file, content)
    if on_the_hub:
        there = {path.name: path for path in tmp_path.iterdir()}
        monkeypatch.setattr(families, "is_gpt2", lambda thing: True)
        monkeypatch.setattr(data, "read_config", lambda name: GPTConfig())
        monkeypatch.setattr(texts, "fetch", lambda name, file: {"some/gpt2": there}[name].get(file))
        name = "some/gpt2"
    refused(lambda: data.load_tokenizer(name), f"{file} is neither GPT-2's vocabulary nor")


def test_two_vocabularies_of_one_size_are_two():
    words = [data.world_tokenizer().decode([n]) for n in range(data.world_tokenizer().n_vocab - 1)]
    data.same_vocabulary(data.world_tokenizer(), texts.word_tokenizer(words))
    refused(lambda: data.same_vocabulary(data.world_tokenizer(), texts.word_tokenizer(words[::-1])),
            "the student has 126 tokens and the teacher other 126", "one vocabulary")


def test_gpt2s_vocabulary_is_known_in_either_form(tmp_path, gpt2, monkeypatch):
    name = save_config(tmp_path, gpt2.n_vocab, gpt2.eot_token)
    data.save_tokenizer(gpt2, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert data.load_tokenizer(name) is gpt2
    write_json(tmp_path / "tokenizer.json", {"model": {"vocab": vocab, "merges": []}})  # as this project wrote before
    (tmp_path / "vocab.json").unlink()
    assert data.load_tokenizer(name) is gpt2


@pytest.mark.parametrize("change, words", [
    (lambda raw, rules: raw["model"].update(merges=[rule.split(" ") for rule in rules]), []),
    (lambda raw, rules: raw["model"].update(merges=rules), []),
    (lambda raw, rules: raw["model"].update(merges=rules[::-1]), ["its merges are others"]),
    (lambda raw, rules: raw.update(normalizer={"type": "Lowercase"}), ["has a normalizer"])])
def test_gpt2s_tokens_with_other_rules_are_refused(change, words, tmp_path, gpt2):
    """They would read a text as other tokens than the model has learned."""
    name = save_config(tmp_path, gpt2.n_vocab, gpt2.eot_token)
    vocab, merges = (texts.gpt2_files()[file].decode() for file in ("vocab.json", "merges.txt"))
    raw = {"normalizer": None, "model": {"type": "BPE", "vocab": json.loads(vocab)}}
    change(raw, merges.split("\n")[1:-1])
    write_json(tmp_path / "tokenizer.json", raw)
    if words:
        refused(lambda: data.load_tokenizer(name), "tokenizer.json", *words)
    else:
        assert data.load_tokenizer(name) is gpt2
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
    for rules, known in ((merges, True), (merges.replace("\u0120 t\n", "", 1), False)):
        (tmp_path / "merges.txt").write_text(rules, encoding="utf-8")
        if known:
            assert data.load_tokenizer(name) is gpt2
        else:
            refused(lambda: data.load_tokenizer(name), "vocab.json has GPT-2's tokens, but its merges are others")


def test_a_model_without_tokenizer_files_is_taken_for_gpt2s_aloud(tmp_path, gpt2, capsys):
    name = save_config(tmp_path, gpt2.n_vocab, gpt2.eot_token)
    assert data.load_tokenizer(name) is gpt2
    assert capsys.readouterr().err == (f"{name} has no vocab.json or tokenizer.json: its tokens are taken for "
                                       "GPT-2's\n")


def test_a_model_in_the_hubs_cache_needs_no_network_for_its_tokenizer(gpt2, monkeypatch):
    def unreachable(name, file):
        raise UserError("the hub could not be reached")

    monkeypatch.setattr(families, "is_gpt2", lambda thing: True)
    monkeypatch.setattr(data, "read_config", lambda name: GPTConfig())
    monkeypatch.setattr(texts, "fetch", unreachable)
    assert data.load_tokenizer("gpt2") is gpt2


# ---- plain text -----------------------------------------------------------------------------------------------------

def test_text_files_become_tokens_with_an_end_after_each_document(tmp_path, gpt2):
    (tmp_path / "a.txt").write_text(f"one\n\n two\n{END}\nthree <b>{END}</b>\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("four", encoding="utf-8")
    corpus = load_corpus(str(tmp_path), gpt2, tmp_path / "cache", CPU)
    assert corpus.dtype == np.uint16 and isinstance(corpus, np.memmap)
    documents = ["one\n\n two", f"three <b>{END}</b>\n", "four"]
    assert corpus.tolist() == [t for d in documents for t in [*gpt2.encode_ordinary(d), gpt2.eot_token]]
    made = [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()]
    load_corpus(str(tmp_path), gpt2, tmp_path / "cache", CPU)
    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()] == made  # tokenised once
    (tmp_path / "b.txt").write_text("five!", encoding="utf-8")
    assert load_corpus(str(tmp_path), gpt2, tmp_path / "cache", CPU).tolist()[-3:-1] == gpt2.encode_ordinary("five!")


@pytest.mark.parametrize("lines", [
    ["word\n", "two words \n", "\n", "  indented\n", "\t\n", "last's \t \n", "x" * 50 + "\n"], ["trailing  \n"],
    ["no line at all "]])
def test_a_long_document_is_tokenised_in_pieces_as_if_whole(lines, tmp_path, gpt2):
    rng = np.random.default_rng(0)
    text = "".join(lines[i] for i in rng.integers(0, len(lines), 40_000))
    pieces = list(texts.documents(_write(tmp_path / "a.txt", text)))
    assert "".join(piece for piece, _ in pieces) == text and (len(pieces) > 3) == (lines[0][-1] == "\n")
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    corpus = load_corpus(str(tmp_path / "a.txt"), gpt2, tmp_path, CPU)
    assert corpus.tolist()[:-1] == gpt2.encode_ordinary(text)


def test_line_ends_of_windows_leave_nothing_behind(tmp_path, gpt2):
    """A carriage return before each end token would be learned as the way to end a text."""
    text = f"\ufeffone\n two\n{END}\n{END}\n\nthree\n{END}"
    unix = load_corpus(str(_write(tmp_path / "unix.txt", text)), gpt2, tmp_path, CPU).tolist()
    windows = load_corpus(str(_write(tmp_path / "dos.txt", text.replace("\n", "\r\n"))), gpt2, tmp_path, CPU).tolist()
    assert windows == unix == [t for d in ("one\n two", "\nthree") for t in [*gpt2.encode_ordinary(d), gpt2.eot_token]]


def _write(path, text):
    path.write_bytes(text.encode())
    return path


def test_plain_text_that_cannot_be_had(tmp_path, gpt2, monkeypatch):
    refused(lambda: load_corpus("nowhere.txt", gpt2, tmp_path, CPU), "nowhere.txt", "no such .txt file")
    (tmp_path / "void").mkdir()
    refused(lambda: load_corpus(str(tmp_path / "void"), gpt2, tmp_path, CPU), "no such .txt file")
    refused(lambda: load_corpus(str(_write(tmp_path / "e.txt", "")), gpt2, tmp_path, CPU), "no text in it")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    refused(lambda: load_corpus(str(tmp_path / "bad.txt"), gpt2, tmp_path, CPU), "bad.txt", "not UTF-8")
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refused(lambda: data.text_files("openwebtext:2"), "pip install pyarrow", "--pt_coef=0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dolly").mkdir()
    assert data.is_text("void") and not data.is_text("dolly") and not data.is_text("tiny")


def test_openwebtext_is_read_from_its_parquet_files(tmp_path, gpt2, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="an optional package")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"text": ["one", "", None, "two"]}), tmp_path / "0000.parquet")
    asked = []
    monkeypatch.setattr(data, "require", lambda *where: asked.append(where) or tmp_path / "0000.parquet")
    corpus = load_corpus("openwebtext", gpt2, tmp_path, CPU)
    assert corpus.tolist() == [505, gpt2.eot_token, 11545, gpt2.eot_token]
    assert asked == [("Skylion007/openwebtext", "plain_text/partial-train/0000.parquet", "dataset",
                      "refs/convert/parquet")]
    assert load_corpus("openwebtext:2", gpt2, tmp_path, CPU).tolist() == 2 * corpus.tolist()
    assert asked[-1][1].endswith("0001.parquet")


def test_pieces_are_examples_whose_first_token_is_given():
    pieces = Pieces(np.arange(23, dtype=np.uint16), 5)
    assert len(pieces) == 4 and pieces[1].prompt == [5] and pieces[1].response == [6, 7, 8, 9]
    assert [e.prompt for e in pieces[1:3]] == [[5], [10]] and len(pieces[-1:]) == 1
    refused(lambda: Pieces(np.arange(3, dtype=np.uint16), 5), "3 tokens", "no piece of 5")
    with pytest.raises(IndexError):
        pieces[4]


def test_stages_of_a_run_share_the_tokens_of_its_plain_text(tmp_path, gpt2):
    text = str(_write(tmp_path / "a.txt", "word " * 40))
    for stage in ("teacher", "minillm"):
        assert len(data.load_pieces(text, gpt2, tmp_path / "run" / stage, 10, CPU)) == 4
    assert len(list((tmp_path / "run" / "corpus").iterdir())) == 1


# ---- batches --------------------------------------------------------------------------------------------------------

def test_the_walk_through_the_data_visits_all_and_can_be_entered_anywhere():
    walk = picks(0, 30, 10, seed=3)
    assert sorted(walk[:10]) == sorted(walk[10:20]) == list(range(10)) and walk[:10] != walk[10:20]
    assert picks(7, 9, 10, seed=3) == walk[7:16] and picks(0, 10, 10, seed=4) != walk[:10]


def test_padding():
    tokens, starts = pad_left([[1, 2], [3, 4, 5]], CPU.device)
    assert tokens.tolist() == [[0, 1, 2], [3, 4, 5]] and starts.tolist() == [1, 0]
    batch = pad_right([[1, 2], [3]], [[4], [5, 6, 0]], CPU.device)
    assert batch.tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 0]]  # the last 0 of row two is a token: the mask knows
    assert batch.response.tolist() == [[4, 0, 0], [5, 6, 0]]
    assert batch.response_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.response_mask.dtype == torch.bool and batch.tokens.dtype == batch.columns.dtype == torch.int64
    examples = [data.Example(Row(""), [1, 2], [4]), data.Example(Row(""), [3], [5, 6, 0])]
    assert data.batch_of(examples, CPU.device).tokens.tolist() == batch.tokens.tolist()


def test_each_response_token_is_predicted_from_the_column_before_it():
    """A slip by one would train a model to repeat its input."""
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[7], [8, 9, 10, 11, 12], [13, 14]]
    batch = pad_right(prompts, responses, CPU.device)
    before = batch.predicting(batch.tokens[:, :, None])[:, :, 0]  # a model whose states are its input tokens
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        assert before[row, : len(response)].tolist() == [prompt[-1], *response[:-1]]
    without_last = batch.predicting(batch.tokens[:, :-1, None])[:, :, 0]  # as sampling feeds it
    assert torch.equal(without_last[batch.response_mask], before[batch.response_mask])


def test_slices_are_consecutive_and_lose_nothing():
    assert [list(part) for part in data.slices(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(data.slices([], 3)) == []


def test_the_command_shows_a_set(capsys):
    data.main(data.Config(data="tiny", show=1))
    printed = capsys.readouterr().out
    assert "data tiny train: 8,000 rows" in printed and "### Instruction:\nTell about the" in printed
