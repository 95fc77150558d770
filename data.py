"""Where tokens come from: instruction sets, the prompt template, tokenizers, plain text, batches.

Paper:    arXiv 2306.08543v4, Section 3.1 and Appendix B: D (Dolly, 1,000 rows for validation), D_PT (OpenWebText) and
          the evaluation sets. Prompts over 256 tokens and samples over 512 are dropped, and counted aloud.
Run:      python data.py --data=dolly           what a set holds; also --data=FILE.jsonl, --data=tiny
Shapes:   B rows, P prompt tokens, T response tokens, S of both.
Left out: chat templates and several turns (the paper has one template and one turn); sets larger than memory.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

import world
from config import Machine, UserError, check, flag, read_json, run, written_aside
from model import fetch, missing, read_config

# The paper's prompt template, verbatim (it is Alpaca's).
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n")
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")


@dataclass(frozen=True)
class Row:
    """A line of an instruction set. `ended` is false for a sampled answer that ran out of length."""
    instruction: str
    input: str = ""
    outputs: tuple[str, ...] = ()
    ended: bool = True

    @property
    def prompt_text(self) -> str:
        return (WITH_INPUT if self.input else WITHOUT_INPUT).format(instruction=self.instruction, input=self.input)


@dataclass(frozen=True)
class Example:
    """A row in tokens: the prompt, and the first reference with its end token."""
    row: Row
    prompt: list[int]
    response: list[int]


# ---- instruction sets -----------------------------------------------------------------------------------------------

ALL = slice(None)
# name: dataset on the hub, and for each split its file and the rows used
HUB_SETS = {
    "dolly": ("MiniLLM/dolly", {"train": ("raw.jsonl", slice(1000, None)), "valid": ("raw.jsonl", slice(1000)),
                                "test": ("valid.jsonl", ALL)}),
    "self-inst": ("MiniLLM/self-inst", {"test": ("valid.jsonl", ALL)}),
    "vicuna": ("MiniLLM/Vicuna", {"test": ("valid.jsonl", ALL)}),
    "sinst": ("MiniLLM/sinst", {"test": ("11_/valid.jsonl", ALL)}),
    "uinst": ("MiniLLM/uinst", {"test": ("11_/valid.jsonl", slice(10000))}),
}


def load_rows(name: str, split: str) -> list[Row]:
    """The rows of a split of "tiny" (the built-in world), of a set on the hub, or of a .jsonl file.

    A file's "valid" rows are its first tenth, 1,000 at most, and "train" has the others; "test" is the whole file.
    "all" is what can be trained on if another set validates: of a file all rows, of other sets those of "train".
    Raises UserError: for a bad row with file, line and fault, and for a set that cannot be had."""
    if split == "all" and not name.endswith(".jsonl"):
        split = "train"
    if name == "tiny":
        return [Row(instruction, input, (answer,)) for instruction, input, answer in world.instructions(split)]
    if name in HUB_SETS:
        repo, splits = HUB_SETS[name]
        if split not in splits:
            raise UserError(f"{name} has only a test split; to train, use dolly, tiny or a .jsonl of your own")
        file, part = splits[split]
        path = fetch(repo, file, "dataset")
        if path is None:
            raise missing(repo, file)
        return read_rows(path)[part]
    if not name.endswith(".jsonl"):
        raise UserError(f"{name} is no instruction set: give tiny, {', '.join(HUB_SETS)}, or a .jsonl file")
    rows = read_rows(Path(name))
    if split in ("train", "valid") and len(rows) < 2:
        raise UserError(f"{name}: one row is too few to train on and to validate with")
    held_out = min(1000, -(-len(rows) // 10))
    return {"train": rows[held_out:], "valid": rows[:held_out]}.get(split, rows)


def read_rows(path: Path, need_output: bool = True) -> list[Row]:
    """Every row of a .jsonl file: `instruction`, optional `input`, `output` (a string, or a list of references)."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(read_row(line, need_output))
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
    if not rows:
        raise UserError(f"{path}: it holds no rows; one JSON object a line is expected")
    return rows


def read_row(line: bytes, need_output: bool) -> Row:
    try:
        raw = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON (column {error.colno}: {error.msg}); is the line cut off?") from None
    except ValueError as error:
        raise UserError(f"not JSON that can be read ({error})") from None
    except RecursionError:
        raise UserError("JSON nested too deeply") from None
    if not isinstance(raw, dict):
        raise UserError(f"one JSON object a line is expected, this is a {type(raw).__name__}")

    def text(key: str, value) -> str:
        if not isinstance(value, str):
            raise UserError(f'"{key}" must be a string, it is {json.dumps(value)[:40]}')
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f'"{key}" holds half of a surrogate pair, which is not text') from None
        return value

    for key in ("instruction", "output") if need_output else ("instruction",):
        if key not in raw:
            raise UserError(f'there is no "{key}" (found: {", ".join(raw) or "nothing"})')
    outputs = raw["output"] if need_output else []
    row = Row(text("instruction", raw["instruction"]),
              "" if raw.get("input") is None else text("input", raw["input"]),
              tuple(text("output", output) for output in (outputs if isinstance(outputs, list) else [outputs])),
              raw.get("ended") is not False)
    if not row.instruction.strip():
        raise UserError('"instruction" is empty')
    if need_output and not all(output.strip() for output in row.outputs or [""]):
        raise UserError('"output" is empty')
    return row


