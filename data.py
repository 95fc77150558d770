"""Where tokens come from: instruction sets, the prompt template, tokenizers, plain text, batches.

Paper:    arXiv 2306.08543v4, Section 3.1 and Appendix B: D is Dolly, D_PT is OpenWebText. Prompts
          over 256 tokens and samples over 512 are dropped, and their number is printed.
Run:      python data.py --data=dolly           shows a set; also --data=FILE.jsonl, --data=tiny
Shapes:   B rows, P prompt tokens, T response tokens, S of both, D width.
Left out: dialogues; instruction sets that do not fit into memory.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

import world
from config import Machine, UserError, check, flag, run
from families import or_family
from model import read_config
from safe.files import written_aside
from safe.hub import require
from safe.rows import fields_of_rows, file_of_rows, held_out_rows, is_blank, is_file_of_rows
from safe.texts import (as_sampled, encoded, gpt2_tokenizer, refuse_unknown_words, text_files,
                        tokenised, tokenizer_files, word_tokenizer, words_of)

# The paper's prompt template, verbatim (it is Alpaca's).
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n")
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")


@dataclass(frozen=True)
class Row:
    """A line of an instruction set. `ended` is false for a sampled answer that ran out of room."""
    instruction: str
    input: str = ""
    outputs: tuple[str, ...] = ()
    ended: bool = True
    tokens: tuple[int, ...] | None = None  # of a sampled answer, without its end token

    @property
    def prompt_text(self) -> str:
        template = WITHOUT_INPUT if is_blank(self.input) else WITH_INPUT
        return template.format(instruction=self.instruction, input=self.input)


@dataclass(frozen=True)
class Example:
    """The prompt and the first reference, as tokens. A whole one ends with the end token."""
    row: Row
    prompt: list[int]
    response: list[int]


# ---- instruction sets -------------------------------------------------------------------------

# name: repository on the hub, file of the test split
HUB_SETS = {"dolly": ("MiniLLM/dolly", "valid.jsonl"),
            "self-inst": ("MiniLLM/self-inst", "valid.jsonl"),
            "vicuna": ("MiniLLM/Vicuna", "valid.jsonl"),
            "sinst": ("MiniLLM/sinst", "11_/valid.jsonl"),
            "uinst": ("MiniLLM/uinst", "11_/valid.jsonl")}


def load_rows(name: str, split: str) -> list[Row]:
    """The rows of a split of "tiny" (the built-in world), of a set on the hub, or of a user's file.

    A tenth of a file, at most 1,000 rows, is "valid" and the rest "train"; "test" is all of it.
    "all" is what may be trained on if another set validates: a whole file, or a set's "train"."""
    own = is_file_of_rows(name)
    if split == "all":
        split = "test" if own else "train"
    if name == "tiny":
        return [Row(asked, input, (said,)) for asked, input, said in world.instructions(split)]
    if name in HUB_SETS:
        if split != "test" and name != "dolly":
            raise UserError(f"{name} has only a test split; to train, use dolly, tiny or a file")
        repo, file = HUB_SETS[name]
        path = require(repo, file if split == "test" else "raw.jsonl", "dataset")
    else:
        path = file_of_rows(name, ["tiny", *HUB_SETS])
    rows = [Row(*fields) for fields in fields_of_rows(path, own)]
    if split == "test":
        return rows[:10_000] if name == "uinst" else rows  # the paper's number
    held_out = held_out_rows(name, rows) if own else range(1000)  # 1,000 of Dolly, as in the paper
    return [row for n, row in enumerate(rows) if (n in held_out) == (split == "valid")]


def load_examples(name: str, split: str, tokenizer: tiktoken.Encoding, max_prompt_tokens: int,
                  max_tokens: int, say: Callable = print) -> list[Example]:
    """The examples of a split. `say` is told how many there are and how many were dropped.

    In the test split a reference that is too long is cut: only the held-out loss reads it."""
    rows = load_rows(name, split)
    prompts = prompts_of(tokenizer, rows)
    answers = encode(tokenizer, [row.outputs[0] for row in rows])
    short = []
    for row, prompt, answer in zip(rows, prompts, answers):
        if len(prompt) <= max_prompt_tokens:
            answer = as_sampled(tokenizer, row.tokens, row.outputs[0]) or answer
            response = [*answer, tokenizer.eot_token] if row.ended else answer
            short.append(Example(row, prompt, response))
    if split == "test":
        kept = [replace(e, response=e.response[: max_tokens - len(e.prompt)]) for e in short]
    else:
        kept = [e for e in short if len(e.prompt) + len(e.response) <= max_tokens]
    say(f"data {name} {split}: {len(kept):,} rows; dropped {len(rows) - len(short):,} with a "
        f"prompt over {max_prompt_tokens} tokens and {len(short) - len(kept):,} over {max_tokens} "
        "in all")
    if not kept:
        raise UserError(f"--data={name}: its {split} split has no row within --max_prompt_tokens="
                        f"{max_prompt_tokens} and {max_tokens} tokens in all")
    return kept


