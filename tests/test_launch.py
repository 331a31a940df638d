"""The scripts that rent machines: what they would run, and how they take what happens there.

`gcloud`, `kubectl`, Slurm's commands and the interpreter on a host are stand-ins here: small
programs that write down their arguments, keep a slice's state in a file, and run what they are
asked to run on a host in a folder of its own.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").glob("*.sh"))
SOURCED = {"venv.sh", "remote.sh", "dry_run.sh"}
SETTINGS = {
    "tpu_vm.sh": {
        "TPU_NAME": "pod",
        "TPU_PROJECT": "lab",
        "TPU_ZONE": "us-x1-a",
        "TPU_TYPE": "v5litepod-16",
        "TPU_RUNTIME": "v2-alpha-tpuv5-lite",
        "TPU_SPOT": "yes",
        "TPU_SETUP": "sudo mount server:share /mnt/runs",
    },
    "gke.sh": {
        "GKE_CONTEXT": "cluster",
        "GKE_NAME": "distill",
        "GKE_IMAGE": "registry/opd_jax:1",
        "GKE_ACCELERATOR": "tpu-v5-lite-podslice",
        "GKE_TOPOLOGY": "4x4",
        "GKE_CHIPS": "4",
        "GKE_CLAIM": "filestore",
        "GKE_RESTARTS": "20",
    },
    "slurm.sh": {
        "JOB_NAME": "distill",
        "JOB_PARTITION": "gpus",
        "JOB_NODES": "2",
        "JOB_GPUS": "8",
        "JOB_PROCESSES": "gpu",
        "JOB_TIME": "24:00:00",
    },
}
TRAIN = ("--config=c.py:a=1", "--workdir=/mnt/runs/x", "--config.note=it's $(HOME)")


# --- Every script


@pytest.mark.parametrize("script", [*SCRIPTS, Path(".ci/run")], ids=str)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    words = [shellcheck, "--external-sources", script]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_script_is_short_and_says_how_it_is_used(script: Path) -> None:
    lines = (ROOT / script).read_text().splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 100
    executable = bool((ROOT / script).stat().st_mode & 0o111)
    assert executable == (script.name not in SOURCED)
    if executable:
        assert lines[0] == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in lines
        header = lines[1 : lines.index("set -euo pipefail")]
        assert all(line.startswith("#") for line in header)
        assert any(script.name in line for line in header)


def test_the_example_names_exactly_what_the_scripts_require() -> None:
    example = (ROOT / "launch" / "env.example").read_text()
    named = re.findall(r"^([A-Z_]+)=", example, re.MULTILINE)
    assert re.findall(r"^[A-Z_]+=.+", example, re.MULTILINE) == []  # nobody's project
    required = []
    for script in SETTINGS:
        (line,) = re.findall(r"^require (.*)$", (ROOT / "launch" / script).read_text(), re.M)
        assert line.split() == list(SETTINGS[script])
        required += line.split()
    assert named == required


def test_the_image_is_made_of_files_that_exist() -> None:
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "opd_jax", "launch/*.sh", "launch/*.py"} <= set(copied)
    assert all(list(ROOT.glob(pattern)) for pattern in copied)


# --- A checkout of its own, and programs that stand in for the foreign ones

STAND_INS = {
    # Hosts are folders; a request is granted at once. STATE holds its state, FOLLOW the statuses
    # that connections end with instead of showing a log.
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
    # The interpreter on a host: a training of process 0 does what the next line of SCENARIO says.
    "python": """
        case "$*" in
          "-m opd_jax.train "*)
            echo "train [${OPD_JAX_DISTRIBUTED-}] [${JAX_LOCAL_DEVICE_IDS-}] ${*:3}" >>"$LOG"
            [[ $PWD == */1/* || ${SLURM_PROCID:-0} != 0 ]] && exit 0
            trap 'echo "saved by SIGTERM"; exit 0' TERM
            read -r what <"$SCENARIO"; sed -i 1d "$SCENARIO"; echo "$what" >"$SCENARIO.now"
            case $what in
              preempted) echo SUSPENDED >"$STATE"; kill -KILL $$ ;;
              deleted) : >"$STATE"; kill -KILL $$ ;;
              waits) while :; do /bin/sleep 0.02; done ;;
              fails) echo Traceback; exit 1 ;;
              mistaken) exit 2 ;;
            esac ;;
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
    "sleep": "exec /bin/sleep 0.02",
}


class Checkout(NamedTuple):
    path: Path
    environment: dict[str, str]

    @property
    def log(self) -> list[str]:
        return (self.path / "log").read_text().splitlines()

    def run(
        self, script: str, *words: str, **changed: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a script with the settings that it needs; None removes one."""
        environment: Mapping = self.environment | SETTINGS.get(script, {}) | changed
        return subprocess.run(
            [self.path / "launch" / script, *words],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    def plan(self, *attempts: str) -> None:
        (self.path / "scenario").write_text("".join(f"{attempt}\n" for attempt in attempts))

    def install(self, checkout: Path) -> str:
        """The command that gives `checkout` its interpreter; the stamps say it is installed."""
        stamps = " ".join(f"{checkout}/.venv/installed-{extra}" for extra in ("tpu", "cuda"))
        source = self.path / "programs" / "python"
        return (
            f"mkdir -p {checkout}/.venv/bin && cp {source} {checkout}/.venv/bin && touch {stamps}"
        )


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


# --- Settings, and the dry run


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script in SETTINGS for name in SETTINGS[script]]
)
def test_a_setting_that_is_missing_is_named(checkout: Checkout, script: str, name: str) -> None:
    done = checkout.run(script, "status", **{name: None})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: `{name}` is not set; set it in launch/env, a copy of launch/env.example\n"
    )
    assert checkout.log == []


@pytest.mark.parametrize(
    ("script", "words", "changed", "expected"),
    [
        ("tpu_vm.sh", ["delete"], {}, ["create sync run status stop", "`delete`"]),
        ("tpu_vm.sh", ["run", "--config=c"], {}, ["`--workdir=/DIR`"]),
        ("tpu_vm.sh", ["create"], {"TPU_SPOT": "1"}, ["`TPU_SPOT`", "yes no", "`1`"]),
        ("gke.sh", ["run", "--workdir=runs"], {}, ["`--workdir=/DIR`"]),
        ("gke.sh", ["status"], {"GKE_TOPOLOGY": "16"}, ["`GKE_TOPOLOGY`", "4x4", "`16`"]),
        ("gke.sh", ["status"], {"GKE_CHIPS": "3"}, ["`GKE_CHIPS`", "4x4", "`3`"]),
        ("slurm.sh", [], {}, ["run status stop"]),
        ("slurm.sh", ["stop"], {"JOB_PROCESSES": "8"}, ["`JOB_PROCESSES`", "node gpu", "`8`"]),
    ],
)
def test_a_mistake_is_one_line_and_runs_nothing(
    checkout: Checkout, script: str, words: list[str], changed: dict, expected: list[str]
) -> None:
    done = checkout.run(script, *words, **changed)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr)
    assert [part for part in expected if part not in done.stderr] == []
    assert checkout.log == []


def test_settings_come_from_the_file_unless_the_environment_has_them(checkout: Checkout) -> None:
    lines = [f"{name}='{value}'\n" for name, value in SETTINGS["slurm.sh"].items()]
    (checkout.path / "launch" / "env").write_text("".join(lines))
    nothing = dict.fromkeys(SETTINGS["slurm.sh"])
    shown = checkout.run("slurm.sh", "stop", "--dry-run", **nothing).stdout
    assert shown == "scancel --user=ada --name=distill\n"
    shown = checkout.run("slurm.sh", "stop", "--dry-run", **nothing | {"JOB_NAME": "other"}).stdout
    assert shown == "scancel --user=ada --name=other\n"


SYNC = r"""
mkdir -p build
tar -czf build/opd_jax.tar.gz --exclude=__pycache__ --exclude=launch/env opd_jax configs launch pyproject.toml README.md LICENSE
gcloud compute tpus tpu-vm scp build/opd_jax.tar.gz pod: --project=lab --zone=us-x1-a --worker=all
gcloud compute tpus tpu-vm ssh pod --project=lab --zone=us-x1-a --worker=all '--command=if [ -e opd_jax/launch/worker.sh ]; then opd_jax/launch/worker.sh stop; fi && mkdir -p opd_jax && tar -xzf opd_jax.tar.gz -C opd_jax --recursive-unlink'
gcloud compute tpus tpu-vm ssh pod --project=lab --zone=us-x1-a --worker=all '--command=sudo mount server:share /mnt/runs'
"""  # noqa: E501
CREATE = (
    "gcloud compute tpus queued-resources create pod --node-id=pod --project=lab --zone=us-x1-a "
    "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
)
LIST = (
    "gcloud compute tpus queued-resources list --project=lab --zone=us-x1-a "
    "'--filter=name~/pod$' '--format=value(state.state)'"
)
DRY_RUNS = {
    ("local.sh", *TRAIN): r"""
bash -c 'source launch/venv.sh && ensure_venv ""'
.venv/bin/python -m opd_jax.train --config=c.py:a=1 --workdir=/mnt/runs/x --config.note=it\'s\ \$\(HOME\)
""",  # noqa: E501
    ("local.sh", "--config=configs/c.py:a=1"): """
bash -c 'source launch/venv.sh && ensure_venv ""'
.venv/bin/python -m opd_jax.train --config=configs/c.py:a=1 --workdir=runs/c-a=1
""",
    ("tpu_vm.sh", "create"): f"{CREATE} --spot",
    ("tpu_vm.sh", "sync"): SYNC,
    ("tpu_vm.sh", "run", *TRAIN[:2]): f"""
{LIST}
{CREATE} --spot
{LIST}
gcloud compute tpus tpu-vm list --project=lab --zone=us-x1-a '--filter=name~/pod$' '--format=value(state)'
{SYNC.strip()}
gcloud compute tpus tpu-vm ssh pod --project=lab --zone=us-x1-a --worker=all '--command=opd_jax/launch/worker.sh start --config=c.py:a=1 --workdir=/mnt/runs/x'
gcloud compute tpus tpu-vm ssh pod --project=lab --zone=us-x1-a --worker=0 '--command=opd_jax/launch/worker.sh follow --config=c.py:a=1 --workdir=/mnt/runs/x'
""",  # noqa: E501
    ("tpu_vm.sh", "status"): """
gcloud compute tpus queued-resources describe pod --project=lab --zone=us-x1-a
gcloud compute tpus tpu-vm ssh pod --project=lab --zone=us-x1-a --worker=all '--command=tail -n 1 opd_jax/runs/worker.log'
""",  # noqa: E501
    ("tpu_vm.sh", "stop"): """
gcloud compute tpus tpu-vm ssh pod --project=lab --zone=us-x1-a --worker=all '--command=opd_jax/launch/worker.sh stop'
gcloud compute tpus queued-resources delete pod --project=lab --zone=us-x1-a --force --quiet
""",  # noqa: E501
    ("gke.sh", "run", *TRAIN): """
kubectl --context=cluster create --filename=- <<'YAML'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: distill
  annotations: {alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}
spec:
  failurePolicy:
    maxRestarts: 20
    rules: [{action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}]
  replicatedJobs:
  - name: slice
    template:
      spec:
        parallelism: 4
        completions: 4
        backoffLimit: 0
        podFailurePolicy:
          rules: [{action: FailJob, onExitCodes: {containerName: train, operator: In, values: [2]}}]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
              cloud.google.com/gke-tpu-topology: 4x4
            tolerations: [{key: cloud.google.com/gke-spot, operator: Exists, effect: NoSchedule}]
            containers:
            - name: train
              image: registry/opd_jax:1
              command: [./launch/pod.sh]
              args:
              - '--config=c.py:a=1'
              - '--workdir=/mnt/runs/x'
              - '--config.note=it''s $$(HOME)'
              env: [{name: OPD_JAX_DISTRIBUTED, value: auto}]
              resources: {limits: {google.com/tpu: 4}}
              volumeMounts: [{name: runs, mountPath: /runs}]
            volumes: [{name: runs, persistentVolumeClaim: {claimName: filestore}}]
YAML
""",
    ("gke.sh", "status"): """
kubectl --context=cluster get jobset distill
kubectl --context=cluster get pods --selector=jobset.sigs.k8s.io/jobset-name=distill --output=wide
kubectl --context=cluster logs --selector=jobset.sigs.k8s.io/jobset-name=distill,batch.kubernetes.io/job-completion-index=0 --tail=3
""",  # noqa: E501
    ("gke.sh", "stop"): "kubectl --context=cluster delete jobset distill",
    ("slurm.sh", "run", *TRAIN): r"""
mkdir -p runs
bash -c 'source launch/venv.sh && ensure_venv cuda'
sbatch --job-name=distill --partition=gpus --time=24:00:00 --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --exclusive --mem=0 --requeue --signal=TERM@120 --open-mode=append --output=runs/slurm-%j.log launch/slurm_job.sh --config=c.py:a=1 --workdir=/mnt/runs/x '--config.note=it'\''s $(HOME)'
""",  # noqa: E501
    ("slurm.sh", "status"): "squeue --user=ada --name=distill",
    ("slurm.sh", "stop"): "scancel --user=ada --name=distill",
}


@pytest.mark.parametrize("words", DRY_RUNS, ids=lambda words: " ".join(words[:2]))
def test_a_dry_run_prints_the_commands_and_runs_none(
    checkout: Checkout, words: Sequence[str]
) -> None:
    for name in ("gcloud", "kubectl", "sbatch", "squeue", "scancel"):
        (checkout.path / "programs" / name).unlink()
    bare = {"PATH": f"{checkout.path / 'programs'}:/usr/bin:/bin"}
    before = sorted(checkout.path.rglob("*"))
    done = checkout.run(words[0], *words[1:], "--dry-run", **bare)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == DRY_RUNS[tuple(words)].strip()
    assert sorted(checkout.path.rglob("*")) == before


@pytest.mark.parametrize("words", DRY_RUNS, ids=lambda words: " ".join(words[:2]))
def test_what_a_dry_run_prints_is_what_is_run(checkout: Checkout, words: Sequence[str]) -> None:
    quick = {"TPU_SETUP": checkout.install(Path("opd_jax"))}
    script, rest = words[0], words[1:]
    subprocess.run(checkout.install(checkout.path), shell=True, check=True)
    shown = checkout.run(script, *rest, "--dry-run", **quick).stdout

    def anew() -> None:
        for name in ("log", "state"):
            (checkout.path / name).write_text("")
        checkout.plan("finishes")
        shutil.rmtree(checkout.path / "hosts")
        for host in ("0", "1"):
            there = checkout.path / "hosts" / host / "opd_jax"
            shutil.copytree(ROOT / "launch", there / "launch")
            (there / "runs").mkdir()
            (there / "runs" / "worker.log").touch()

    anew()
    done = checkout.run(script, *rest, **quick)
    assert done.returncode == 0, done.stderr
    ran = sorted(checkout.log)  # sorted, since hosts train side by side
    anew()
    words = ["bash", "-euc", shown]
    again = subprocess.run(words, cwd=checkout.path, env=checkout.environment, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert ran
    assert sorted(checkout.log) == ran


def test_a_slice_that_is_not_spot_is_asked_for_as_such(checkout: Checkout) -> None:
    assert checkout.run("tpu_vm.sh", "create", TPU_SPOT="no").returncode == 0
    assert checkout.log == [CREATE]


def test_the_manifest_says_what_was_given(checkout: Checkout) -> None:
    def job(**changed: str) -> dict:
        (checkout.path / "log").write_text("")
        assert checkout.run("gke.sh", "run", *TRAIN, **changed).returncode == 0
        manifest = yaml.safe_load("\n".join(checkout.log[1:]))
        return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]

    (container,) = job()["template"]["spec"]["containers"]
    # Kubernetes replaces $(NAME), and $$ by $.
    assert [word.replace("$$", "$") for word in container["args"]] == list(TRAIN)
    assert (ROOT / container["command"][0]).is_file()
    assert job(GKE_TOPOLOGY="2x2x4")["completions"] == 4
    one = job(GKE_TOPOLOGY="2x2")
    assert one["parallelism"] == one["completions"] == 1
    assert one["template"]["spec"]["containers"][0]["env"] == []  # one process, nobody to find


# --- A slice of TPU VMs


def course(checkout: Checkout, *attempts: str, **changed: str) -> tuple[int, list[str], str]:
    """Status of `run` with these attempts, what it did with the slice, and what it said."""
    checkout.plan(*attempts)
    setup = checkout.install(Path("opd_jax"))
    done = checkout.run("tpu_vm.sh", "run", *TRAIN, TPU_SETUP=setup, **changed)
    verbs = r"queued-resources (create|delete)|worker\.sh (start|follow)"
    found = [match[1] or match[2] for line in checkout.log if (match := re.search(verbs, line))]
    return done.returncode, found, done.stderr


def test_a_run_trains_on_every_host_with_the_arguments_given(checkout: Checkout) -> None:
    assert course(checkout, "finishes")[:2] == (0, ["create", "start", "follow"])
    trained = [line for line in checkout.log if line.startswith("train")]
    assert trained == [f"train [auto] [] {' '.join(TRAIN)}"] * 2


def test_a_preempted_slice_is_asked_for_again_until_the_run_is_finished(
    checkout: Checkout,
) -> None:
    once = ["create", "start", "follow", "delete"]
    status, did, _ = course(checkout, "preempted", "preempted", "finishes")
    assert (status, did) == (0, once + once + ["create", "start", "follow"])


def test_a_run_that_was_stopped_goes_on(checkout: Checkout) -> None:
    # It ended with status 0, and finished.py says that there is more to do.
    status, did, _ = course(checkout, "stops", "finishes")
    assert (status, did) == (0, ["create", "start", "follow", "start", "follow"])


def test_a_connection_that_is_lost_is_made_again(checkout: Checkout) -> None:
    (checkout.path / "follow").write_text("255\n")
    status, did, _ = course(checkout, "stops", "finishes")
    assert (status, did) == (0, ["create", "start", "follow", "start", "follow"])


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        ("fails", "error: it ended with status 1, and was not preempted"),
        ("mistaken", "error: a mistake in the command: see above"),
        ("deleted", "error: `pod` was deleted before the run was finished"),
    ],
)
def test_what_no_preemption_explains_is_not_tried_again(
    checkout: Checkout, attempt: str, expected: str
) -> None:
    status, did, said = course(checkout, attempt, "finishes")
    assert (status, did) == (2, ["create", "start", "follow"])
    assert said.splitlines()[-1] == expected


def test_a_slice_that_cannot_be_had_is_an_error(checkout: Checkout) -> None:
    status, did, said = course(checkout, GRANTED="FAILED")
    assert (status, did) == (2, ["create"])
    assert "`pod` was refused" in said
    (checkout.path / "log").write_text("")
    (checkout.path / "state").write_text("")
    assert course(checkout, CREATE="1")[:2] == (1, ["create"])


def test_a_setup_that_fails_is_not_tried_again(checkout: Checkout) -> None:
    done = checkout.run("tpu_vm.sh", "run", *TRAIN, TPU_SETUP="false")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("status 1, and was not preempted")
    assert not any("worker.sh start" in line for line in checkout.log)


def test_gcloud_that_never_answers_is_an_error(checkout: Checkout) -> None:
    (checkout.path / "state").unlink()  # its stand-in fails
    done = checkout.run("tpu_vm.sh", "run", *TRAIN)
    assert done.returncode != 0
    assert len(checkout.log) == 10
    assert not any("create" in line for line in checkout.log)


def test_sync_brings_this_checkout_and_leaves_what_the_host_made(checkout: Checkout) -> None:
    (checkout.path / "launch" / "env").write_text("SECRET=1\n")
    for host in ("0", "1"):
        there = checkout.path / "hosts" / host / "opd_jax"
        for name in ("opd_jax/removed.py", "runs/worker.log", ".venv/made"):
            (there / name).parent.mkdir(parents=True)
            (there / name).touch()
    assert checkout.run("tpu_vm.sh", "sync", TPU_SETUP="echo $PWD >mounted").returncode == 0
    for host in ("0", "1"):
        there = checkout.path / "hosts" / host
        found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
        assert {"opd_jax/opd_jax/model.py", "opd_jax/launch/worker.sh", "mounted"} <= found
        assert {"opd_jax/runs/worker.log", "opd_jax/.venv/made"} <= found
        assert found.isdisjoint({"opd_jax/opd_jax/removed.py", "opd_jax/launch/env"})
    with tarfile.open(checkout.path / "build" / "opd_jax.tar.gz") as archive:
        assert "launch/env" not in archive.getnames()


# --- On the machines


@pytest.fixture
def installed(checkout: Checkout) -> Checkout:
    """A checkout on a machine: with an interpreter."""
    subprocess.run(checkout.install(checkout.path), shell=True, check=True)
    return checkout


def wait_until_training(checkout: Checkout) -> None:
    for _ in range(1000):
        if (checkout.path / "scenario.now").exists():
            return
        time.sleep(0.02)
    raise TimeoutError("nothing trains")


def test_training_on_a_host_outlives_the_connection_and_stops_when_told(
    installed: Checkout,
) -> None:
    installed.plan("waits", "finishes")
    assert installed.run("worker.sh", "start", *TRAIN).returncode == 0
    wait_until_training(installed)
    assert installed.run("worker.sh", "stop").returncode == 0
    followed = installed.run("worker.sh", "follow", *TRAIN)
    assert (followed.returncode, followed.stdout) == (75, "saved by SIGTERM\n")
    assert installed.run("worker.sh", "start", *TRAIN).returncode == 0
    assert installed.run("worker.sh", "follow", *TRAIN).returncode == 0


def test_a_new_start_on_a_host_ends_the_old_training_first(installed: Checkout) -> None:
    installed.plan("waits", "finishes")
    assert installed.run("worker.sh", "start", *TRAIN).returncode == 0
    wait_until_training(installed)
    first = int((installed.path / "runs" / "worker.pid").read_text())
    assert installed.run("worker.sh", "start", *TRAIN).returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert installed.run("worker.sh", "follow", *TRAIN).returncode == 0


def test_a_host_that_started_anew_asks_to_be_started(installed: Checkout) -> None:
    # What a restart leaves: a log, no status, and a number that by now is somebody else's.
    (installed.path / "runs").mkdir()
    (installed.path / "runs" / "worker.log").write_text("update 7\n")
    (installed.path / "runs" / "worker.pid").write_text(f"{os.getpid()}\n")
    followed = installed.run("worker.sh", "follow", *TRAIN)
    assert (followed.returncode, followed.stdout) == (75, "update 7\n")
    assert installed.run("worker.sh", "stop").returncode == 0  # and this process lives


@pytest.mark.parametrize(
    ("attempt", "first", "other"), [("finishes", 0, 0), ("stops", 75, 0), ("fails", 1, 1)]
)
def test_a_pod_succeeds_only_if_the_run_is_finished(
    installed: Checkout, attempt: str, first: int, other: int
) -> None:
    for worker, expected in (("0", first), ("3", other)):
        installed.plan(attempt)
        assert installed.run("pod.sh", *TRAIN, TPU_WORKER_ID=worker).returncode == expected


def test_a_pod_hands_on_the_signal_and_waits_for_the_save(installed: Checkout) -> None:
    installed.plan("waits")
    pod = subprocess.Popen(
        [installed.path / "launch" / "pod.sh", *TRAIN],
        env=installed.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_until_training(installed)
    pod.send_signal(signal.SIGTERM)
    output, _ = pod.communicate()
    assert (pod.returncode, output) == (75, "saved by SIGTERM\n")


def job(checkout: Checkout, *, tasks: int, **changed: str) -> tuple[int, list[str]]:
    """Status of a Slurm job of two nodes with four GPUs each, and what it did."""
    done = subprocess.run(
        [checkout.path / "launch" / "slurm_job.sh", *TRAIN[:2]],
        cwd=checkout.path,
        env={
            **checkout.environment,
            "SLURM_JOB_ID": "5000",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS": str(tasks),
            "SLURM_GPUS_ON_NODE": "4",
            **changed,
        },
        capture_output=True,
        text=True,
    )
    return done.returncode, [line for line in checkout.log if not line.startswith("srun")]


def test_slurm_tasks_of_a_gpu_find_each_other_by_jax_itself(installed: Checkout) -> None:
    installed.plan("finishes")
    train = "train [auto] [] --config=c.py:a=1 --workdir=/mnt/runs/x"
    assert job(installed, tasks=8) == (0, [train] * 8)


def test_slurm_tasks_of_a_node_are_told_their_place_and_all_their_gpus(
    installed: Checkout,
) -> None:
    installed.plan("finishes")
    status, did = job(installed, tasks=2)
    assert (status, did[0]) == (0, "scontrol show hostnames node[7-8]")
    assert did[1:] == [
        f"train [node7:62344,{process},2] [0,1,2,3] --config=c.py:a=1 --workdir=/mnt/runs/x"
        for process in (0, 1)
    ]


def test_a_slurm_job_that_was_stopped_goes_back_into_the_queue(installed: Checkout) -> None:
    installed.plan("stops")
    status, did = job(installed, tasks=8)
    assert (status, did[-1]) == (0, "scontrol requeue 5000")


@pytest.mark.parametrize(
    ("attempt", "state", "expected"),
    [("fails", "RUNNING", 1), ("mistaken", "RUNNING", 2), ("stops", "COMPLETING", 75)],
)
def test_a_slurm_job_that_failed_or_was_cancelled_does_not(
    installed: Checkout, attempt: str, state: str, expected: int
) -> None:
    installed.plan(attempt)
    status, did = job(installed, tasks=8, JOB_STATE=state)
    assert status == expected
    assert not any("requeue" in line for line in did)