def load_examples(name: str, split: str, tokenizer: tiktoken.Encoding, max_prompt_tokens: int, max_tokens: int,
                  say: Callable = print) -> list[Example]:
    """The examples of a split; `say` is told how many there are and how many were dropped.

    Dropped are prompts over `max_prompt_tokens` and, but for the test split, samples over `max_tokens`. In that the
    reference is cut instead: only the held-out loss reads its tokens."""
    rows = load_rows(name, split)
    prompts = encode(tokenizer, [row.prompt_text for row in rows])
    answers = encode(tokenizer, [row.outputs[0] for row in rows])
    kept, long_prompts, long_samples = [], 0, 0
    for row, prompt, answer in zip(rows, prompts, answers):
        response = answer + [tokenizer.eot_token] * row.ended
        if len(prompt) > max_prompt_tokens:
            long_prompts += 1
        elif split != "test" and len(prompt) + len(response) > max_tokens:
            long_samples += 1
        else:
            kept.append(Example(row, prompt, response[: max_tokens - len(prompt)]))
    dropped = (f"; dropped {long_prompts:,} with a prompt over {max_prompt_tokens} tokens and {long_samples:,} over "
               f"{max_tokens} tokens in all") if long_prompts or long_samples else ""
    say(f"data {name} {split}: {len(kept):,} rows{dropped}")
    if not kept:
        raise UserError(f"--data={name}: no row of its {split} split is within --max_prompt_tokens={max_prompt_tokens} "
                        f"and {max_tokens} tokens in all")
    return kept


# ---- tokenizers -----------------------------------------------------------------------------------------------------

END = "<|endoftext|>"


@cache
def gpt2_tokenizer() -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests, ssl and socket have one each
        raise UserError(f"the GPT-2 vocabulary could not be fetched ({type(error).__name__}): connect once, or set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it") from None


@cache
def world_tokenizer() -> tiktoken.Encoding:
    headers = [WITHOUT_INPUT.split("{")[0], WITH_INPUT.split("{")[0], "\n\n### Input:\n", "\n\n### Response:\n"]
    return word_tokenizer([*headers, *world.vocabulary()])


def word_tokenizer(words: list[str]) -> tiktoken.Encoding:
    """An encoding with one token for each of these words."""
    special = re.compile(r"([.^$*+?{}()|\[\]\\])")
    pattern = "|".join(special.sub(r"\\\1", word) for word in sorted(words, key=len, reverse=True))
    return tiktoken.Encoding("words", pat_str=pattern, special_tokens={END: len(words)},
                             mergeable_ranks={word.encode(): i for i, word in enumerate(words)})


def tokenizer_for(data: str) -> tiktoken.Encoding:
    """The tokenizer that a new model needs for this data."""
    return world_tokenizer() if data in ("tiny", "tiny-text") else gpt2_tokenizer()


# Some of GPT-2's tokens as its vocabulary spells them. GPT-2s of other languages have as many, but not these.
OF_GPT2 = {"Ġthe": 262, "Ġand": 290, "Ġof": 286, "ing": 278, "ĠEnglish": 3594}


def load_tokenizer(model: str) -> tiktoken.Encoding:
    """The tokenizer of a model: words if it is a folder whose tokenizer.json says so, else GPT-2's.

    Raises UserError if the model is not there, or was made for another vocabulary."""
    config, path = read_config(model), Path(model) / "tokenizer.json"
    raw = read_json(path).get("model") if path.is_file() else {"vocab": OF_GPT2}
    vocab = raw.get("vocab") if isinstance(raw, dict) else None
    if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
        raise UserError(f"{path} is damaged: it has no vocabulary, each token with its number")
    if raw.get("type") == "WordLevel":
        words = [word for word in sorted(vocab, key=vocab.get) if word != END]
        if [vocab[word] for word in words] != list(range(len(words))) or not all(word.isascii() for word in words):
            raise UserError(f"{path} is no vocabulary of a built-in world: its words are not numbered from 0 on")
        tokenizer = word_tokenizer(words)
    elif any(vocab.get(token) != i for token, i in OF_GPT2.items()):
        raise UserError(f"{path} is not GPT-2's vocabulary: here text is read and written by that alone")
    else:
        tokenizer = gpt2_tokenizer()
    if (config.vocab_size, config.eos_token_id) != (tokenizer.n_vocab, tokenizer.eot_token):
        raise UserError(f"{model}: its config.json has {config.vocab_size} tokens and ends answers with number "
                        f"{config.eos_token_id}; its tokenizer has {tokenizer.n_vocab} and {tokenizer.eot_token}")
    return tokenizer


