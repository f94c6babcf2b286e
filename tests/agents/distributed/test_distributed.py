"""Work on a Ray cluster: two nodes on this machine's loopback, workers that are killed, files that are gone on with."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import psutil
import pytest
from typer.testing import CliRunner

# Before Ray is imported: it keeps to the loopback interface, and its workers are not made to wait for others.
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",
}

from qstar_decoding.agents import QStar, TokenQPolicy
from qstar_decoding.agents.distributed.jobs import InProcess, Job
from qstar_decoding.agents.distributed.ray_workers import ATTEMPTS, RayWorkers, check_address
from qstar_decoding.agents.learning.experience import Searcher
from qstar_decoding.cli import app as cli
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.errors import ConfigurationError, PromptError, RewardError, WorkerError
from qstar_decoding.tasks import load_task

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")  # in one process: every other would start a cluster of its own
TASK = load_task("toy")
PROMPTS = TASK.prompts.of("test")


class Calculator:
    """What the workers of some tests hold. It writes down what it does, so that nobody has to guess when to kill it."""

    added = 0

    def receive(self, news):
        self.added, log = news
        note(log, "received")

    def square(self, x, log, seconds=0.0):
        note(log, f"begin {x}")
        time.sleep(seconds)
        note(log, f"end {x}")
        return x * x + self.added

    def fail(self, x):
        raise RewardError(f"no square of {x}")

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)


def note(log, text):
    with open(log, "a") as file:
        file.write(f"{text} {os.getpid()}\n")


def noted(log):
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def cluster():
    """Two raylets of one processor each, on loopback; the address of the head."""
    from ray.cluster_utils import Cluster

    # The variable, not the argument `temp_dir`: with that, Cluster writes its address into the default folder all the
    # same, and fails where no cluster has ever run.
    with tempfile.TemporaryDirectory(prefix="qstar-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        common = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        two = Cluster(initialize_head=True, head_node_args=common)
        two.add_node(**{k: v for k, v in common.items() if k != "include_dashboard"})
        yield two.address
        two.shutdown()


@pytest.fixture(scope="class")
def both(cluster):
    # Not by reference: the workers cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with RayWorkers(cluster, Calculator) as workers:
        assert workers.count == 2  # as many as there are processors
        yield workers


@pytest.fixture
def workers(both):
    both.pids()  # both are there, whatever the last test has done to them
    return both


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def qstar(*arguments, **kwargs):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], **kwargs)
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_command(*arguments):
    return [sys.executable, "-m", "qstar_decoding.cli", *map(str, arguments)]


# -- workers ----------------------------------------------------------------------------------------------------------


class TestWorkers:
    def test_two_nodes_share_the_work_and_every_job_is_done_once(self, workers, log):
        workers.share((1, log))
        jobs = [Job("square", (x, log, 0.05), str(x)) for x in range(12)]
        assert sorted((job.args[0], result) for job, result in workers.run(jobs)) == [(x, x * x + 1) for x in range(12)]
        assert sorted(int(line[1]) for line in noted(log) if line[0] == "begin") == list(range(12))
        assert {line[-1] for line in noted(log)} == {str(pid) for pid in workers.pids()}
        assert len({node["NodeID"] for node in ray.nodes()}) == 2
        # One and the same version is fetched once by each; the next one again.
        list(workers.run(jobs[:4]))
        assert sum(line[0] == "received" for line in noted(log)) == 2
        workers.share((2, log))
        assert {result - job.args[0] ** 2 for job, result in workers.run(jobs)} == {2}
        workers.share((0, log))

    def test_a_worker_killed_in_the_middle_loses_only_what_it_had_in_hand(self, workers, log):
        jobs = [Job("square", (x, log, 1.5 if x == 4 else 0.1), str(x)) for x in range(10)]
        victims = []

        def kill():
            victims.append(wait_for(lambda: [int(x[2]) for x in noted(log) if x[:2] == ["begin", "4"]])[0])
            os.kill(victims[0], signal.SIGKILL)

        killer, handed = threading.Thread(target=kill), []
        killer.start()
        found = sorted((job.args[0], result) for job, result in workers.run(jobs, started=handed.append))
        killer.join()
        assert found == [(x, x * x) for x in range(10)]
        # What the victim had begun was handed out twice, and nothing else.
        assert sorted(job.name for job in handed) == sorted([*(job.name for job in jobs), "4"])
        assert victims[0] not in workers.pids()

    def test_a_job_that_kills_its_workers_is_named_and_the_others_are_done(self, workers, log):
        one, three = Job("square", (1, log), "one"), Job("square", (3, log), "three")
        # Of several together, each is tried alone when a worker has died over them.
        jobs = [Job("die", (), "the deadly one"), Job("die", (), "both", parts=(one, three))]
        found = {job.name: result for job, result in workers.run(jobs, keep_going=True)}
        assert (found["one"], found["three"]) == (1, 9)
        assert isinstance(found["the deadly one"], WorkerError)
        assert str(found["the deadly one"]).startswith(f"the deadly one: {ATTEMPTS} workers died over it")
        assert len(found) == 3

    def test_what_a_job_raises_is_raised_here_and_the_workers_go_on(self, workers, log):
        jobs = [Job("fail", (5,), "five"), *(Job("square", (x, log, 0.1), str(x)) for x in range(3))]
        with pytest.raises(RewardError, match="no square of 5"):
            list(workers.run(jobs))
        assert sorted(result for _, result in workers.run(jobs[1:])) == [0, 1, 4]
        with pytest.raises(ray.exceptions.RayTaskError, match="no_such_method"):
            list(workers.run([Job("no_such_method", (), "?")]))

    def test_jobs_of_a_group_go_to_one_worker_while_the_others_have_enough(self, workers, log):
        list(workers.run([Job("square", (10 * g + x, log, 0.05), "", str(g)) for x in range(6) for g in range(2)]))
        place = {int(line[1]): line[2] for line in noted(log) if line[0] == "begin"}
        # Both groups have six; the last ones may go to whoever is idle.
        for group in range(2):
            assert len({place[10 * group + x] for x in range(4)}) == 1
        assert place[0] != place[10]


# -- what is distributed ----------------------------------------------------------------------------------------------


def compare(folder, *more):
    # One that draws, one that uses Q, one that is tuned.
    options = ["--decoders", "greedy,best-of-n,REBASE,Q*", "--budgets", "8,16", "--seeds", "2", "--out", folder]
    return ["evaluate", "toy", *options, *more]


def measured(folder):
    cells = {path.name: path.read_bytes() for path in (folder / "toy" / "cells").iterdir()}
    return cells, (folder / "toy" / "settings.json").read_bytes()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The evaluation without Ray."""
    folder = tmp_path_factory.mktemp("evaluated")
    qstar(*compare(folder))
    cells, settings = measured(folder)
    assert len(cells) == 1 + 4 + 4 + 2
    return cells, settings


