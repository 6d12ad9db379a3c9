"""What is launched, before it is: hosts, plans, who is to blame; and jobs on this machine, for real."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from launcher import conductor, here, ordered, survey
from launcher import ranks as ranks_module
from launcher.attempt import Attempt
from launcher.cli import app
from launcher.command import Team, rank_command, rank_environment, teams
from launcher.conductor import check_alike
from launcher.ends import End, culprit
from launcher.here import local_plan, ssh_plan
from launcher.hosts import Host, chosen_hosts, hosts_of_file, hosts_of_list
from launcher.ranks import Ranks
from launcher.spec import job_spec
from launcher.survey import digest
from prefix_ds.config import config_text
from prefix_ds.errors import EXIT_DEVICE, EXIT_PEER, EXIT_STOPPED, EXIT_USER, ConfigError, LaunchError
from tests.chaos import command_of
from tests.ranks import command
from tests.test_kill import trained_bytes
from tests.workshop import run_config

HOSTILE = "a b'c\"d $HOME\n`x` ü;&"
LAUNCH = [sys.executable, "-m", "launcher"]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name: base}\nprefix: {text: Sum up}\ndata: {train: x.jsonl}\nrun: {folder: runs/x}\n"
    )
    return path


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# all\na slots=4\n\nb-1.lan   slots=2 # old\n")
    assert hosts_of_file(path) == [Host("a", (0, 1, 2, 3)), Host("b-1.lan", (0, 1))]
    assert hosts_of_list("a, b:2", 3) == [Host("a", (0, 1, 2)), Host("b", (0, 1))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=2\na slots=2\n", "a: is there twice"),
        ("a slots=0\n", r"hosts:1: a: 0 slots: expected 1 to 1024, or leave the host out"),
        ("a slots=99999999999\n", r"hosts:1: a: 99999999999 slots: expected 1 to 1024"),
        ("a slots=2\nb\n", r"hosts:2: 'b': expected NAME slots=NUMBER"),
        ("# none\n", "names no host"),
        ("-oProxyCommand=x slots=1\n", "ssh would take it for an option"),
    ],
)
def test_a_bad_hostfile_is_one_line(tmp_path, text, said):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(LaunchError, match=said) as error:
        hosts_of_file(path)
    assert "\n" not in str(error.value)


def test_filters_are_deepspeeds():
    def left(include=None, exclude=None):
        return chosen_hosts(None, "a:4,b:4,c:2", 1, include, exclude)

    assert left(include="a@c:1") == [Host("a", (0, 1, 2, 3)), Host("c", (1,))]
    assert left(exclude="a:0,2@b") == [Host("a", (1, 3)), Host("c", (0, 1))]
    assert not left(include="c:1")[0].has_all
    for words, said in (
        ({"include": "d"}, "d: is none of a, b, c"),
        ({"include": "a:7"}, "a has 4 slots"),
        ({"include": "a", "exclude": "b"}, "give one of them"),
        ({"exclude": "a@b@c"}, "names no host"),
        ({"include": "a:0@a:1"}, "names a host twice"),
        ({"exclude": "a:0@b@a"}, "names a host twice"),
    ):
        with pytest.raises(LaunchError, match=said):
            left(**words)


def test_a_filter_names_a_host_without_its_user():
    assert chosen_hosts(None, "me@a:2,me@b:2", 1, "b:1", None) == [Host("me@b", (1,))]
    with pytest.raises(LaunchError, match="--include: me: is none of a, b"):
        chosen_hosts(None, "me@a:2,me@b:2", 1, "me@a", None)


@pytest.mark.parametrize("names", [":4", "a,:2", "a b", "a :2", "a\tb:1"])
def test_a_host_without_a_name_is_refused(names):
    with pytest.raises(LaunchError, match=r"^--hosts: '.*': expected the name of a host$"):
        hosts_of_list(names, 1)


def test_filters_agree_with_deepspeeds_own(tmp_path):
    from deepspeed.launcher.runner import parse_resource_filter

    slots = {"a": list(range(4)), "b": list(range(4)), "c": [0, 1]}
    for words in ({"include_str": "a@c:1"}, {"exclude_str": "a:0,2@b"}, {"include_str": "b:3"}, {}):
        theirs = parse_resource_filter({n: list(s) for n, s in slots.items()}, **words)
        ours = chosen_hosts(None, "a:4,b:4,c:2", 1, words.get("include_str"), words.get("exclude_str"))
        assert {host.name: list(host.devices) for host in ours} == {n: list(s) for n, s in theirs.items()}


def test_ranks_are_numbered_over_the_nodes():
    first, second = teams([2, 3], "10.0.0.1", 7)
    assert (first, second) == (Team(0, 2, 5, "10.0.0.1", 7), Team(2, 3, 5, "10.0.0.1", 7))
    environment = rank_environment(second, 4)
    assert (
        environment | {"RANK": "4", "LOCAL_RANK": "2", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "3"}
        == environment
    )
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "7")
    assert rank_environment(Team(0, 2, 2, "a", 7, (1, 3)), 0)["CUDA_VISIBLE_DEVICES"] == "1,3"


def end(rank, code, **more):
    return End("h", rank, code, **more)


@pytest.mark.parametrize(
    ("ends", "blamed"),
    [
        ([end(0, 0), end(1, 0)], None),
        ([end(0, EXIT_PEER), end(1, -9)], 1),  # the first to end is not the first to die
        ([end(0, EXIT_PEER), end(1, 1), end(2, 1)], 1),
        ([end(0, -9, by_us=True), end(1, 1)], 1),
        ([end(1, EXIT_USER), end(0, EXIT_USER)], 0),  # the one that says why
        ([end(0, EXIT_STOPPED), end(1, EXIT_STOPPED)], 0),
        ([end(0, EXIT_STOPPED), end(1, EXIT_PEER)], 1),
        ([end(0, EXIT_PEER), end(1, EXIT_PEER)], 0),
        ([end(0, -9, by_us=True)], 0),
        ([end(0, -6), end(1, EXIT_DEVICE)], 1),  # with NCCL, who lost a peer is aborted by torch's watchdog
        ([end(0, -6), end(1, -9)], 1),
        ([end(0, EXIT_PEER), end(1, -6)], 1),
        ([end(0, -9, by_us=True), end(1, -6)], 1),
    ],
)
def test_who_is_to_blame(ends, blamed):
    found = culprit(ends)
    assert (found and found.rank) == blamed


@pytest.mark.parametrize(
    ("code", "ends_them"), [(0, False), (EXIT_STOPPED, False), (1, True), (EXIT_PEER, True), (-9, True)]
)
def test_after_which_ends_the_other_ranks_are_ended_too(code, ends_them):
    assert end(0, code).ends_others == ends_them


def test_an_end_is_told_in_words():
    assert end(3, -11).told() == "h, rank 3: killed by SIGSEGV"
    assert end(3, -9).exit_code == 137
    assert "another rank was lost" in end(3, EXIT_PEER).told()
    assert end(3, EXIT_DEVICE).told() == "h, rank 3: its device broke down"
    assert "memory" in end(3, -9).told()
    assert end(3, -9, by_us=True).told() == "h, rank 3: killed by SIGKILL from its agent"


@pytest.mark.parametrize(("code", "starts"), [(1, 1), (EXIT_USER, 1), (EXIT_DEVICE, 3), (-6, 3), (-9, 3)])
def test_what_would_end_the_same_is_not_started_again(run_file, monkeypatch, code, starts):
    tries = []

    async def tried(self, *, is_first):
        tries.append(is_first)
        return end(0, code)

    monkeypatch.setattr(conductor._Conductor, "_tried", tried)
    monkeypatch.setattr(conductor, "_BETWEEN_SECONDS", 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert conductor.submit(local_plan(job_spec(run_file), max_restarts=2)) == end(0, code).exit_code
    assert len(tries) == starts


def crew(run_file, **how):
    """A conductor of three hosts, each of which answers with its own name for an address."""
    plan = ssh_plan(job_spec(run_file, port=29500), [Host(name, (0,)) for name in "abc"], **how)
    terminal = SimpleNamespace(show=None, say=lambda _: None)
    agents = [
        SimpleNamespace(name=member.host.name, member=member, hello={"address": member.host.name, "port": 7})
        for member in plan.members
    ]
    return conductor._Conductor(plan, {}, terminal), agents


def test_the_host_that_becomes_the_first_has_its_own_address_and_the_port(run_file, monkeypatch):
    conducting, agents = crew(run_file, master="10.0.0.1", min_nodes=1)
    asked = []

    class Noted:
        def __init__(self, agents, words, master, show):
            asked.append(master)

        async def run(self):
            return []

    async def dismissed(self, agents):
        pass

    monkeypatch.setattr(conductor, "Attempt", Noted)
    monkeypatch.setattr(conductor, "check_alike", lambda *_: None)
    monkeypatch.setattr(conductor._Conductor, "_dismiss", dismissed)
    for there in (agents, agents[1:]):

        async def reached(self, is_first, there=there):
            return there

        monkeypatch.setattr(conductor._Conductor, "_reached", reached)
        asyncio.run(conducting._tried(is_first=True))
    assert asked == ["10.0.0.1", None]
    assert [conducting._order(agent.member)["port"] for agent in agents] == [29500] * 3
    conducting, agents = crew(run_file)
    assert [conducting._order(agent.member)["port"] for agent in agents] == [29500, None, None]


def test_ctrl_c_when_all_is_over_changes_nothing_but_that_it_ends(run_file):
    conducting, _ = crew(run_file)
    conducting._leaving = [SimpleNamespace(kill=lambda: None)]
    conducting._ask()
    conducting._ask()
    assert conducting._asked == 1


def test_the_last_words_of_a_rank_are_kept_however_slow_the_listener(tmp_path, monkeypatch):
    program = "for n in range(30): print(n, flush=True)\nprint('last words'); raise SystemExit(2)"
    monkeypatch.setattr(ranks_module, "rank_command", lambda _: [sys.executable, "-c", program])
    told = []

    async def heard(rank, line):
        await asyncio.sleep(0.2)
        told.append(line)

    async def ends():
        ranks = Ranks(Team(0, 1, 1, "127.0.0.1", 1), [], tmp_path, heard)
        return [end async for end in ranks.run(os.environ)]

    (end,) = asyncio.run(ends())
    said = [*map(str, range(30)), "last words"]
    assert (end.code, list(end.tail)) == (2, said)
    (log,) = tmp_path.iterdir()
    assert log.read_text().splitlines() == said


def test_a_module_of_the_working_folder_is_not_taken_for_ours(tmp_path):
    for name in ("launcher.py", "prefix_ds.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')")
    for words in ([sys.executable, *here._AGENT[:3], "--help"], rank_command(["--help"])):
        subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 4),
        ("", 0),
        ("0,2", 2),
        ("1, 3,", 2),
        ("0,-1,1", 1),
        ("NoDevFiles", 0),
        ("GPU-8932f937,MIG-1", 2),
    ],
)
def test_gpus_are_those_that_are_not_hidden(monkeypatch, visible, count):
    monkeypatch.setattr(survey, "gpus", lambda: ["H100"] * 4)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert survey.usable_gpus(environment) == count


@pytest.mark.parametrize(
    ("gpus", "team", "visible", "counted"),
    [
        (4, Team(0, 2, 2, "a", 7), None, 2),  # a rank for each, and the others are not ours
        (4, Team(0, 2, 2, "a", 7, (1, 3)), "0", 2),  # ours goes before the host's own
        (4, Team(0, 1, 1, "a", 7), "", 0),  # hidden: on CPUs, as asked
        (0, Team(0, 2, 2, "a", 7), "0,1", 0),
    ],
)
def test_ranks_are_told_how_many_gpus_must_be_there(monkeypatch, gpus, team, visible, counted):
    """`joined_world` refuses what torch cannot use. No GPU is needed to see what it is told."""
    monkeypatch.setattr(survey, "gpus", lambda: ["H100"] * gpus)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    told = rank_environment(ordered._counting_on_gpus(team, environment), 0)
    assert told.get("PREFIX_DS_GPUS", "0") == str(counted)


@pytest.mark.parametrize(("visible", "ranks"), [("0,1,2", "0 to 2"), ("", "'0'")])
def test_here_there_is_a_rank_for_each_gpu_that_is_visible(run_file, visible, ranks):
    done = subprocess.run(
        [*LAUNCH, "local", run_file.name, "--dry-run"],
        cwd=run_file.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"ranks: {ranks}\n" in done.stdout


def reached(name, address, num_ranks=1):
    """An agent on a host that was reached at an address."""
    member = SimpleNamespace(host=Host(name, tuple(range(num_ranks))))
    return SimpleNamespace(name=name, member=member, hello={"address": address, "port": 7})


@pytest.mark.parametrize(
    ("address", "master"), [("127.0.1.1", None), ("10.0.0.1", "localhost"), ("::1", None)]
)
def test_hosts_cannot_meet_at_a_loopback(address, master):
    agents = [reached("a", address), reached("b", "10.0.0.2")]
    with pytest.raises(LaunchError, match=r"--master: .*: the other hosts cannot reach a there"):
        Attempt(agents, [], master, None)
    Attempt(agents, [], "10.0.0.1", None)
    Attempt(agents[:1], [], master, None)


def test_the_way_to_the_others_is_never_the_loopback(monkeypatch):
    """Debian's own name of a machine is 127.0.1.1."""
    ways = {"node-1": "127.0.1.1", "192.0.2.1": "10.0.0.1", "node-2": "10.0.0.1", "here": "127.0.0.1"}
    interfaces = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}
    addresses = {name: [SimpleNamespace(address=address)] for name, address in interfaces.items()}
    monkeypatch.setattr(survey, "_address_towards", ways.get)
    monkeypatch.setattr(survey.psutil, "net_if_addrs", lambda: addresses)
    assert [survey.interface_towards(name) for name in ("node-1", "node-2", "here", "x")] == ["eth0"] * 3 + [
        None
    ]
    del ways["192.0.2.1"]
    assert survey.interface_towards("node-1") is None


