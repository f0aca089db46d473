"""The verbs on an adapter of a mixture's experts."""

import json

import pytest
import torch
from command_line import run
from mixtures import tiny