def test_an_evaluation_on_this_machine_equals_one_without_ray(tmp_path, evaluated):
    command = run_command(*compare(tmp_path, "--ray", "local", "--workers", "2"))
    before = set(os.listdir("/tmp"))
    subprocess.run(command, check=True, capture_output=True)
    assert measured(tmp_path) == evaluated
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("qstar-")]


def test_an_evaluation_by_two_nodes_one_of_whose_workers_is_killed_equals_one_without_ray(tmp_path, evaluated, cluster):
    process = subprocess.Popen(run_command(*compare(tmp_path, "--ray", cluster)), stderr=subprocess.PIPE)
    cells = tmp_path / "toy" / "cells"
    try:
        wait_for(lambda: process.poll() is not None or (cells.is_dir() and list(cells.glob("*.json"))))
        assert process.poll() is None, process.stderr.read().decode()[-2000:]
        children = psutil.Process().children(recursive=True)
        at_work = [child for child in children if "ray::Worker" in " ".join(child.cmdline()[:1])]
        at_work[0].kill()
        assert process.wait(90) == 0, process.stderr.read().decode()[-2000:]
    finally:
        process.kill()
        process.communicate()
    assert measured(tmp_path) == evaluated


def test_what_qstar_learns_does_not_depend_on_who_searches_nor_on_a_pause(cluster, tmp_path):
    def new_env():
        return TokenDecodingVecEnv(2, prompts=TASK.prompts.of("train"), **TASK.env)

    options = {**TASK.training, "searches_per_round": 20, "gradient_steps": 4}
    alone = QStar(TokenQPolicy, new_env(), seed=0, workers=InProcess(Searcher(TASK.mdp)), **options)
    alone.learn(450).learn(450, reset_num_timesteps=False)
    with RayWorkers(cluster, partial(Searcher, TASK.mdp)) as workers:
        QStar(TokenQPolicy, new_env(), seed=0, workers=workers, **options).learn(450).save(tmp_path / "q")
        together = QStar.load(tmp_path / "q", new_env(), workers=workers).learn(450, reset_num_timesteps=False)
    assert together.num_timesteps == alone.num_timesteps
    assert together.q_function().fingerprint() == alone.q_function().fingerprint()


