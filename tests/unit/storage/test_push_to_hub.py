"""Uploads to the Hub, one on this machine: the adapter goes there, never the base; a refusal says what to do."""

from __future__ import annotations

import base64
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import ConfigError, SourceError
from toys.several import Model, config, run, three

pytest.importorskip("huggingface_hub")


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Takes commits of small files as the Hub does, and keeps what they hold."""

    files: dict[str, bytes]
    calls: list[tuple[str, str]]
    bodies: list[dict[str, Any]]
    refuse: int | None = None
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.calls.append(("HEAD", self.path))
        match = re.fullmatch(r"/me/adapter/resolve/([^/]+)/(.+)", self.path)
        if match is None or match[2] not in self.files:
            return self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.answer({}, 200, {"ETag": '"1"', "X-Repo-Commit": "a" * 40})

    def do_POST(self) -> None:
        self.calls.append(("POST", self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.refuse is not None:
            return self.answer({"error": "no"}, self.refuse)
        if self.path == "/api/repos/create":
            self.bodies.append(json.loads(body))
            return self.answer({"url": f"http://{self.headers['Host']}/me/adapter", "id": "1", "name": "me/adapter"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/branch/" in self.path:
            return self.answer({})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        if "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                self.bodies.append(line)
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/me/adapter/commit/{'b' * 40}"
            return self.answer({"commitUrl": url, "commitOid": "b" * 40, "pullRequestUrl": None})
        return self.answer({}, 404)

    def do_GET(self) -> None:
        self.calls.append(("GET", self.path))
        if self.refuse is not None:
            return self.answer({"error": "no"}, self.refuse)
        return self.answer({"type": "user", "name": "me", "siblings": [], "id": "me/adapter", "sha": "a" * 40})

    def answer(self, value: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = b"" if self.command == "HEAD" else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[dict[str, Any], type[FakeHub]]]:
    """Options that lead to the Hub on this machine, and what it has seen."""
    handler = type("Handler", (FakeHub,), {"files": {}, "calls": [], "bodies": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield {"endpoint": f"http://127.0.0.1:{server.server_port}", "token": "hf_secret"}, handler
    server.shutdown()
    server.server_close()
    thread.join()


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_what_is_uploaded_is_what_save_pretrained_writes(hub: tuple[dict[str, Any], Any], tmp_path: Path) -> None:
    options, seen = hub
    model = three()
    commit = model.push_to_hub("me/adapter", **options)
    assert commit.oid == "b" * 40
    model.save_pretrained(tmp_path / "saved")
    expected = {str(p.relative_to(tmp_path / "saved")) for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert seen.files.keys() == expected
    assert len([name for name in seen.files if name.endswith(".safetensors")]) == 3
    write(tmp_path / "fetched", seen.files)
    loaded = PeftModel.from_pretrained(Model().double(), tmp_path / "fetched" / "a")
    assert run(loaded).equal(run(model))
    assert seen.bodies[0]["name"] == "adapter"
    header = next(body["value"] for body in seen.bodies if body.get("key") == "header")
    assert header["summary"] == "Upload adapter"


def test_what_is_said_about_a_commit_is_passed_on(hub: tuple[dict[str, Any], Any]) -> None:
    options, seen = hub
    model = get_peft_model(Model(), config())
    model.push_to_hub(
        "me/adapter", commit_message="mine", commit_description="more", private=True, revision="dev",
        max_shard_size="5GB", **options,
    )  # fmt: skip
    header = next(body["value"] for body in seen.bodies if body.get("key") == "header")
    assert (header["summary"], header["description"]) == ("mine", "more")
    assert seen.bodies[0].get("private") is True or seen.bodies[0].get("visibility") == "private"
    assert any(path.endswith("/branch/dev") for method, path in seen.calls if method == "POST")
    assert any("/commit/dev" in path for _, path in seen.calls)


def test_a_pull_request_is_asked_for_and_makes_no_branch(
    hub: tuple[dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, seen = hub
    given: dict[str, Any] = {}
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **kw: given.update(kw))
    get_peft_model(Model(), config()).push_to_hub("me/adapter", create_pr=True, revision="dev", **options)
    assert (given["create_pr"], given["revision"]) == (True, "dev")
    assert not any("/branch/" in path for _, path in seen.calls)


def test_a_card_that_the_repository_has_is_not_replaced(hub: tuple[dict[str, Any], Any]) -> None:
    options, seen = hub
    seen.files["README.md"] = b"# By hand"
    get_peft_model(Model(), config()).push_to_hub("me/adapter", **options)
    assert seen.files["README.md"] == b"# By hand"
    assert "adapter_model.safetensors" in seen.files


def test_a_config_is_uploaded_alone(hub: tuple[dict[str, Any], Any]) -> None:
    options, seen = hub
    LoraConfig(r=3, target_modules=["q"]).push_to_hub("me/adapter", **options)
    assert list(seen.files) == ["adapter_config.json"]
    assert json.loads(seen.files["adapter_config.json"])["r"] == 3


REFUSALS = [
    (401, r"The upload to 'me/adapter' failed: .* Log in \('hf auth login'\) or pass token="),
    (403, r"The upload to 'me/adapter' failed: .* The token may not write there: pass one of an account that may"),
    (404, r"The upload to 'me/adapter' failed: .* Check the name and the revision; a private repository needs token="),
    (418, r"The upload to 'me/adapter' failed: .* Try again, or save_pretrained and upload the folder\."),
]


@pytest.mark.parametrize(("status", "text"), REFUSALS)
def test_a_refusal_of_the_hub_says_what_to_do(status: int, text: str, hub: tuple[dict[str, Any], Any]) -> None:
    options, seen = hub
    seen.refuse = status
    with pytest.raises(SourceError, match=text) as caught:
        get_peft_model(Model(), config()).push_to_hub("me/adapter", **options)
    assert "hf_secret" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own attempts
    with pytest.raises(SourceError, match=r"The upload to 'me/adapter' failed: .* Try again, or save_pretrained"):
        get_peft_model(Model(), config()).push_to_hub("me/adapter", endpoint="http://127.0.0.1:9", token="hf_x")


def test_names_arguments_and_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Model(), config())
    with pytest.raises(SourceError, match="'-a-/b/c' cannot be the name of a Hub repository: "):
        model.push_to_hub("-a-/b/c", endpoint="http://127.0.0.1:9", token="hf_x")
    with pytest.raises(
        ConfigError, match=r"push_to_hub has no argument 'commit_msg'\. Did you mean 'commit_message'\?"
    ):
        model.push_to_hub("me/adapter", commit_msg="x")  # type: ignore[call-arg]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"push_to_hub needs a package that is not installed\. Run: pip"):
        model.push_to_hub("me/adapter")


def test_the_models_own_upload_is_not_reached() -> None:
    class Hubbed(Model):
        def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("the base model would be uploaded")

        def create_or_update_model_card(self, folder: Path) -> None:
            raise AssertionError("a card of the base model would be written")

    model = get_peft_model(Hubbed(), config())
    with pytest.raises(SourceError, match="The upload to 'me/adapter' failed"):
        model.push_to_hub("me/adapter", endpoint="http://127.0.0.1:9", token="hf_x")


# ---- cards


def test_a_card_is_written_or_the_one_there_gets_what_it_lacks(tmp_path: Path) -> None:
    base = Model()
    base.name_or_path = "owner/base"  # type: ignore[assignment]
    model = get_peft_model(base, config())
    model.create_or_update_model_card(tmp_path / "new")
    text = (tmp_path / "new" / "README.md").read_text()
    assert "base_model: owner/base" in text
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlibrary_name: other\ntags:\n- mine\n---\n\n# By hand\n")
    model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    for part in ("license: mit", "library_name: other", "- mine", "- lora", "base_model: owner/base", "# By hand"):
        assert part in text
    model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n\n# Broken\n")
    with pytest.raises(RuntimeError, match=r"The head of .*README\.md cannot be read: .* Mend or delete it\."):
        model.create_or_update_model_card(tmp_path)
    assert "# Broken" in (tmp_path / "README.md").read_text()


def test_a_card_needs_its_package_only_where_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    model.create_or_update_model_card(tmp_path)
    with pytest.raises(RuntimeError, match=r"Reading the head of .* Run: pip install huggingface_hub"):
        model.create_or_update_model_card(tmp_path)
