"""Downloads with the hub's own client, from a server on loopback."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
from edge_vlm_export.checkpoint.hub import HubName, fetch, parse_source
from edge_vlm_export.families.registry import download_files

from edge_vlm.bundle.manifest import Bundle
from edge_vlm.errors import CheckpointError, EdgeVLMError, InputError
from tests.conftest import GOLDEN
from tests.hub_server import COMMIT, Hub, etag, serve

pytestmark = pytest.mark.engine  # it exports models

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAME = HubName("owner/model")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits between tries; and it would send the user's token."""
    clock = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    with serve(Hub(GOLDEN / "tiny-126-tied" / "checkpoint")) as served:
        served.files["README.md"] = b"---\nlicense: cc-by-nc-4.0\n---\n"
        served.files["pytorch_model.bin"] = b"not needed"
        yield served


@pytest.fixture
def download(hub: Hub, tmp_path: Path) -> Callable[..., Path]:
    def call(name: HubName = NAME, **options: Any) -> Path:
        files = options.pop("files", download_files)
        return fetch(name, files, **{"endpoint": hub.url, "cache": tmp_path / "cache", **options})

    return call


def test_a_complete_download_has_what_an_export_reads(
    hub: Hub, download: Callable[..., Path]
) -> None:
    lines: list[str] = []
    seen: list[tuple[str, int, int]] = []
    folder = download(notice=lines.append, progress=lambda *step: seen.append(step))
    assert folder.as_posix().endswith(f"models--owner--model/snapshots/{COMMIT}")
    names = {path.name for path in folder.iterdir()}
    assert names == set(hub.files) - {"pytorch_model.bin"}
    assert all((folder / name).read_bytes() == hub.files[name] for name in names)
    total = sum(len(hub.files[name]) for name in names)
    assert ("download", total, total) in seen
    assert all(done <= all_ for _, done, all_ in seen)
    assert len(lines) == 1
    assert "1.1 MB to download" in lines[0]

    hub.requests.clear()
    assert download() == folder
    assert hub.fetched(SHARDS[0]) == []


def test_export_by_name(hub: Hub, tmp_path: Path) -> None:
    hub.token = "secret"  # noqa: S105
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "secret",
    }
    out = tmp_path / "bundle"
    command = [sys.executable, "-c", "from edge_vlm.cli.main import main; main()", "export"]
    arguments = ["--out", str(out), "--vision", "fp32", "--decoder", "f32"]

    def export(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, name, *arguments, *more], capture_output=True, text=True, env=environment
        )

    done = export("owner/model@main")
    assert done.returncode == 0, done.stderr
    assert "to download" in done.stderr
    model = Bundle.open(out).manifest.model
    assert (model.name, model.revision) == ("owner/model", COMMIT)
    assert model.license == "cc-by-nc-4.0"

    environment["HF_TOKEN"] = "wrong"  # noqa: S105
    refused = export("owner/model", "--force")
    assert refused.returncode == 2
    assert "HF_TOKEN" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    offline = export("owner/model", "--force", "--offline")
    assert offline.returncode == 0, offline.stderr


def leftovers(cache: Path) -> list[Path]:
    """Half files."""
    return [path for path in cache.rglob("*") if ".incomplete" in path.name]