def test_the_command_trains_with_workers(cluster, tmp_path):
    assert qstar("train", "toy", "--ray", cluster, "--out", tmp_path / "run", "--steps", 200).exit_code == 0
    description = json.loads((tmp_path / "run" / "q" / "config.json").read_text())["description"]
    assert description["time_steps"] >= 200
    assert f"--ray {cluster}" in description["command"]


# -- prompts from a file ----------------------------------------------------------------------------------------------


def results_in(text):
    """Return the records without what differs from run to run."""
    records = [json.loads(line) for line in text.splitlines()]
    for record in records:
        del record["usage"]["seconds"]
        record.pop("settings", None)
        record["trace"] = [[tokens, *bounds] for tokens, _, *bounds in record["trace"]]
    return records


@pytest.fixture
def prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


def decode(path, *more, **kwargs):
    return qstar("decode", "--input", path, "--task", "toy", "--budget", "16", *more, **kwargs)


def test_prompts_of_a_file_are_decoded_in_order_with_and_without_ray(cluster, prompts_file):
    here = results_in(decode(prompts_file).stdout)
    assert [record["prompt"] for record in here] == PROMPTS
    assert [record["line"] for record in here] == list(range(1, len(PROMPTS) + 1))
    assert results_in(decode(prompts_file, "--ray", cluster).stdout) == here
    assert results_in(decode("-", input=prompts_file.read_text()).stdout) == here
    one = json.loads(qstar("decode", PROMPTS[2], "--task", "toy", "--budget", "16", "--json").stdout)
    assert {key: here[2][key] for key in ("text", "objective", "upper_bound")} == {
        key: one[key] for key in ("text", "objective", "upper_bound")
    }


def test_what_is_in_the_results_is_not_done_again(tmp_path, prompts_file):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    assert "16 prompts decoded, 0 had been before" in decode(prompts_file, "--out", whole).stderr
    lines = whole.read_text().splitlines(keepends=True)
    marked = lines[3].replace('"stop_reason": "', '"stop_reason": "marked ')
    # Three results in another order, and what a kill left of a fourth.
    part.write_text(lines[7] + marked + lines[0] + lines[5][:40])
    assert "13 prompts decoded, 3 had been before" in decode(prompts_file, "--out", part).stderr
    again = part.read_text().splitlines(keepends=True)
    assert again[3] == marked
    assert results_in("".join(again[:3] + again[4:])) == results_in("".join(lines[:3] + lines[4:]))
    with pytest.raises(ConfigurationError, match="results of another task, decoder, budget"):
        decode(prompts_file, "--out", part, "--decoder", "greedy")
    prompts_file.write_text('"aa"\n')
    with pytest.raises(ConfigurationError, match="another prompt for line 1"):
        decode(prompts_file, "--out", part)
    (tmp_path / "other").write_text("{}\n")
    with pytest.raises(ConfigurationError, match="line 1 is no result"):
        decode(prompts_file, "--out", tmp_path / "other")


def test_a_decoding_killed_in_the_middle_goes_on(tmp_path, prompts_file):
    # A worker's token tree grows with the prompts: results must not depend on what was decoded before.
    prompts_file.write_text("".join(json.dumps(a + b + c) + "\n" for a in "abcdefg" for b in "abcdefg" for c in "abcd"))
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        run_command("decode", "--input", prompts_file, "--task", "toy", "--budget", "16", "--out", out)
    )
    wait_for(lambda: out.exists() and out.stat().st_size > 20_000)
    process.kill()
    process.wait()
    said = decode(prompts_file, "--out", out).stderr
    assert "0 had been before" not in said
    assert [record["line"] for record in results_in(out.read_text())] == list(range(1, 7 * 7 * 4 + 1))
    assert results_in(out.read_text()) == results_in(decode(prompts_file).stdout)


