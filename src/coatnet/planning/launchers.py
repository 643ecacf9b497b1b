"""Launch commands and job files for a training on many machines, as text; nothing is started here.

Each forwards the signal of a preemption to every process and gives the run ten minutes to save. The schedulers start
the job again, and `coatnet train` with the folder of an unfinished run resumes it.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import indent

PORT = 29500  # torchrun's own default
SAVING_SECONDS = 600  # between SIGTERM and SIGKILL
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # by default torchrun forwards the first four
# NCCL writes what each process was doing when one of them no longer answers; a crash in C leaves a Python traceback.
ENVIRONMENT = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000", "PYTHONFAULTHANDLER": "1"}
# Otherwise machines that restart look for the others at the addresses of processes that have ended.
MULTI_NODE_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@dataclass(frozen=True)
class Launch:
    """A training and the machines it runs on."""

    name: str  # of the job: letters, digits and hyphens
    arguments: tuple[str, ...]  # of `coatnet`, without --data and --out
    num_nodes: int
    gpus_per_node: int
    gpu: str  # in SkyPilot's spelling


def torchrun(launch: Launch) -> str:
    """Commands for a shell, to be run once on each machine."""
    settings = ["DATA=path/to/images", f"RUN=runs/{launch.name}"]
    if launch.num_nodes == 1:
        return _script(_exports(launch, settings), _command(launch, ""))
    comments = (
        f"# Run this on each of the {launch.num_nodes} machines. HEAD: the host name of one of them.",
        "# DATA and RUN: paths on a file system that all of them share.",
    )
    return _script(*comments, _exports(launch, ["HEAD=node-0", *settings]), _command(launch, launch.name))


def slurm(launch: Launch) -> str:
    """A script for `sbatch` that is requeued, and resumes, when its time is over or its machines are needed."""
    head = '"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
    settings = {
        "job-name": launch.name,
        "nodes": launch.num_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": launch.gpus_per_node,
        "exclusive": None,
        "time": "1-00:00:00",
        "signal": f"B:TERM@{SAVING_SECONDS}",
        "requeue": None,
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    start = f'srun --cpus-per-task="$SLURM_CPUS_ON_NODE" {_command(launch, "$SLURM_JOB_ID")} &'
    return _script(
        "#!/bin/bash",
        *(f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in settings.items()),
        "",
        f"# Save as {launch.name}.sh; start with: sbatch {launch.name}.sh",
        _exports(launch, [f"HEAD={head}", "DATA=path/to/images", f'RUN="$SLURM_SUBMIT_DIR/runs/{launch.name}"']),
        start,
        "step=$!",
        "# Ten minutes before the time limit this shell gets SIGTERM: the run saves, stops, and is requeued.",
        "trap 'stopped=yes; kill -TERM \"$step\"' TERM",
        'wait "$step"',
        "code=$?",
        'while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done',
        'if [ "${stopped:-no}" = yes ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    )


def kubernetes(launch: Launch) -> str:
    """A file for `kubectl apply` (Kubernetes 1.33 or newer): a Job with one pod per machine, and their Service."""
    name, nodes = launch.name, launch.num_nodes
    start = _script(
        _exports(launch, [f"HEAD={name}-0.{name}", "DATA=/shared/images", f"RUN=/shared/runs/{name}"]),
        f"exec {_command(launch, name)}",
    )
    return f"""\
# Save as {name}.yaml; start with: kubectl apply -f {name}.yaml
# Set the image (Python with coatnet) and the claim (a volume that all pods can write: ReadWriteMany).
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: {name}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {nodes}
  parallelism: {nodes}
  backoffLimitPerIndex: 10
  podFailurePolicy:
    rules:
      - action: Ignore  # a drained or preempted machine does not count as a failure
        onPodConditions:
          - type: DisruptionTarget
  template:
    spec:
      subdomain: {name}
      restartPolicy: Never
      terminationGracePeriodSeconds: {SAVING_SECONDS}
      containers:
        - name: train
          image: coatnet:latest
          command: [bash, -c]
          args:
            - |
{indent(start, " " * 14)}\
          resources:
            limits:
              nvidia.com/gpu: {launch.gpus_per_node}
          volumeMounts:
            - name: shared
              mountPath: /shared
            - name: workers  # worker processes pass decoded images in shared memory
              mountPath: /dev/shm
      volumes:
        - name: shared
          persistentVolumeClaim:
            claimName: shared
        - name: workers
          emptyDir:
            medium: Memory
"""


def skypilot(launch: Launch) -> str:
    """A file for `sky jobs launch`: a managed job, which gets new machines when a cloud preempts the old ones."""
    head = '"$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"'
    start = _script(
        _exports(launch, [f"HEAD={head}", "DATA=/shared/images", f"RUN=/shared/runs/{launch.name}"]),
        _command(launch, launch.name),
    )
    return f"""\
# Save as {launch.name}.yaml; start with: sky jobs launch {launch.name}.yaml
# Create the volume first; it must outlive the machines. A mounted bucket does not work: it cannot rename a folder
# atomically, as writing a checkpoint requires.
name: {launch.name}
num_nodes: {launch.num_nodes}
resources:
  accelerators: {launch.gpu}:{launch.gpus_per_node}
  use_spot: true
volumes:
  /shared: shared
setup: pip install coatnet
run: |
{indent(start, "  ")}"""


LAUNCHERS: dict[str, Callable[[Launch], str]] = {
    "torchrun": torchrun,
    "slurm": slurm,
    "kubernetes": kubernetes,
    "skypilot": skypilot,
}


def _command(launch: Launch, rendezvous: str) -> str:
    """`torchrun ... -m coatnet train ...`, or `coatnet train ...` for one process."""
    train = (shlex.join(launch.arguments), '--data "$DATA" --out "$RUN"')
    if launch.num_nodes == launch.gpus_per_node == 1:
        return " \\\n    ".join((f"coatnet {train[0]}", train[1]))
    nodes = "--standalone"
    if launch.num_nodes > 1:
        nodes = (
            f'--nnodes {launch.num_nodes} --rdzv-backend c10d --rdzv-endpoint "$HEAD:{PORT}" --rdzv-id "{rendezvous}"'
        )
    return " \\\n    ".join(
        (
            f"torchrun --nproc-per-node {launch.gpus_per_node} {nodes}",
            f"--max-restarts 3 --shutdown-timeout {SAVING_SECONDS} --signals-to-handle {SIGNALS}",
            f"-m coatnet {train[0]}",
            train[1],
        )
    )


def _exports(launch: Launch, settings: Sequence[str]) -> str:
    """Lines of `export`; `settings` are `NAME=value`, quoted if necessary."""
    environment = ENVIRONMENT | (MULTI_NODE_ENVIRONMENT if launch.num_nodes > 1 else {})
    lines = [f"export {each}" for each in (*settings, *(f"{k}={v}" for k, v in environment.items()))]
    if launch.num_nodes * launch.gpus_per_node > 1:
        lines.append("# torchrun has --shutdown-timeout since torch 2.12; leave it out before.")
    return "\n".join(lines)


def _script(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)