def ranks_that(monkeypatch, program, count=1):
    """Ranks that run a line of bash, with the lines they say and the ends they have."""
    said = []

    async def heard(rank, line):
        said.append(line)

    monkeypatch.setattr(ranks_module, "rank_command", lambda words: ["bash", "-c", program])
    return Ranks(Team(0, count, count, "a", 7), [], None, heard), said


def test_ranks_find_what_lies_beside_their_python(monkeypatch):
    """DeepSpeed looks for ninja, which a virtual environment holds that nobody has activated."""
    ranks, said = ranks_that(monkeypatch, 'echo "$PATH"')

    async def run():
        return [end async for end in ranks.run({"PATH": "/usr/bin:/bin"})]

    assert [end.code for end in asyncio.run(run())] == [0]
    assert said == [f"{Path(sys.executable).parent}:/usr/bin:/bin"]


def test_a_stop_while_ranks_are_being_started_reaches_all(monkeypatch):
    ranks, _ = ranks_that(monkeypatch, "exec sleep 30", count=3)

    async def run():
        stopping = asyncio.ensure_future(ranks.stop(20))  # it looks for ranks before there are any
        ends = [end async for end in ranks.run(os.environ)]
        await stopping
        return ends

    assert [end.code for end in asyncio.run(run())] == [-signal.SIGTERM] * 3


