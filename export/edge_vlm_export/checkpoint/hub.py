"""Checkpoints from the Hugging Face Hub, through ``huggingface_hub`` and in its cache.

Files are downloaded in the calling thread, so that Ctrl-C ends at once: ``snapshot_download`` waits
for the files that its threads are at. The client checks a file's length alone; the hash that the
hub states is compared here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.bundle.checksums import sha256_of
from edge_vlm.errors import CheckpointError, InputError
from edge_vlm_export.checkpoint.adapter import WEIGHTS_NAME as ADAPTER_NAME
from edge_vlm_export.checkpoint.adapter import beside
from edge_vlm_export.checkpoint.config_file import ADAPTER, check_is_itself, read_part
from edge_vlm_export.checkpoint.hub_client import Counter, bar, client
from edge_vlm_export.checkpoint.new_folder import check_space, size_text
from edge_vlm_export.checkpoint.tensors import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    SHARD_NAME,
    WEIGHTS_NAME,
    Index,
    no_weights,
)

if TYPE_CHECKING:
    from edge_vlm_export.counted import Progress

Notice = Callable[[str], None]
Room = tuple[Path, Callable[[Path], int]]  # where, and bytes by a folder with settings files

Files = Callable[[Path], tuple[Sequence[str], Sequence[str]]]

FIRST = "config.json"

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's of a small file, SHA-256 of a large one
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@([\w./-]{{1,200}}))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A model on the hub: ``owner/model``, and a branch, tag or commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


def parse_source(source: str) -> Path | HubName:
    """What a checkpoint argument means: an existing folder wins, then a hub name."""
    path, match = Path(source), _NAME.fullmatch(source)
    if match and not path.exists() and ".." not in source:
        return HubName(match[1], match[2] or "main")
    return path


def fetch(
    name: HubName,
    files: Files,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
    then: Room | None = None,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Path:
    """The folder of a checkpoint in the hub's cache, downloaded as far as it is not there.

    The folder's path ends in ``models--owner--model/snapshots/COMMIT``. It has the files asked for
    and the weights, one safetensors file or an index and its files; Python files are never taken.

    Args:
        name: Which model.
        files: By the folder that has ``config.json``: names of files that the model has to have,
            and names or patterns (``*.txt``) of files that are taken where there are any.
        offline: Use what was downloaded before; nothing is sent.
        progress: Called with "download" or "checksum", the bytes done and in total, from whichever
            thread. An exception it raises stops the download; finished files are kept.
        notice: Called with a line that says how much there is to download.
        then: What the checkpoint is for, so that its room is checked before the download too: the
            folder that is written to, and the bytes, computed from a folder with settings files.
        endpoint: Address of the hub, by default ``HF_ENDPOINT``.
        cache: The cache's folder, by default ``HF_HUB_CACHE``.

    Raises:
        InputError: there is no such model or revision, it may not be read, the disk lacks room, or
            it is not in the cache and ``offline`` is set.
        CheckpointError: the model lacks a file, or a file is not what the hub says it is.
        EdgeVLMError: the hub cannot be reached or answers with a failure.
    """
    from huggingface_hub import constants

    cache = Path(cache or constants.HF_HUB_CACHE)
    counter = Counter(progress)
    with client(str(name), cache, counter):
        model = _Model(name, cache, endpoint, offline or constants.HF_HUB_OFFLINE)
        model.open(FIRST)
        model.check(FIRST, lambda n_bytes: None)
        required, optional = files(model.folder)
        names = model.choose(required, optional)
        if model.offline:
            sizes = {file: (model.folder / file).stat().st_size for file in names}
        else:
            for file in names:
                if not model.listed[file].lfs:  # settings, from which the room is computed
                    model.get(file)
            model.check_room(names, notice, then)
            sizes = {file: model.listed[file].size or 0 for file in names}
            counter.each("download", sizes, lambda file, n: model.get(file, tqdm_class=bar(n)))
        counter.each("checksum", sizes, model.check)
    return model.folder


@dataclass
class _Model:
    """A model on the hub, or offline what the cache has of it."""

    name: HubName
    cache: Path
    endpoint: str | None
    offline: bool
    listed: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    folder: Path = Path()

    def open(self, first: str) -> None:
        """List the files, and find the folder in the cache, with one of them in it."""
        from huggingface_hub import HfApi

        if not self.offline:
            self.sweep()
            api = HfApi(endpoint=self.endpoint)
            info = api.model_info(self.name.repo, revision=self.name.revision, files_metadata=True)
            self.commit, files = info.sha, info.siblings or ()
            self.listed = {file.rfilename: file for file in files}
            self.need(first)
        # By the branch's name, which records in the cache what the branch stands for.
        folder = Path(self.get(first, revision=self.name.revision)).parent
        if self.offline:
            self.commit = folder.name
            self.listed = {path.relative_to(folder).as_posix(): None for path in folder.rglob("*")}
        self.folder = Path(self.get(first)).parent  # the branch may have moved meanwhile

    def sweep(self) -> None:
        """Remove half downloads that are a page of a portal, which a client would go on from."""
        folder = self.cache / f"models--{self.name.repo.replace('/', '--')}" / "blobs"
        for part in folder.glob("*.incomplete"):
            with part.open("rb") as file:
                head = file.read(80)
            try:
                check_is_itself(part, head)
            except CheckpointError:
                part.unlink(missing_ok=True)

    def get(self, file: str, **options: Any) -> Any:
        """The path of a file in the cache, downloaded if it is not there."""
        from huggingface_hub import hf_hub_download

        options = {"revision": self.commit, "cache_dir": self.cache, **options}
        options |= {"endpoint": self.endpoint, "local_files_only": self.offline}
        return hf_hub_download(self.name.repo, file, **options)

    def need(self, file: str) -> str:
        """The name of a file that has to be there."""
        if file in self.listed and not file.endswith(".py"):
            return file
        if self.offline:
            problem = f"{file} is missing, its download was not finished; run without --offline"
            raise InputError(f"{self.name}: {problem}")
        if file == FIRST and ADAPTER in self.listed:
            problem = "is a LoRA adapter and no model: download it, export its base with --adapter"
            raise CheckpointError(f"{self.name}: {problem}")
        raise CheckpointError(f"{self.name}: has no {file} on the hub")

    def choose(self, required: Sequence[str], optional: Sequence[str]) -> list[str]:
        """The names of the files to take, the weights last."""
        if problem := beside(self.listed):
            raise CheckpointError(f"{self.name}: {problem}")
        more = [name for name in self.listed if any(fnmatchcase(name, p) for p in optional)]
        names = [*required, *(name for name in more if not name.endswith(".py"))]
        if WEIGHTS_NAME in self.listed:
            return list(dict.fromkeys(map(self.need, [*names, WEIGHTS_NAME])))
        if not self.offline and not any(map(SHARD_NAME.fullmatch, {*self.listed} - {ADAPTER_NAME})):
            raise CheckpointError(f"{self.name}: {no_weights(self.listed)}")
        names = list(map(self.need, [*names, INDEX_NAME]))
        index = Path(self.get(INDEX_NAME))
        shards = set(read_part(Index, index, MAX_HEADER_BYTES).weight_map.values())
        shards = {name for name in shards if isinstance(name, str) and SHARD_NAME.fullmatch(name)}
        if not shards:
            raise CheckpointError(f"{index}: names no safetensors file")
        return list(dict.fromkeys([*names, *map(self.need, sorted(shards))]))

    def check(self, file: str, told: Callable[[int], None]) -> None:
        """Compare a file with the hash that the hub states, or offline with that in its name.

        Online one that differs is removed. Where the cache has no links, a file's name tells none.
        """
        path, item = self.folder / file, self.listed[file]
        if item is None:
            expected = path.resolve().name
        else:
            expected = item.lfs.sha256 if item.lfs else item.blob_id or ""
        if not _HASH.fullmatch(expected):
            return
        if len(expected) == 64:
            found = sha256_of(path, told)
        else:
            content = path.read_bytes()
            git_hash = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
            found = git_hash.hexdigest()
        if found == expected:
            return
        if self.offline:
            problem = f"{file} is damaged: its checksum is not the one in its name"
            raise CheckpointError(f"{self.name}: {problem} in {self.cache}; run without --offline")
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{self.name}: {file} has another checksum than the hub states; it was removed,"
            " export again to download it again"
        )

    def check_room(self, files: Sequence[str], notice: Notice | None, then: Room | None) -> None:
        """Tell how much is to be downloaded, and refuse where that or what follows has no room."""
        planned = [self.get(file, dry_run=True) for file in files]
        left = sum(file.file_size or 0 for file in planned if file.will_download)
        if left and notice:
            notice(f"{self.name}: {size_text(left)} to download to {self.cache}")
        check_space(self.cache, left)
        if then:
            out, n_bytes = then
            same = os.stat(out).st_dev == os.stat(self.cache).st_dev
            check_space(out, n_bytes(self.folder) + (left if same else 0))
