"""An adapter is found in a folder or on the Hub, and what is not there is explained with the next step."""

from __future__ import annotations

import hashlib
import http.server
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError, SourceError
from lorafa.io.find import find_adapter_files
from lorafa.storage.tensors import read_tensors, write_tensors

TENSORS = {"q.lora_A.weight": torch.arange(12.0).view(4, 3)}


def save_adapter(folder: Path, weights: str = "adapter_model.safetensors") -> Path:
    LoraConfig(r=4, target_modules=["q"]).save_pretrained(folder)
    if weights.endswith(".bin"):
        torch.save(TENSORS, folder / weights)
    else:
        write_tensors(folder / weights, TENSORS)
    return folder


def test_an_adapter_is_found_in_a_folder_and_safetensors_come_first(tmp_path):
    save_adapter(tmp_path, "adapter_model.bin")
    assert find_adapter_files(tmp_path).weights == tmp_path / "adapter_model.bin"
    save_adapter(tmp_path)
    found = find_adapter_files(str(tmp_path))
    assert found.weights == tmp_path / "adapter_model.safetensors"
    assert found.config == tmp_path / "adapter_config.json"


def test_an_adapter_is_found_in_a_subfolder(tmp_path):
    save_adapter(tmp_path / "other")
    assert find_adapter_files(tmp_path, subfolder="other").weights.parent == tmp_path / "other"


def test_a_folder_without_an_adapter_says_what_it_holds(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    text = r"has no adapter_config\.json; it holds: model\.safetensors\. Name the folder an adapter was saved to"
    with pytest.raises(SourceError, match=text):
        find_adapter_files(tmp_path)
    LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(
        SourceError, match=r"has no adapter_model\.safetensors or adapter_model\.bin; it holds: adapter_con"
    ):
        find_adapter_files(tmp_path)


def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match=r"There is no folder '.*gone'\. Check the path\."):
        find_adapter_files(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"There is no folder '\./gone'\. Check the path"):
        find_adapter_files("./gone")
    with pytest.raises(SourceError, match=r"There is no folder '.*gone'\. Check the path and the subfolder\."):
        find_adapter_files(tmp_path, subfolder="gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=r"There is no folder '.*file'\. It is a file: name the folder it is in"):
        find_adapter_files(tmp_path / "file")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(SourceError, match=r"It is a file: name the folder it is in"):  # and the Hub is not asked
        find_adapter_files(f"{tmp_path.name}/file")


def test_an_option_the_hub_does_not_have_is_refused_for_folders_too(tmp_path):
    save_adapter(tmp_path)
    with pytest.raises(ConfigError, match=r"no argument 'revison'\. Did you mean 'revision'\?"):
        find_adapter_files(tmp_path, revison="main")


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does for one repository, owner/adapter, and one gated one, owner/gated."""

    root: Path
    COMMIT = "a" * 40

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        match = re.fullmatch(r"/(owner/\w+)/resolve/(\w+)/(.+)", self.path)
        if match is None or match[1] not in ("owner/adapter", "owner/gated"):
            return self.fail(401 if match else 404, "RepoNotFound")
        if match[1] == "owner/gated":
            return self.fail(403, "GatedRepo")
        if match[2] == "broken" and body:
            return self.fail(418, "Teapot")
        if match[2] not in ("main", "broken", self.COMMIT):
            return self.fail(404, "RevisionNotFound")
        path = self.root / match[3]
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
        return None

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("X-Repo-Commit", self.COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, object]]:
    """Options that lead to a Hub on this machine; its files are in tmp_path / "hub"."""
    pytest.importorskip("huggingface_hub")
    save_adapter(tmp_path / "hub")
    save_adapter(tmp_path / "hub" / "sub", "adapter_model.bin")
    handler = type("Handler", (FakeHub,), {"root": tmp_path / "hub"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": tmp_path / "cache", "token": False}
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_adapter_is_fetched_from_the_hub_and_found_in_the_cache_afterwards(hub):
    found = find_adapter_files("owner/adapter", **hub)
    torch.testing.assert_close(read_tensors(found.weights)[0], TENSORS, rtol=0, atol=0)
    assert LoraConfig.from_pretrained("owner/adapter", **hub).r == 4
    assert find_adapter_files("owner/adapter", **hub, local_files_only=True) == found


def test_the_older_name_of_token_is_sent_as_the_token(hub, monkeypatch):
    seen = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: seen.append(options) or "/x")
    find_adapter_files("owner/adapter", use_auth_token="hf_older")
    find_adapter_files("owner/adapter", use_auth_token="hf_older", token="hf_newer")
    find_adapter_files("owner/adapter", use_auth_token=None, proxies=None)
    assert [options.get("token") for options in seen[::2]] == ["hf_older", "hf_newer", None]
    assert not any({"use_auth_token", "proxies"} & options.keys() for options in seen)


def test_proxies_are_passed_on_where_the_hubs_package_takes_them(hub, monkeypatch):
    given = {"https": "http://127.0.0.1:9"}
    with pytest.raises(ConfigError, match=r"takes no proxies=\. Set the environment variable HTTPS_PROXY instead"):
        find_adapter_files("owner/adapter", proxies=given, **hub)
    seen = []

    def download(repo, filename, *, subfolder=None, proxies=None):
        seen.append(proxies)
        return "/x"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    find_adapter_files("owner/adapter", proxies=given)
    assert seen == [given, given]


def test_a_subfolder_of_the_hub_with_a_pickle_only_is_found(hub):
    assert find_adapter_files("owner/adapter", subfolder="sub", **hub).weights.name == "adapter_model.bin"


HUB_FAILURES = [
    (
        {"source": "owner/nothing"},
        r"'owner/nothing' is no local folder, and the Hub has no such repository\. Check the na",
    ),
    (
        {"source": "owner/gated"},
        r"'owner/gated' is no local folder, and the Hub repository is gated\. Ask for access on",
    ),
    (
        {"source": "owner/adapter", "revision": "v9"},
        r"'owner/adapter' has no revision 'v9'\. Its page lists its branches",
    ),
    (
        {"source": "owner/adapter", "subfolder": "x"},
        r"'owner/adapter/x' has no adapter_config\.json\. Is it an adapter\?",
    ),
    (
        {"source": "owner/adapter", "revision": "broken"},
        r"the Hub gave no adapter_config\.json: .* Try again, or use a f",
    ),
    ({"source": "owner/-bad-"}, r"'owner/-bad-' is no local folder, and it cannot be the name of a Hub repository: "),
]


@pytest.mark.parametrize(("arguments", "text"), HUB_FAILURES)
def test_what_the_hub_does_not_give_is_explained(arguments, text, hub):
    with pytest.raises(SourceError, match=text):
        find_adapter_files(**(hub | arguments))


def test_a_hub_that_cannot_be_reached_is_explained_with_the_next_step(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    nowhere = {"endpoint": "http://127.0.0.1:9", "cache_dir": tmp_path, "token": False}
    text = (
        r"'owner/x' is no local folder, and the Hub could not be reached for adapter_config\.json \(.*name its folder"
    )
    with pytest.raises(SourceError, match=text):
        find_adapter_files("owner/x", **nowhere)
    with pytest.raises(SourceError, match=text):
        find_adapter_files("owner/x", **nowhere, local_files_only=True)


def test_without_the_hubs_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        SourceError, match=r"'owner/x' is no local folder, and the Hub needs a package .*pip install hugg"
    ):
        find_adapter_files("owner/x")
