"""Scripts that run as two processes over gloo."""

import os
import subprocess
import sys
from pathlib import Path

# What every script begins with.
PREAMBLE = """
import copy
import os
import sys
import torch
import torch.distributed as dist

torch.set_num_threads(1)
os.environ["LOCAL_RANK"] = os.environ["RANK"]
dist.init_process_group("gloo")
rank, folder, arguments = dist.get_rank(), sys.argv[1], sys.argv[2:]


def train(model, tokens, steps=3, lr=1e-2):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr), []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def refused(action, reason, **arguments):
    try:
        action(**arguments)
    except (RuntimeError, ValueError) as error:
        assert reason in str(error), error
    else:
        raise AssertionError("done where it should have been refused")
"""


def run_two_processes(script, folder, *arguments, paths=()):
    """Run `script`, which finds `folder` and `arguments` under these names, as two processes that must both succeed."""
    search = [str(Path(__file__).parent), *map(str, paths), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search)), "DS_ACCELERATOR": "cpu"}
    (folder / "script.py").write_text(PREAMBLE + script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*launch, folder / "script.py", folder, *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    return run.stdout
