"""Checkpoints from the Hugging Face Hub, through ``huggingface_hub`` and in its cache.

Only the files that an export reads are downloaded. Large ones are fetched into a file beside their
place in the cache, so that an interrupted download goes on where it stopped, also in another
process; ``huggingface_hub`` by itself would begin the file again. A file gets its name in the cache
once its SHA-256 is the one that the hub states. Small files are compared with their git hash.

Layout of the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from edge_vlm.errors import CheckpointError, EdgeVLMError, InputError
from edge_vlm_export.checkpoint.json_file import read_json
from edge_vlm_export.checkpoint.tensors import INDEX_NAME, SHARD_NAME, WEIGHTS_NAME
from edge_vlm_export.steps.folder import check_space, size_text
from edge_vlm_export.steps.manifest import HASH_BLOCK

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in total

REQUIRED = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "tokenizer.json",
)
OPTIONAL = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",  # tells the licence
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
PARTIAL_SUFFIX = ".edge-vlm.partial"

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class HubName:
    """A model on the hub: ``owner/model``, and a branch, tag or commit."""

    repo: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"


@dataclass(frozen=True)
class _Remote:
    """One file of the listing."""

    name: str
    size: int
    sha256: str | None  # of a large file
    git_hash: str | None


def parse_source(source: str) -> Path | HubName:
    """What a checkpoint argument means: an existing folder wins, then a hub name."""
    path = Path(source)
    match = _NAME.fullmatch(source)
    if match and not path.exists() and ".." not in source:
        return HubName(match["repo"], match["revision"] or "main")
    return path


def fetch(
    name: HubName,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
    then: tuple[Path, Callable[[Path], int]] | None = None,
    endpoint: str | None = None,
    cache: Path | None = None,
) -> Path:
    """The folder of a checkpoint in the hub's cache, downloaded as far as it is not there.

    The folder's path ends in ``models--owner--model/snapshots/COMMIT``.

    Args:
        name: Which model.
        offline: Use what was downloaded before; nothing is sent.
        progress: Called with "download" or "checksum", the bytes done and in total. An exception
            it raises stops the download, which a later call continues.
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
    if offline or constants.HF_HUB_OFFLINE:
        return _cached(name, cache)
    with _converted(name, cache), _quiet():
        return _Fetch(name, cache, endpoint, progress, notice, then).run()


