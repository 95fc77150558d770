"""Rows of instructions in files: a bad one is named, and what is not read is said aloud.

data.py makes examples of what is read here.
"""

import difflib
import gzip
import hashlib
import json
import math
import re
import shlex
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

from config import UserError
from safe.files import refuse_pointer, say_once
from safe.texts import END, TOO_BLANK, blank_run

ROWS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
# The other spellings are those of Dolly, of files of prompts, and of questions.
SPELLINGS = {"instruction": ("instruction", "prompt", "question"), "input": ("input", "context"),
             "output": ("output", "response", "completion", "answer")}
KNOWN = [*SPELLINGS["instruction"], *SPELLINGS["input"], *SPELLINGS["output"], "ended", "tokens",
         "seed"]
# Keys that tell about a row and do not belong to it.
BOOKKEEPING = set("""id idx index uid uuid row line number category categories topic task task_type
    type kind source src dataset subset domain tag tags lang language split license url author
    annotator date time timestamp created_at model model_name generator score scores rating quality
    difficulty level version metadata meta""".split())
FILLED_IN = "Below is an instruction that describes a task"  # as the template begins
CSV = ("python -c \"import csv, json; [print(json.dumps(row)) for row in csv.DictReader(open(0, "
       "encoding='utf-8-sig', newline=''){})]\" < {} > {}")


def is_file_of_rows(name: str) -> bool:
    return name.lower().endswith(ROWS)


def file_of_rows(name: str, sets: Iterable[str]) -> Path:
    """The user's file of this name. Raises UserError if it is neither that nor one of the sets."""
    path = Path(name)
    if is_file_of_rows(name):
        return path
    if path.is_dir():
        raise UserError(f"{name} is a folder: give one file of rows ({', '.join(ROWS)})")
    if path.suffix.lower() in (".csv", ".tsv"):
        tabs = ", delimiter='\\t'" if path.suffix.lower() == ".tsv" else ""
        rows = shlex.quote(f"{path.with_suffix('')}-rows.jsonl")
        line = CSV.format(tabs, shlex.quote(name), rows)
        raise UserError(f"{name} is a table; this makes rows of it: {line}")
    raise UserError(f"{name or 'an empty name'} is not an instruction set: give {', '.join(sets)}, "
                    f"or a file of rows ({', '.join(ROWS)})")


def fields_of_rows(path: Path, own: bool) -> list[tuple]:
    """The fields of each data.Row of a file, in their order.

    Raises UserError for a bad row: the file, the line or row, and what is wrong with it. Of a
    user's own file it says how other keys are read; in one from the hub they are passed over."""
    return read_fields(path, own, zlib.crc32(path.read_bytes()) if path.is_file() else 0)


@lru_cache(maxsize=4)
def read_fields(path: Path, own: bool, content: int) -> list[tuple]:
    """Does the work of fields_of_rows(), once for all stages of a run."""
    rows, read_as, marked = [], {}, 0
    for place, raw in raw_rows(path):
        try:
            raw = parsed(raw) if isinstance(raw, bytes) else as_object(raw, "one JSON object a row")
            if own:
                raw = without_others(raw, read_as)
            else:
                raw = {key: raw[key] for key in SPELLINGS if key in raw}
            rows.append(fields(raw, read_as))
            marked += any(END in text for text in (*rows[-1][:2], *rows[-1][2]))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no rows; one JSON object a line is expected")
    if own and read_as:
        told = [f'"{key}" is read as "{name}"' for key, name in read_as.items() if name]
        passed_over = [f'"{key}"' for key, name in read_as.items() if not name]
        told += [f"not read: {', '.join(passed_over)}"] if passed_over else []
        say_once(f"data {path}: {'; '.join(told)}")
    if marked:
        say_once(f"data {path}: {END} is in {marked:,} of the rows, where it is text and ends "
                 "nothing: remove it, unless that is meant")
    return rows


