# syntax=docker/dockerfile:1
# Builds the relay, then leaves everything but the binary, libc and the CA certificates behind.

FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
# The caches live beside the layer, so the binary has to be copied out of target/.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin watership \
    && install -D -s target/release/watership /out/watership

# Same Debian release as the builder: the binary links against its glibc.
FROM gcr.io/distroless/cc-debian12:nonroot
LABEL org.opencontainers.image.title="watership" \
      org.opencontainers.image.description="Postgres outbox and WAL to RabbitMQ" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0"
COPY --from=build /out/watership /usr/local/bin/watership
USER nonroot:nonroot
EXPOSE 9187
# SIGTERM drains: what is in flight is confirmed and the checkpoint stored.
STOPSIGNAL SIGTERM
# No curl in this image: the binary asks its own admin port.
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=6 \
    CMD ["/usr/local/bin/watership", "status", "--ready", \
         "--config", "/etc/watership/watership.toml"]
ENTRYPOINT ["/usr/local/bin/watership"]
CMD ["run", "--config", "/etc/watership/watership.toml"]