def test_what_a_killed_rank_has_started_has_time_to_tell_how_it_ended(monkeypatch, tmp_path):
    """MLflow's mirror: else the run would be running there for ever."""
    monkeypatch.chdir(tmp_path)
    child = "(until [ -e killed ]; do sleep 0.1; done; touch told) > /dev/null"
    ranks, _ = ranks_that(monkeypatch, f"{child} & touch begun; while :; do wait; done")

    async def killed():
        running = asyncio.ensure_future(anext(ranks.run(os.environ)))
        while not Path("begun").exists():
            await asyncio.sleep(0.05)
        ranks.kill()
        Path("killed").touch()
        return await running

    end = asyncio.run(killed())
    assert (end.code, end.by_us) == (-signal.SIGKILL, True)
    assert Path("told").exists()


def test_a_plan_for_hosts_as_it_is_printed(run_file, monkeypatch):
    monkeypatch.chdir(run_file.parent)
    spec = job_spec(Path("run.yaml"), ["train.lr=0.1"], variables=["HF_TOKEN"])
    hosts = chosen_hosts(None, "a:2,b:2", 1, None, "b:0")
    plan = ssh_plan(spec, hosts, ssh="ssh -p 2222", python="/opt/python", max_restarts=2, min_nodes=1)
    golden = (ROOT / "tests" / "plans" / "ssh.yaml").read_text()
    assert plan.text() == golden.format(folder=run_file.parent)