class _Fetch:
    def __init__(
        self,
        name: HubName,
        cache: Path,
        endpoint: str | None,
        progress: Progress | None,
        notice: Callable[[str], None] | None,
        then: tuple[Path, Callable[[Path], int]] | None,
    ) -> None:
        self.then = then
        self.name = name
        self.cache = cache
        self.endpoint = endpoint
        self.progress = progress
        self.notice = notice
        self.checked: set[str] = set()  # files whose checksum was compared
        self.folder = cache / f"models--{name.repo.replace('/', '--')}"

    def run(self) -> Path:
        # By branch name, which also records in the cache what the branch stands for.
        config = self._small("config.json", self.name.revision)
        commit = config.parent.name
        files = self._files(commit)
        for file in files:
            if not file.sha256:  # settings, of which the rest follows
                self._small(file.name, commit)
        self._check_room(files, commit)
        total = sum(file.size for file in files)
        done = 0
        for file in files:
            if file.sha256:
                if not self._at(file, commit).exists():
                    self._large(file, commit, done, total)
                self._small(file.name, commit)  # which finds it there
            done += file.size
            self._report("download", done, total)
        unchecked = [file for file in files if file.name not in self.checked]
        total, done = sum(file.size for file in unchecked), 0
        for file in unchecked:
            done = self._verify(file, config.parent, done, total)
        return config.parent

    def _files(self, commit: str) -> list[_Remote]:
        """The files that an export reads, as the hub lists them."""
        from huggingface_hub import HfApi

        info = HfApi(endpoint=self.endpoint).model_info(
            self.name.repo, revision=commit, files_metadata=True
        )
        listed = {
            item.rfilename: _Remote(
                item.rfilename,
                (item.lfs.size if item.lfs else item.size) or 0,
                item.lfs.sha256 if item.lfs else None,
                item.blob_id,
            )
            for item in info.siblings or ()
        }
        wanted = [*REQUIRED, *(name for name in OPTIONAL if name in listed)]
        if WEIGHTS_NAME in listed:
            wanted.append(WEIGHTS_NAME)
        else:
            self._need(INDEX_NAME, listed)
            wanted += [INDEX_NAME, *_shards(self._small(INDEX_NAME, commit))]
        for name in wanted:
            self._need(name, listed)
        return [listed[name] for name in wanted]

    def _need(self, name: str, listed: dict[str, _Remote]) -> None:
        if name not in listed:
            raise CheckpointError(f"{self.name}: has no {name} on the hub")

    def _check_room(self, files: list[_Remote], commit: str) -> None:
        missing = [file for file in files if not self._at(file, commit).exists()]
        left = sum(file.size for file in missing) - sum(
            partial.stat().st_size for file in missing if (partial := self._partial(file)).exists()
        )
        if left and self.notice:
            self.notice(f"{self.name}: {size_text(left)} to download to {self.cache}")
        check_space(self.cache, left)
        if self.then:
            folder, n_bytes = self.then
            later = n_bytes(self.folder / "snapshots" / commit)
            same = os.stat(folder).st_dev == os.stat(self.cache).st_dev
            check_space(folder, later + (left if same else 0))

    def _small(self, file: str, revision: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                self.name.repo,
                file,
                revision=revision,
                cache_dir=self.cache,
                endpoint=self.endpoint,
            )
        )

    def _large(self, file: _Remote, commit: str, done: int, total: int) -> None:
        """Download into a partial file, then give it the name under which the client looks."""
        from filelock import FileLock, Timeout
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.name.repo, file.name, revision=commit, endpoint=self.endpoint)
        metadata = get_hf_file_metadata(url)
        headers = build_hf_headers()
        if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)  # the storage's address carries its own permission
        headers["Accept-Encoding"] = "identity"
        partial = self._partial(file)
        lock = self.cache / ".locks" / self.folder.name / f"{partial.name}.lock"
        for folder in (partial.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=0):
                have = partial.stat().st_size if partial.exists() else 0
                if have > file.size:
                    partial.unlink()
                    have = 0
                with _Counted(partial, lambda n: self._report("download", done + n, total)) as out:
                    out.seek(have)
                    http_get(
                        metadata.location,
                        out,
                        resume_size=have,
                        headers=headers,
                        expected_size=file.size,
                    )
                if _sha256(partial, lambda n: None) != file.sha256:
                    partial.unlink()
                    raise self._damaged(file)
                partial.replace(self._blob(file))
                self.checked.add(file.name)
        except Timeout as error:
            raise InputError(f"{self.name}: {file.name} is being downloaded already") from error

    def _verify(self, file: _Remote, folder: Path, done: int, total: int) -> int:
        """Compare a file in the cache with the hash that the hub states."""
        path = folder / file.name

        def read(n_bytes: int) -> None:
            nonlocal done
            done += n_bytes
            self._report("checksum", done, total)

        if file.sha256:
            intact = _sha256(path, read) == file.sha256
        else:
            content = path.read_bytes()
            read(len(content))
            git_hash = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
            intact = file.git_hash in (None, git_hash.hexdigest())
        if not intact:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise self._damaged(file)
        return done

    def _damaged(self, file: _Remote) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: {file.name} has another checksum than the hub states; it was removed,"
            " export again to download it again"
        )

    def _at(self, file: _Remote, commit: str) -> Path:
        """Where a file is if it was downloaded before, under any revision."""
        pointer = self.folder / "snapshots" / commit / file.name
        return pointer if pointer.exists() else self._blob(file)

    def _blob(self, file: _Remote) -> Path:
        return self.folder / "blobs" / (file.sha256 or file.git_hash or "none")

    def _partial(self, file: _Remote) -> Path:
        return self._blob(file).with_suffix(PARTIAL_SUFFIX)

    def _report(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)