def encode(tokenizer: tiktoken.Encoding, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. Text never becomes the end token, not even the text <|endoftext|>."""
    if tokenizer.name == "words":
        for text in texts:
            if unknown := re.sub(tokenizer._pat_str, "\0", text).strip("\0"):
                word = unknown.split("\0")[0]  # or a space too many
                raise UserError(f"a model of the built-in world does not know {word.strip() or word!r}; "
                                "`python data.py --data=tiny` shows its language")
        return [tokenizer.encode_ordinary(text) for text in texts]  # short: threads would cost more
    return tokenizer.encode_ordinary_batch(texts)


def decode(tokenizer: tiktoken.Encoding, tokens: Iterable[int]) -> str:
    """The text of a response, without its end token. Bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode([token for token in tokens if token != tokenizer.eot_token])


def save_tokenizer(tokenizer: tiktoken.Encoding, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, from which `transformers` reads the same tokens."""
    ranks = {tokenizer.decode_single_token_bytes(i): i for i in range(tokenizer.eot_token)}
    if tokenizer.name == "words":
        model = {"type": "WordLevel", "vocab": {word.decode(): i for word, i in ranks.items()}, "unk_token": END}
        split = {"type": "Split", "pattern": {"Regex": tokenizer._pat_str}, "behavior": "Isolated", "invert": False}
        decoder = {"type": "Fuse"}
    else:
        letters = byte_letters()
        spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
        merges = [[spell[half] for half in halves(token, ranks)] for token in ranks if len(token) > 1]
        model = {"type": "BPE", "vocab": {spell[token]: i for token, i in ranks.items()}, "merges": merges}
        split = decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model["vocab"][END] = tokenizer.eot_token
    end = {"id": tokenizer.eot_token, "content": END, "special": True, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
             "pre_tokenizer": split, "post_processor": None, "decoder": decoder, "model": model}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "unk_token": END,
                "clean_up_tokenization_spaces": False}
    for file, value in (("tokenizer.json", whole), ("tokenizer_config.json", settings)):
        with written_aside(folder / file) as aside:
            aside.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def byte_letters() -> list[str]:
    """The printable letter by which GPT-2's files write each of the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge made this one: its byte pair encoding, stopped a merge early."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


# ---- plain text, D_PT -----------------------------------------------------------------------------------------------

def is_text(name: str) -> bool:
    """Whether a name of data means plain text rather than instructions; a folder called "dolly" does not."""
    return name not in ("tiny", *HUB_SETS) and (
        name == "tiny-text" or name.startswith("openwebtext") or name.endswith(".txt") or Path(name).is_dir())


def text_files(name: str) -> list[Path]:
    """The .txt files that a name of plain text means; none for tiny-text and openwebtext. Raises UserError for what is
    not there, and where the package is missing that reads OpenWebText."""
    if name == "tiny-text":
        return []
    if re.fullmatch(r"openwebtext(:[1-9]\d*)?", name):
        if find_spec("pyarrow") is None:
            raise UserError(f"{name} is stored as parquet: `pip install pyarrow`; or give a .txt file, or go without "
                            "plain text by --pt_coef=0")
        return []
    path = Path(name)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".txt" for file in files):
        raise UserError(f"{name}: there is no such .txt file, nor a folder with .txt files (tiny-text and openwebtext "
                        "are known by name)")
    return files


def load_corpus(name: str, tokenizer: tiktoken.Encoding, folder: Path, m: Machine) -> np.ndarray:
    """Plain text as one array of uint16 tokens, an end token after each document.

    name: "tiny-text", "openwebtext" ("openwebtext:3" for three of its 306 MB files), a .txt file or a folder of them. A
    line that is exactly <|endoftext|> parts two documents. Files are tokenised once, into `folder`, and then mapped."""
    files = text_files(name)
    if name == "tiny-text":
        lines = encode(tokenizer, world.text())
        return np.array([token for line in lines for token in [*line, tokenizer.eot_token]], np.uint16)
    documents = text_documents(files)
    if not files:
        names = [f"plain_text/partial-train/{n:04d}.parquet" for n in range(int(name.partition(":")[2] or 1))]
        files = [fetch("Skylion007/openwebtext", file, "dataset", "refs/convert/parquet") for file in names]
        if None in files:
            raise missing("Skylion007/openwebtext", names[files.index(None)])
        documents = parquet_documents(files)
    key = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files] + [tokenizer.name])
    path = folder / f"{Path(name).stem.replace(':', '-')}-{hashlib.sha1(key.encode()).hexdigest()[:12]}.bin"
    whole = path.exists() and path.stat().st_size and path.stat().st_size % 2 == 0
    if m.rank == 0 and not whole:
        m.say(f"corpus {name}: tokenising once, into {path}")
        with written_aside(path) as aside, open(aside, "wb") as file:
            while batch := list(islice(documents, 512)):
                for tokens, (_, last) in zip(encode(tokenizer, [text for text, _ in batch]), batch):
                    np.array(tokens + [tokenizer.eot_token] * last, np.uint16).tofile(file)
            if file.tell() == 0:
                raise UserError(f"{name}: there is no text in it")
    m.barrier()
    corpus = np.memmap(path, np.uint16, "r")
    m.say(f"corpus {name}: {len(corpus):,} tokens")
    return corpus


