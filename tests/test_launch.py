"""The scripts that rent machines: what they run, and how they take what happens there.

Stand-ins play `gcloud`, `kubectl`, Slurm's commands and the interpreter on a host. They are small
programs that log their arguments, keep a slice's state in a file, and run the commands for a host
in a folder of its own.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SOURCED = {"venv.sh", "remote.sh", "dry_run.sh", "help.sh", "restarts.sh", "workdir.sh"}
SETTINGS = {
    script: dict(word.split("=", 1) for word in shlex.split(words))
    for script, words in {
        "tpu_vm.sh": "TPU_NAME=pod TPU_PROJECT=lab TPU_ZONE=us-x1-a TPU_TYPE=v5litepod-16 "
        "TPU_RUNTIME=v2-alpha-tpuv5-lite TPU_SPOT=yes TPU_RUNS=gs://lab/runs/ "
        "TPU_SETUP='sudo mount server:share /mnt'",
        "gke.sh": "GKE_CONTEXT=cluster GKE_NAME=distill GKE_IMAGE=registry/opd_jax:1 "
        "GKE_ACCELERATOR=tpu-v5-lite-podslice GKE_TOPOLOGY=4x4 GKE_CHIPS=4 GKE_RUNS=gs://lab/runs "
        "GKE_RESTARTS=20",
        "slurm.sh": "JOB_NAME=distill JOB_PARTITION=gpus JOB_NODES=2 JOB_GPUS=8 "
        "JOB_PROCESSES=gpu JOB_TIME=24:00:00",
    }.items()
}
TRAIN = ("--config=c.py:a=1", "--workdir=/mnt/runs/x", "--config.note=it's $(HOME)")


# --- Every script


def test_shellcheck_has_nothing_to_say() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    words = [shellcheck, "--external-sources", ".ci/run", *SCRIPTS]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_short_and_says_how_it_is_used(script: Path) -> None:
    lines = script.read_text().splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 100
    executable = bool(script.stat().st_mode & 0o111)
    assert executable == (script.name not in SOURCED)
    if executable:
        assert lines[0] == "#!/usr/bin/env bash"
        header = lines[1 : lines.index("set -euo pipefail")]
        assert all(line.startswith("#") for line in header)
        assert any(script.name in line for line in header)


def test_the_example_names_exactly_what_the_scripts_require() -> None:
    example = (ROOT / "launch" / "env.example").read_text()
    named = re.findall(r"^([A-Z_]+)=$", example, re.MULTILINE)  # and gives none a value
    assert named == [name for settings in SETTINGS.values() for name in settings]
    for script, settings in SETTINGS.items():
        (line,) = re.findall(r"^require (.*)$", (ROOT / "launch" / script).read_text(), re.M)
        assert line.split() == [name for name in settings if not name.endswith("_RUNS")]


def test_the_image_is_made_of_files_that_exist() -> None:
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "opd_jax", "launch/*.sh", "launch/*.py"} <= set(copied)
    assert all(list(ROOT.glob(pattern)) for pattern in copied)


# --- A checkout of its own, and the stand-ins

STAND_INS = {
    # Hosts are folders. A request is granted at once. STATE holds the slice's state. FOLLOW holds
    # statuses: a connection that follows a log ends with the next one instead.
    "gcloud": """
        echo "gcloud $*" >>"$LOG"
        for word in "$@"; do
          [[ $word == --command=* ]] && command=${word#--command=}
          [[ $word == --worker=* ]] && worker=${word#--worker=}
        done
        case "$*" in
          *" queued-resources list "*) cat "$STATE" ;;
          *" tpu-vm list "*) echo READY ;;
          *" queued-resources create "*) echo "${GRANTED:-ACTIVE}" >"$STATE"; exit "${CREATE:-0}" ;;
          *" queued-resources delete "*) : >"$STATE"; rm -rf "$HOSTS"; mkdir -p "$HOSTS"/{0,1} ;;
          *" scp "*) for host in 0 1; do cp "$5" "$HOSTS/$host"; done ;;
          *" ssh "*)
            if [[ $command == *follow* ]] && read -r status <"$FOLLOW"; then
              sed -i 1d "$FOLLOW"
              exit "$status"
            fi
            for host in ${worker/all/0 1}; do
              (cd "$HOSTS/$host" && bash -c "$command") || exit
            done ;;
        esac""",
    # The interpreter on a host. Training on process 0 does what the next line of SCENARIO says.
    "python": """
        case "$*" in
          "-m opd_jax.train "*)
            echo "train [${OPD_JAX_DISTRIBUTED-}] [${JAX_LOCAL_DEVICE_IDS-}] ${*:3}" >>"$LOG"
            [[ $PWD == */1/* || ${SLURM_PROCID:-0} != 0 ]] && exit 0
            trap 'echo "saved by SIGTERM"; exit 0' TERM
            trap 'exit 130' INT
            read -r what <"$SCENARIO"; sed -i 1d "$SCENARIO"; echo "$what" >"$SCENARIO.now"
            case $what in
              preempted) echo SUSPENDED >"$STATE"; kill -KILL $$ ;;
              deleted) : >"$STATE"; kill -KILL $$ ;;
              waits) while :; do command -p sleep 0.02; done ;;
              fails) echo Traceback; exit 1 ;;
              mistaken) exit 2 ;;
              full) exit 74 ;;
              away | hidden) exit 75 ;;
              saves*)
                [[ $* =~ --workdir=([^ ]+) ]]
                saved=opd/seed-0/checkpoints/${what#saves }
                if [[ ${BASH_REMATCH[1]} == gs://* ]]; then
                  echo "$saved/commit_success.txt" >>"$SCENARIO.bucket"
                else
                  mkdir -p "${BASH_REMATCH[1]}/$saved"
                fi
                exit 75 ;;
            esac ;;
          *"bucket.names("*)
            [[ $(<"$SCENARIO.now") != hidden ]] || exit 75
            [[ ! -e $SCENARIO.bucket ]] || cat "$SCENARIO.bucket" ;;
          "-m pip "*alfworld*) echo "install ${*: -1}" >>"$LOG" ;;
          "launch/finished.py "*) [[ $(<"$SCENARIO.now") == finishes ]] || exit 75 ;;
        esac""",
    "kubectl": 'echo "kubectl $*" >>"$LOG"; [[ $2 != create ]] || cat >>"$LOG"',
    "sbatch": 'echo "sbatch $*" >>"$LOG"',
    "srun": """
        echo "srun $*" >>"$LOG"
        for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "${@:3}" || exit; done""",
    "scontrol": 'echo "scontrol $*" >>"$LOG"; [[ $1 != show ]] || printf "node%s\\n" 7 8',
    "squeue": 'echo "squeue $*" >>"$LOG"; echo "${JOB_STATE:-RUNNING}"',
    "scancel": 'echo "scancel $*" >>"$LOG"',
    # Waiting for a process takes a while here too. Waiting for a machine does not.
    "sleep": "case $1 in 5) command -p sleep 0.02 ;; 0.1) command -p sleep 0.005 ;; esac",
    "tail": 'command -p tail --sleep-interval=0.02 "$@"',
}


class Checkout(NamedTuple):
    path: Path
    environment: dict[str, str]

    @property
    def log(self) -> list[str]:
        return (self.path / "log").read_text().splitlines()

    @property
    def trained(self) -> list[str]:
        return [line for line in self.log if line.startswith("train ")]

    def start(self, script: str, *words: str, **changed: str | None) -> subprocess.Popen[str]:
        """Starts a script with the settings that it needs; None removes one."""
        environment = self.environment | SETTINGS.get(script, {}) | changed
        return subprocess.Popen(
            [self.path / "launch" / script, *words],
            env={name: value for name, value in environment.items() if value is not None},
            cwd=self.path,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *words: str, **changed: str | None) -> tuple[int, str, str]:
        """Status, stdout and stderr of a script."""
        process = self.start(script, *words, **changed)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def plan(self, *attempts: str) -> None:
        (self.path / "scenario").write_text("".join(f"{attempt}\n" for attempt in attempts))
        (self.path / "scenario.now").unlink(missing_ok=True)

    def wait_until_training(self) -> None:
        for _ in range(1000):
            if (self.path / "scenario.now").exists():
                return
            time.sleep(0.02)
        raise TimeoutError("nothing trains")

    def install(self, checkout: Path) -> str:
        """The command that gives `checkout` its interpreter; the stamps say it is installed."""
        python, venv = self.path / "programs" / "python", checkout / ".venv"
        stamps = f"{venv}/installed-tpu,gcs {venv}/installed-cuda"
        return f"mkdir -p {venv}/bin; cp {python} {venv}/bin; touch {stamps}"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("env"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("opd_jax", "configs", "programs", "hosts/0", "hosts/1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "opd_jax" / "model.py").write_text("new = True\n")
    for name, program in STAND_INS.items():
        path = tmp_path / "programs" / name
        path.write_text(f"#!/usr/bin/env bash\n{program}\n")
        path.chmod(0o755)
    names = ("log", "state", "scenario", "follow")
    for name in names:
        (tmp_path / name).touch()
    return Checkout(
        tmp_path,
        {
            "PATH": f"{tmp_path / 'programs'}:{os.environ['PATH']}",
            "USER": "ada",
            "HOSTS": str(tmp_path / "hosts"),
            **{name.upper(): str(tmp_path / name) for name in names},
        },
    )


@pytest.fixture
def installed(checkout: Checkout) -> Checkout:
    """A checkout on a machine: with an interpreter."""
    subprocess.run(["bash", "-c", checkout.install(checkout.path)], check=True)
    return checkout


# --- Help


@pytest.mark.parametrize("script", ["local.sh", "pod.sh", "test.sh", *SETTINGS])
def test_help_is_what_the_script_says_of_itself_and_runs_nothing(
    script: str, checkout: Checkout
) -> None:
    for words in (["--help"], ["run", "-h"]):  # without settings too
        nothing = dict.fromkeys(SETTINGS.get(script, {}))
        status, output, errors = checkout.run(script, *words, **nothing)
        assert (status, errors) == (0, "")
        header = (ROOT / "launch" / script).read_text().partition("\nset -")[0]
        assert header.splitlines()[1:] == [f"# {line}".rstrip() for line in output.splitlines()]
    assert checkout.log == []


def test_the_help_of_training_follows_where_it_is_installed(installed: Checkout) -> None:
    status, output, _ = installed.run("local.sh", "--config=c.py", "--help")
    assert (status, output.startswith("Make .venv if absent")) == (0, True)
    assert installed.trained == ["train [] [] --config=c.py --help --workdir=runs/c"]


# --- Settings


def test_a_setting_that_is_missing_is_named(checkout: Checkout) -> None:
    for script, settings in SETTINGS.items():
        for name in settings:
            said = f"`{name}` is not set; set it in launch/env, a copy of launch/env.example"
            words = ["run", "--config=c"] if name.endswith("_RUNS") else ["status"]
            assert checkout.run(script, *words, **{name: None}) == (2, "", f"error: {said}\n")
    assert checkout.log == []


def test_a_mistake_is_one_line_and_runs_nothing(checkout: Checkout) -> None:
    for script, words, changed, expected in [
        ("tpu_vm.sh", ["delete"], {}, ["create sync run status stop", "`delete`"]),
        (
            "tpu_vm.sh",
            ["run", "--config=c"],
            {"TPU_RUNS": "runs"},
            ["`TPU_RUNS`", "gs://", "/DIR", "`runs`"],
        ),
        ("tpu_vm.sh", ["create"], {"TPU_SPOT": "1"}, ["`TPU_SPOT`", "yes no", "`1`"]),
        ("gke.sh", ["run", "--workdir=runs"], {}, ["`--workdir=gs://BUCKET/DIR`", "got `runs`"]),
        ("gke.sh", ["status"], {"GKE_TOPOLOGY": "16"}, ["`GKE_TOPOLOGY`", "4x4", "`16`"]),
        ("gke.sh", ["status"], {"GKE_CHIPS": "3"}, ["`GKE_CHIPS`", "4x4", "`3`"]),
        ("pod.sh", ["--config=c"], {}, ["`--workdir=gs://BUCKET/DIR`", "/DIR", "got none"]),
        ("pod.sh", ["--workdir", "runs/a b"], {}, ["got `runs/a b`"]),
        ("slurm.sh", [], {}, ["run status stop"]),
        ("slurm.sh", ["run", "--config=c"], {}, ["`--workdir=", "/DIR", "got none"]),
        ("slurm.sh", ["stop"], {"JOB_PROCESSES": "8"}, ["`JOB_PROCESSES`", "node gpu", "`8`"]),
    ]:
        status, output, errors = checkout.run(script, *words, **changed)
        assert (status, output) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", errors)
        assert [part for part in expected if part not in errors] == []
    assert checkout.log == []


def test_settings_come_from_the_file_unless_the_environment_has_them(checkout: Checkout) -> None:
    lines = [f"{name}='{value}'\n" for name, value in SETTINGS["slurm.sh"].items()]
    (checkout.path / "launch" / "env").write_text("".join(lines))
    nothing = dict.fromkeys(SETTINGS["slurm.sh"])
    for changed, name in [({}, "distill"), ({"JOB_NAME": "other"}, "other")]:
        shown = checkout.run("slurm.sh", "stop", "--dry-run", **nothing | changed)
        assert shown == (0, f"scancel --user=ada --name={name}\n", "")


# --- The dry run

INSTALL = "bash -c 'source launch/venv.sh && ensure_venv"
LOCAL = ".venv/bin/python -m opd_jax.train"
FINISHED = ".venv/bin/python launch/finished.py"
TPUS = "gcloud compute tpus"
WHERE = "--project=lab --zone=us-x1-a"
CREATE = (
    f"{TPUS} queued-resources create pod --node-id=pod {WHERE} "
    "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
)
LIST = f"{TPUS} queued-resources list {WHERE} '--filter=name~/pod$' '--format=value(state.state)'"
SSH = f"{TPUS} tpu-vm ssh pod {WHERE} --worker"
WORKER = "opd_jax/launch/worker.sh"
SYNC = f"""\
mkdir -p build
tar -czf build/opd_jax.tar.gz --exclude=__pycache__ --exclude=launch/env \
opd_jax configs launch pyproject.toml README.md LICENSE
{TPUS} tpu-vm scp build/opd_jax.tar.gz pod: {WHERE} --worker=all
{SSH}=all '--command=if [ -e {WORKER} ]; then {WORKER} stop; fi && mkdir -p opd_jax && \
tar -xzf opd_jax.tar.gz -C opd_jax --recursive-unlink'
{SSH}=all '--command=sudo mount server:share /mnt'"""
JOBSET = "jobset.sigs.k8s.io/jobset-name=distill"
DRY_RUNS = {
    ("local.sh", *TRAIN): f"""
{INSTALL} ""'
{LOCAL} --config=c.py:a=1 --workdir=/mnt/runs/x '--config.note=it'\\''s $(HOME)'""",
    ("local.sh", "--config=configs/c.py:a=1"): f"""
{INSTALL} ""'
{LOCAL} --config=configs/c.py:a=1 --workdir=runs/c-a=1""",
    ("tpu_vm.sh", "create"): f"{CREATE} --spot",
    ("tpu_vm.sh", "sync"): SYNC,
    ("tpu_vm.sh", "run", *TRAIN[:2]): f"""
{LIST}
{CREATE} --spot
{LIST}
{TPUS} tpu-vm list {WHERE} '--filter=name~/pod$' '--format=value(state)'
{SYNC}
{SSH}=all '--command={WORKER} start --config=c.py:a=1 --workdir=/mnt/runs/x'
{SSH}=0 '--command={WORKER} follow --config=c.py:a=1 --workdir=/mnt/runs/x'""",
    ("tpu_vm.sh", "run", TRAIN[0]): f"""
{LIST}
{CREATE} --spot
{LIST}
{TPUS} tpu-vm list {WHERE} '--filter=name~/pod$' '--format=value(state)'
{SYNC}
{SSH}=all '--command={WORKER} start --config=c.py:a=1 --workdir=gs://lab/runs/c-a=1'
{SSH}=0 '--command={WORKER} follow --config=c.py:a=1 --workdir=gs://lab/runs/c-a=1'""",
    ("tpu_vm.sh", "status"): f"""
{TPUS} queued-resources describe pod {WHERE}
{SSH}=all '--command=tail -n 1 opd_jax/runs/worker.log'""",
    ("tpu_vm.sh", "stop"): f"""
{SSH}=all '--command={WORKER} stop'
{TPUS} queued-resources delete pod {WHERE} --force --quiet""",
    # A manifest follows, and ends with YAML on a line of its own.
    ("gke.sh", "run", *TRAIN): "kubectl --context=cluster create --filename=- <<'YAML'",
    ("gke.sh", "status"): f"""
kubectl --context=cluster get jobset distill
kubectl --context=cluster get pods --selector={JOBSET} --output=wide
kubectl --context=cluster logs \
--selector={JOBSET},batch.kubernetes.io/job-completion-index=0 --tail=3""",
    ("gke.sh", "stop"): "kubectl --context=cluster delete jobset distill",
    ("pod.sh", *TRAIN): f"""
{INSTALL} "tpu,gcs"'
{LOCAL} --config=c.py:a=1 --workdir=/mnt/runs/x '--config.note=it'\\''s $(HOME)'
{FINISHED} --config=c.py:a=1 --workdir=/mnt/runs/x '--config.note=it'\\''s $(HOME)'""",
    ("slurm.sh", "run", *TRAIN): f"""
mkdir -p runs
{INSTALL} cuda'
sbatch --job-name=distill --partition=gpus --time=24:00:00 --nodes=2 --gpus-per-node=8 \
--ntasks-per-node=8 --exclusive --mem=0 --requeue --signal=TERM@120 --open-mode=append \
--output=runs/slurm-%j.log launch/slurm_job.sh --config=c.py:a=1 --workdir=/mnt/runs/x \
'--config.note=it'\\''s $(HOME)'""",
    ("slurm.sh", "status"): "squeue --user=ada --name=distill",
    ("slurm.sh", "stop"): "scancel --user=ada --name=distill",
}


@pytest.mark.parametrize("words", DRY_RUNS, ids=lambda words: " ".join(words[:2]))
def test_a_dry_run_prints_the_commands_that_are_run(
    installed: Checkout, words: Sequence[str]
) -> None:
    before = sorted(installed.path.rglob("*"))
    status, shown, errors = installed.run(*words, "--dry-run", PATH="/usr/bin:/bin")
    assert (status, errors) == (0, "")
    commands = re.sub(r"^apiVersion.*^YAML$", "", shown, flags=re.M | re.S)
    assert commands.strip() == DRY_RUNS[tuple(words)].strip()
    assert (sorted(installed.path.rglob("*")), installed.log) == (before, [])

    def anew() -> None:
        for name in ("log", "state"):
            (installed.path / name).write_text("")
        installed.plan("finishes")
        shutil.rmtree(installed.path / "hosts")
        for host in ("0", "1"):
            there = installed.path / "hosts" / host / "opd_jax"
            shutil.copytree(ROOT / "launch", there / "launch")
            (there / "runs").mkdir()
            (there / "runs" / "worker.log").touch()

    def logged() -> list[str]:
        """What ran, sorted: hosts train side by side, and a run follows the first one only."""
        hosts = 2 if words[:2] == ("tpu_vm.sh", "run") else 0
        for _ in range(1000):
            if len(installed.trained) >= hosts:
                break
            time.sleep(0.02)
        return sorted(installed.log)

    setup = installed.install(Path("opd_jax"))  # so that the hosts can train
    anew()
    status, _, errors = installed.run(*words, TPU_SETUP=setup)
    assert status == 0, errors
    ran = logged()
    assert ran
    anew()
    printed = shown.replace(SETTINGS["tpu_vm.sh"]["TPU_SETUP"], setup)
    command = ["bash", "-euc", printed]
    subprocess.run(command, cwd=installed.path, env=installed.environment, check=True)
    assert logged() == ran


def test_a_slice_that_is_not_spot_is_asked_for_as_such(checkout: Checkout) -> None:
    assert checkout.run("tpu_vm.sh", "create", TPU_SPOT="no")[0] == 0
    assert checkout.log == [CREATE]


def test_the_manifest_says_what_was_given(checkout: Checkout) -> None:
    def spec(**changed: str) -> dict:
        (checkout.path / "log").write_text("")
        assert checkout.run("gke.sh", "run", *TRAIN, **changed)[0] == 0
        return yaml.safe_load("\n".join(checkout.log[1:]))["spec"]

    def job(spec: dict) -> dict:
        return spec["replicatedJobs"][0]["template"]["spec"]

    found = spec()
    assert found["failurePolicy"]["maxRestarts"] == 20
    assert (job(found)["parallelism"], job(found)["completions"]) == (4, 4)
    pod = job(found)["template"]["spec"]
    assert list(pod["nodeSelector"].values()) == ["tpu-v5-lite-podslice", "4x4"]
    assert pod["volumes"] == pod["containers"][0]["volumeMounts"] == []
    (container,) = pod["containers"]
    assert container["image"] == "registry/opd_jax:1"
    assert (ROOT / container["command"][0]).is_file()
    # Kubernetes replaces $(NAME), and $$ by $.
    assert [word.replace("$$", "$") for word in container["args"]] == list(TRAIN)
    assert container["env"] == [{"name": "OPD_JAX_DISTRIBUTED", "value": "auto"}]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    # A mistake in the command, status 2, or a full disk ends the JobSet.
    codes = {"containerName": container["name"], "operator": "In", "values": [2, 74]}
    assert job(found)["backoffLimit"] == 0
    assert job(found)["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": codes}]
    rule = {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert found["failurePolicy"]["rules"] == [rule]

    assert job(spec(GKE_TOPOLOGY="2x2x4"))["completions"] == 4
    one = job(spec(GKE_TOPOLOGY="2x2"))
    assert one["parallelism"] == one["completions"] == 1
    assert one["template"]["spec"]["containers"][0]["env"] == []  # one process, nobody to find

    pod = job(spec(GKE_CLAIM="filestore"))["template"]["spec"]
    claim = {"name": "runs", "persistentVolumeClaim": {"claimName": "filestore"}}
    assert pod["volumes"] == [claim]
    assert pod["containers"][0]["volumeMounts"] == [{"name": "runs", "mountPath": "/runs"}]


def test_without_a_workdir_a_run_goes_to_the_bucket(checkout: Checkout) -> None:
    for words in (TRAIN[:1], ("--config", "c.py:a=1")):
        (checkout.path / "log").write_text("")
        assert checkout.run("gke.sh", "run", *words)[0] == 0
        assert checkout.log[-5].strip() == "- '--workdir=gs://lab/runs/c-a=1'"


def test_a_mounted_file_system_does_as_well_as_a_bucket(checkout: Checkout) -> None:
    for script, name in [("gke.sh", "GKE_RUNS"), ("tpu_vm.sh", "TPU_RUNS")]:
        given = checkout.run(script, "run", "--dry-run", *TRAIN, **{name: None})
        assert (given[0], "--workdir=/mnt/runs/x" in given[1], given[2]) == (0, True, "")
        below = checkout.run(script, "run", "--dry-run", *TRAIN[:1], **{name: "/nfs/runs/"})
        assert (below[0], "--workdir=/nfs/runs/c-a=1" in below[1], below[2]) == (0, True, "")


# --- A slice of TPU VMs


def course(
    checkout: Checkout, *attempts: str, words: Sequence[str] = TRAIN, **changed: str
) -> tuple[int, list[str], str]:
    """Status of `run` with these attempts, what it did with the slice, and its last line."""
    checkout.plan(*attempts)
    settings = {"TPU_SETUP": checkout.install(Path("opd_jax"))} | changed
    status, _, errors = checkout.run("tpu_vm.sh", "run", *words, **settings)
    verbs = r"queued-resources (create|delete)|worker\.sh (start|follow)"
    found = [match[1] or match[2] for line in checkout.log if (match := re.search(verbs, line))]
    return status, found, (errors.splitlines() or [""])[-1]


TRY = ["start", "follow"]


def test_a_run_goes_on_after_preemptions_and_stops_until_it_is_finished(
    checkout: Checkout,
) -> None:
    # Where it stops it ends with status 0, and finished.py says that there is more to do.
    status, did, _ = course(checkout, "preempted", "stops", "finishes")
    assert (status, did) == (0, ["create", *TRY, "delete", "create", *TRY, *TRY])
    assert checkout.trained == [f"train [auto] [] {' '.join(TRAIN)}"] * 3 * 2  # on two hosts


def test_a_connection_that_is_lost_is_made_again(checkout: Checkout) -> None:
    (checkout.path / "follow").write_text("255\n")
    assert course(checkout, "stops", "finishes")[:2] == (0, ["create", *TRY, *TRY])


@pytest.mark.parametrize(
    ("attempt", "changed", "expected"),
    [
        ("fails", {}, (2, ["create", *TRY], "status 1, not by a preemption")),
        ("mistaken", {}, (2, ["create", *TRY], "the command has a mistake")),
        ("full", {}, (2, ["create", *TRY], "status 74, not by a preemption")),
        ("deleted", {}, (2, ["create", *TRY], "`pod` was deleted before")),
        ("-", {"TPU_SETUP": "false"}, (2, ["create"], "status 1, not by a preemption")),
        ("-", {"GRANTED": "FAILED"}, (2, ["create"], "`pod` was refused")),
        ("-", {"CREATE": "1"}, (1, ["create"], "")),
    ],
)
def test_what_no_preemption_explains_is_not_tried_again(
    checkout: Checkout, attempt: str, changed: dict, expected: tuple[int, list[str], str]
) -> None:
    status, did, said = course(checkout, attempt, "finishes", **changed)
    assert (status, did) == expected[:2]
    assert expected[2] in said


def test_a_slice_whose_world_failed_trains_again_a_few_times(
    checkout: Checkout, tmp_path: Path
) -> None:
    words = (TRAIN[0], f"--workdir={tmp_path / 'x'}")
    tries = ("away", "saves 8", "finishes")
    status, did, _ = course(checkout, *tries, words=words, RESTARTS="1")
    assert (status, did) == (0, ["create", *TRY * 3])
    (checkout.path / "log").write_text("")
    words = (TRAIN[0], f"--workdir={tmp_path / 'y'}")
    status, did, said = course(checkout, "away", "away", "finishes", words=words, RESTARTS="1")
    assert (status, did) == (2, TRY * 2)
    assert "status 1, not by a preemption" in said


def test_hosts_install_the_environments_extra_too(checkout: Checkout) -> None:
    assert course(checkout, "finishes", EXTRAS="alfworld")[0] == 0
    installs = [line for line in checkout.log if line.startswith("install ")]
    assert installs == ["install .[tpu,gcs,alfworld]"] * 2  # on two hosts
    (checkout.path / "log").write_text("")
    shown = checkout.run("slurm.sh", "run", *TRAIN, "--dry-run", EXTRAS="alfworld")[1]
    assert "ensure_venv cuda,alfworld'" in shown


def test_gcloud_that_never_answers_is_an_error(checkout: Checkout) -> None:
    status, did, _ = course(checkout, STATE="nowhere")  # so that its stand-in fails
    assert (status, did, len(checkout.log)) == (1, [], 10)


def test_sync_brings_this_checkout_and_leaves_what_the_host_made(checkout: Checkout) -> None:
    (checkout.path / "launch" / "env").write_text("SECRET=1\n")
    hosts = [checkout.path / "hosts" / host for host in ("0", "1")]
    for there in hosts:
        for name in ("opd_jax/removed.py", "runs/worker.log", ".venv/made"):
            (there / "opd_jax" / name).parent.mkdir(parents=True)
            (there / "opd_jax" / name).touch()
    assert checkout.run("tpu_vm.sh", "sync", TPU_SETUP="echo $PWD >mounted")[0] == 0
    for there in hosts:
        found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
        assert {"opd_jax/opd_jax/model.py", "opd_jax/launch/worker.sh", "mounted"} <= found
        assert {"opd_jax/runs/worker.log", "opd_jax/.venv/made"} <= found
        assert found.isdisjoint({"opd_jax/opd_jax/removed.py", "opd_jax/launch/env"})


# --- On the machines


@pytest.mark.parametrize(
    ("attempts", "status", "trained"),
    [
        (["away", "away", "away", "finishes"], 0, 4),
        (["away"] * 5, 75, 4),
        (["away", "away", "saves 3", "away", "away", "saves 4", "away", "finishes"], 0, 8),
        (["saves 3-tmp"] + ["saves 3-tmp"] * 5, 75, 4),  # of a save that was killed
        (["away", "fails"], 1, 2),
        (["mistaken"], 2, 1),
        (["full"], 74, 1),
    ],
)
def test_a_run_whose_world_failed_is_started_again_a_few_times_without_a_checkpoint(
    installed: Checkout, tmp_path: Path, attempts: list[str], status: int, trained: int
) -> None:
    (installed.path / ".venv" / "installed-core").touch()
    installed.plan(*attempts)
    assert installed.run("local.sh", TRAIN[0], f"--workdir={tmp_path / 'x'}")[0] == status
    assert len(installed.trained) == trained
    if attempts[:3] == ["away"] * 3 and status == 0:  # where the training's checkpoints are
        installed.plan("away", "finishes")
        home = {"HOME": str(tmp_path / "home")}
        assert installed.run("local.sh", TRAIN[0], "--workdir=~/x", **home)[0] == 0
        assert (tmp_path / "home" / "x" / "restarts").is_file()
        assert not list(installed.path.glob("~*"))
    # Somebody who starts it by hand has all tries again.
    if status == 75:
        installed.plan("away", "away", "away", "finishes")
        assert installed.run("local.sh", TRAIN[0], "--workdir", f"{tmp_path / 'x'}")[0] == 0


@pytest.mark.parametrize(
    ("attempts", "status", "trained"),
    [
        (["away"] * 5, 75, 4),
        (["away", "away", "saves 3", "away", "away", "saves 4", "away", "finishes"], 0, 8),
        # A bucket that is away shows no other checkpoints.
        (["saves 3", "away", "hidden", "away", "finishes"], 75, 4),
        (["hidden", "hidden", "hidden", "hidden", "finishes"], 75, 4),
    ],
)
def test_restarts_of_a_run_in_a_bucket_are_counted_on_the_machine(
    installed: Checkout, attempts: list[str], status: int, trained: int
) -> None:
    (installed.path / ".venv" / "installed-core").touch()
    installed.plan(*attempts)
    assert installed.run("local.sh", TRAIN[0], "--workdir=gs://lab/x")[0] == status
    assert len(installed.trained) == trained
    assert not list(installed.path.glob("gs:*"))


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_run_hears_the_signals_and_is_not_started_again(
    installed: Checkout, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    (installed.path / ".venv" / "installed-core").touch()
    installed.plan("waits", "finishes")
    run = installed.start("local.sh", TRAIN[0], f"--workdir={tmp_path / 'x'}")
    installed.wait_until_training()
    run.send_signal(sent)
    output, _ = run.communicate()
    assert (run.returncode, output) == (status, "" if status else "saved by SIGTERM\n")
    assert len(installed.trained) == 1


def test_a_host_whose_world_failed_too_often_says_so(installed: Checkout, tmp_path: Path) -> None:
    words = (TRAIN[0], f"--workdir={tmp_path / 'x'}")
    for expected in (75, 75, 1, 75):
        installed.plan("away")
        assert installed.run("worker.sh", "start", *words)[0] == 0
        status, _, errors = installed.run("worker.sh", "follow", *words, RESTARTS="2")
        assert status == expected
        assert ("75 again after 2 restarts" in errors) == (expected == 1)


def test_training_on_a_host_outlives_the_connection_and_stops_when_told(
    installed: Checkout,
) -> None:
    def start(attempt: str) -> None:
        installed.plan(attempt)
        assert installed.run("worker.sh", "start", *TRAIN)[0] == 0
        installed.wait_until_training()

    start("waits")
    first = int((installed.path / "runs" / "worker.pid").read_text())
    start("waits")  # which ends the one before
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert installed.run("worker.sh", "stop")[0] == 0
    assert installed.run("worker.sh", "follow", *TRAIN)[:2] == (75, "saved by SIGTERM\n")
    start("finishes")
    assert installed.run("worker.sh", "follow", *TRAIN)[0] == 0


def test_a_host_that_started_anew_asks_to_be_started(installed: Checkout) -> None:
    # A reboot leaves a log, no status, and a number that by now is another process's.
    (installed.path / "runs").mkdir()
    (installed.path / "runs" / "worker.log").write_text("update 7\n")
    (installed.path / "runs" / "worker.pid").write_text(f"{os.getpid()}\n")
    assert installed.run("worker.sh", "follow", *TRAIN)[:2] == (75, "update 7\n")
    assert installed.run("worker.sh", "stop")[0] == 0  # and this process lives


@pytest.mark.parametrize(
    ("attempt", "first", "other"),
    [("finishes", 0, 0), ("stops", 75, 0), ("fails", 1, 1), ("full", 74, 74), ("away", 75, 75)],
)
def test_a_pod_succeeds_only_if_the_run_is_finished(
    installed: Checkout, attempt: str, first: int, other: int
) -> None:
    for worker, expected in (("0", first), ("3", other)):
        installed.plan(attempt)
        assert installed.run("pod.sh", *TRAIN, TPU_WORKER_ID=worker)[0] == expected


@pytest.mark.parametrize("where", ["gs://lab/runs/x", "/mnt/runs/x"])
@pytest.mark.parametrize("words", [("--workdir={}",), ("--workdir", "{}")], ids=["=", "space"])
def test_a_pod_takes_a_workdir_that_outlives_it(
    installed: Checkout, where: str, words: Sequence[str]
) -> None:
    given = [word.format(where) for word in words]
    first, other = (
        installed.run("pod.sh", *given, "--dry-run", TPU_WORKER_ID=worker) for worker in ("0", "1")
    )
    train, finished = f"{LOCAL} {' '.join(given)}\n", f"{FINISHED} {' '.join(given)}\n"
    assert (first[0], first[1].endswith(train + finished)) == (0, True), first
    assert (other[0], other[1] + finished) == (0, first[1]), other


def test_a_pod_hands_on_the_signal_and_waits_for_the_save(installed: Checkout) -> None:
    installed.plan("waits")
    pod = installed.start("pod.sh", *TRAIN)
    installed.wait_until_training()
    pod.send_signal(signal.SIGTERM)
    output, _ = pod.communicate()
    assert (pod.returncode, output) == (75, "saved by SIGTERM\n")


def job(
    checkout: Checkout,
    attempt: str,
    *,
    tasks: int,
    state: str = "RUNNING",
    words: Sequence[str] = TRAIN[:2],
) -> int:
    """Status of a Slurm job of two nodes with four GPUs each."""
    checkout.plan(attempt)
    slurm = {
        "SLURM_JOB_ID": "5000",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": str(tasks),
        "SLURM_GPUS_ON_NODE": "4",
        "JOB_STATE": state,
    }
    return checkout.run("slurm_job.sh", *words, **slurm)[0]


def test_slurm_tasks_find_each_other_and_their_gpus(installed: Checkout) -> None:
    # JAX itself does it for a task of one GPU. A task of a node is told its place and its GPUs.
    words = " ".join(TRAIN[:2])
    assert job(installed, "finishes", tasks=8) == 0
    assert installed.trained == [f"train [auto] [] {words}"] * 8
    assert job(installed, "finishes", tasks=2) == 0
    assert "scontrol show hostnames node[7-8]" in installed.log
    node = [f"train [node7:62344,{process},2] [0,1,2,3] {words}" for process in (0, 1)]
    assert installed.trained[8:] == node


@pytest.mark.parametrize(
    ("attempt", "state", "expected", "again"),
    [
        ("stops", "RUNNING", 0, ["scontrol requeue 5000"]),
        ("stops", "COMPLETING", 75, []),  # somebody cancelled it
        ("fails", "RUNNING", 1, []),
        ("mistaken", "RUNNING", 2, []),
        ("full", "RUNNING", 74, []),
    ],
)
def test_only_a_slurm_job_that_was_stopped_goes_back_into_the_queue(
    installed: Checkout, attempt: str, state: str, expected: int, again: list[str]
) -> None:
    assert job(installed, attempt, tasks=8, state=state) == expected
    assert [line for line in installed.log if line.startswith("scontrol")] == again


def test_a_slurm_job_whose_world_failed_goes_back_a_few_times(
    installed: Checkout, tmp_path: Path
) -> None:
    words = (TRAIN[0], f"--workdir={tmp_path / 'x'}")
    requeue = "scontrol requeue 5000"
    for number, attempt in enumerate(["away", "away", "saves 7", "away", "away"], 1):
        assert job(installed, attempt, tasks=8, words=words) == 0
        assert installed.log.count(requeue) == number
    assert job(installed, "away", tasks=8, words=words) == 75
    assert installed.log.count(requeue) == 5
