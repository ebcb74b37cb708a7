"""The text: Python's own standard library, split by file and packed into rows of bytes."""

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .config import CorpusConfig
from .errors import LabError
from .seeds import derive_seed, generator


BOS = 256  # begins every document; the 256 byte values are their own token ids
VOCABULARY = 257
TOKENIZER = "bytes+bos/257"
IGNORE = -100

Split = Literal["test", "validation", "reference", "train"]
SPLITS: tuple[Split, ...] = get_args(Split)


class Document(NamedTuple):
    """One file: its path below the root, its bytes, and which of them were corrupted."""

    name: str
    data: bytes
    corrupted: Tensor


@dataclass(frozen=True)
class Packed:
    """Documents laid end to end and cut into rows; every field is `[rows, seq]`."""

    tokens: Tensor
    labels: Tensor  # the tokens, IGNORE where the last row is padded
    segment_ids: Tensor  # equal within a document, -1 on padding
    corrupted: Tensor

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def fingerprint(self) -> str:
        """Changes with any byte, their order, or the way that they are packed."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.numpy().tobytes())
        digest.update(self.segment_ids.numpy().tobytes())
        return digest.hexdigest()[:16]


Data = dict[Split, Packed]


def load_splits(config: CorpusConfig) -> dict[Split, list[Document]]:
    """Read the files and deal them to the splits: each file to one, decided by its own path.

    A path decides alone, so a file that is added or removed moves no other one between splits.
    """
    root = Path(config.root or sysconfig.get_path("stdlib"))
    names = list_files(root, config.skip)
    splits: dict[Split, list[Document]] = {split: [] for split in SPLITS}
    budget = {split: getattr(config, f"{split}_bytes") for split in SPLITS}
    seen: set[bytes] = set()
    for name in sorted(names, key=lambda name: derive_seed("order", config.split_seed, name)):
        data = (root / name).read_bytes()
        digest = hashlib.sha256(data).digest()
        split = split_of(name, config)
        fits = 0 < len(data) <= min(config.max_file_bytes, budget[split])
        if not fits or digest in seen:  # a second copy of a file could sit in another split
            continue
        seen.add(digest)
        budget[split] -= len(data)
        splits[split].append(Document(name, data, torch.zeros(len(data), dtype=torch.bool)))
    for split, documents in splits.items():
        if not documents:
            raise LabError(
                f"no {split} file: {len(names)} usable .py files below {root}; point corpus.root "
                f"at a folder with more of them or raise corpus.{split}_bytes"
            )
    return splits


def list_files(root: Path, skip: Sequence[str]) -> list[str]:
    """Paths of the .py files below `root`, sorted, none with a part that matches `skip`."""
    if not root.is_dir():
        raise LabError(f"corpus.root: no folder {root}; give one that holds .py files, or ''")

    def wanted(name: str) -> bool:
        return not any(fnmatch.fnmatch(name, pattern) for pattern in skip)

    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = filter(wanted, subfolders)  # site-packages is large: do not even enter it
        names = (name for name in files if name.endswith(".py") and wanted(name))
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in names]
    return sorted(found)


def split_of(name: str, config: CorpusConfig) -> Split:
    """The split that a path belongs to, whatever else is in the corpus."""
    point = derive_seed("split", config.split_seed, name) / 2**63
    for split, share in zip(SPLITS, config.shares, strict=False):
        point -= share
        if point < 0:
            return split
    return "train"


def pack(documents: Sequence[Document], length: int, seed: int) -> Packed:
    """Lay the documents end to end in an order drawn from `seed` and cut rows of `length`."""
    order = torch.randperm(len(documents), generator=generator("pack", seed)).tolist()
    tokens, segments, corrupted = [], [], []
    for index in order:
        data = torch.frombuffer(bytearray(documents[index].data), dtype=torch.uint8).long()
        tokens += [torch.tensor([BOS]), data]
        segments.append(torch.full((len(data) + 1,), index))
        corrupted += [torch.zeros(1, dtype=torch.bool), documents[index].corrupted]
    return Packed(
        tokens=_cut(torch.cat(tokens), length, BOS),
        labels=_cut(torch.cat(tokens), length, IGNORE),
        segment_ids=_cut(torch.cat(segments), length, -1),
        corrupted=_cut(torch.cat(corrupted), length, False),
    )


def _cut(stream: Tensor, length: int, fill: int | bool) -> Tensor:
    missing = -len(stream) % length
    return torch.cat([stream, stream.new_full((missing,), fill)]).view(-1, length)