def text_documents(files: list[Path]) -> Iterator[tuple[str, bool]]:
    """(piece of text, whether a document ends with it). A long document is cut into pieces where no token can lie:
    behind a line that is not blank, before one that does not begin with white space."""
    for path in files:
        piece, size = [], 0
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                for line in file:
                    ends = line.rstrip("\r\n") == END
                    if piece and (ends or (size > 100_000 and not line[0].isspace() and piece[-1].strip())):
                        text = "".join(piece)
                        yield (text.removesuffix("\n") if ends else text), ends
                        piece, size = [], 0
                    if not ends:
                        piece.append(line)
                        size += len(line)
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None
        if piece:
            yield "".join(piece), True


def parquet_documents(files: list[Path]) -> Iterator[tuple[str, bool]]:
    from pyarrow import parquet
    for path in files:
        for batch in parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
            yield from ((text, True) for text in batch.column(0).to_pylist() if text)


class Pieces(Sequence):
    """Plain text as examples of `length` tokens: the first is given, the others are predicted."""

    def __init__(self, corpus: np.ndarray, length: int):
        if len(corpus) < length:
            raise UserError(f"{len(corpus)} tokens of plain text make no piece of {length}")
        self.corpus, self.length = corpus, length

    def __len__(self) -> int:
        return len(self.corpus) // self.length

    def __getitem__(self, i: int | slice):
        if isinstance(i, slice):
            first, last, _ = i.indices(len(self))
            return Pieces(self.corpus[first * self.length : last * self.length], self.length)
        if not 0 <= i < len(self):
            raise IndexError(i)
        first, *rest = self.corpus[i * self.length : (i + 1) * self.length].tolist()
        return Example(Row(""), [first], rest)


# ---- batches --------------------------------------------------------------------------------------------------------

def picks(first: int, count: int, n: int, seed: int) -> list[int]:
    """Steps `first` to `first + count` of an endless walk through n items, shuffled anew in each pass.

    A function of its arguments alone: a resumed run, and any number of processes, go on where the walk stood."""
    return [int(shuffled(n, seed, k // n)[k % n]) for k in range(first, first + count)]


@lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts that end in one column: tokens (B, P), and starts (B,), the padding before each."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    return tokens, torch.tensor([width - len(p) for p in prompts], device=device)


def pad_right(prompts: list[list[int]], responses: list[list[int]],
              device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt and response in one row: tokens (B, S), response (B, T), response_mask (B, T)."""
    width, longest = max(len(p) + len(r) for p, r in zip(prompts, responses)), max(map(len, responses))
    tokens = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in zip(prompts, responses)], device=device)
    response = torch.tensor([r + [0] * (longest - len(r)) for r in responses], device=device)
    lengths = torch.tensor([len(r) for r in responses], device=device)
    return tokens, response, torch.arange(longest, device=device) < lengths[:, None]


# ---- command --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    data: str = flag("tiny", "instruction set: tiny, dolly, self-inst, vicuna, sinst, uinst or FILE.jsonl")
    max_prompt_tokens: int = flag(256, "longer prompts are dropped")
    max_tokens: int = flag(512, "longer samples, prompt and answer, are dropped")
    show: int = flag(3, "rows to print")

    def __post_init__(self):
        check(self, max_prompt_tokens=(1, 1023), max_tokens=(2, 1024), show=(0, 1000))


def main(cfg: Config) -> None:
    load_rows(cfg.data, "test")  # a wrong name or a bad row is told before the vocabulary is fetched
    for split in HUB_SETS[cfg.data][1] if cfg.data in HUB_SETS else ("train", "valid", "test"):
        examples = load_examples(cfg.data, split, tokenizer_for(cfg.data), cfg.max_prompt_tokens, cfg.max_tokens)
    for example in examples[: cfg.show]:
        print(f"\n{example.row.prompt_text}{example.row.outputs[0]}")


if __name__ == "__main__":
    run(main, Config)
