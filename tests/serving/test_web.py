"""examples/serving/web: the page in a real browser, and its little server."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytestmark = [pytest.mark.runtimes, pytest.mark.slow]

PROMPT = "Tom found a red kite near the river. He felt"
NEW_TOKENS = 24


def check_quiet_and_local(seen: Any) -> None:
    assert seen["errors"] == []
    assert len(seen["requests"]) > 10
    assert [url for url in seen["requests"] if not url.startswith(seen["url"])] == []


def check_grew(texts: list[str], last: str) -> None:
    """Token by token: more steps than a text that came at once has, each adding to the last."""
    assert len(set(texts)) > 10
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert texts[-1] == last


def test_slider_steers_the_text(demo: Any, use_page: Any) -> None:
    seen = use_page(demo.folder, PROMPT, NEW_TOKENS, (0, 0.5, 1))
    base = demo.text(PROMPT, NEW_TOKENS, 0)
    assert [run["base"] for run in seen["runs"]] == [base] * 3
    steered = {run["scale"]: run["steered"] for run in seen["runs"]}
    assert steered == {s: demo.text(PROMPT, NEW_TOKENS, s) for s in (0, 0.5, 1)}
    assert steered[0] == base
    assert len(set(steered.values())) == 3
    # The slider moved while it was being written, and did not disturb it.
    check_grew(seen["shown"]["base"], base)
    assert seen["slider"]
    assert seen["basePanel"]
    check_quiet_and_local(seen)


def test_adaptive_gains_in_the_browser(tiny: Any, use_page: Any) -> None:
    served, prompt = tiny(1), "the day Tom felt"
    seen = use_page(served.folder, prompt, NEW_TOKENS, (0.5, 1))
    assert seen["base"] == served.text(prompt, NEW_TOKENS, 0)
    steered = [run["steered"] for run in seen["runs"]]
    assert steered == [served.text(prompt, NEW_TOKENS, scale) for scale in (0.5, 1)]
    assert seen["base"] not in steered
    check_quiet_and_local(seen)


def test_weights_in_a_file_of_their_own(demo: Any, use_page: Any, tmp_path: Path) -> None:
    seen = use_page(demo.split_folder(tmp_path / "model"), PROMPT, 12, (1,))
    assert seen["steered"] == demo.text(PROMPT, 12, 1)
    assert seen["base"] == demo.text(PROMPT, 12, 0)
    assert f"{seen['url']}model/model.onnx.data" in seen["requests"]
    check_quiet_and_local(seen)


def test_fixed_strength_hides_the_slider(demo: Any, use_page: Any, tmp_path: Path) -> None:
    seen = use_page(demo.fixed_folder(tmp_path / "fixed"), PROMPT, NEW_TOKENS)
    assert not seen["slider"]
    assert not seen["basePanel"]
    assert "no steering_scale input" in seen["status"]
    assert seen["base"] == ""
    check_grew(seen["shown"]["steered"], demo.text(PROMPT, NEW_TOKENS, 1))
    check_quiet_and_local(seen)


def test_broken_model_is_said_on_the_page(tiny: Any, use_page: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny(0).folder, folder := tmp_path / "model")
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[:1000])
    seen = use_page(folder, PROMPT, NEW_TOKENS)
    assert "cannot load this model" in seen["status"]
    assert seen["steered"] == ""
    assert seen["errors"] == []


@pytest.fixture(scope="module")
def site(serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The server over a folder with a secret beside it."""
    parent = tmp_path_factory.mktemp("site")
    (parent / "secret.txt").write_text("secret")
    folder = parent / "model"
    (folder / "deeper").mkdir(parents=True)
    for name in ("model.onnx", ".hidden", "deeper/secret.txt"):
        (folder / name).write_text("secret")
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    with serve(folder) as url:
        yield url


def ask(url: str, path: str, method: str = "GET") -> tuple[int, bytes, Any]:
    """One request whose path is sent exactly as it is."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/../README.md", 403),
        ("/../../../README.md", 403),
        ("/model/../secret.txt", 403),
        ("/model/../../../../../../../../etc/passwd", 403),
        ("/model/%2e%2e/secret.txt", 403),
        ("/model/..%2fsecret.txt", 403),
        ("/model/%2e%2e%2fsecret.txt", 403),
        ("/model/..%5csecret.txt", 403),
        ("/model/x%5c..%5csecret.txt", 403),
        ("/model/config.json%00.txt", 403),
        ("/model/.hidden", 403),
        ("/.npmrc", 403),
        ("/model/%252e%252e%252fsecret.txt", 404),
        ("/model//etc/passwd", 404),
        ("//etc/passwd", 404),
        ("/model/deeper/secret.txt", 404),
        ("/model/deeper", 404),
        ("/model/", 404),
        ("/model", 404),
        ("/model/none.json", 404),
        ("/secret.txt", 404),
        ("/serve.mjs", 404),
        ("/package.json", 404),
        ("/node_modules/onnxruntime-web/package.json", 404),
        ("/constructor/name", 404),
        ("/__proto__/x", 404),
        ("http://127.0.0.1/../secret.txt", 403),
        ("/%zz", 400),
    ],
)
def test_server_refuses(path: str, status: int, site: str) -> None:
    found, content, _ = ask(site, path)
    assert found == status
    assert content == f"{status}\n".encode()


def test_server_answers(site: str) -> None:
    status, content, headers = ask(site, "/model/config.json?again=1")
    assert (status, json.loads(content)) == (200, {"eos_token_id": 2})
    assert headers["Content-Type"] == "application/json"
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert ask(site, "/model/model.onnx")[1] == b"secret"
    assert ask(site, "/")[1] == ask(site, "/index.html")[1] != b""
    status, content, headers = ask(site, "/ort/ort-wasm-simd-threaded.wasm", "HEAD")
    assert (status, content, headers["Content-Type"]) == (200, b"", "application/wasm")
    assert int(headers["Content-Length"]) > 1_000_000
    assert ask(site, "/model/config.json", "POST")[0] == 405


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "no model.onnx in this folder"),
        (["{folder}/none"], "no model.onnx in this folder"),
        ([], "expected node serve.mjs FOLDER"),
        (["{folder}", "--port", "many"], "--port: expected a number"),
        (["{folder}", "--colour"], "Unknown option '--colour'"),
    ],
)
def test_server_starts_on_a_model_folder_only(
    arguments: list[str], message: str, node: str, tmp_path: Path
) -> None:
    script = Path(__file__).resolve().parents[2] / "examples/serving/web/serve.mjs"
    command = [node, str(script), *(text.format(folder=tmp_path) for text in arguments)]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("serve.mjs: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
