"""The game on Ray: two nodes that share nothing but a folder, actors and a node that die, and what
is said where there is no cluster. All nodes run on this machine, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import psutil
import pytest

from lib import crew_ray, environment, jobs, roundtrip
from lib.errors import UserError
from lib.presets import get_preset
from lib.stores import StorePath
from tests.mortal import DOOMED, broken, contents, doomed, fragile, paint
from tests.standins import stand_ins, without_weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="the optional package ray is not installed: pip install --no-deps -r requirements-ray.lock")
MINI = without_weights(get_preset("mini"))
N, K = 10, 3
PATIENCE = 300.0  # seconds that a very busy machine may take to start a process


# --- a cluster of two nodes ----------------------------------------------------------------------


def free_port():
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start_node(log, *options, **variables):
    """Start a node with one processor, as its own process; ``ray start --block`` ends with it.

    Its helper processes get ports and minutes: Ray would wait for their word for 15 seconds, and end.
    """
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block",
               "--node-ip-address=127.0.0.1", "--num-cpus=1", "--object-store-memory=100000000",
               "--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", *options]
    agents = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port",
              "metrics-export-port")
    command += [f"--{agent}={free_port()}" for agent in agents]
    variables |= {"RAY_worker_niceness": "0",  # 15 by Ray's default, which starves on a busy machine
                  "RAY_agent_register_timeout_ms": "300000", "RAY_worker_register_timeout_seconds": "300"}
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                stdin=subprocess.DEVNULL, env={**os.environ, **variables})


def end_node(node):
    """Kill a node with all that it has started, as a power cut would."""
    try:
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    node.wait()


def await_port(port, node, log):
    """Wait until a node listens. Ray gives up by itself after some seconds on a very busy machine."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and node.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.2)
    return pytest.skip(f"Ray does not start here: {log.read_text()[-300:]}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The processes of two nodes, the second of which is marked as doomed; RAY_ADDRESS points there."""
    logs = tmp_path_factory.mktemp("nodes")
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
        nodes = [start_node(logs / "0", "--head", f"--port={port}", "--include-dashboard=false")]
        try:
            await_port(port, nodes[0], logs / "0")
            patch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            for _ in range(3):
                nodes.append(start_node(logs / "1", f"--address=127.0.0.1:{port}", **{DOOMED: "1"}))
                if has_joined(nodes, logs):
                    break
                end_node(nodes.pop())
            else:
                pytest.skip(f"Ray's second node does not start here: {(logs / '1').read_text()[-300:]}")
            yield nodes
        finally:
            for node in reversed(nodes):
                end_node(node)


def has_joined(nodes, logs):
    """Wait until all nodes are there; False if the newest has given up, as a very busy machine
    makes it do. Skips where the first has."""
    import ray  # not before the variables are set: it reads them when it is imported

    end = time.monotonic() + PATIENCE
    while True:
        try:  # the head's port may answer long before the rest of it
            ray.init(logging_level="ERROR", log_to_driver=False)
            break
        except ConnectionError:
            ray.shutdown()
            if nodes[0].poll() is not None or time.monotonic() > end:
                pytest.skip(f"Ray does not start here: {(logs / '0').read_text()[-300:]}")
    try:
        while sum(known["Alive"] for known in ray.nodes()) < len(nodes):
            if nodes[-1].poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.2)
        return True
    finally:
        ray.shutdown()


def connected():
    """Whether this process is still part of a cluster."""
    import ray

    return ray.is_initialized()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("ray") / "pictures", N)


def play(pictures, folder, models, **options):
    options = {"engine": "ray", "workers": 2, "progress": False, "shard_size": 1, "root": folder / "runs",
               **options}
    return roundtrip.play(MINI, pictures, "image", N, K, 0, models=models, **options)


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    return contents(play(pictures, tmp_path_factory.mktemp("alone"), stand_ins, engine="local", workers=1))


def test_a_killed_actor_is_replaced_and_the_bytes_are_those_of_one(
        cluster, pictures, alone, tmp_path, capfd):
    root = f"disk://{tmp_path}/runs"  # actors write into a store
    run = play(pictures, tmp_path, partial(fragile, tmp_path / "once"), progress=True, root=root)
    assert (tmp_path / "once").exists() and contents(run) == alone
    assert isinstance(run.path, StorePath) and not list(run.path.glob(".scratch/*"))
    said = capfd.readouterr().err
    assert "is tried again: shard 5 (items 05.png): its actor was lost" in said
    assert said.count("10/10") == 1  # one bar for all actors
    assert not connected()