def test_a_broken_line_is_named_and_the_rest_goes_on_if_asked_to(tmp_path, prompts_file):
    # Line 2 is no JSON; line 4 is a prompt, but of letters that the toy language does not have.
    prompts_file.write_text('"ab"\n{"prompt": \n"cd"\n"Hello!"\n"ef"\n')
    with pytest.raises(PromptError, match=r"prompts.jsonl, line 2: Expecting value"):
        decode(prompts_file)
    out = tmp_path / "out.jsonl"
    result = decode(prompts_file, "--keep-going", "--out", out)
    assert result.exit_code == 1
    assert "line 2: Expecting value" in result.stderr
    assert "failed: line 4: " in result.stderr
    assert "3 prompts decoded, 0 had been before, 2 failed" in result.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["line"], "error" in r) for r in records] == [(1, False), (3, False), (4, True), (5, False)]
    # What failed is tried again; without --keep-going that ends it, and what is done stays.
    prompts_file.write_text('"ab"\n"ga"\n"cd"\n"Hello!"\n"ef"\n')
    with pytest.raises(PromptError, match="line 4: "):
        decode(prompts_file, "--out", out)
    prompts_file.write_text('"ab"\n"ga"\n"cd"\n"af"\n"ef"\n')
    assert decode(prompts_file, "--out", out).exit_code == 0
    assert [r["line"] for r in results_in(out.read_text())] == [1, 2, 3, 4, 5]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_an_address_that_does_not_answer_is_said_at_once(prompts_file):
    start = time.monotonic()
    with pytest.raises(ConfigurationError, match=r"no Ray cluster answers at '127\.0\.0\.1:1'"):
        decode(prompts_file, "--ray", "127.0.0.1:1")
    assert time.monotonic() - start < 5
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(ConfigurationError, match="is no Ray cluster"):
            qstar("evaluate", "toy", "--ray", f"ray://127.0.0.1:{port}")
        assert time.monotonic() - start < 10
    with pytest.raises(ConfigurationError, match="a Ray address is 'local', 'auto', 'host:6379'"):
        qstar("train", "toy", "--ray", "somewhere")


def test_a_cluster_that_asks_for_its_token(monkeypatch):
    class Locked(grpc.GenericRpcHandler):
        def service(self, details):
            return grpc.unary_unary_rpc_method_handler(
                lambda request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            )

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Locked()])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with pytest.raises(ConfigurationError, match="asks for its token: set RAY_AUTH_MODE=token"):
            check_address(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        check_address(address)  # Ray will bear the token; whether it is the right one, it says itself
    finally:
        server.stop(None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode"], "give one prompt, or --input"),
        (["decode", "a", "--input", "x.jsonl"], "give one prompt, or --input"),
        (["decode", "a", "--ray", "local"], "give them with --input"),
        (["decode", "--input", "x.jsonl", "--tree", "t.html"], "--tree is for one prompt"),
        (["evaluate", "toy", "--workers", "2"], "give --ray too"),
    ],
)
def test_options_that_do_not_fit_together(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('"ab"\n')
    with pytest.raises(ConfigurationError, match=message):
        qstar(*arguments)


def test_more_workers_than_processors(cluster):
    with pytest.raises(ConfigurationError, match=r"3 workers of 2 threads need 6 processors, .* has 2"):
        RayWorkers(cluster, dict, count=3, threads=2)


def test_what_a_worker_cannot_make_is_raised_here(cluster, tmp_path):
    with (
        RayWorkers(cluster, partial(Searcher, partial(TASK.mdp, reward="no_such_reward"))) as workers,
        pytest.raises(ConfigurationError, match="unknown reward 'no_such_reward'"),
    ):
        list(workers.run([Job("search", (), "a search")]))


def test_without_ray_the_extra_is_named(monkeypatch, prompts_file):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigurationError, match=r'pip install "qstar-decoding\[ray\]"'):
        decode(prompts_file, "--ray", "local")