def test_a_dry_run_prints_the_plan_and_starts_nothing(run_file):
    done = subprocess.run(
        [*LAUNCH, "local", run_file.name, "--processes", "3", "--dry-run"],
        cwd=run_file.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ranks: 0 to 2" in done.stdout
    assert sorted(path.name for path in run_file.parent.iterdir()) == ["run.yaml"]


@pytest.mark.parametrize("seconds", ["-5", "nan"])
def test_a_grace_that_is_no_time_is_refused(run_file, seconds):
    words = ["local", str(run_file), "--processes=1", f"--grace-seconds={seconds}", "--dry-run"]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code != 0
    assert "--grace-seconds" in ended.output + str(ended.exception)


def test_values_of_variables_are_in_no_plan(run_file, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    spec = job_spec(run_file, variables=["HF_TOKEN"])
    assert "hf_secret" not in ssh_plan(spec, [Host("a", (0,))]).text() + repr(spec)


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (["mlflow.uri=http://me:pw@host"], {}, "mlflow.uri: has a user, a password or a token in it"),
        (["mlflow.uri=https://dapi0secret@host"], {}, "mlflow.uri: has a user, a password or a token in it"),
        (
            ["mlflow.uri=postgresql://bob:hun/ter2@db/x"],
            {},
            "mlflow.uri: has a user, a password or a token in",
        ),
        *(
            ([f"mlflow.uri={uri}"], {}, "mlflow.uri: has a user, a password or a token in it")
            for uri in ("postgresql://db/x?user=u&password=pw", "http://h/?token=pw", "http://h/?Key=pw")
        ),
        *(
            ([f"mlflow.tags={{{name}: a-secret}}"], {}, f"mlflow.tags: {name}: looks like a secret")
            for name in ("DB_PWD", "credentials", "access_key", "accessKey", "DB_PASS", "ssh-key")
        ),
        (["mlflow.tags={source: 'a://h/x?a=b;pass=pw'}"], {}, "mlflow.tags: source: looks like a secret"),
        (["mlflow.tags={api_key: a-secret}"], {}, "mlflow.tags: api_key: looks like a secret"),
        (["mlflow.tags={OurToken: a-secret}"], {}, "mlflow.tags: OurToken: looks like a secret"),
        (["mlflow.tags={source: 'https://me:pw@host/x'}"], {}, "mlflow.tags: source: looks like a secret"),
        ([], {"variables": ["A=secret"]}, "--env: A: expected the name of a variable"),
        ([], {"port": 0}, "--port: 0: expected 1 to 65535"),
        (["train.lr=fast"], {}, "train.lr: 'fast'"),
    ],
)
def test_a_bad_job_is_refused_before_anything_starts(run_file, words, options, said):
    with pytest.raises((LaunchError, ConfigError), match=said) as error:
        job_spec(run_file, words, **options)
    assert "secret" not in str(error.value).replace("looks like a secret", "")
    assert "pw" not in str(error.value)


