#!/bin/sh
# Make the secrets that the manifests refer to by name, with random passwords. One that is there is
# kept, so it is safe to run again. HF_TOKEN and AWS_ACCESS_KEY_ID / AWS_SECRET_ACCESS_KEY are taken
# from the environment where they are set.
#
#   k8s/create-secrets.sh [NAMESPACE]
set -eu

namespace=${1:-orchestrator}

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

# secret NAME KEY VALUE...: values go through files, never through the list of processes.
secret() {
    name=$1
    shift
    if kubectl get secret "$name" -n "$namespace" >/dev/null 2>&1; then
        echo "secret $name: kept"
        return
    fi
    folder=$(mktemp -d)
    while [ $# -gt 0 ]; do
        printf '%s' "$2" >"$folder/$1"
        shift 2
    done
    kubectl create secret generic "$name" -n "$namespace" --from-file="$folder"
    rm -r "$folder"
}

umask 077
kubectl get namespace "$namespace" >/dev/null 2>&1 || kubectl create namespace "$namespace"

s3_id=${AWS_ACCESS_KEY_ID:-$(random)}
s3_key=${AWS_SECRET_ACCESS_KEY:-$(random)}
if kubectl get secret s3 -n "$namespace" >/dev/null 2>&1; then
    echo "secret s3: kept; s3-identities goes with it"
else
    # The identities are the in-cluster store's list of users: the same pair.
    secret s3-identities s3.json "{\"identities\": [{\"name\": \"mlflow\", \"credentials\": [{\"accessKey\": \"$s3_id\", \"secretKey\": \"$s3_key\"}], \"actions\": [\"Admin\", \"Read\", \"Write\", \"List\"]}]}"
    secret s3 AWS_ACCESS_KEY_ID "$s3_id" AWS_SECRET_ACCESS_KEY "$s3_key"
fi
secret postgres password "$(random)"
secret mlflow-admin username admin password "$(random)" flask-secret-key "$(random)"
secret mlflow-credentials username sweeps password "$(random)"
secret ray-token auth_token "$(random)"
if [ -n "${HF_TOKEN:-}" ]; then
    secret huggingface-token token "$HF_TOKEN"
fi
