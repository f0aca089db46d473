"""Agreement between two real processes; the module is loaded by itself, so that they start soon."""

import json
import os
import subprocess
import sys

import pytest

from gralora.recipe import processes
from gralora.recipe.processes import Processes, disconnect, is_main_process

SCRIPT = f"""
import json, os, runpy, sys

module = runpy.run_path({processes.__file__!r})
processes, StoppedTogetherError = module["Processes"](), module["StoppedTogetherError"]
rank = processes.rank
if not processes.restarted:
    with open(f"{{sys.argv[1]}}/launch-{{rank}}", "w") as file:
        file.write(processes.launch)
    sys.exit(7)


def outcome(action):
    try:
        return ["returned", action()]
    except Exception as error:
        return [type(error).__name__, str(error)]


def fails_in(*ranks):
    def action():
        if rank in ranks:
            raise OSError("no weights")
        return rank
    return action


calls = []
seen = {{
    "facts": [processes.count, processes.is_main, processes.restarted, processes.kind, processes.share_model],
    "launch": processes.launch,
    "stop": outcome(lambda: processes.stop("enough")),
    "any": [processes.any(flag) for flag in (False, rank == 0, rank == 1, True)],
    "from main": outcome(lambda: processes.from_main(lambda: calls.append(1) or {{"rank": rank}})),
    "from main, calls": len(calls),
    "from main, failing": outcome(lambda: processes.from_main(fails_in(0))),
    "from main, failing elsewhere": outcome(lambda: processes.from_main(fails_in(1))),
    "together": outcome(lambda: processes.together(fails_in())),
    "together, failing in 0": outcome(lambda: processes.together(fails_in(0))),
    "together, failing in 1": outcome(lambda: processes.together(fails_in(1))),
    "together, failing in both": outcome(lambda: processes.together(fails_in(0, 1))),
    "gathered": processes.gathered([f"{{rank}}-{{i}}" for i in range(rank + 1)]),
}}
order = []
seen["one first"] = processes.one_per_node_first(lambda: order.append(os.path.exists(sys.argv[1] + "/first"))
                                                  or open(sys.argv[1] + "/first", "w").close() or rank)
seen["one first, saw the file"] = order
processes.any(False)
with open(f"{{sys.argv[1]}}/{{rank}}.json", "w") as file:
    json.dump(seen, file)
module["disconnect"]()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def seen(folder):
    """What each of two processes saw, which torchrun had started a second time."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (folder / "script.py").write_text(SCRIPT)
    command = [*launch, "--max-restarts", "1", folder / "script.py", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_facts(seen, folder):
    assert [process["facts"] for process in seen] == [
        [2, True, True, "DDP", False],
        [2, False, True, "DDP", False],
    ]
    launches = {process["launch"] for process in seen} | {(folder / f"launch-{rank}").read_text() for rank in (0, 1)}
    assert len(launches) == 1


def test_any_is_true_everywhere_if_it_is_anywhere(seen):
    assert [process["any"] for process in seen] == [[False, True, True, True]] * 2


def test_from_main_calls_in_the_main_process_and_returns_everywhere(seen):
    assert [process["from main"] for process in seen] == [["returned", {"rank": 0}]] * 2
    assert [process["from main, calls"] for process in seen] == [1, 0]
    assert [process["from main, failing elsewhere"] for process in seen] == [["returned", 0]] * 2


def test_an_error_of_the_main_process_is_raised_in_all(seen):
    assert seen[0]["from main, failing"] == ["OSError", "no weights"]
    assert seen[1]["from main, failing"] == ["StoppedTogetherError", "no weights"]


def test_together_fails_everywhere_if_it_fails_anywhere(seen):
    assert [process["together"] for process in seen] == [["returned", 0], ["returned", 1]]
    for where in ("0", "both"):
        assert seen[0][f"together, failing in {where}"] == ["OSError", "no weights"]
        assert seen[1][f"together, failing in {where}"] == ["StoppedTogetherError", "no weights"]
    said = "no weights This happened in process 1 of 0 to 1."
    assert seen[0]["together, failing in 1"] == ["RuntimeError", said]
    assert seen[1]["together, failing in 1"] == ["StoppedTogetherError", said]


def test_all_can_stop_with_a_message_that_the_main_process_reports(seen):
    assert [process["stop"] for process in seen] == [["RuntimeError", "enough"], ["StoppedTogetherError", "enough"]]


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK"])
def test_the_main_process_is_known_before_the_processes_are_connected(name, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_process()
    monkeypatch.setenv(name, "1")
    assert not is_main_process()


def test_items_are_gathered_by_rank(seen):
    assert [process["gathered"] for process in seen] == [["0-0", "1-0", "1-1"]] * 2


def test_one_process_of_a_node_acts_before_the_others(seen):
    assert [process["one first"] for process in seen] == [0, 1]
    assert [process["one first, saw the file"] for process in seen] == [[False], [True]]


def fails():
    raise OSError("no weights")


def test_one_process_needs_no_agreement(monkeypatch):
    for name in ("WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes()
    assert (alone.count, alone.rank, alone.is_main, alone.restarted) == (1, 0, True, False)
    assert (alone.kind, alone.share_model, alone.launch) == ("one process", False, None)
    assert [alone.any(False), alone.any(True)] == [False, True]
    assert alone.from_main(lambda: 3) == alone.together(lambda: 3) == alone.one_per_node_first(lambda: 3) == 3
    assert alone.gathered((1, 2)) == [1, 2]
    for agree in (alone.from_main, alone.together, alone.one_per_node_first):
        with pytest.raises(OSError, match="no weights"):
            agree(fails)
    with pytest.raises(RuntimeError, match="enough"):
        alone.stop("enough")
    disconnect()


def test_one_process_loads_neither_accelerate_nor_torch():
    script = (
        f"import runpy, sys; P = runpy.run_path({processes.__file__!r})['Processes']; P().any(True); "
        "print([name for name in ('torch', 'accelerate') if name in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize("version", [None, "1"])
def test_the_first_version_of_fsdp_is_refused_with_the_way_out(version, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match=r"got fsdp_version=1\. Write `fsdp_version: 2` under `fsdp_config`"):
        Processes()


def test_deepspeed_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install deepspeed"):
        Processes()