class _Counted(io.FileIO):
    """A file to append to that reports its length."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path, "r+" if path.exists() else "w+")
        self.report = report

    def write(self, data: Any) -> int:
        """Write all of ``data``; a plain FileIO may stop early on a disk that fills up."""
        view = memoryview(data).cast("B")
        n_bytes = len(view)
        while view:
            view = view[super().write(view) :]
        self.report(self.tell())
        return n_bytes


def _shards(index: Path) -> list[str]:
    names = read_json(index).section("weight_map").data.values()
    shards = sorted(
        {name for name in names if isinstance(name, str) and SHARD_NAME.fullmatch(name)}
    )
    if not shards:
        raise CheckpointError(f"{index}: names no safetensors file")
    return shards


def _cached(name: HubName, cache: Path) -> Path:
    """The folder of an earlier, complete download."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(
        name.repo, "config.json", cache_dir=cache, revision=name.revision
    )
    if not isinstance(config, str):
        raise InputError(f"{name}: is not in {cache}, and downloads are off (--offline)")
    folder = Path(config).parent
    wanted = [*REQUIRED, WEIGHTS_NAME]
    if not (folder / WEIGHTS_NAME).exists() and (folder / INDEX_NAME).exists():
        wanted = [*REQUIRED, *_shards(folder / INDEX_NAME)]
    for file in wanted:
        if not (folder / file).exists():
            raise InputError(
                f"{name}: {file} is not in {cache}, and downloads are off (--offline); its"
                " download was not finished"
            )
    return folder


@contextmanager
def _converted(name: HubName, cache: Path) -> Iterator[None]:
    """Turn the client's exceptions into this project's."""
    from huggingface_hub import errors

    access = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except EdgeVLMError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name}: asks for its terms to be accepted on the hub's page; then {access}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{name}: no such model on the hub, or a private one: {access}") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: has no revision {name.revision}") from error
    except errors.RemoteEntryNotFoundError as error:
        file = urlsplit(str(error.response.url)).path.rsplit("/", 1)[-1]
        raise CheckpointError(f"{name}: has no {file} on the hub") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(f"{name}: the hub refuses access ({status}); {access}") from error
        raise EdgeVLMError(f"{name}: the hub failed ({status}); try again later") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise EdgeVLMError(
                f"{cache}: no space left; the download continues where it stopped"
            ) from error
        raise _failure(name, error) from error
    except Exception as error:  # the transport's own classes differ between the client's versions
        raise _failure(name, error) from error


def _failure(name: HubName, error: Exception) -> EdgeVLMError:
    """An error about a connection; ``_raise_on_head_call_error`` hides its kind in the cause."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError) and not isinstance(
        cause, (GatedRepoError, RepositoryNotFoundError)
    ):
        status = cause.response.status_code
        if status in (401, 403):
            return InputError(
                f"{name}: the hub refuses access ({status}); log in with `hf auth login` or set"
                " HF_TOKEN"
            )
        return EdgeVLMError(f"{name}: the hub failed ({status}); try again later")
    reason = " ".join(str(cause or error).split())[:200] or type(cause or error).__name__
    return EdgeVLMError(
        f"{name}: the download failed ({reason}); the next try continues where it stopped, and"
        " --offline uses an earlier download"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's bars and warnings off stderr."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    verbosity, were_disabled = logging.get_verbosity(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not were_disabled:
            enable_progress_bars()


def _sha256(path: Path, read: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            digest.update(block)
            read(len(block))
    return digest.hexdigest()
