"""What starts a training parses, is understood by torchrun and by `coatnet train`, and passes a preemption on."""

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
    """What a shell runs in the end."""
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
def test_the_script_is_a_shell_script(launcher: str, launch: Launch) -> None:
    run = subprocess.run(["bash", "-n"], input=script(launcher, launch), capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""


@pytest.mark.parametrize("launch", [MANY, MACHINE], ids=["many", "machine"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_torchrun_and_train_understand_the_command(launcher: str, launch: Launch) -> None:
    words = command(launcher, launch)
    given = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert given.nproc_per_node == "8" and given.module and given.training_script == "coatnet"
    assert given.shutdown_timeout == SAVING_SECONDS and "SIGUSR1" in given.signals_to_handle
    assert given.standalone == (launch.num_nodes == 1)
    # Only the processes of one machine count their restarts alike, and so find the living under one name.
    assert ("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in script(launcher, launch)) == (launch.num_nodes > 1)
    if launch.num_nodes > 1:
        assert (given.nnodes, given.rdzv_backend) == ("32", "c10d")
    name, *rest = given.training_script_args
    recipe, shell = parse_arguments(rest)
    assert name == "train" and shell.out == "$RUN"
    assert (recipe.name, recipe.model, recipe.data) == ("jft-3b", "coatnet-7", "$DATA")
    assert (recipe.micro_batch_size, recipe.parallelism) == (16, "hsdp")


def test_one_gpu_needs_no_torchrun() -> None:
    assert command("torchrun", ONE) == ["coatnet", *ARGUMENTS, "--data", "$DATA", "--out", "$RUN"]


def test_a_slurm_job_is_signalled_in_time_and_queued_again() -> None:
    lines = LAUNCHERS["slurm"](MANY).splitlines()
    assert lines[0] == "#!/bin/bash"
    settings = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert {"nodes=32", "ntasks-per-node=1", "gpus-per-node=8", "signal=B:TERM@600", "requeue"} <= settings


@pytest.mark.parametrize(("signalled", "queued"), [(True, True), (False, False)])
def test_the_slurm_script_hands_the_signal_on_and_waits_for_the_end(tmp_path, signalled, queued) -> None:
    (tmp_path / "srun").write_text(
        "#!/bin/bash\ntrap 'sleep 0.3; echo saved; exit 143' TERM\n"
        "echo started\nfor _ in $(seq 20); do sleep 0.1; done\necho finished\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ "$1" = show ] && echo node-a || echo "queued $2"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment |= {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_CPUS_ON_NODE": "4"}
    job = subprocess.Popen(["bash", "-c", LAUNCHERS["slurm"](MANY)], env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "started\n"
    if signalled:
        job.terminate()
    said, _ = job.communicate(timeout=30)
    assert said.splitlines() == (["saved", "queued 17"] if queued else ["finished"])
    assert job.returncode == (143 if signalled else 0)


def test_a_kubernetes_job_has_a_pod_a_machine_that_the_others_find() -> None:
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


def test_a_skypilot_job_asks_for_the_gpus() -> None:
    task = yaml.safe_load(LAUNCHERS["skypilot"](MANY))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (32, "A100-80GB:8")