def test_what_cannot_be_played_is_named_and_the_rest_completes(cluster, pictures, alone, tmp_path, capfd):
    with pytest.raises(UserError, match=r"1 of 10 shards could not be played, all others are kept. "
                                        r"First shard 5 \(items 05.png\): its actor was lost"):
        play(pictures, tmp_path, fragile)
    assert capfd.readouterr().err.count("its actor was lost") == jobs.TRIES
    kept = {path.stem for path in tmp_path.glob("runs/*/shards/*.parquet")}
    assert kept == {f"{i:05d}" for i in range(N)} - {"00005"}
    run = play(pictures, tmp_path, stand_ins, engine="local", workers=1)  # mended
    assert contents(run) == alone


def test_no_actor_comes_to_life(cluster, pictures, tmp_path):
    with pytest.raises(UserError, match="3 Ray actors in a row died while .* RuntimeError: no such thing"):
        play(pictures, tmp_path, broken)


def test_a_node_that_is_lost_costs_no_row(cluster, pictures, alone, tmp_path, capfd):
    def kill_when_stuck():
        while not (tmp_path / "stuck").exists():
            time.sleep(0.05)
        end_node(cluster[1])

    killer = threading.Thread(target=kill_when_stuck, daemon=True)
    killer.start()
    run = play(pictures, tmp_path, partial(doomed, tmp_path))
    killer.join(timeout=120)
    assert not killer.is_alive()
    assert (tmp_path / "doomed").exists() and (tmp_path / "safe").exists()  # both nodes have played
    assert capfd.readouterr().err.count("its actor was lost") == 1
    assert contents(run) == alone


# --- one machine, and no cluster -------------------------------------------------------------------


def test_a_cluster_for_the_length_of_the_run(cluster, pictures, alone, tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS")
    try:
        run = play(pictures, tmp_path, stand_ins)
    except UserError as error:
        if "Ray does not start on this machine (The current node timed out" in str(error):
            pytest.skip(str(error))  # Ray allows itself some seconds; a very busy machine needs more
        raise
    assert contents(run) == alone and not connected()


@pytest.mark.parametrize(("address", "reason"), [
    ("nonsense", "RAY_ADDRESS = nonsense: must be HOST:PORT"),
    ("ray://somewhere:10001", "must be HOST:PORT .* on a machine of that cluster"),
    ("127.0.0.1:99999", "must be HOST:PORT"),
    ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS = 127.0.0.1:1 .Connection refused.: start one"),
    ("no-such-host.invalid:6379", "no Ray cluster answers at RAY_ADDRESS = no-such-host.invalid"),
])
def test_no_cluster_at_the_address(pictures, tmp_path, monkeypatch, address, reason):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=reason):
        play(pictures, tmp_path, stand_ins)


@pytest.mark.parametrize(("nodes", "workers", "cpus", "gpus"), [
    ([{"CPU": 8}], 2, 4, 0),
    ([{"CPU": 8}], 3, 2, 0),
    ([{"CPU": 4}, {"CPU": 2}], 2, 2, 0),  # 3 each would not fit on the second
    ([{"CPU": 2}], 6, 0.3333, 0),  # more actors than processors
    ([{"CPU": 16, "GPU": 4}], 4, 4, 1.0),
    ([{"CPU": 16, "GPU": 4}], 2, 8, 1.0),  # no actor has use for two cards
    ([{"CPU": 16, "GPU": 4}], 8, 2, 0.5),
    ([{"CPU": 16, "GPU": 2}], 3, 5, 0.5),  # two thirds of a card would leave the third actor without
    ([{"CPU": 64}, {"CPU": 8, "GPU": 2}], 2, 4, 1.0),  # only the second machine has cards
    ([{"CPU": 16, "GPU": 1}], 3, 5, 0.3333),
    ([{}], 2, 0.5, 0),  # a head without processors: actors wait for machines
])
def test_all_actors_fit(nodes, workers, cpus, gpus):
    part = crew_ray.share(nodes, workers)
    assert part == {"num_cpus": cpus, "num_gpus": gpus}


# --- the optional package ------------------------------------------------------------------------


def test_the_second_lock_holds_exactly_what_the_first_lacks():
    assert environment.read_lock(environment.EXTRA_LOCKS["ray"]) == environment.extra_pins("ray")
    assert not environment.mismatches(environment.read_lock(environment.EXTRA_LOCKS["ray"]))
