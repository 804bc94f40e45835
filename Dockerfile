# Lockstep as an image for use with a Postgres and a Qdrant of your own:
#
#   docker build -t lockstep .
#   docker run -v lockstep:/data -p 8080:8080 -e DATABASE_URL=... -e QDRANT_URL=... \
#     -e LOCKSTEP_LISTEN=0.0.0.0:8080 -e LOCKSTEP_API_KEYS=... lockstep
#
# (Without API keys the service binds loopback only.) Go modules are fixed by go.sum, crates by
# Cargo.lock, ONNX Runtime and the model by the checksums in deploy/setup. Base images are
# named by version; to fix them by digest too, pass --build-arg GO_IMAGE=golang@sha256:... and
# likewise RUST_IMAGE and BASE_IMAGE.
ARG GO_IMAGE=golang:1.26.8-bookworm
ARG RUST_IMAGE=rust:1.95.0-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${RUST_IMAGE} AS rust

FROM ${GO_IMAGE} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3-pip && rm -rf /var/lib/apt/lists/*
COPY --from=rust /usr/local/cargo /usr/local/cargo
COPY --from=rust /usr/local/rustup /usr/local/rustup
ENV PATH=/usr/local/cargo/bin:$PATH CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup XDG_CACHE_HOME=/cache
WORKDIR /src
# What changes rarely first: the native libraries and the model stay in the layer cache.
COPY go.mod go.sum Makefile ./
COPY deploy/setup deploy/setup
COPY internal/config/cachedir internal/config/cachedir
RUN make setup
COPY . .
RUN make build
# One place for what the image keeps, under names without versions.
RUN mkdir -p /image/model && cp -r /cache/lockstep/checkpoints/*/. /image/model/ \
 && cp /cache/lockstep/native/onnxruntime-*/libonnxruntime.* /image/libonnxruntime.so \
 && cp bin/lockstep /image/lockstep && mkdir /image/data

FROM ${BASE_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libstdc++6 && rm -rf /var/lib/apt/lists/*
COPY --from=build /image/lockstep /usr/local/bin/lockstep
COPY --from=build /image/libonnxruntime.so /opt/lockstep/
COPY --from=build /image/model /opt/lockstep/model
COPY --from=build --chown=65532:65532 /image/data /data
# The checkpoint is built into the cache at the first start; /data keeps it and all else.
ENV ONNXRUNTIME_LIB=/opt/lockstep/libonnxruntime.so LOCKSTEP_MODEL=/opt/lockstep/model \
    LOCKSTEP_DATA_DIR=/data XDG_CACHE_HOME=/data/cache
VOLUME /data
EXPOSE 8080
USER 65532:65532
ENTRYPOINT ["lockstep"]
CMD ["serve"]
