"""Tokenizers of other families, with what data.py asks of a tiktoken.Encoding, and their prompts.

Text in the data never becomes a special token. A prompt is the paper's template behind the family's
begin token or, with --template=chat, the model's own template, in which the instruction is what the
user says. The template that a model was trained with is noted in its tokenizer_config.json.

Left out: dialogues; a system's instructions, but for those that a template has by itself.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache as once
from pathlib import Path
from tempfile import TemporaryDirectory

from config import UserError
from safe.files import read_json
from safe.hub import fetch, require

TRAINED_WITH = "minillm_template"  # in tokenizer_config.json: the template of the prompts
VOCABULARY = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt",
              "sentencepiece.bpe.model")  # one of them is enough
TOKENIZER = (*VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja", "merges.txt", "generation_config.json")


@once
def folder_of(name: str) -> Path:
    """The folder with a model's files, those of a hub repository fetched first. Without a network
    those in the hub's cache are all there are."""
    folder = require(name, "config.json").parent
    try:
        for file in TOKENIZER:
            fetch(name, file)
    except UserError:
        if not any((folder / file).is_file() for file in VOCABULARY):
            raise
    return folder


def settings(name: str, file: str) -> dict:
    path = folder_of(name) / file
    return read_json(path) if path.is_file() else {}


def refusal(name: str, error: Exception) -> UserError:
    """One line of whatever `transformers` has raised: each of its parts has exceptions of its
    own."""
    text = " ".join(str(error).split()) or "no reason given"
    return UserError(f"{name} cannot be opened by transformers ({type(error).__name__}: "
                     f"{text[:160]})")


def transformers_config(name: str):
    try:
        import transformers
        import transformers.modeling_layers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    except ImportError:
        raise UserError(f"{name} is no GPT-2: `pip install 'transformers>=4.56'` opens other "
                        "families") from None
    folder = folder_of(name)
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True,
                                                       trust_remote_code=False)
    except Exception as error:
        raise refusal(name, error) from None


