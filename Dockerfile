# syntax=docker/dockerfile:1.7
# docker build --target cpu    -t qlora-orchestrator:0.1.0 .          one node without GPUs; see TORCH below
# docker build --target cuda   -t qlora-orchestrator:0.1.0 .          GPUs
# docker build --target mlflow -t qlora-orchestrator-mlflow:0.1.0 .   the tracking server
#
# Nobody is root in the images: uid 1000 and gid 100, as in Ray's own. What a target is built with
# stays in its builder, with one exception that says why.

ARG PYTHON=docker.io/library/python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${PYTHON} AS base
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 1000 --gid 100 --create-home ray


FROM base AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CACHE_DIR=/var/cache/pip
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/venv
WORKDIR /src
COPY constraints.txt pyproject.toml ./


FROM builder AS mlflow-builder
RUN --mount=type=cache,target=/var/cache/pip \
    pip install -c constraints.txt "mlflow[auth]" "psycopg[binary]==3.3.9" "boto3==1.44.5" "flask-wtf==1.3.0"


# torch and everything else first: a layer that changes with constraints.txt only.
FROM builder AS dependencies
# The CPU build of torch: --build-arg TORCH=torch==2.13.0+cpu and PyTorch's index of CPU builds (its install page names it) as
# --build-arg PIP_EXTRA_INDEX_URL. Otherwise pip's index brings CUDA, 5 GB of it.
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/var/cache/pip \
    pip install -c constraints.txt "${TORCH}" \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt


FROM dependencies AS project
COPY README.md LICENSE ./
COPY k8s/base/rayjob.yaml k8s/base/
COPY orchestrator orchestrator
COPY cluster cluster
COPY jobs jobs
RUN pip install --no-deps . && pip check


FROM base AS mlflow
COPY --from=mlflow-builder /opt/venv /opt/venv
USER 1000:100
WORKDIR /home/ray
RUN pip check && python -c "import boto3, psycopg, mlflow.server.auth.client"
EXPOSE 5000
CMD ["mlflow", "server", "--help"]


FROM base AS sweep
# What is compiled or downloaded at run time goes where a pod mounts storage, or here.
ENV ORCHESTRATOR_CACHE=/home/ray/cache \
    TOKENIZERS_PARALLELISM=false \
    MLFLOW_DISABLE_TELEMETRY=true \
    RAY_USAGE_STATS_ENABLED=0
COPY --from=project /opt/venv /opt/venv
USER 1000:100
WORKDIR /home/ray
CMD ["orchestrator", "doctor"]


FROM sweep AS cpu
RUN python -c "import bitsandbytes, mlflow, peft, ray, torch, cluster, jobs" && orchestrator --help


FROM sweep AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# The exception: Triton compiles the launcher of every kernel with the system's C compiler, and DeepSpeed its CPU optimizer and,
# with libaio, its NVMe swapping with the C++ one, all at run time. CUDA itself comes with torch, the driver from the node.
USER root
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libaio-dev \
    && rm -rf /var/lib/apt/lists/*
USER 1000:100
RUN python -c "import bitsandbytes, deepspeed, mlflow, peft, ray, torch, triton, cluster, jobs; assert torch.version.cuda" \
    && orchestrator --help
