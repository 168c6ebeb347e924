# One image for all of ours in docker-compose.yml: the `hpo` command with its example studies, and no data or password.
FROM python:3.12.12-slim-bookworm

# torch.compile needs a compiler while it trains, and KubeRay asks a pod by wget how it is. Debian keeps only the latest
# versions, so that none can be named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/*

# A new volume that is mounted at /files takes over its owner.
RUN useradd --uid 1000 --home-dir /tmp --no-create-home hpo \
    && install --directory --owner=hpo --group=hpo /files /files/data

# For a Ray cluster: docker build --build-arg EXTRAS=postgres,s3,ray
ARG EXTRAS=postgres,s3

# What we depend on, some 6 GB, is a layer that a change of our code leaves as it is: the package is empty here.
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN mkdir hpo studies \
    && echo '__version__ = "0"' > hpo/_version.py \
    && touch README.md LICENSE \
    && pip install --no-cache-dir --constraint constraints.txt "./[$EXTRAS]"

COPY README.md LICENSE ./
COPY hpo hpo
COPY studies studies
RUN pip install --no-cache-dir --no-deps .

# HOME is where libraries put their caches.
ENV HOME=/tmp HPO_FILES=/files HPO_DATA=/files/data
WORKDIR /hpo
USER 1000:1000
CMD ["hpo", "--help"]
