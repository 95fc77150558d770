"""Files of models and data: from a folder or the hub, whole or refused.

A damaged file is named, with what to do, instead of being computed with. Weights of users and of
other trainers come in several forms; read_weights() takes them all and runs no code.
"""

import errno
import functools
import hashlib
import json
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from config import UserError
from safe.files import read_json, refuse_pointer, say_once, written_aside

# what a disk answers where the hub's client cannot write, or lock, a file of its cache
DISK = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.ENOTSUP,
        errno.EOPNOTSUPP)
# under which trainers keep the weights in a checkpoint, beside the state of the optimizer, say
WRAPPERS = ("model", "module", "state_dict", "model_state_dict")


def fetch(name: str, file: str, repo_type: str = "model",
          revision: str | None = None) -> Path | None:
    """Returns the path of a file in a folder, or of one downloaded from a hub repository, or None
    if it is not there. Raises UserError if there is no such place."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    # A run that has not been made yet is not looked for on the hub.
    if name.startswith("out/") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name!r} is neither a folder nor a name on the hub (NAME or OWNER/NAME); "
                        "`python distill.py` makes the models in out/tiny")
    if folder.is_file() and repo_type == "model":
        raise UserError(f"{name} is a file: a model is a folder, with config.json and weights")
    from huggingface_hub import constants, errors, hf_hub_download
    try:
        path = hf_hub_download(name, file, repo_type=repo_type, revision=revision)
    except errors.GatedRepoError:
        raise UserError(f"{name} on the hub is gated: ask for access on its page, then "
                        "`hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{name} is neither a folder here nor a {repo_type} on the hub (a private "
                        "one needs `hf auth login`)") from None
    except Exception as error:  # each layer of the client has its own
        not_cached = isinstance(error, errors.LocalEntryNotFoundError)
        if isinstance(error, errors.EntryNotFoundError):
            if not not_cached or constants.HF_HUB_OFFLINE:
                return None
        if isinstance(error, OSError) and error.errno in DISK:
            raise UserError(f"{name}: {file} cannot be kept in the hub's cache ({error}); set "
                            "HF_HOME to another folder") from None
        reason = " ".join(str(error.__cause__ or error).split())[:80]
        raise UserError(f"{name}: the hub could not be reached for {file} ({reason}); check the "
                        "network and HF_ENDPOINT, or give a local folder") from None
    return intact(Path(path))


@functools.cache
def intact(path: Path) -> Path:
    """Checks a file in the hub's cache, where a large one's name is the SHA-256 of its content."""
    real = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", real.name):
        sha256 = hashlib.sha256()
        with open(real, "rb") as file:
            while piece := file.read(2**24):
                sha256.update(piece)
        if sha256.hexdigest() != real.name:
            raise UserError(f"{path} is damaged: remove {real}, and it is fetched again")
    return path


def require(name: str, file: str, repo_type: str = "model",
            revision: str | None = None) -> Path:
    """Does as fetch, but raises UserError if the file is not there."""
    path = fetch(name, file, repo_type, revision)
    if path is None:
        hub = "hub repository, or its cache if HF_HUB_OFFLINE is set,"
        raise UserError(f"{name}: this {'folder' if os.path.isdir(name) else hub} has no {file}")
    return path


def read_torch(path: Path) -> dict:
    """Reads a file of torch.save, and runs no code in it. A damaged one raises some Exception."""
    whole = zipfile.is_zipfile(path)  # files from before 2020 are not
    if whole:
        with zipfile.ZipFile(path) as file:
            if part := file.testzip():
                raise ValueError(f"the checksum of {part} is another")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=whole)


def weight_files(name: str) -> list[Path]:
    """The file of a model's weights, or the files of its shards. Where a folder has two kinds, a
    line says which is read. Raises UserError for an adapter, without which they are not whole."""
    if any(Path(name).glob("adapter_model.*")):
        raise UserError(f"{name} holds an adapter, which is not read: merge it into the weights "
                        "(merge_and_unload() in peft), and save those")
    kinds = ("model.safetensors", "pytorch_model.bin")
    if all((Path(name) / kind).is_file() for kind in kinds):
        say_once(f"{name} holds {' and '.join(kinds)}: the first is read")
    for whole in kinds:
        if path := fetch(name, whole):
            return [path]
        if index := fetch(name, whole + ".index.json"):
            shards = read_json(index).get("weight_map")
            names = shards.values() if isinstance(shards, dict) else [None]
            if not all(isinstance(shard, str) for shard in names):
                raise UserError(f"{index}: there is no table of shards, weight_map: fetch it again")
            return [require(name, shard) for shard in sorted(set(names))]
    raise UserError(f"{name} has neither model.safetensors nor pytorch_model.bin, nor their shards")


def tensor_names(path: Path) -> set[str]:
    """The names of the tensors in a file, which is not read for them."""
    from safetensors import safe_open
    refuse_pointer(path)
    try:
        if path.suffix != ".safetensors":
            return set(read_torch(path))
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except Exception as error:  # each reader has its own errors for a broken file
        raise UserError(f"{path} is damaged: remove it, and fetch it again "
                        f"({type(error).__name__})") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file. Reading a .bin runs no code. Raises UserError if the file is damaged,
    or is something else than a table of tensors."""
    refuse_pointer(path)
    try:
        is_safe = path.suffix == ".safetensors"
        content = read_safetensors(path) if is_safe else read_torch(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # each reader has its own errors for a broken file
        refused = re.search(r"GLOBAL (\S+)", str(error))  # torch names a class that is no tensor's
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise UserError(f"{path} holds {refused[1]}, and reading that could run code: save the "
                            "model's state_dict() alone") from None
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"
        raise UserError(f"{path} is damaged: remove it, and fetch it again ({reason})") from None
    while isinstance(content, dict):
        inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
        if not inner:
            break
        content = inner[0]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a table of tensors: save "
                        "the model's state_dict()")
    for key, tensor in content.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path} holds {key!r} of type {type(tensor).__name__}, where named "
                            "tensors are expected: save the model's state_dict() alone")
    return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a file. A damaged one raises some Exception.

    write_weights() notes checksums of the table of tensors and of their bytes. Others who cast or
    change tensors may keep these notes, but make another table, whose bytes are not checked."""
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    with open(path, "rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        noted = table.pop("__metadata__", {})
        if noted.get("table") == crc32_of(table):
            crc = 0
            while piece := file.read(2**24):
                crc = zlib.crc32(piece, crc)
            if noted.get("crc32") != str(crc):
                raise ValueError("its checksum is another")
    return tensors


def crc32_of(table: dict) -> str:
    return str(zlib.crc32(json.dumps(table).encode()))


def write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes float32 tensors as a .safetensors file, with checksums of its table and of its bytes.
    The library's own writer copies all tensors twice, and puts its metadata in random order: equal
    weights would not make equal files."""
    table, end, crc = {}, 0, 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        table[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        crc = zlib.crc32(tensor.numpy(), crc)
    noted = {"crc32": str(crc), "table": crc32_of(table), "format": "pt"}
    text = json.dumps({"__metadata__": noted, **table}).encode()
    text += b" " * (-len(text) % 8)
    with written_aside(path) as aside, open(aside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.numpy())
