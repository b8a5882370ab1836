# The server, without PyTorch: for fleets whose clients bring their own app (task "external").
#
#   docker build -f deploy/server.Dockerfile -t turnout-server:0.1.0 .
#
# A server that has a built-in task's data and evaluates on it runs in the clients' image.
ARG PYTHON=python:3.11.13-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /src
RUN python -m venv /opt/turnout
COPY deploy/requirements/server.txt deploy/requirements/server.txt
RUN /opt/turnout/bin/pip install --no-cache-dir --no-deps --requirement deploy/requirements/server.txt
COPY . .
RUN /opt/turnout/bin/pip install --no-cache-dir --no-deps .

FROM ${PYTHON} AS server
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Turnout server" \
      org.opencontainers.image.description="Federated learning server; no PyTorch" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# The folders exist with this owner, so that volumes mounted there belong to it.
RUN groupadd --gid 10001 turnout \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin turnout \
 && install --directory --owner 10001 --group 10001 --mode 0750 /data /pki /certs \
      /certs/server /certs/client-0 /certs/client-1 /certs/client-2
COPY --from=build /opt/turnout /opt/turnout
COPY --chmod=0755 deploy/docker/healthcheck.py /usr/local/bin/turnout-healthcheck
# Everything that is written goes to the volumes and to /tmp: the root may be read-only.
ENV PATH="/opt/turnout/bin:${PATH}" \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    FLWR_TELEMETRY_ENABLED=0 \
    TURNOUT_LOG_FORMAT=json \
    TURNOUT_METRICS_ADDRESS=127.0.0.1:9100
USER 10001:10001
WORKDIR /data
EXPOSE 9091 9092 9100
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["turnout-healthcheck"]
ENTRYPOINT ["turnout"]
CMD ["server", "/etc/turnout/experiment.toml", "--resume", "auto"]
