"""Several processes over loopback: one sigma in all of them, and a job that outlives a process."""

import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import process_training
import pytest

SECONDS = 400
"""A process that takes longer has failed."""


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(tmp_path, processes, **training):
    """Starts a job: one process for each rank."""
    config = {"processes": processes, "port": free_port(), "training": training}
    file = tmp_path / f"{config['port']}.json"
    file.write_text(json.dumps(config))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_X64": "0"}
    return [
        subprocess.Popen(
            [sys.executable, process_training.__file__, str(file), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(job):
    """What each process prints at its end."""
    found = []
    try:
        for process in job:
            out, errors = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, errors[-4000:]
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in job:
            process.kill()
            process.wait()
    return found


def alone(steps):
    """The same training on one device of this process."""
    return process_training.train(jax.devices()[:1], 0, steps)


def check(found, expected, processes):
    """Every device of every process holds the same sigmas, and each process a share of weights."""
    assert [one["rank"] for one in found] == list(range(processes))
    for one in found:
        assert one["sigmas"] == found[0]["sigmas"]
        assert one["entries"] == expected["entries"] // processes
        for name, sigmas in one["sigmas"].items():
            assert len(sigmas) == process_training.DEVICES
            assert np.allclose(sigmas, expected["sigmas"][name], rtol=1e-5)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_hold_the_sigma_of_one(tmp_path, processes):
    check(finish(start(tmp_path, processes, steps=3)), alone(3), processes)


@pytest.mark.slow
def test_a_killed_process_costs_the_steps_since_the_last_checkpoint(tmp_path):
    directory = str(tmp_path / "checkpoints")
    job = start(tmp_path, 4, steps=8, directory=directory, kill=[3, 5])
    try:
        assert job[3].wait(timeout=SECONDS) == -signal.SIGKILL
    finally:
        for process in job:  # they wait for the one that is gone
            process.kill()
            process.communicate()
    found = finish(start(tmp_path, 2, steps=8, directory=directory))
    assert [one["first"] for one in found] == [4, 4]
    check(found, alone(8), 2)
