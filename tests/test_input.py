"""Bad input: files of instructions broken in several hundred ways, and every flag of every command given wrongly."""

import dataclasses
import importlib
import json
import random
import types
import typing

import pytest

import data
from config import UserError, parse

GOOD = {"instruction": "Say hi", "input": "to Anna", "output": "hi Anna"}
COMMANDS = ["data", "sample", "eval", "exposure", "calibration", "judge", "teacher", "distill", "oracle", "report",
            "bench"]


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
            rows = data.read_rows(path)
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


def wrong_values(kind) -> list[str]:
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is typing.Literal:
        return ["nonsense", "", typing.get_args(kind)[0].upper() + "x"]
    return {bool: ["maybe", "1", ""], int: ["x", "1.5", "", "-1", "nan", "99999999999999999999"],
            float: ["x", "", "-1", "nan", "--"]}.get(kind, [])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_given_wrongly_ends_in_one_line(name, capsys):
    """Of the wrong type, out of range, misspelt: exit code 2, and a line that names the flag."""
    module = importlib.import_module(name)
    hints, tried = typing.get_type_hints(module.Config), 0
    needed = {"sample": ["--prompt=x"], "calibration": ["--data=x"], "judge": ["--answers=x", "--judge=y"],
              "report": ["out"], "bench": []}.get(name, [])
    for field in dataclasses.fields(module.Config):
        if hints[field.name] == tuple[str, ...]:
            continue
        wrong = [f"--{field.name}={value}" for value in wrong_values(hints[field.name])]
        for given in (*wrong, f"--{field.name}x=1", f"--{field.name[:-1]}_=1", f"-{field.name}=1"):
            with pytest.raises(SystemExit) as ended:
                parse(module.Config, [*needed, given], getattr(module, "presets", None))
            told = capsys.readouterr().err
            assert ended.value.code == 2 and told.count("\n") == 1 and given.split("=")[0].strip("-") in told, given
            tried += 1
    assert tried >= 3 * len(dataclasses.fields(module.Config)) - 3