@pytest.mark.parametrize(
    "word",
    [
        "mlflow.uri=sqlite:////runs/me@lab/mlflow.db",
        "mlflow.uri=https://host/at/@me",
        "mlflow.tags={tokenizer: x, key: x, author: me@lab.example, tokens: '5', pass: '2', monkey: x}",
        "mlflow.uri=postgresql://db/mlflow?sslmode=require&user=u&password=&tokens=5",
    ],
)
def test_what_is_no_secret_is_not_refused(run_file, word):
    job_spec(run_file, [word])


@pytest.mark.parametrize("folder", [".", "/", "runs/.."])
def test_a_run_folder_without_a_name_is_refused(run_file, folder):
    with pytest.raises(LaunchError, match=r"^run\.folder: .*: expected a folder with a name"):
        local_plan(job_spec(run_file, [f"run.folder={folder}"]))


def test_too_few_hosts_for_the_fewest(run_file):
    with pytest.raises(LaunchError, match="--min-nodes: 3: expected 1 to 1"):
        ssh_plan(job_spec(run_file), [Host("a", (0,))], min_nodes=3)


def answered(name, run_file="digest", **versions):
    """An agent that says what its node has."""
    hello = {"run_file": run_file, "versions": {"python": "3.11.7", "torch": "2.13.0"} | versions}
    return SimpleNamespace(name=name, hello=hello)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"torch": "2.14.0"}, "b: torch 2.14.0, but a has 2.13.0"),
        ({"run_file": None}, "b: .*run.yaml: is not there"),
        ({"run_file": "x"}, "b: .*run.yaml: is another file than here"),
    ],
)
def test_a_host_that_differs_is_named(run_file, other, said):
    plan = ssh_plan(job_spec(run_file), [Host("a", (0,)), Host("b", (0,))])
    mine = digest(run_file)
    check_alike([answered("a", mine), answered("b", mine)], plan)
    with pytest.raises(LaunchError, match=said):
        check_alike([answered("a", mine), answered("b", **{"run_file": mine} | other)], plan)