def test_an_interrupted_download_goes_on(
    hub: Hub, download: Callable[..., Path], tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done > 700_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(progress=stop)
    assert hub.fetched(SHARDS[0]) == [None]
    assert hub.fetched(SHARDS[1]) == [None]
    folder = download()
    assert len(hub.fetched(SHARDS[0])) == 1  # what was finished was kept
    assert len(hub.fetched(SHARDS[1])) == 2
    assert all((folder / name).read_bytes() == hub.files[name] for name in SHARDS)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("stage", ["download", "checksum"])
def test_what_the_callback_raises_arrives_as_it_is(
    stage: str, hub: Hub, download: Callable[..., Path]
) -> None:
    def stop(now: str, done: int, total: int) -> None:
        if now == stage and done > 200_000:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        download(progress=stop)
    assert download().is_dir()


def test_bytes_counted_in_another_thread(
    hub: Hub, download: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the client does with Xet, in two bars: for what it receives and for what it writes."""
    original = huggingface_hub.hf_hub_download
    size = len(hub.files[SHARDS[0]])
    finished = threading.Event()

    def by_xet(repo: str, name: str, *, tqdm_class: Any = None, **options: Any) -> Any:
        def count() -> None:
            received = tqdm_class(total=size, unit="B", unit_scale=True, position=0, leave=True)
            written = tqdm_class(total=size, unit="B", unit_scale=True, position=1, leave=True)
            for share in (3, 2):
                received.update(size // share)
                written.update(size // 10)
                received.set_postfix_str("1 MB/s", refresh=False)
            finished.set()

        if name == SHARDS[0] and tqdm_class:
            finished.clear()
            threading.Thread(target=count).start()
            finished.wait(10)
            for _ in range(500):  # where an interrupt arrives, on a busy machine later
                time.sleep(0.01)
        return original(repo, name, tqdm_class=tqdm_class, **options)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", by_xet)
    seen: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append(done)
        if done > size * 3 // 4:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        download(progress=stop)
    assert hub.fetched(SHARDS[0]) == []  # stopped at once, not when the file was there
    assert seen == sorted(seen)
    assert download(progress=lambda *step: None).is_dir()


def _heed_interrupts() -> None:
    """Background jobs of a shell start with SIGINT ignored, and hand that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to one process")
def test_ctrl_c_ends_at_once(hub: Hub, download: Callable[..., Path], tmp_path: Path) -> None:
    hub.hold_after[SHARDS[1]] = 300_000
    home = tmp_path / "home"
    command = [sys.executable, "-c", "from edge_vlm.cli.main import main; main()", "export"]
    process = subprocess.Popen(
        [*command, "owner/model", "--out", str(tmp_path / "bundle")],
        preexec_fn=_heed_interrupts,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)},
    )
    try:
        deadline = time.monotonic() + 60
        while not hub.fetched(SHARDS[1]) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, errors = process.communicate(timeout=30)
        assert time.monotonic() - started < 2
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    assert errors.endswith(b"stopped\n")
    hub.hold_after.clear()
    folder = download(cache=home / "hub")
    assert len(hub.fetched(SHARDS[0])) == 1
    assert (folder / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]
    assert leftovers(tmp_path) == []


