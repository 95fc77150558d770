"""Plain text and vocabularies in files: a corpus is tokenised once, other vocabularies are refused.

data.py makes examples of what is read here, and of safe/rows.py.
"""

import json
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import read_file_cached

from config import Machine, UserError
from safe.files import read_json, refuse_pointer, say_once, txt_files, written_aside
from safe.hub import fetch

END = "<|endoftext|>"


# ---- tokens of texts ----------------------------------------------------------------------------

BLANKS = 500_000
TOO_BLANK = f"over {BLANKS:,} characters of white space in a row, which is no text: remove them"


def blank_run(text: str) -> re.Match | None:
    """A run of white space so long that the tokenizer could panic, as it does at a million."""
    return re.search(rf"(?<!\s)\s{{{BLANKS}}}", text) if len(text) >= BLANKS else None


def encoded(tokenizer: tiktoken.Encoding, texts: list[str]) -> list[list[int]]:
    if any(map(blank_run, texts)):
        raise UserError(f"in a text there are {TOO_BLANK}")
    return tokenizer.encode_ordinary_batch(texts)


def refuse_unknown_words(tokenizer: tiktoken.Encoding, texts: list[str]) -> None:
    for text in texts:
        unknown = re.sub(tokenizer._pat_str, "\0", text).strip("\0").split("\0")[0]
        if unknown:
            word = unknown.strip() or unknown  # a space too many
            raise UserError(f"a model of the built-in world does not know {word!r}; "
                            "`python data.py --data=tiny` shows its language")


def as_sampled(tokenizer: tiktoken.Encoding, tokens: Sequence[int] | None,
               text: str) -> list[int] | None:
    """The tokens of a sampled answer if they read as its text in this vocabulary, else None: the
    text has been edited then, or another vocabulary wrote it."""
    end = tokenizer.eot_token
    if tokens is None or not all(0 <= t < tokenizer.n_vocab and t != end for t in tokens):
        return None
    tokens = list(tokens)
    if tokenizer.decode(tokens) == text:
        return tokens
    say_once('an "output" is not what its "tokens" read as: the text is learned, and "ended" says '
             "whether an end token follows it")
    return None


# ---- plain text ---------------------------------------------------------------------------------

def text_files(name: str) -> list[Path]:
    """The .txt files that a name means; none for tiny-text and openwebtext. Raises UserError where
    there is no such text, or no package that reads it."""
    if re.fullmatch(r"tiny-text|openwebtext(:[1-9]\d*)?", name):
        if name != "tiny-text" and find_spec("pyarrow") is None:
            raise UserError(f"{name} is stored as parquet: `pip install pyarrow`; or give a .txt "
                            "file, or go without plain text by --pt_coef=0")
        return []
    path = Path(name)
    files = sorted(txt_files(path)) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".txt" for file in files):
        raise UserError(f"{name}: there is no such .txt file, nor a folder with .txt files; "
                        "tiny-text and openwebtext are known by name")
    for file in files:
        refuse_pointer(file)
    return files


def tokenised(name: str, files: list[Path], tokenizer: tiktoken.Encoding, encode: Callable,
              folder: Path, m: Machine) -> np.ndarray:
    """The tokens of these files, with an end token after each document, mapped into memory from a
    file in `folder`. The first process writes that file, unless it is there."""
    read = [(str(file.resolve()), file.stat()) for file in files]
    key = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in read]
    which = tokenizer.name
    if which != "gpt2":  # GPT-2's, or one of many lists of words or of other families
        which = repr((tokenizer._mergeable_ranks, tokenizer.eot_token))
    kind = np.dtype(np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32)
    crc = zlib.crc32(repr([which, *key]).encode())
    path = folder / f"{Path(name).stem.replace(':', '-')}-{crc:08x}.bin"
    whole = path.exists() and path.stat().st_size and path.stat().st_size % kind.itemsize == 0
    if m.rank == 0 and not whole:
        m.say(f"corpus {name}: tokenising once, into {path}")
        pieces = (piece for file in files for piece in documents(file))
        with written_aside(path) as aside, open(aside, "wb") as file:
            while some := list(islice(pieces, 512)):
                tokens = encode(tokenizer, [text for text, _ in some])
                for piece, (_, ends) in zip(tokens, some):
                    np.array(piece + [tokenizer.eot_token] * ends, kind).tofile(file)
            if file.tell() == 0:
                raise UserError(f"{name}: there is no text in it")
    m.barrier()
    corpus = np.memmap(path, kind, "r")
    m.say(f"corpus {name}: {len(corpus):,} tokens")
    return corpus


