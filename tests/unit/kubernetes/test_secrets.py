"""k8s/create-secrets.sh, against a kubectl that keeps secrets as folders of files."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.kubernetes.overlays import K8S, OVERLAYS, containers, pods, rendered

KUBECTL = """#!/bin/sh
case "$1 $2" in
"get namespace") ;;
"get secret") [ -d "$SECRETS/$3" ] ;;
"create secret") for last; do :; done; cp -r "${last#--from-file=}" "$SECRETS/$4" ;;
*) exit 64 ;;
esac
"""


def create_secrets(folder: Path, **environment: str) -> dict[str, dict[str, str]]:
    """What there is after the script has run, by name and key."""
    kept = folder / "secrets"
    kept.mkdir(exist_ok=True)
    kubectl = folder / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "SECRETS": str(kept)}
    script = str(K8S / "create-secrets.sh")
    subprocess.run([script], env={**paths, **environment}, check=True, timeout=60)
    return {
        secret.name: {key.name: key.read_text() for key in secret.iterdir()}
        for secret in kept.iterdir()
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_key_that_a_pod_needs_is_made(overlay: str, tmp_path: Path) -> None:
    made = create_secrets(tmp_path)
    for name, pod in pods(rendered(overlay)):
        for container in containers(pod):
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference and not reference.get("optional"):
                    assert made[reference["name"]][reference["key"]], name


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    first = create_secrets(tmp_path)
    assert create_secrets(tmp_path) == first


def test_passwords_are_long_and_differ(tmp_path: Path) -> None:
    made = create_secrets(tmp_path)
    passwords = [
        value
        for values in made.values()
        for key, value in values.items()
        if key not in ("username", "s3.json")
    ]
    assert len(set(passwords)) == len(passwords)
    assert min(map(len, passwords)) >= 32


def test_the_store_inside_the_cluster_knows_the_keys_that_mlflow_has(tmp_path: Path) -> None:
    made = create_secrets(tmp_path)
    (identity,) = json.loads(made["s3-identities"]["s3.json"])["identities"]
    (pair,) = identity["credentials"]
    assert pair == {
        "accessKey": made["s3"]["AWS_ACCESS_KEY_ID"],
        "secretKey": made["s3"]["AWS_SECRET_ACCESS_KEY"],
    }


def test_what_the_environment_names_is_used(tmp_path: Path) -> None:
    given = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "HF_TOKEN": "hub"}
    made = create_secrets(tmp_path, **given)
    assert made["s3"] == {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
    assert made["huggingface-token"] == {"token": "hub"}