# ---- tokenizers -------------------------------------------------------------------------------

@cache
def world_tokenizer() -> tiktoken.Encoding:
    headers = [WITHOUT_INPUT.split("{")[0], WITH_INPUT.split("{")[0], "\n\n### Input:\n",
               "\n\n### Response:\n"]
    return word_tokenizer([*headers, *world.vocabulary()])


def tokenizer_for(data: str) -> tiktoken.Encoding:
    """The tokenizer that a new model needs for this data."""
    return world_tokenizer() if data in ("tiny", "tiny-text") else gpt2_tokenizer()


@or_family
def load_tokenizer(model: str, template: str = "auto") -> tiktoken.Encoding:
    """The tokenizer of a model: GPT-2's, or one of words if the model's tokenizer.json lists some.

    Raises UserError if the model is not there, or was made for another vocabulary."""
    config = read_config(model)
    if template == "chat":
        raise UserError(f"{model} is a GPT-2, which has no chat template: leave out --template")
    words = words_of(model)
    tokenizer = word_tokenizer(words) if words else gpt2_tokenizer()
    if (config.vocab_size, config.eos_token_id) != (tokenizer.n_vocab, tokenizer.eot_token):
        raise UserError(f"{model}: its config.json has {config.vocab_size} tokens and ends answers "
                        f"with number {config.eos_token_id}; its tokenizer has {tokenizer.n_vocab} "
                        f"and {tokenizer.eot_token}")
    return tokenizer


@or_family
def same_vocabulary(student: tiktoken.Encoding, teacher: tiktoken.Encoding) -> None:
    """Raises UserError unless q and p are distributions over the same tokens."""
    if student._mergeable_ranks != teacher._mergeable_ranks:
        raise UserError(f"the student has {student.n_vocab:,} tokens and the teacher other "
                        f"{teacher.n_vocab:,}: distillation needs one vocabulary")


def encode(tokenizer: tiktoken.Encoding, texts: list[str]) -> list[list[int]]:
    """The tokens of each text. Text never becomes the end token, not even "<|endoftext|>"."""
    if tokenizer.name != "words":
        return encoded(tokenizer, texts)
    refuse_unknown_words(tokenizer, texts)
    return [tokenizer.encode_ordinary(text) for text in texts]  # short: threads would cost more


@or_family
def prompts_of(tokenizer: tiktoken.Encoding, rows: Sequence[Row]) -> list[list[int]]:
    """The tokens of each row's prompt."""
    return encode(tokenizer, [row.prompt_text for row in rows])


def decode(tokenizer: tiktoken.Encoding, tokens: Iterable[int]) -> str:
    """The text of a response, without its end token. Bytes that are not UTF-8 become U+FFFD."""
    return tokenizer.decode([token for token in tokens if token != tokenizer.eot_token])


@or_family
def save_tokenizer(tokenizer: tiktoken.Encoding, folder: Path) -> None:
    """Writes the files from which `transformers` and load_tokenizer() read the same tokens."""
    for name, content in tokenizer_files(tokenizer).items():
        with written_aside(folder / name) as aside:
            aside.write_bytes(content)


# ---- plain text, D_PT -------------------------------------------------------------------------

def is_text(name: str) -> bool:
    """Whether a name means plain text and not instructions. A folder called "dolly" does not."""
    known = re.fullmatch(r"tiny-text|openwebtext.*|.*\.txt", name) or Path(name).is_dir()
    return bool(known) and name not in ("tiny", *HUB_SETS) and not is_file_of_rows(name)