def documents(path: Path) -> Iterator[tuple[str, bool]]:
    """(piece of text, whether a document ends with it). A long document is cut where no token can
    lie: after a line that is not blank, before one that does not begin with white space."""
    if path.suffix == ".parquet":
        from pyarrow import parquet
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(1000, columns=["text"]):
            for text in batch.column(0).to_pylist():
                number += 1
                if text:
                    if blank_run(text):
                        raise UserError(f"{path}, row {number}: there are {TOO_BLANK}")
                    yield text, True
        return
    lines, size, first = [], 0, 1  # of the piece, which begins in the line number `first`
    try:
        with open(path, encoding="utf-8-sig") as file:  # \r\n is read as \n
            for number, line in enumerate(file, 1):
                ends = line.strip() == END
                if END in line and not ends:
                    say_once(f"{path}:{number}: {END} is text here, as it shares its line: only on "
                             "a line of its own it parts documents")
                cut = size > 100_000 and lines[-1].strip() and not line[0].isspace()
                if lines and (ends or cut):
                    text = piece_of(lines, path, first)
                    yield text.removesuffix("\n") if ends else text, ends
                    lines, size = [], 0
                if not ends:
                    first = first if lines else number
                    lines.append(line)
                    size += len(line)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    if lines:
        yield piece_of(lines, path, first), True


def piece_of(lines: list[str], path: Path, first: int) -> str:
    """The lines in one text. Raises UserError if no tokenizer could read it."""
    text = "".join(lines)
    run = blank_run(text)
    if run:
        number = first + text.count("\n", 0, run.start())
        raise UserError(f"{path}:{number}: there are {TOO_BLANK}")
    return text


# ---- vocabularies -------------------------------------------------------------------------------

def words_of(model: str) -> list[str]:
    """The words that a model's tokenizer.json lists, or none if its vocabulary is GPT-2's, as it is
    without any such file. Raises UserError for all other vocabularies."""
    path = None
    for file in ("vocab.json", "tokenizer.json"):
        with suppress(UserError):  # the hub is out of reach, and its cache lacks the file
            path = fetch(model, file) or path
    if path is None:
        say_once(f"{model} has no vocab.json or tokenizer.json: its tokens are taken for GPT-2's")
        return []
    raw = read_json(path)
    merges = None
    if path.name == "vocab.json":
        raw = {"vocab": raw}
        with suppress(UserError):
            merges = fetch(model, "merges.txt")
    elif raw.get("normalizer"):
        raise UserError(f"{path} has a normalizer, and GPT-2's has none: texts would be other "
                        "tokens here than there")
    else:
        raw = raw.get("model")
    vocab = raw.get("vocab") if isinstance(raw, dict) else None
    if not isinstance(vocab, dict):
        raise UserError(f"{path} is damaged: it does not list tokens with their numbers")
    if raw.get("type") == "WordLevel":
        words = [word for word in vocab if word != END]
        numbered = all(vocab[word] == i and word.isascii() for i, word in enumerate(words))
        known = bool(words) and numbered
    else:  # GPT-2s of other languages have as many tokens as the English one
        words = []
        gpt2_tokenizer()  # it tells why, if GPT-2's files are out of reach
        known = json.loads(gpt2_files()["vocab.json"]).items() <= vocab.items()
        merges = merges.read_bytes().split(b"\n") if merges else raw.get("merges", ())
        merges = rules_of(merges)
        if known and merges and merges != rules_of(gpt2_files()["merges.txt"].split(b"\n")):
            raise UserError(f"{path} has GPT-2's tokens, but its merges are others: texts would be "
                            "other tokens here than there")
    if not known:
        raise UserError(f"{path} is neither GPT-2's vocabulary nor that of a built-in world: text "
                        "can be read and written by these alone")
    return words


