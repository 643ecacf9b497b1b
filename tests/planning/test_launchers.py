"""Launch commands parse, for torchrun and for `coatnet train`, and job files forward the signal of a preemption."""

import shlex
import subprocess

import pytest
import yaml
from torch.distributed.run import get_args_parser

from coatnet.cli.train import parse_arguments
from coatnet.planning.launchers import LAUNCHERS, SAVING_SECONDS, Launch

ARGUMENTS = ("train", "jft-3b", "--model", "coatnet-7", "--micro_batch_size", "16", "--parallelism", "hsdp")
MANY = Launch("coatnet-7", ARGUMENTS, num_nodes=32, gpus_per_node=8, gpu="A100-80GB")
MACHINE = Launch("coatnet-7", ARGUMENTS, num_nodes=1, gpus_per_node=8, gpu="A100-80GB")
ONE = Launch("coatnet-7", ARGUMENTS, num_nodes=1, gpus_per_node=1, gpu="L4")


def script(launcher: str, launch: Launch) -> str:
    """The shell script inside the text of a launcher."""
    text = LAUNCHERS[launcher](launch)
    if launcher == "kubernetes":
        _, job = yaml.safe_load_all(text)
        return job["spec"]["template"]["spec"]["containers"][0]["args"][0]
    return yaml.safe_load(text)["run"] if launcher == "skypilot" else text


def command(launcher: str, launch: Launch) -> list[str]:
    """The words of the command that starts the processes of one machine."""
    joined = script(launcher, launch).replace("\\\n", " ")
    (line,) = (line for line in joined.splitlines() if "coatnet train" in line)
    return shlex.split(line.removesuffix("&"))


@pytest.mark.parametrize("launch", [MANY, MACHINE, ONE], ids=["many", "machine", "one"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_script_is_valid_shell(launcher: str, launch: Launch) -> None:
    run = subprocess.run(["bash", "-n"], input=script(launcher, launch), capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""


@pytest.mark.parametrize("launch", [MANY, MACHINE], ids=["many", "machine"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_torchrun_and_train_parse_the_command(launcher: str, launch: Launch) -> None:
    if "shutdown-timeout" not in get_args_parser().format_help():
        pytest.skip("the launch commands need the torchrun of torch 2.12")
    words = command(launcher, launch)
    given = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert given.nproc_per_node == "8" and given.module and given.training_script == "coatnet"
    assert given.shutdown_timeout == SAVING_SECONDS and "SIGUSR1" in given.signals_to_handle
    assert given.standalone == (launch.num_nodes == 1)
    # The name of a store has the count of restarts in it, on which only the processes of one machine agree.
    assert ("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script(launcher, launch)) == (launch.num_nodes > 1)
    if launch.num_nodes > 1:
        assert (given.nnodes, given.rdzv_backend) == ("32", "c10d")
    name, *rest = given.training_script_args
    recipe, shell = parse_arguments(rest)
    assert name == "train" and shell.out == "$RUN"
    assert (recipe.name, recipe.model, recipe.data) == ("jft-3b", "coatnet-7", "$DATA")
    assert (recipe.micro_batch_size, recipe.parallelism) == (16, "hsdp")


def test_an_option_that_older_torchruns_lack_is_named() -> None:
    for launcher in LAUNCHERS:
        assert "since torch 2.12" in script(launcher, MACHINE) and "2.12" not in script(launcher, ONE)


def test_one_gpu_needs_no_torchrun() -> None:
    assert command("torchrun", ONE) == ["coatnet", *ARGUMENTS, "--data", "$DATA", "--out", "$RUN"]


def test_a_slurm_job_is_signaled_in_time_and_requeued() -> None:
    lines = LAUNCHERS["slurm"](MANY).splitlines()
    assert lines[0] == "#!/bin/bash"
    settings = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=32", "ntasks-per-node=1", "gpus-per-node=8", "signal=B:TERM@600", "requeue"} <= settings


@pytest.mark.parametrize(("signaled", "queued"), [(True, True), (False, False)])
def test_the_slurm_script_forwards_the_signal_and_waits(tmp_path, signaled, queued) -> None:
    # One function, which bash has read to its end before it says "started": a trap that runs while bash parses the next
    # command substitution fails with "unexpected EOF".
    (tmp_path / "srun").write_text(
        "#!/bin/bash\ntrap 'sleep 0.3; echo saved; exit 143' TERM\n"
        "work() { echo started; for _ in {1..20}; do sleep 0.1; done; echo finished; }\nwork\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ "$1" = show ] && echo node-a || echo "queued $2"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment |= {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_ON_NODE": "4"}
    job = subprocess.Popen(["bash", "-c", LAUNCHERS["slurm"](MANY)], env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "started\n"
    if signaled:
        job.terminate()
    printed, _ = job.communicate(timeout=30)
    assert printed.splitlines() == (["saved", "queued 17"] if queued else ["finished"])
    assert job.returncode == (143 if signaled else 0)


def test_a_kubernetes_job_has_one_pod_per_machine_and_their_service() -> None:
    service, job = yaml.safe_load_all(LAUNCHERS["kubernetes"](MANY))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert (service["kind"], service["spec"]["clusterIP"], job["kind"]) == ("Service", "None", "Job")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 32, 32)
    assert pod["terminationGracePeriodSeconds"] == SAVING_SECONDS and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert "HEAD=coatnet-7-0.coatnet-7" in container["args"][0]


def test_a_skypilot_job_requests_the_gpus() -> None:
    task = yaml.safe_load(LAUNCHERS["skypilot"](MANY))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (32, "A100-80GB:8")
