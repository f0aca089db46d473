"""Uploading an adapter: to a server in this process that speaks the hub's protocol for small files."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gralora.recipe.hub import check_access
from gralora.recipe.options import TrainingOptions
from gralora.recipe.training import train

pytest_plugins = ["run_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread")
TOKEN = "hf_a_token_of_the_test"


class Hub(BaseHTTPRequestHandler):
    """Knows one user, makes repositories, and keeps the files of commits."""

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        else:
            self.answer({"type": "user", "name": "me", "orgs": [], "sha": "0" * 40, "id": "me/mine", "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}/me/mine"
        if self.path.endswith("/repos/create"):
            self.server.made.append(json.loads(body)["name"])
            self.answer({"url": address, "id": "me/mine"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{address}/commit/{'0' * 40}"})
        else:
            self.answer({}, 200)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.made, server.files = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_with(hub, *arguments, token=TOKEN):
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": token}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "gralora", "train", *arguments, "--push-to-hub", "mine"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_finished_adapter_is_uploaded_with_its_card_alone(hub, base_model, rows_file, tmp_path):
    output = tmp_path / "out"
    settings = ["--model", base_model, "--data", rows_file, "--output", str(output), "--r", "4", "--steps", "1"]
    ran = run_with(hub, *settings)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"uploaded to http://127.0.0.1:{hub.server_port}/me/mine" in ran.stdout
    assert hub.made == ["mine"]
    names = {"adapter_model.safetensors", "adapter_config.json", "README.md", "loss.png"}
    assert hub.files == {name: (output / name).read_bytes() for name in names}


def test_a_token_that_the_hub_refuses_is_said_before_anything_is_loaded(hub, tmp_path):
    ran = run_with(hub, "--model", "./nowhere", "--data", "nowhere.jsonl", "--output", str(tmp_path / "out"), token="x")
    assert ran.returncode == 2
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert "--push-to-hub needs a hub that accepts your token: " in line
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_is_said():
    with pytest.raises(ValueError, match=r"`push_to_hub` needs a hub that accepts your token: "):
        train(TrainingOptions(push_to_hub="me/mine", model="./nowhere"))


def test_a_bad_name_is_said():
    with pytest.raises(ValueError, match=r"`push_to_hub` must name a repository: "):
        check_access("me/mine/too")