def put(folder: Path, save: Callable[[str], object]) -> None:
    """Lets `save` write files into a folder beside, and moves them into this one."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="tmp-") as aside:
        save(aside)
        for file in sorted(Path(aside).iterdir(), reverse=True):  # config.json last
            os.replace(file, folder / file.name)


# ---- tokenizers -------------------------------------------------------------------------------

class FamilyTokenizer:
    """A tokenizer of `transformers` with what data.py asks of a tiktoken.Encoding."""

    def __init__(self, name: str, whole, template: str):
        self.name, self.model, self.whole, self.template = "family", name, whole, template
        self._mergeable_ranks = dict(sorted(whole.get_vocab().items()))
        self.n_vocab = 1 + max(self._mergeable_ranks.values())
        self.eot_token = whole.eos_token_id
        more = settings(name, "generation_config.json").get("eos_token_id")
        more = more if isinstance(more, list) else [more]
        self.ends = (self.eot_token, *(end for end in more
                                       if type(end) is int and end != self.eot_token))
        # what stands before a text: found in front of a letter, behind which nothing is merged
        framed, plain = (whole("a", add_special_tokens=own)["input_ids"] for own in (True, False))
        at = framed.index(plain[0]) if plain and plain[0] in framed else 0
        self.begin = framed[:at]
        self.special = [token.content for token in whole.added_tokens_decoder.values()
                        if token.special]

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode_ordinary_batch([text])[0]

    def encode_ordinary_batch(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text. What looks like a special token in it is text."""
        if not texts:
            return []
        return self.whole(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(self, tokens) -> str:
        tokens = [token for token in tokens if token not in self.ends]
        return self.whole.decode(tokens, clean_up_tokenization_spaces=False)

    def chat(self, said: str) -> list[int]:
        """The tokens of the model's own template, in which a user says this."""
        try:
            text = self.whole.apply_chat_template([{"role": "user", "content": said}],
                                                  tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program
            raise refusal(f"{self.model}: its chat template", error) from None
        parts = [text]
        if any(word in said for word in self.special):  # which must remain words
            parts = text.split(said)
            if len(parts) != 2:
                raise UserError(f"{self.model}: its chat template rewrites what a user says, which "
                                f"has the text of a special token in it: {said[:60]!r}")
        tokens = [self.whole(part, add_special_tokens=False)["input_ids"] for part in parts]
        return tokens[0] if len(parts) == 1 else [*tokens[0], *self.encode_ordinary(said),
                                                  *tokens[1]]


def prompts_of(tokenizer: FamilyTokenizer, rows: Sequence) -> list[list[int]]:
    """The tokens of each row's prompt: behind the family's begin tokens the paper's template, or
    with --template=chat the model's own, in which the instruction is what a user says."""
    if tokenizer.template == "paper":
        texts = tokenizer.encode_ordinary_batch([row.prompt_text for row in rows])
        return [[*tokenizer.begin, *tokens] for tokens in texts]
    return [tokenizer.chat("\n\n".join(filter(None, (row.instruction, row.input))))
            for row in rows]


@once
def load_tokenizer(name: str, template: str = "auto") -> FamilyTokenizer:
    """The tokenizer of a model, which makes its prompts by this template; "auto" is the one that
    the model was trained with here, else the paper's."""
    transformers_config(name)  # says what to install
    from transformers import AutoTokenizer
    folder = folder_of(name)
    if not any((folder / file).is_file() for file in VOCABULARY):
        raise UserError(f"{name} has no tokenizer: one of {', '.join(VOCABULARY)} is needed")
    if template == "auto":
        template = settings(name, "tokenizer_config.json").get(TRAINED_WITH, "paper")
    if template not in ("paper", "chat"):
        raise UserError(f"{name}: tokenizer_config.json has {TRAINED_WITH}={template!r}: give "
                        "--template")
    try:
        whole = AutoTokenizer.from_pretrained(folder, local_files_only=True,
                                              trust_remote_code=False)
    except Exception as error:
        raise refusal(f"{name}: its tokenizer", error) from None
    if whole.eos_token_id is None:
        raise UserError(f"{name}: its tokenizer names no end token")
    if template == "chat" and not whole.chat_template:
        raise UserError(f"{name} has no chat template: leave out --template=chat")
    tokenizer = FamilyTokenizer(name, whole, template)
    if template == "chat" and "Abc" not in tokenizer.decode(tokenizer.chat("Abc")):
        raise UserError(f"{name}: its chat template leaves out, or rewrites, what a user says")
    return tokenizer


def save_tokenizer(tokenizer: FamilyTokenizer, folder: Path) -> None:
    """Writes the files that the tokenizer is read from, and notes its template in them."""
    def write(aside: str) -> None:
        tokenizer.whole.save_pretrained(aside)
        path = Path(aside) / "tokenizer_config.json"
        noted = read_json(path) | {TRAINED_WITH: tokenizer.template}
        path.write_text(json.dumps(noted, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    put(folder, write)


def same_vocabulary(student: FamilyTokenizer, teacher: FamilyTokenizer) -> None:
    """Raises UserError unless q and p are distributions over the same tokens, asked and ended
    alike."""
    if student._mergeable_ranks != teacher._mergeable_ranks:
        raise UserError(f"the student has {student.n_vocab:,} tokens and the teacher other "
                        f"{teacher.n_vocab:,}: distillation needs one vocabulary")
    if student.template != teacher.template:
        raise UserError(f"the student is asked by the {student.template} template and the teacher "
                        f"by the {teacher.template} one: give --template")
    if student.eot_token != teacher.eot_token:
        ends = [tokenizer.whole.eos_token for tokenizer in (student, teacher)]
        raise UserError(f"the student ends answers with {ends[0]!r} and the teacher with "
                        f"{ends[1]!r}: make eos_token in their tokenizer_config.json the same")
    texts = [tokenizer.whole.chat_template if tokenizer.template == "chat" else tokenizer.begin
             for tokenizer in (student, teacher)]
    if texts[0] != texts[1]:
        raise UserError("student and teacher have different begin tokens or chat templates: give "
                        "both the same files of a tokenizer")
