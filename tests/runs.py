"""Settings of a tiny training run, and what interrupts it. The fixtures are in `run_fixtures.py`."""

import os
import signal

from gralora.recipe.progress import Reporter

# 20 rows in batches of 4: an epoch is 5 steps, so that 8 steps cross from one to the next.
SETTINGS = {"r": 4, "dropout": 0.3, "lr": 1e-2, "batch_size": 4, "steps": 8, "dtype": "float32"}


class Recorder(Reporter):
    """Keeps the events of a run, and calls `do` at step `at_step`."""

    def __init__(self, at_step=None, do=lambda: None):
        self.notes, self.summary, self.scores, self.evaluations, self.samples = [], None, [], [], []
        self.at_step, self.do = at_step, do

    def note(self, text):
        self.notes.append(text)

    def ready(self, summary):
        self.summary = summary

    def evaluated(self, step, loss):
        self.evaluations.append((step, loss))

    def sample(self, step, prompt, answer):
        self.samples.append((step, prompt, answer))

    def scoring(self, what, done, rows):
        self.scores.append((what, done, rows))

    def step(self, step, loss, tokens_per_second):
        if step == self.at_step:
            self.do()


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def stop_at_once():
    raise KeyboardInterrupt


def adapter_bytes(output):
    return (output / "adapter_model.safetensors").read_bytes()


def contents(folder):
    """Return the bytes of every file under `folder`, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
