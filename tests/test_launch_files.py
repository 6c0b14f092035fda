"""The files in launchers/ that start nothing here are what the programs that read them expect."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from deepspeed.launcher.runner import fetch_hostfile
from torch.distributed.elastic.rendezvous import RendezvousParameters, static_tcp_rendezvous
from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

from i2i_dist import assembly, config
from i2i_dist.assembly import Settings
from i2i_dist.command_line import parse
from i2i_dist.methods import resolve
from tests import launch_files, needs
from tests.launch_files import LAUNCHERS
from tests.ranks import ROOT

DOCKERFILE = LAUNCHERS / "container" / "Dockerfile"
DEFINITION = LAUNCHERS / "container" / "i2i_dist.def"
KUBERNETES_VERSIONS = ("1.31", "1.37")


def strict(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


TEXTS = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
# jobset.x-k8s.io/v1alpha2 as its reference has it, without the parts that the manifest has no use for.
JOB_SET = strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": strict({"name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}}, "name"),
        "spec": strict(
            {
                "suspend": {"type": "boolean"},
                "network": strict(
                    {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                        "subdomain": {"type": "string"},
                    }
                ),
                "failurePolicy": strict(
                    {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
                        "rules": {
                            "type": "array",
                            "items": strict(
                                {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": TEXTS,
                                    "targetReplicatedJobs": TEXTS,
                                },
                                "name",
                                "action",
                            ),
                        },
                    }
                ),
                "replicatedJobs": {
                    "type": "array",
                    "items": strict(
                        {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 0},
                            "template": {"type": "object"},
                        },
                        "name",
                        "template",
                    ),
                },
            }
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


@pytest.fixture
def job_set() -> dict[str, Any]:
    return launch_files.job_set()


def validate(job_set: dict[str, Any]) -> None:
    """Hold a JobSet, and the Jobs that the controller makes of it, against their schemas."""
    jsonschema.validate(job_set, JOB_SET)
    for replicated in job_set["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}} | replicated["template"]
        for version in KUBERNETES_VERSIONS:
            kubernetes_validate.validate(job, version, strict=True)


def test_kubernetes_knows_every_key(job_set: dict[str, Any]) -> None:
    validate(job_set)
    for version in KUBERNETES_VERSIONS:
        kubernetes_validate.validate(launch_files.claim(), version, strict=True)


def test_deleting_the_job_set_keeps_the_volume(job_set: dict[str, Any]) -> None:
    """Each file has one object, and that of `kubectl delete -f launchers/kubernetes.yaml` is not the claim."""
    assert job_set["kind"] == "JobSet"
    assert launch_files.claim()["kind"] == "PersistentVolumeClaim"


def rename(path: str, new: str) -> Callable[[Any], None]:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]

    def change(value: Any) -> None:
        for key in parents:
            value = value[key]
        value[new] = value.pop(last)

    return change


@pytest.mark.parametrize(
    "change",
    [
        rename("spec.network.enableDNSHostnames", "enableDnsHostnames"),
        rename("spec.failurePolicy.rules.0.onJobFailureReasons", "onJobFailureReason"),
        rename("spec.replicatedJobs.0.template.spec.podFailurePolicy", "podFailurePolicies"),
        rename("spec.replicatedJobs.0.template.spec.podFailurePolicy.rules.0.onExitCodes.values", "value"),
        rename("spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriodSeconds", "terminationGrace"),
        rename("spec.replicatedJobs.0.template.spec.template.spec.containers.0.volumeMounts", "volumesMounts"),
    ],
)
def test_a_misspelt_key_is_noticed(job_set: dict[str, Any], change: Callable[[Any], None]) -> None:
    change(job_set)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(job_set)


def test_the_manifest_agrees_with_itself_and_with_the_trainer(job_set: dict[str, Any]) -> None:
    name, (replicated,) = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"]
    job, container = replicated["template"]["spec"], launch_files.container_of(job_set)
    pod, command = job["template"]["spec"], container["command"]
    assert job["parallelism"] == job["completions"] == int(launch_files.option(command, "nnodes"))
    assert launch_files.option(command, "master_addr") == f"{name}-{replicated['name']}-0-0.{name}"
    assert launch_files.option(command, "nproc_per_node") == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] >= int(launch_files.option(command, "grace")) + 15
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume]
    assert claims == [launch_files.claim()["metadata"]["name"]]
    assert pod["restartPolicy"] == "Never"  # the only one that podFailurePolicy goes with
    by_code = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule and rule["onExitCodes"]["containerName"] == container["name"]
        for code in rule["onExitCodes"]["values"]
    }
    assert by_code == {2: "FailJob", 75: "Ignore"}
    options = parse(command[command.index("launchers/train.py") + 1 :])
    assert (ROOT / options.config).is_file()
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(options.run.startswith(f"{mount}/") for mount in mounts)
    assert f"WORKDIR {container['workingDir']}\n" in DOCKERFILE.read_text()


def test_the_metrics_of_the_first_pod_can_be_reached(job_set: dict[str, Any]) -> None:
    container = launch_files.container_of(job_set)
    command = container["command"]
    options = parse(command[command.index("launchers/train.py") + 1 :])
    output = config.load(ROOT / options.config, options.settings).output
    assert output.metrics_host == "0.0.0.0"
    assert [port["containerPort"] for port in container["ports"]] == [output.metrics_port]
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(output.metrics_port)


def scrape_example() -> dict[str, Any]:
    """Return the one configuration of Prometheus that docs/operations.md shows."""
    page = (ROOT / "docs" / "operations.md").read_text()
    (example,) = re.findall(r"^    scrape_configs:\n(?:     .*\n)+", page, re.MULTILINE)
    return dict(yaml.safe_load(example))


def test_the_scrape_example_asks_where_a_run_answers(job_set: dict[str, Any]) -> None:
    by_address, in_pods = scrape_example()["scrape_configs"]
    default = config.OutputConfig().metrics_port
    assert all(target.endswith(f":{default}") for one in by_address["static_configs"] for target in one["targets"])
    container = launch_files.container_of(job_set)
    kept = [rule["regex"] for rule in in_pods["relabel_configs"] if rule.get("action") == "keep"]
    assert kept == [f"{container['name']};{container['ports'][0]['name']};0"]  # nodes are numbered from 0, as ranks are


def test_torchrun_waits_for_a_node_as_long_as_the_page_says(job_set: dict[str, Any]) -> None:
    command = launch_files.container_of(job_set)["command"]
    given: dict[str, Any] = _parse_rendezvous_config(launch_files.option(command, "rdzv_conf"))
    parameters = RendezvousParameters("static", "node:29500", "run", 2, 2, rank=1, **given)
    waits = static_tcp_rendezvous.create_rdzv_handler(parameters).timeout  # type: ignore[attr-defined]
    assert f"`--rdzv_conf=timeout={waits.seconds}` of the manifest" in (ROOT / "docs" / "operations.md").read_text()


def check_batch(words: list[str], ranks: int) -> None:
    """Refuse what train.py, with these words, would refuse on so many ranks."""
    options = parse(words)
    loaded = config.load(ROOT / options.config, options.settings)
    settings = Settings(loaded, *resolve(loaded.method), Path(options.run))
    assembly._check_fits(loaded, assembly._sketch(settings), assembly._layout(loaded, ranks, "fp32"))


def test_the_manifest_s_batch_is_shared_by_all_ranks(job_set: dict[str, Any]) -> None:
    command = launch_files.container_of(job_set)["command"]
    words = command[command.index("launchers/train.py") + 1 :]
    ranks = int(launch_files.option(command, "nnodes")) * int(launch_files.option(command, "nproc_per_node"))
    check_batch(words, ranks)
    with pytest.raises(config.ConfigError, match="allowed on 16 ranks is a multiple of 16"):
        check_batch([word for word in words if "global_batch" not in word], ranks)


@pytest.mark.parametrize("path", ["launchers/slurm.sbatch", "docs/operations.md"])
def test_the_example_s_batch_is_shared_by_all_tasks(path: str) -> None:
    (found,) = re.findall(r"^#?    +sbatch --nodes=(\d+) launchers/slurm.sbatch (.+)$", (ROOT / path).read_text(), re.M)
    tasks = re.findall(r"^#SBATCH --ntasks-per-node=(\d+)$", (LAUNCHERS / "slurm.sbatch").read_text(), re.M)
    nodes, words = found
    check_batch(words.split(), int(nodes) * int(tasks[0]))


def test_deepspeed_reads_the_example_of_a_hostfile() -> None:
    assert dict(fetch_hostfile(str(LAUNCHERS / "hostfile.example"))) == {"node1": 8, "node2": 8}


def docker_sources() -> set[str]:
    """Return what the Dockerfile copies, in all its stages."""
    copies = re.findall(r"^COPY (.+) \S+$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return {source for copied in copies for source in copied.split()}


def test_the_dockerfile_is_sound() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert [source for source in docker_sources() if not (ROOT / source).exists()] == []


def test_the_linter_notices_a_mistake(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    for right, mistake in (
        ("make .venv/installed", "cd csrc && make $TARGET"),
        ("COPY csrc csrc/", "COPPY csrc csrc/"),
    ):
        wrong.write_text(DOCKERFILE.read_text().replace(right, mistake))
        assert subprocess.run([Path(sys.executable).with_name("hadolint"), wrong], capture_output=True).returncode


def packages(script: str) -> set[str]:
    """Return what a script installs by apt-get."""
    installs = re.findall(r"--no-install-recommends((?: |\\\n|[a-z0-9+-])+)", script)
    return {package for install in installs for package in install.replace("\\\n", " ").split()}


def test_both_images_hold_the_same() -> None:
    definition = launch_files.sections(DEFINITION)
    files = dict(line.split() for line in definition["files"].splitlines() if line.strip())
    assert {*files} == {source.rstrip("/") for source in docker_sources()}
    assert {*files.values()} == {"/opt/i2i_dist/"}
    (archs,) = re.findall(r'^ARCHS = "(.+)"$', (ROOT / "setup.py").read_text(), flags=re.MULTILINE)
    assert f'ARG CUDA_ARCHS="{archs}"\n' in DOCKERFILE.read_text()
    assert f"CUDA_ARCHS={archs}\n" in definition["arguments"]  # Apptainer would make quotes a part of the value
    assert packages(definition["post"]) == packages(DOCKERFILE.read_text()) >= {"g++", "make", "python3-venv"}


@pytest.mark.parametrize("path", [DOCKERFILE, DEFINITION], ids=lambda path: path.name)
def test_the_images_are_made_by_targets_that_there_are(path: Path) -> None:
    targets = re.findall(r"^(?:RUN )?.*\bmake (\.?[a-z/]+)$", path.read_text(), flags=re.MULTILINE)
    assert targets
    for target in targets:
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("section", ["post", "environment", "test", "runscript"])
def test_the_scripts_of_the_apptainer_image_are_sound(section: str) -> None:
    shellcheck = needs.program("shellcheck", "shellcheck")
    begin = "#!/bin/sh -e\n" if section == "post" else "#!/bin/sh\n"  # as Apptainer runs them
    script = begin + launch_files.sections(DEFINITION)[section]
    done = subprocess.run([shellcheck, "-"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_script_of_continuous_integration_is_sound() -> None:
    done = subprocess.run(
        [needs.program("shellcheck", "shellcheck"), ".ci/run"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