def raw_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Each row of a file after its place, the file with the line or the row: a line as it stands
    there, or a value."""
    if path.is_file():
        refuse_pointer(path)
    if path.suffix.lower() == ".parquet":
        yield from ((f"{path}, row {n}", row) for n, row in enumerate(parquet_rows(path), 1))
        return
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        try:
            array = json_value(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        yield from ((f"{path}, row {n}", row) for n, row in enumerate(array, 1))
        return
    if content.lstrip().startswith((b"{\n", b"{\r\n")):
        other = shlex.quote(f"{path.parent / path.name.split('.')[0]}-lines.jsonl")
        raise UserError(f"{path}: a row is one line; this makes such lines: gzip -cdf "
                        f"{shlex.quote(str(path))} | jq -c . > {other}")
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def parquet_rows(path: Path) -> list[dict]:
    if find_spec("pyarrow") is None:
        raise UserError(f"{path} is read by pyarrow: `pip install pyarrow`, or give a .jsonl file")
    from pyarrow import parquet
    try:
        with open(path, "rb") as file:
            return parquet.ParquetFile(file).read().to_pylist()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or str(error).splitlines()[0]}") from None
    except ValueError as error:  # pyarrow's own errors are among them
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def parsed(line: bytes) -> dict:
    return as_object(json_value(line), "one JSON object a line")


def as_object(value, expected: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{expected} is expected, this is a {type(value).__name__}")
    return value


def json_value(content: bytes):
    """What JSON of one line, or of several, stands for."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=without_doubles)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = error.start - content.rfind(b"\n", 0, error.start)
        raise UserError(f"{in_line(line)}not UTF-8 (byte {byte} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{in_line(error.lineno)}not JSON (column {error.colno}: {error.msg}); is "
                        "the line cut off?") from None
    except ValueError as error:
        raise UserError(f"not JSON that can be read ({error})") from None
    except RecursionError:
        raise UserError("JSON nested too deeply") from None


def in_line(number: int) -> str:
    return f"line {number}: " if number > 1 else ""


def without_doubles(pairs: list[tuple]) -> dict:
    """For json: of two equal keys it would drop the first."""
    raw = dict(pairs)
    if len(raw) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f'"{key}" is given twice')
    return raw


@cache
def nearest(key: str, holds_bool: bool) -> str:
    """The key that is read and of which this may be a misspelling, or ""."""
    near = difflib.get_close_matches(key, ["ended"] if holds_bool else KNOWN, n=1, cutoff=0.8)
    return near[0] if near else ""


def without_others(raw: dict, read_as: dict[str, str]) -> dict:
    """The row without the keys that are not read, which are noted. Raises UserError for a key that
    may be a misspelling, or under which text would be lost."""
    row = {}
    for key, value in raw.items():
        copy = key in ("prompt", "text") and "instruction" in raw  # as in released files
        copy = copy and isinstance(value, str) and value.startswith(FILLED_IN)
        if key in KNOWN and not copy:
            row[key] = value
            continue
        plain = key.strip().lower()
        bookkeeping = copy or plain in BOOKKEEPING or plain.endswith("_id")
        bookkeeping = bookkeeping or (isinstance(value, int | float) and type(value) is not bool)
        if bookkeeping and not copy and isinstance(value, str) and len(value.split()) > 20:
            bookkeeping = False  # "source" may hold the passage that a question is about
        if not bookkeeping and value not in (None, "", [], {}):
            if near := nearest(plain, isinstance(value, bool)):
                raise UserError(f'unknown key "{key}": did you mean "{near}"?')
            if '"' in json.dumps(value, default=str):
                raise UserError(f'unknown key "{key}", whose text would be lost: put it into '
                                '"instruction" or "input", or remove the key')
        read_as[key] = ""
    return row


def key_of(name: str, raw: dict) -> str:
    """The key that holds this field of a row, in one of its spellings. Raises UserError if two hold
    different texts."""
    there = [key for key in SPELLINGS[name] if key in raw]
    filled = [key for key in there if raw[key] not in (None, "", [])]
    for key in filled[1:]:
        if raw[key] != raw[filled[0]]:
            raise UserError(f'"{filled[0]}" and "{key}" both hold the {name}: join them, or remove '
                            "one")
    return [*filled, *there, name][0]