def test_two_processes_at_once(hub: Hub, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from edge_vlm_export.checkpoint.hub import HubName, fetch
from edge_vlm_export.families.registry import download_files
print(fetch(HubName("owner/model"), download_files, endpoint=sys.argv[1], cache=Path(sys.argv[2])))
"""
    hub.hold_after[SHARDS[0]] = 300_000
    command = [sys.executable, "-c", code, hub.url, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]

    def asked() -> int:
        return sum(m == "HEAD" and p.endswith(SHARDS[0]) for m, p, _ in hub.requests)

    deadline = time.monotonic() + 60
    while asked() < 4 and time.monotonic() < deadline:  # each for its size, then for itself
        time.sleep(0.05)
    hub.go_on.set()
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(folders) == 1
    folder = Path(folders.pop())
    assert all((folder / name).read_bytes() == hub.files[name] for name in SHARDS)
    assert len(hub.fetched(SHARDS[0])) == 1  # the second waited for the first
    assert leftovers(tmp_path) == []


def test_other_files_of_another_family(hub: Hub, download: Callable[..., Path]) -> None:
    for name in [*SHARDS, "model.safetensors.index.json"]:
        del hub.files[name]
    more = ("model.safetensors", "vocab.json", "merges.txt", "a.py", "b.py")
    hub.files |= {name: name.encode() for name in more}
    folder = download(files=lambda _: (("config.json", "vocab.json"), ("*.txt", "*.py")))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "vocab.json", "merges.txt", "model.safetensors"}
    with pytest.raises(CheckpointError, match=r"has no b\.py on the hub"):
        download(files=lambda _: (("config.json", "b.py"), ()))
    with pytest.raises(InputError, match="its download was not finished"):
        download(offline=True)
    assert download(files=lambda _: (("config.json",), ()), offline=True) == folder


def test_a_broken_connection_and_a_later_try(hub: Hub, download: Callable[..., Path]) -> None:
    hub.stop_after[SHARDS[1]] = 300_000
    with pytest.raises(EdgeVLMError, match="what is finished is kept") as caught:
        download()
    assert caught.value.exit_code == 1
    assert None not in hub.fetched(SHARDS[1])[1:]  # what it tried again went on where it broke
    hub.stop_after.clear()
    hub.requests.clear()
    folder = download()
    assert hub.fetched(SHARDS[0]) == []
    assert len(hub.fetched(SHARDS[1])) == 1
    assert (folder / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]


@pytest.mark.parametrize("name", [SHARDS[0], "config.json"])
def test_a_wrong_checksum(name: str, hub: Hub, download: Callable[..., Path]) -> None:
    content = hub.files[name]
    hub.sent[name] = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    with pytest.raises(CheckpointError, match=f"{name} has another checksum"):
        download()
    hub.sent.clear()
    folder = download()
    assert (folder / name).read_bytes() == content


def test_a_file_that_changed_in_the_cache(hub: Hub, download: Callable[..., Path]) -> None:
    blob = (download() / SHARDS[1]).resolve()
    assert blob.name == etag(SHARDS[1], hub.files[SHARDS[1]])
    blob.write_bytes(bytes(blob.stat().st_size))
    with pytest.raises(CheckpointError, match="another checksum"):
        download()
    assert (download() / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]


@pytest.mark.parametrize(
    "name", [SHARDS[0], "tokenizer.json", "config.json", "chat_template.jinja"]
)
def test_a_file_damaged_in_the_cache_is_found_offline(
    name: str, hub: Hub, download: Callable[..., Path]
) -> None:
    """Large files are named by their SHA-256, small ones by git's hash."""
    folder = download()
    assert download(offline=True) == folder
    blob = (folder / name).resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged.*run without --offline"):
        download(offline=True)
    assert blob.exists()  # it cannot be had again without the hub
    with pytest.raises(CheckpointError, match="it was removed"):
        download()
    assert (download() / name).read_bytes() == hub.files[name]
    assert download(offline=True) == folder


def test_a_cache_without_links_is_taken_as_it_is(hub: Hub, download: Callable[..., Path]) -> None:
    """As on Windows, where files lie in the snapshot itself and tell no hash."""
    folder = download()
    for path in folder.iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert download(offline=True) == folder


PAGE = b"<!DOCTYPE html><html><body>Please log in to this network</body></html>"


def test_a_portal_s_page_is_not_gone_on_from(
    hub: Hub, download: Callable[..., Path], tmp_path: Path
) -> None:
    hub.sent[SHARDS[0]] = PAGE
    with pytest.raises(EdgeVLMError):
        download()
    blobs = tmp_path / "cache" / "models--owner--model" / "blobs"
    part = blobs / f"{etag(SHARDS[0], hub.files[SHARDS[0]])}.incomplete"  # what some clients leave
    part.write_bytes(PAGE)
    honest = blobs / f"{'b' * 64}.incomplete"
    honest.write_bytes(hub.files[SHARDS[0]][:1000])
    hub.sent.clear()
    hub.requests.clear()
    folder = download()
    assert (folder / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]
    assert set(hub.fetched(SHARDS[0])) == {None}
    assert not part.exists()
    assert honest.exists()


def test_an_adapter_on_the_hub_is_no_model(hub: Hub, download: Callable[..., Path]) -> None:
    for name in list(hub.files):
        del hub.files[name]
    hub.files |= {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    with pytest.raises(CheckpointError, match="owner/model: is a LoRA adapter and no model"):
        download()


def test_an_adapter_beside_a_model_on_the_hub(hub: Hub, download: Callable[..., Path]) -> None:
    hub.files |= {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    with pytest.raises(CheckpointError, match=r"owner/model: .*lies beside the model"):
        download()
    for name in (*SHARDS, "model.safetensors.index.json"):
        del hub.files[name]
    with pytest.raises(CheckpointError, match="an adapter and no model; export its base"):
        download()


def test_weights_of_another_format_on_the_hub(hub: Hub, download: Callable[..., Path]) -> None:
    for name in (*SHARDS, "model.safetensors.index.json"):
        del hub.files[name]
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors but pytorch_model\.bin"):
        download()
    del hub.files["pytorch_model.bin"]
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
        download()


def test_settings_inside_the_processor_s_file_are_enough(
    hub: Hub, download: Callable[..., Path]
) -> None:
    for name in ("preprocessor_config.json", "generation_config.json"):
        del hub.files[name]
    names = {path.name for path in download().iterdir()}
    assert names == set(hub.files) - {"pytorch_model.bin"}


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", SHARDS[1], "model.safetensors.index.json"]
)
def test_a_missing_file(name: str, hub: Hub, download: Callable[..., Path]) -> None:
    del hub.files[name]
    with pytest.raises(CheckpointError, match=rf"owner/model: has no {name} on the hub"):
        download()
    assert hub.fetched(SHARDS[0]) == []  # noticed before anything large is fetched


def test_no_space_is_noticed_beforehand(
    hub: Hub, download: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match=r"are needed, 1\.0 MB are free"):
        download()
    assert hub.fetched(SHARDS[0]) == []


def test_no_space_for_the_bundle_is_noticed_before_the_download(
    hub: Hub, download: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[set[str]] = []

    def later(folder: Path) -> int:
        asked.append({path.name for path in folder.iterdir()})
        return 2 * 10**9

    for free, enough in ((2 * 10**9, False), (3 * 10**9, True)):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        if not enough:
            with pytest.raises(InputError, match=r"2\.\d+ GB are needed, 2\.00 GB are free"):
                download(then=(tmp_path, later))
            assert hub.fetched(SHARDS[0]) == []
            assert {"config.json", "preprocessor_config.json"} <= asked[0]
        else:
            assert download(then=(tmp_path, later)).is_dir()


def test_a_disk_that_fills_up(
    hub: Hub, download: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    get = huggingface_hub.file_download.http_get

    def full(url: str, file: Any, **options: Any) -> None:
        def write(data: bytes) -> int:
            if file.tell() > 200_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(file.write(data))

        get(url, SimpleNamespace(write=write, tell=file.tell), **options)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", full)
        with pytest.raises(EdgeVLMError, match="no space left") as caught:
            download()
    assert caught.value.exit_code == 1
    hub.requests.clear()
    download()
    assert hub.fetched("tokenizer.json") == []
    assert leftovers(tmp_path) == []


def test_offline(hub: Hub, download: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="downloads are off"):
        download(offline=True)
    hub.stop_after[SHARDS[1]] = 300_000
    with pytest.raises(EdgeVLMError):
        download()
    with pytest.raises(InputError, match="was not finished"):
        download(offline=True)
    hub.stop_after.clear()
    folder = download()
    hub.requests.clear()
    assert download(offline=True) == folder
    assert download(HubName("owner/model", COMMIT), offline=True) == folder
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "failure", "kind", "message"),
    [
        (HubName("owner/nothing"), None, InputError, "no such model"),
        (HubName("owner/model", "v9"), None, InputError, "has no revision v9"),
        (NAME, (403, "GatedRepo"), InputError, "terms"),
        (NAME, (403, ""), InputError, "refuses access"),
        (NAME, (500, ""), EdgeVLMError, "the hub failed"),
    ],
)
def test_refusals_are_one_line(
    name: HubName,
    failure: tuple[int, str] | None,
    kind: type[EdgeVLMError],
    message: str,
    hub: Hub,
    download: Callable[..., Path],
) -> None:
    hub.failure = failure
    with pytest.raises(EdgeVLMError, match=message) as caught:
        download(name)
    assert type(caught.value) is kind
    assert len(str(caught.value).splitlines()) == 1


def test_no_network(tmp_path: Path) -> None:
    with pytest.raises(EdgeVLMError, match="--offline uses an earlier download") as caught:
        fetch(NAME, download_files, endpoint="http://127.0.0.1:9", cache=tmp_path)
    assert caught.value.exit_code == 1


def test_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source("jinaai/jina-vlm") == HubName("jinaai/jina-vlm")
    assert parse_source("jinaai/jina-vlm@v1.0") == HubName("jinaai/jina-vlm", "v1.0")
    assert str(HubName("a/b", "c")) == "a/b@c"
    for text in ("./jinaai/jina-vlm", "/a/b", "folder", "a/b/c", "../x", "a/..", "a/b@../c", "a/"):
        assert parse_source(text) == Path(text)
    Path("jinaai/jina-vlm").mkdir(parents=True)
    assert parse_source("jinaai/jina-vlm") == Path("jinaai/jina-vlm")
