# One image for the coordinator and for every client; its command says which one it is. Paths: docs/operations.md.
#
#   docker build --build-arg TORCH="torch==2.13.0 --index-url URL" --tag offsite .    a build of torch for your machine
#   docker build --secret id=pip,src=pip.conf --tag offsite .                         packages from your own mirror
ARG PYTHON=python:3.11-slim

FROM ${PYTHON} AS build
# As in the Makefile: what pip is told, so it may hold options.
ARG TORCH="torch==2.13.0"
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/offsite
WORKDIR /source
COPY requirements.lock .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/offsite/bin/pip install --require-hashes --no-deps --requirement requirements.lock
# torch is in no lock: its builds for other machines lie on indexes of their own, under hashes of their own.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/offsite/bin/pip install ${TORCH}
COPY . .
RUN /opt/offsite/bin/pip install --no-index --no-deps --no-build-isolation . \
 && /opt/offsite/bin/pip check

FROM ${PYTHON}
# The uid is fixed, so that folders on the host can be made for it; the name stands in the record of an approval.
RUN groupadd --gid 10001 offsite \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin offsite \
 && install --directory --owner=10001 --group=10001 --mode=0700 /home-volume /site
COPY --from=build /opt/offsite /opt/offsite
COPY deploy/healthcheck.py /opt/offsite/healthcheck.py
# Nothing is written but below the two folders above and /tmp; nothing is fetched, and nothing is reported to anybody.
ENV PATH=/opt/offsite/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    RAY_USAGE_STATS_ENABLED=0
USER 10001:10001
WORKDIR /tmp
CMD ["offsite", "--help"]