def fields(raw: dict, read_as: dict[str, str]) -> tuple:
    keys = {name: key_of(name, raw) for name in SPELLINGS}
    for name in ("instruction", "output"):
        if keys[name] not in raw:
            raise UserError(f'there is no "{name}" (found: {", ".join(raw) or "nothing"})')
    read_as |= {key: name for name, key in keys.items() if key != name}
    instruction, input, output = (raw.get(keys[name]) for name in SPELLINGS)
    input = "" if input is None else input
    outputs = output if isinstance(output, list) else [output]
    ended = True if raw.get("ended") is None else raw["ended"]
    if not isinstance(ended, bool):
        raise UserError(f'"ended" must be true or false, not {as_shown(ended)}')
    tokens = raw.get("tokens")  # of an answer that was sampled, without its end token
    if tokens is not None:
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise UserError(f'"tokens" must be a list of whole numbers, not {as_shown(tokens)}')
        tokens = tuple(tokens)
    texts = [("instruction", instruction), *(("output", text) for text in outputs or [""])]
    for name, text in [*texts, ("input", input)]:
        key = keys[name]
        if not isinstance(text, str):
            raise UserError(f'"{key}" must be a string, not {as_shown(text)}')
        if re.search(r"[\ud800-\udfff]", text):
            raise UserError(f'"{key}" holds half of a surrogate pair, which is not text')
        # a sampled answer may be white space, or its end token alone
        sampled = name == "output" and tokens is not None and (text or ended)
        if is_blank(text) and name != "input" and not sampled:
            raise UserError(f'"{key}" is empty')
        if blank_run(text):
            raise UserError(f'in "{key}" there are {TOO_BLANK}')
    if instruction.startswith(FILLED_IN):
        raise UserError(f'"{keys["instruction"]}" is a template that is filled in already: give '
                        "the instruction alone")
    return instruction, input, tuple(outputs), ended, tokens


def as_shown(value) -> str:
    return json.dumps(value, default=str)[:40]


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: white space, line ends, marks of no width."""
    return all(unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cc", "Cf") for c in text)


def plain_prompt(row) -> str:
    """The prompt of a data.Row in the form in which twins are equal."""
    plain = unicodedata.normalize("NFKC", row.prompt_text).casefold()
    plain = "".join(c for c in plain if c.isascii() or unicodedata.category(c) != "Cf")
    return " ".join(plain.split())


def held_out_rows(name: str, rows: list) -> set[int]:
    """The numbers of those of a file's data.Rows that validate: a tenth of all, at most 1,000.

    Prompts are taken by their hashes, with all of their rows, so the order of a file does not
    matter, and doubles are on one side. White space, case, marks of no width and other forms of a
    letter make no other prompt."""
    numbers_by_hash = defaultdict(list)
    for number, row in enumerate(rows):
        plain = plain_prompt(row)
        numbers_by_hash[hashlib.sha256(plain.encode()).hexdigest()].append(number)
    if len(numbers_by_hash) < 2:
        raise UserError(f"{name}: rows of one prompt cannot train and validate too: add others, or "
                        "validate on another set (teacher.py --valid_data)")
    prompts = [numbers for _, numbers in sorted(numbers_by_hash.items())]
    most = min(1000, math.ceil(len(rows) / 10))
    held_out = set()
    for numbers in prompts:
        if len(held_out) + len(numbers) <= most:
            held_out.update(numbers)
    return held_out or set(min(prompts, key=len))  # each prompt may have more rows than `most`


def apart(name: str, examples: list, valid_name: str, valid: list, say: Callable) -> list:
    """Those data.Examples whose prompts do not validate. It matters where a file of sampled answers
    is trained on, say. The built-in world is passed over: all of its prompts are trained on."""
    prompts = {plain_prompt(example.row) for example in valid}
    kept = [example for example in examples if plain_prompt(example.row) not in prompts]
    if valid_name == "tiny" or len(kept) == len(examples):
        return examples
    if not kept:
        raise UserError(f"{name} holds no other prompts than those of {valid_name} that validate: "
                        "give other rows")
    say(f"data {name}: {len(examples) - len(kept):,} rows are left out, as prompts of {valid_name} "
        "validate")
    return kept