@pytest.mark.parametrize("words", [["--help"], ["local", "--help"], ["ssh", "--help"]])
def test_help_loads_nothing_heavy(words):
    program = (
        "import sys; from launcher.cli import app\n"
        f"app({words!r}, standalone_mode=False)\n"
        "print('LOADED', [n for n in ('torch', 'deepspeed', 'transformers', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "LOADED []"


# For real, on this machine.


def long_run(folder, *words, steps=100):
    config = run_config(folder, f"train.max_steps={steps}", "run.save_every=10", "run.valid_every=50", *words)
    path = folder / "run.yaml"
    path.write_text(config_text(config))
    return path


def launched(run_file, *words, **options):
    return subprocess.Popen(
        [*LAUNCH, "local", str(run_file), *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PREFIX_DS_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def ranks_of(run_file):
    """Pids of the ranks of a run, by command line."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [pid for pid in pids if f"-m prefix_ds train {run_file}" in command_of(pid)]


def wait_for_checkpoint(folder, process):
    deadline = time.monotonic() + 90
    while not any(folder.glob("run/checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_rank_that_dies_is_named_and_the_run_goes_on_from_its_checkpoint(tmp_path):
    calm = tmp_path / "calm"
    calm.mkdir()
    for ended in command("train", long_run(calm), size=2):
        assert ended.code == 0, ended.err
    run_file = long_run(tmp_path, f"data.train={calm}/train.jsonl", f"data.valid={calm}/valid.jsonl")
    process = launched(run_file, f"model.name={calm}/base", "--processes", 2, "--max-restarts", 1)
    wait_for_checkpoint(tmp_path, process)
    os.kill(ranks_of(run_file)[-1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "killed by SIGKILL" in said
    assert "restart 1 of 1" in said
    assert "going on after step" in said
    assert trained_bytes(tmp_path / "run", 100) == trained_bytes(calm / "run", 100)
    logs = sorted(path.name for path in (tmp_path / "run-logs").iterdir())
    assert [name.rpartition("-rank-")[2] for name in logs] == ["0.log", "1.log"]


def test_ctrl_c_leaves_a_checkpoint_and_a_second_one_nothing_that_runs(tmp_path):
    run_file = long_run(tmp_path, steps=5000)
    process = launched(run_file, "--processes", 2)
    wait_for_checkpoint(tmp_path, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, said
    assert "every rank writes a checkpoint" in said
    process = launched(run_file, "--processes", 2)
    while not ranks_of(run_file):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert process.returncode == 130
    assert not ranks_of(run_file)


def test_ranks_do_not_outlive_a_launcher_or_an_agent_that_is_killed(tmp_path):
    run_file = long_run(tmp_path, steps=5000)
    for victim in ("launcher", "agent"):
        process = launched(run_file, "--processes", 2)
        while len(ranks_of(run_file)) < 2:
            time.sleep(0.05)
        agent = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        os.kill(agent if victim == "agent" else process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        deadline = time.monotonic() + 15
        while ranks_of(run_file) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not ranks_of(run_file)
    assert process.returncode == EXIT_PEER


def launched_with(agent, run_file, *words):
    """A launch on this machine whose agent has these lines of Python in front."""
    agent = f"{agent}\nfrom launcher.node import main\nmain()"
    program = f"from launcher import cli, here\nhere._AGENT = ('-c', {agent!r}, '--ordered')\ncli.main()"
    return subprocess.Popen(
        [sys.executable, "-c", program, "local", str(run_file), *words],
        cwd=run_file.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_agent_that_cannot_start_its_ranks_is_told_of(run_file):
    agent = "from launcher import ranks; ranks.rank_command = lambda words: ['/nowhere/python']"
    process = launched_with(agent, run_file, "--processes=2")
    _, said = process.communicate(timeout=30)
    assert process.returncode == EXIT_PEER
    assert "localhost: FileNotFoundError: " in said
    assert "/nowhere/python" in said


def test_a_second_ctrl_c_ends_it_whatever_the_agent_does(run_file):
    hang = "ordered._Obeying._run = lambda *_: asyncio.sleep(600)"
    agent = f"import asyncio\nfrom launcher import ordered\n{hang}"
    process = launched_with(agent, run_file, "--processes=1")
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    assert "stopping" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert process.returncode == 130


def test_a_ctrl_c_does_not_wait_for_an_agent_that_does_not_leave(run_file):
    """Its ranks have ended."""
    agent = "import asyncio\nfrom launcher import ranks\nranks.Ranks.stop = lambda *_: asyncio.sleep(600)"
    process = launched_with(
        f"{agent}\nranks.rank_command = lambda words: ['bash', '-c', 'exit 77']", run_file, "--processes=1"
    )
    time.sleep(4)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == EXIT_DEVICE


def test_ctrl_c_between_two_attempts_ends_it(run_file):
    program = "echo >> starts; kill -9 $$"
    agent = f"from launcher import ranks; ranks.rank_command = lambda words: ['bash', '-c', {program!r}]"
    process = launched_with(agent, run_file, "--max-restarts=3")
    while not (line := process.stderr.readline()).startswith("restart 1 of 3"):
        assert line
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 130
    assert said == ""
    assert (run_file.parent / "starts").read_text() == "\n"


def test_a_port_that_was_taken_meanwhile_costs_a_restart(run_file):
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        agent = f"""\
import os, sys
from launcher import ranks, survey
free = survey.free_port
survey.free_port = lambda wish: free(wish) if os.path.exists("tried") else os.mkdir("tried") or {port}
ranks.rank_command = lambda words: [sys.executable, "-m", "prefix_ds", "links"]
"""
        process = launched_with(agent, run_file, "--processes=2", "--max-restarts=1")
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"port {port} of {socket.gethostname()} is in use" in said
    assert "restart 1 of 1" in said


@pytest.mark.parametrize("command", ["ssh", "doctor"])
def test_without_ssh_it_says_so_in_one_line(run_file, command):
    words = [command, run_file.name, "--hosts", "a", "--ssh", "/nowhere/ssh -p 22"]
    done = subprocess.run(
        [*LAUNCH, *words],
        cwd=run_file.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_USER
    assert "a: /nowhere/ssh: No such file or directory" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_run_is_refused_in_one_line_and_not_started_again(tmp_path):
    run_file = long_run(tmp_path, "data.train=/nowhere.jsonl")
    process = launched(run_file, "--processes", 2, "--max-restarts", 3)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_USER
    assert said.count("no such file") == 1
    assert "restart" not in said


def test_hostile_names_arrive_as_they_are(tmp_path):
    folder = tmp_path / HOSTILE
    folder.mkdir()
    config = run_config(tmp_path, "train.max_steps=4")
    run = config.run.model_copy(update={"folder": str(folder / "run")})
    (folder / "run.yaml").write_text(config_text(config.model_copy(update={"run": run})))
    process = launched(folder / "run.yaml", "--processes", 1)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (folder / "run" / "prefix").is_dir()