def rules_of(merges: Iterable[bytes | str | list[str]]) -> list[str]:
    """Merges in one form: they are lines of merges.txt, or words or pairs in tokenizer.json."""
    merges = [rule.decode().strip() if isinstance(rule, bytes) else rule for rule in merges]
    merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in merges]
    return [rule for rule in merges if rule and not rule.startswith("#version")]


def word_tokenizer(words: list[str]) -> tiktoken.Encoding:
    """An encoding with one token for each of these words. Where two fit, the longer is taken."""
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(re.sub(r"([.^$*+?{}()|\[\]\\])", r"\\\1", word) for word in longest_first)
    return tiktoken.Encoding("words", pat_str=pattern, special_tokens={END: len(words)},
                             mergeable_ranks={word.encode(): i for i, word in enumerate(words)})


@cache
def gpt2_tokenizer() -> tiktoken.Encoding:
    try:
        tokenizer = tiktoken.get_encoding("gpt2")
        gpt2_files()  # they are kept, so that saving a model needs no network
        return tokenizer
    except Exception as error:  # requests, ssl and socket have one each
        raise UserError(f"the GPT-2 vocabulary could not be fetched ({type(error).__name__}): "
                        "connect once, or set TIKTOKEN_CACHE_DIR to a folder that has it") from None


@cache
def gpt2_files() -> dict[str, bytes]:
    """GPT-2's vocabulary as it was released, by its names on the hub. tiktoken fetches the same
    files, so its cache holds them."""
    url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    return {"merges.txt": read_file_cached(url + "vocab.bpe"),
            "vocab.json": read_file_cached(url + "encoder.json")}


def tokenizer_files(tokenizer: tiktoken.Encoding) -> dict[str, bytes]:
    """The files from which `transformers` makes this tokenizer."""
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END,
                "unk_token": END, "clean_up_tokenization_spaces": False}
    if tokenizer.name != "words":
        return gpt2_files() | {"tokenizer_config.json": json.dumps(settings).encode()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    vocab = {tokenizer.decode([i]): i for i in range(tokenizer.n_vocab)}
    split = {"type": "Split", "pattern": {"Regex": tokenizer._pat_str}, "behavior": "Isolated",
             "invert": False}
    end = {"id": tokenizer.eot_token, "content": END, "special": True, "single_word": False,
           "lstrip": False, "rstrip": False, "normalized": False}
    whole = {"version": "1.0", "added_tokens": [end], "pre_tokenizer": split,
             "decoder": {"type": "Fuse"},
             "model": {"type": "WordLevel", "vocab": vocab, "unk_token": END}}
    return {"tokenizer.json": json.dumps(whole).encode(),
            "tokenizer_config.json": json.dumps(settings).encode()}


class Stream:
    """Prints an answer while it grows. Of a letter that is not yet whole nothing is shown."""

    def __init__(self, tokenizer: tiktoken.Encoding):
        self.tokenizer, self.shown = tokenizer, 0

    def show(self, answer: list[int]) -> None:
        end = self.tokenizer.eot_token
        answer = answer[: answer.index(end)] if end in answer else answer
        text = self.tokenizer.decode(answer).rstrip("\ufffd")
        print(text[self.shown :], end="", flush=True)
        self.shown = len(text)


# ---- what Rouge-L sees --------------------------------------------------------------------------

class UnicodeWords:
    """A tokenizer for rouge-score: words in any script, and each letter of those that put no spaces
    between words: Chinese, Japanese, Thai, Lao, Burmese, Khmer."""

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text.lower())
        # marks belong to words, as the vowels of Hindi do
        words = [c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text]
        letter = ("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
                  "\U00020000-\U0003ffff])")
        return re.sub(letter, r" \1 ", "".join(words)).split()


def letters_seen(examples: Iterable, words: str = "english") -> float:
    """The percentage of the letters and digits in the references of data.Examples that Rouge-L can
    see, as the mean over examples: the paper's scorer keeps a-z and 0-9 alone. A reference without
    any, of emoji for instance, is not seen."""
    shares = []
    for example in examples:
        letters = [c for text in example.row.outputs for c in text.lower() if c.isalnum()]
        seen = sum(words == "unicode" or c.isascii() for c in letters)
        shares.append(100 * seen / max(1, len(letters)))
    return sum(shares) / max(1, len(shares))