def load_corpus(name: str, tokenizer: tiktoken.Encoding, folder: Path, m: Machine) -> np.ndarray:
    """Plain text as one array of tokens, with an end token after each document.

    name is "tiny-text", "openwebtext" ("openwebtext:3" for three of its files of 306 MB), a .txt
    file, or a folder of them. A line that is exactly <|endoftext|> separates two documents. Files
    are tokenised once, into `folder`, and mapped into memory from there."""
    files = text_files(name)
    if name == "tiny-text":
        lines = encode(tokenizer, world.text())
        return np.array([t for line in lines for t in [*line, tokenizer.eot_token]], np.uint32)
    if not files:
        count = int(name.partition(":")[2] or 1)
        parts = [f"plain_text/partial-train/{n:04d}.parquet" for n in range(count)]
        where = ("dataset", "refs/convert/parquet")
        files = [require("Skylion007/openwebtext", part, *where) for part in parts]
    return tokenised(name, files, tokenizer, encode, folder, m)


class Pieces(Sequence):
    """Plain text as examples of `length` tokens: the first is given, the others are predicted."""

    def __init__(self, corpus: np.ndarray, length: int):
        if len(corpus) < length:
            raise UserError(f"{len(corpus)} tokens of plain text make no piece of {length} tokens")
        self.tokens = corpus[: len(corpus) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int | slice):
        if isinstance(i, slice):
            return Pieces(self.tokens[i].ravel(), self.tokens.shape[1])
        first, *rest = self.tokens[i].tolist()
        return Example(Row(""), [first], rest)


def load_pieces(name: str, tokenizer: tiktoken.Encoding, out: Path, length: int,
                m: Machine) -> Pieces:
    """Plain text for the run in the folder `out`. All runs beside it share its tokens."""
    return Pieces(load_corpus(name, tokenizer, out.parent / "corpus", m), length)


# ---- batches ----------------------------------------------------------------------------------

def picks(first: int, count: int, n: int, seed: int) -> list[int]:
    """Steps `first` to `first + count` of an endless walk through n items, shuffled anew in each
    pass. They depend on nothing else, so a resumed run goes on where it stopped."""
    return [int(shuffled(n, seed, k // n)[k % n]) for k in range(first, first + count)]


@lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def slices(items: Sequence, size: int) -> Iterator[Sequence]:
    """Consecutive slices of `size` items; the last may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts that end in one column: tokens (B, P), and starts (B,), the padding before each."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    return tokens, torch.tensor([width - len(p) for p in prompts], device=device)


@dataclass(frozen=True)
class Batch:
    """Prompts and their responses, padded with 0 at the right."""
    tokens: Tensor  # (B, S) int64, each prompt followed by its response
    response: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool, true for the tokens of the answer, end token included
    columns: Tensor  # (B, T) int64, the column of `tokens` from which y_t is predicted

    def predicting(self, hidden: Tensor) -> Tensor:
        """Those of the hidden states (B, S, D) that predict the response, (B, T, D)."""
        return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], self.columns]


def pad_right(prompts: list[list[int]], responses: list[list[int]], device: torch.device) -> Batch:
    both = [p + r for p, r in zip(prompts, responses)]
    S, T = max(map(len, both)), max(map(len, responses))
    tokens = torch.tensor([row + [0] * (S - len(row)) for row in both], device=device)
    response = torch.tensor([r + [0] * (T - len(r)) for r in responses], device=device)
    t = torch.arange(T, device=device)  # (T,)
    given = torch.tensor([[len(p)] for p in prompts], device=device)  # (B, 1)
    length = torch.tensor([[len(r)] for r in responses], device=device)  # (B, 1)
    columns = (given - 1 + t).clamp(max=S - 2)  # those of padding may lie outside
    return Batch(tokens, response, t < length, columns)


def batch_of(examples: Sequence[Example], device: torch.device) -> Batch:
    return pad_right([e.prompt for e in examples], [e.response for e in examples], device)


# ---- command ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    data: str = flag("tiny", "tiny, dolly, self-inst, vicuna, sinst, uinst or FILE.jsonl")
    max_prompt_tokens: int = flag(256, "longer prompts are dropped", 1, 1023)
    max_tokens: int = flag(512, "longer samples, prompt and answer, are dropped", 2, 1024)
    show: int = flag(3, "rows to print", 0, 1000)

    def __post_init__(self):
        check(self)


def main(cfg: Config) -> None:
    load_rows(cfg.data, "test")  # a bad row is told before the vocabulary is fetched
    limits = cfg.max_prompt_tokens, cfg.max_tokens
    only_test = cfg.data in HUB_SETS and cfg.data != "dolly"
    for split in ["test"] if only_test else ["train", "valid", "test"]:
        examples = load_examples(cfg.data, split, tokenizer_for(cfg.data), *limits)
    for example in examples[: cfg.show]:
        print(f"\n{example.row.prompt_text}{example.row.outputs[0]}")


if __name__ == "__main__":
    run(main, Config)
