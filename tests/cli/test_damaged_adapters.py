"""Every verb that reads an adapter says in one line what is wrong with a damaged one, and writes nothing."""

import os
import shutil

import pytest
from adapters import CONFIG, TENSORS, lora, run, save_base_and_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

VERBS = {
    "generate": ["{adapter}", "--model", "{base}", "--prompt", "a"],
    "generate --prompts": ["{adapter}", "--model", "{base}", "--prompts", "{prompts}"],
    "chat": ["{adapter}", "--model", "{base}"],
    "merge": ["{base}", "{adapter}", "{out}"],
    "export": ["{adapter}", "{out}"],
    "export --format gguf": ["{adapter}", "{out}.gguf", "--base", "{base}"],
    "export --format diffusers": ["{adapter}", "{out}", "--format", "diffusers"],
    "import": ["{adapter}", "{out}"],
    "inspect": ["{adapter}"],
    "inspect --json": ["{adapter}", "--json"],
}


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def binary(file):
    file.write_bytes(b"\xff\xfe\x00")


DAMAGES = {
    "tensors cut": lambda folder: cut(folder / TENSORS),
    "tensors cut in the header": lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:50]),
    "tensors empty": lambda folder: emptied(folder / TENSORS),
    "tensors missing": lambda folder: (folder / TENSORS).unlink(),
    "tensors a folder": lambda folder: ((folder / TENSORS).unlink(), (folder / TENSORS).mkdir()),
    "config cut": lambda folder: cut(folder / CONFIG),
    "config empty": lambda folder: emptied(folder / CONFIG),
    "config binary": lambda folder: binary(folder / CONFIG),
    "config missing": lambda folder: (folder / CONFIG).unlink(),
    "config of nothing": lambda folder: (folder / CONFIG).write_text("{}"),
    "config a list": lambda folder: (folder / CONFIG).write_text("[]"),
    "folder empty": lambda folder: [file.unlink() for file in folder.iterdir()],
    "folder missing": shutil.rmtree,
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("{}")),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A base, a GraLoRA adapter of it, and a LoRA, which `import` reads."""
    folder = save_base_and_adapter(tmp_path_factory.mktemp("whole"))
    lora().save_pretrained(folder / "lora", save_embedding_layers=False)
    (folder / "prompts").write_text("a\n")
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_adapter_is_one_line_and_status_2(verb, damage, whole, tmp_path, capsys, monkeypatch):
    adapter = tmp_path / "adapter"
    shutil.copytree(whole / ("lora" if verb == "import" else "adapter"), adapter)
    DAMAGES[damage](adapter)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr("gralora.pretrained.load", None)  # damage is found before a model is loaded
    capsys.readouterr()
    places = {"adapter": adapter, "base": whole / "base", "out": tmp_path / "out", "prompts": whole / "prompts"}
    status, out, err = run(capsys, verb.split()[0], *[argument.format(**places) for argument in VERBS[verb]])
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert str(adapter) in err
    assert sorted(os.listdir(tmp_path)) == before
