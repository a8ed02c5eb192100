# graincast in a container: its pipelines, its command line and the registered model over HTTP.
#
#     docker build --tag graincast .
#     docker run --rm --init -v graincast:/graincast/.graincast graincast
#         the demonstration (make demo): trains and registers a segmenter
#     docker run --rm --init -v graincast:/graincast/.graincast -v "$PWD/micrographs:/data:ro" graincast make demo SEM_DIR=/data
#         the same on micrographs of your own
#     docker run --rm --init -v graincast:/graincast/.graincast -v "$PWD:/data" graincast graincast segment /data/image.tif --out /data/grains
#         grain maps and tables; any other command works in the same way
#     docker run --rm --init -v graincast:/graincast/.graincast -p 8080:8080 graincast serve
#         POST /invocations {"inputs": [[[0, 17, ...], ...]]}: prepared images (n, height, width), 0 to 255, to grain ids;
#         GRAINCAST_MODEL chooses another model than the newest
#
# Runs, versions, models and the tools' databases lie on the volume. Where results go to a folder of yours, build with
# `--build-arg UID=$(id -u)`. `docker run --gpus all` trains on CUDA.

FROM python:3.11-slim-bookworm

RUN apt-get update && \
    apt-get install --yes --no-install-recommends git libgomp1 make && \
    rm -rf /var/lib/apt/lists/*

ARG UID=1000
RUN useradd --uid ${UID} --create-home graincast && \
    install --directory --owner=graincast /graincast
USER graincast
WORKDIR /graincast

# The packages alone: this layer stays as long as requirements.lock does.
COPY --chown=graincast requirements.lock ./
RUN python3.11 -m venv .venv && \
    .venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements.lock

# The code. What a run writes beside .graincast is led there, so that one volume holds all of it.
COPY --chown=graincast . .
RUN make .venv/.installed && \
    mkdir .graincast && \
    ln -s .graincast/runs runs && \
    ln -s .graincast/zen .zen && \
    ln -s ../.graincast/dvc/cache .dvc/cache

ENV GRAINCAST_MODEL=models:/graincast-segmenter/latest
VOLUME /graincast/.graincast
EXPOSE 8080
ENTRYPOINT ["./docker-entrypoint.sh"]
CMD ["make", "demo"]
