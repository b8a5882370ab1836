# The dashboard: it reads the run store and needs no PyTorch. The page is built with the wheel.
#
#   docker build -f deploy/dashboard.Dockerfile -t turnout-dashboard:0.1.0 .
ARG PYTHON=python:3.11.13-slim-bookworm

FROM ${PYTHON} AS build
WORKDIR /src
RUN python -m venv /opt/turnout
COPY deploy/requirements/server.txt deploy/requirements/server.txt
RUN /opt/turnout/bin/pip install --no-cache-dir --no-deps --requirement deploy/requirements/server.txt
COPY . .
RUN /opt/turnout/bin/pip install --no-cache-dir --no-deps .

FROM ${PYTHON} AS dashboard
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Turnout dashboard" \
      org.opencontainers.image.description="Dashboard of federated learning runs" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
# The folders exist with this owner, so that volumes mounted there belong to it.
RUN groupadd --gid 10001 turnout \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin turnout \
 && install --directory --owner 10001 --group 10001 --mode 0750 /data
COPY --from=build /opt/turnout /opt/turnout
COPY --chmod=0755 deploy/docker/healthcheck.py /usr/local/bin/turnout-healthcheck
# Everything that is written goes to the volumes and to /tmp: the root may be read-only.
ENV PATH="/opt/turnout/bin:${PATH}" \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    FLWR_TELEMETRY_ENABLED=0 \
    TURNOUT_LOG_FORMAT=json
USER 10001:10001
WORKDIR /data
EXPOSE 8050
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s --retries=3 \
    CMD ["turnout-healthcheck", "http://127.0.0.1:8050/healthz"]
ENTRYPOINT ["turnout"]
CMD ["dashboard", "--host", "0.0.0.0", "--port", "8050", "--store", "/data/runs", "--token-file", "/run/secrets/dashboard_token"]
