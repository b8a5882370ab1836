# Clients, with PyTorch: for machines without a GPU (target cpu) and with NVIDIA's (target cuda).
#
#   docker build -f deploy/client.Dockerfile --target cpu  -t turnout-client:0.1.0-cpu .
#   docker build -f deploy/client.Dockerfile --target cuda -t turnout-client:0.1.0-cuda .
#
# The CUDA libraries come with PyTorch's wheel; the host needs the driver and NVIDIA's container toolkit.
ARG PYTHON=python:3.11.13-slim-bookworm
ARG TORCH=2.13.0

FROM ${PYTHON} AS build
WORKDIR /src
RUN python -m venv /opt/turnout
COPY deploy/requirements/client.txt deploy/requirements/client.txt
RUN /opt/turnout/bin/pip install --no-cache-dir --no-deps --requirement deploy/requirements/client.txt
COPY constraints.txt ./

FROM build AS build-cpu
ARG TORCH
# The index of the builds for CPUs; what they need is in the list above.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN /opt/turnout/bin/pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" "torch==${TORCH}"
COPY . .
RUN /opt/turnout/bin/pip install --no-cache-dir --no-deps .

FROM build AS build-cuda
ARG TORCH
RUN /opt/turnout/bin/pip install --no-cache-dir --constraint constraints.txt "torch==${TORCH}" nvidia-ml-py==13.615.71
COPY . .
RUN /opt/turnout/bin/pip install --no-cache-dir --no-deps .

FROM ${PYTHON} AS cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Turnout client (CPU)" \
      org.opencontainers.image.description="Federated learning client with PyTorch for CPUs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# The folders exist with this owner, so that volumes mounted there belong to it.
RUN groupadd --gid 10001 turnout \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin turnout \
 && install --directory --owner 10001 --group 10001 --mode 0750 /data /state /certs /model
COPY --from=build-cpu /opt/turnout /opt/turnout
COPY --chmod=0755 deploy/docker/healthcheck.py /usr/local/bin/turnout-healthcheck
# Everything that is written goes to the volumes and to /tmp: the root may be read-only.
ENV PATH="/opt/turnout/bin:${PATH}" \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    FLWR_TELEMETRY_ENABLED=0 \
    TURNOUT_LOG_FORMAT=json \
    TURNOUT_STATE_DIR=/state \
    TURNOUT_METRICS_ADDRESS=127.0.0.1:9100
USER 10001:10001
WORKDIR /data
EXPOSE 9100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["turnout-healthcheck"]
ENTRYPOINT ["turnout"]
CMD ["client"]

FROM ${PYTHON} AS cuda
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Turnout client (CUDA)" \
      org.opencontainers.image.description="Federated learning client with PyTorch for NVIDIA GPUs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# The folders exist with this owner, so that volumes mounted there belong to it.
RUN groupadd --gid 10001 turnout \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin turnout \
 && install --directory --owner 10001 --group 10001 --mode 0750 /data /state /certs /model
COPY --from=build-cuda /opt/turnout /opt/turnout
COPY --chmod=0755 deploy/docker/healthcheck.py /usr/local/bin/turnout-healthcheck
# Everything that is written goes to the volumes and to /tmp: the root may be read-only.
ENV PATH="/opt/turnout/bin:${PATH}" \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    FLWR_TELEMETRY_ENABLED=0 \
    TURNOUT_LOG_FORMAT=json \
    TURNOUT_STATE_DIR=/state \
    TURNOUT_METRICS_ADDRESS=127.0.0.1:9100 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /data
EXPOSE 9100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["turnout-healthcheck"]
ENTRYPOINT ["turnout"]
CMD ["client"]
