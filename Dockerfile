# On the CPU, and on CUDA:
#   docker build -t idefics .
#   docker build -t idefics:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 \
#       --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" -v idefics-cache:/cache idefics caption imgs -o captions.jsonl
# (`docker run --gpus all` for CUDA). Models of the hub, and what is measured once, are kept in the volume at /cache.
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS python
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# CUDA's images have no Python, and Triton compiles what launches its kernels.
# hadolint ignore=DL3008
RUN if ! command -v python3 > /dev/null; then \
        apt-get update && \
        apt-get install -y --no-install-recommends python3-venv python3-dev gcc libc6-dev && \
        rm -rf /var/lib/apt/lists/*; \
    fi

FROM python AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=heif,jxl,peft,quantize,score
WORKDIR /source
COPY constraints.txt ./
RUN python3 -m venv /opt/venv && \
    /opt/venv/bin/pip install --no-cache-dir -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY pyproject.toml README.md LICENSE ./
COPY idefics_cli idefics_cli
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM python
COPY --from=build /opt/venv /opt/venv
RUN useradd --uid 10001 --create-home idefics && install -d -m 1777 /cache
ENV PATH=/opt/venv/bin:$PATH XDG_CACHE_HOME=/cache TRITON_CACHE_DIR=/cache/triton
VOLUME /cache
WORKDIR /work
USER 10001
ENTRYPOINT ["idefics"]
CMD ["--help"]
